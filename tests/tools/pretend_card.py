"""A device beside the CPU on a machine without one: its tensors have values, and everything that a card refuses is refused.

PyTorch lets a device be written in Python. This one, "card", computes on the CPU. Tensors of both devices in one operation raise, as do
`numpy()` on a tensor of the card, and each read that makes the host wait for a card is counted. The device is registered for a whole
process, so tests use it in one of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Self

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CARD = "card"
aten = torch.ops.aten
# Between devices by their nature.
CROSSING = {aten._to_copy.default, aten.copy_.default}
# A card takes indices from the host.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Their result's size, or their result itself, is a value that only the card knows.
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.unique_consecutive.default, aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
    aten.is_nonzero.default,
}  # fmt: skip


# PyTorch makes all other tensors of the first two; the rest would give another size to one that exists.
MAKERS = (
    aten.empty.memory_format, aten.empty_strided.default, aten.arange.default, aten.arange.start, aten.arange.start_step,
    aten.linspace.default, aten.eye.default, aten.eye.m, aten.randperm.default, aten.randperm.generator,
)  # fmt: skip


class CardTensor(torch.Tensor):
    """A tensor of the card: `values` is a tensor of the CPU with the same sizes and strides."""

    values: torch.Tensor
    reads = 0  # how often the host has waited for the card
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Self:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(CARD, 0),
        )  # fmt: skip
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return compute(function, arguments, options or {})

    def __repr__(self) -> str:
        return f"CardTensor({self.values})"

    @property
    def data(self) -> CardTensor:
        return CardTensor(self.values)

    @data.setter
    def data(self, other: CardTensor) -> None:  # as `Module.to` changes a type
        torch.Tensor.data.__set__(self, other)
        self.values = other.values

    def tolist(self):
        CardTensor.reads += 1
        return self.values.tolist()


def is_card(device) -> bool:
    return device is not None and torch.device(device).type == CARD


def compute(function, arguments, options):
    """Run one operation on the CPU's values, with the card's rules."""
    tensors = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)]
    on_card = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    to_card = bool(on_card)
    if "device" in options and options["device"] is not None:
        to_card = is_card(options["device"])
        options = {**options, "device": torch.device("cpu")}
    if function in CROSSING:
        if function is not aten._to_copy.default:
            to_card = isinstance(arguments[0], CardTensor)
        CardTensor.reads += bool(on_card) and not to_card
    elif on_card:
        checked = arguments[:1] if function in INDEXING else (arguments, options)
        for tensor in tree_leaves(checked):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, CardTensor) and tensor.dim():
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but {function} has {tuple(tensor.shape)} on the CPU "
                    f"and {tuple(on_card[0].shape)} on the card"
                )
        CardTensor.reads += function in READS or (function in INDEXING and any(
            index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(arguments[1]) if isinstance(index, torch.Tensor)))  # fmt: skip
    if function is aten._fused_sdp_choice.default and on_card:
        return 0  # the definition: fused kernels are chosen by the device's type in C++
    values, named = tree_map(lambda leaf: leaf.values if isinstance(leaf, CardTensor) else leaf, (arguments, options))
    result = function(*values, **named)
    for tensor in on_card:
        if tensor.shape != tensor.values.shape:
            raise NotImplementedError(
                f"{function} has changed a tensor's size from {tensor.shape} to {tensor.values.shape}"
            )
    if to_card:
        result = tree_map(lambda leaf: CardTensor(leaf) if type(leaf) is torch.Tensor else leaf, result)
    return return_and_correct_aliasing(function, arguments, options, result) if on_card else result


class CardModule(getattr(backend_registration, "_DummyBackendModule", object)):  # PyTorch may rename it
    """What `torch.card` holds."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def compute_new(operation, *arguments, **options):
    return compute(operation, arguments, options)


def copy_from(source, destination, non_blocking=False):
    destination.values.copy_(source)
    return destination


KEPT: list[torch.library.Library] = []  # registrations live as long as their objects


def register() -> None:
    """Make "card" a device of this process."""
    backend_registration._setup_privateuseone_for_python_backend(CARD, CardModule())
    library = torch.library.Library("aten", "IMPL")
    for operation in MAKERS:
        library.impl(operation.name(), partial(compute_new, operation), "PrivateUse1")
    library.impl("aten::_local_scalar_dense", partial(compute_new, aten._local_scalar_dense.default), "PrivateUse1")
    library.impl("aten::_copy_from", copy_from, "PrivateUse1")  # within torch.tensor(values, device=...)
    KEPT.append(library)
