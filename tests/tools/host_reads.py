"""Count on a CPU where code would wait for a device: reads of tensors' values by the host, as a GPU would see them."""

import traceback
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

# Whose code runs between the batches of a training or an evaluation.
ROOMS = ("modeling_gsva", "trainers", "evaluation", "metrics", "data_scripts")

# Operations whose result, or whose result's shape, the host must know. `bool()`, `int()`, `float()`, `item()` and conditions end
# in the first; a mask of booleans as an index in `nonzero`, which it does not show on a CPU.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal", "argwhere"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
METHODS = ("tolist", "cpu", "numpy")  # these read a tensor on the CPU without an operation

TRANSFORMERS = str(Path(transformers.__file__).parent)  # wherever it is installed


class HostReads(TorchDispatchMode):
    """
    Counts reads within its `with` block: `places` holds how many there were by file, line and kind.

    Args:
        inside: Only reads from files whose path holds one of these count: what libraries do is theirs.
    """

    def __init__(self, inside: tuple[str, ...] = ROOMS):
        super().__init__()
        self.inside, self.places, self._methods = inside, Counter(), {}

    @property
    def count(self) -> int:
        return sum(self.places.values())

    def _add(self, kind: str) -> None:
        for frame in reversed(traceback.extract_stack()[:-2]):
            if frame.filename.startswith(TRANSFORMERS):
                return
            if "site-packages" in frame.filename:
                continue
            is_test = "/tests/" in frame.filename and "tests" not in self.inside
            if any(f"/{part}/" in frame.filename for part in self.inside) and not is_test:
                self.places[f"{frame.filename.rsplit('/', 1)[1]}:{frame.lineno} {kind}"] += 1
                return

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            self._add(name)
        elif name in INDEXING:
            indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._add("mask as an index")
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        for name in METHODS:
            usual = self._methods[name] = getattr(torch.Tensor, name)

            def read(tensor, *args, _usual=usual, _name=name, **kwargs):
                if tensor.device.type != "meta":
                    self._add(_name)
                return _usual(tensor, *args, **kwargs)

            setattr(torch.Tensor, name, read)
        return super().__enter__()

    def __exit__(self, *error):
        for name, usual in self._methods.items():
            setattr(torch.Tensor, name, usual)
        return super().__exit__(*error)
