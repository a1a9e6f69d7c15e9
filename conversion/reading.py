"""Read checkpoints tensor by tensor, from any of their file formats."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import repr as short_repr  # short, and safe for values that are nested deeply
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from modeling_gsva.loading_gsva import foreign_content, problem_of, safetensors_size

from .keys import full_name, lora_part, reason_to_drop, to_ours
from .kinds import refuse_other_kinds

# After this many bytes, a safetensors file is closed and opened again to return its mapped pages to the system.
REOPEN_BYTES = 256 * 2**20
READ_AHEAD = 256 * 2**20  # bytes of other files; the next tensor mostly follows the last
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Names of shards that are counted, such as model-00001-of-00004.safetensors.
SHARD = re.compile(r"(?P<before>.*?)(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?P<after>\D*)")
# Files with these names are beside a Trainer's weights and hold none.
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def read_json(path: Path) -> dict:
    """Return the object in a JSON file, or `{}` if there is no such file.

    Raises:
        ValueError: The file does not hold a JSON object. The message names the file.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        problem = foreign_content(path) or f"is not JSON in UTF-8 ({error}); download it again"
        raise ValueError(f"{path} {problem}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {short_repr(content)}; download it again.")
    return content


def listed(items: Iterable, limit: int = 12) -> str:
    """Join the first `limit` items with commas and count the rest.

    >>> listed("abcd", limit=2)
    'a, b and 2 more'
    """
    items = [str(item) for item in items]
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if items[limit:] else "")


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def advise(file: BinaryIO, advice: str, begin: int = 0, size: int = 0) -> None:
    """Advise the system which bytes of a file are needed next or no longer. Keeping all pages costs more than reading."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), begin, size, getattr(os, advice))


def is_finite(tensor: torch.Tensor) -> bool:
    """Return True if no number of a tensor is NaN or infinite."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))  # 30 times as fast as torch.isfinite of all


class WeightFile:
    """The tensors of one .bin, .pth, .pt or .safetensors file. Each is read when it is asked for.

    Raises:
        ValueError: The file cannot be read. The message says what it is instead, if that can be recognised.
    """

    def __init__(self, path: Path):
        self.path = path
        self._handle: Any = None  # an open safetensors file
        self._bytes_read = 0  # from the open safetensors file
        self._pickled: dict[
            str, torch.Tensor
        ] = {}  # other files: tensors without content that know their place in the file

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Return the shape and type of each tensor; the type is None if torch does not have it.

        Raises:
            ValueError: The file cannot be read, or holds more than tensors.
        """
        if self._is_safetensors():
            self._open()
            slices = {key: self._handle.get_slice(key) for key in self._handle.keys()}  # noqa: SIM118 (not a dict)
            types = {
                key: (tuple(part.get_shape()), SAFETENSORS_DTYPES.get(part.get_dtype()))
                for key, part in slices.items()
            }
            self._handle = None
            return types
        self._load("meta")
        if others := [key for key, value in self._pickled.items() if not isinstance(value, torch.Tensor)]:
            raise ValueError(
                f"{self.path} holds more than tensors: {listed(others)}. Pass a model's state dict (for a "
                "DeepSpeed checkpoint, the file that zero_to_fp32.py writes)."
            )
        return {key: (tuple(value.shape), value.dtype) for key, value in self._pickled.items()}

    def read(self, key: str) -> torch.Tensor:
        """Return one tensor in CPU memory.

        Raises:
            ValueError: Numbers of the tensor are NaN or infinite, or the file cannot be read.
        """
        try:
            tensor = self._read(key)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if not is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{self.path}: {count} of {tensor.numel()} numbers of {key} are not finite (NaN or infinite): the training "
                "that wrote them has failed, or the file is damaged. Pass an earlier checkpoint, or copy it again."
            )
        return tensor

    def _read(self, key: str) -> torch.Tensor:
        if key not in self._pickled:
            if self._handle is None or self._bytes_read > REOPEN_BYTES:
                self._handle, self._bytes_read = None, 0
                self._open()
            tensor = self._handle.get_tensor(key)
            self._bytes_read += tensor.nbytes
            return tensor
        tensor = self._pickled[key]
        if tensor.is_meta and tensor.untyped_storage()._checkpoint_offset is None:
            self._load("cpu")  # the format of torch < 1.6 can only be read whole
            tensor = self._pickled[key]
        return self._read_piece(tensor) if tensor.is_meta else tensor

    def _is_safetensors(self) -> bool:
        """Return True if the content is safetensors, whatever the name. Go by the name if the content does not decide."""
        try:
            with self.path.open("rb") as file:
                head = file.read(9)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        if head.startswith(b"PK\x03\x04"):
            return False
        return self.path.suffix == ".safetensors" or safetensors_size(head, self.path) is not None

    def _open(self) -> None:
        try:
            self._handle = safe_open(self.path, "pt")
        except Exception as error:
            problem = problem_of(self.path) or f"is not a safetensors file: {_first_line(error)}"
            raise ValueError(f"{self.path} {problem}.") from error

    def _load(self, device: str) -> None:
        try:
            with self.path.open(
                "rb"
            ) as file:  # by a name that ends with .safetensors, torch would choose another format
                content = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:
            problem = problem_of(self.path) or (
                "cannot be read as tensors alone (weights_only=True). A pickle that runs code is never opened; write the "
                f"state dict again with torch.save ({_first_line(error)})"
            )
            raise ValueError(f"{self.path} {problem}.") from error
        for wrapper in ("state_dict", "module", "model"):
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        self._pickled = content if isinstance(content, dict) else {f"<{type(content).__name__}>": content}

    def _read_piece(self, tensor: torch.Tensor) -> torch.Tensor:
        """Read a tensor's bytes from the file. They are not mapped, because page faults cost more than the copy."""
        extent = (
            1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride())) if tensor.numel() else 0
        )
        flat = torch.empty(extent, dtype=tensor.dtype)
        memory = as_bytes(flat)
        # torch notes the offset in tensors loaded to "meta" (its notes on serialization).
        begin = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
        with self.path.open("rb") as file:
            file.seek(begin)
            if file.readinto(memory) != len(memory):
                raise ValueError(f"{self.path} ends within a tensor; it is not whole. Copy or download it again.")
            advise(file, "POSIX_FADV_DONTNEED", begin, len(memory))
            advise(file, "POSIX_FADV_WILLNEED", begin + len(memory), READ_AHEAD)
        return flat.as_strided(tensor.shape, tensor.stride())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weight_files(path: Path, required: bool = True) -> list[Path]:
    """Return the files with weights behind a file, an index or a directory.

    Args:
        required: False returns `[]` for a directory without weights.

    Raises:
        FileNotFoundError: The path, a file that an index lists, or a shard of several does not exist; no weights in a
            directory.
        ValueError: An index that does not name files beside it, several indices in a directory, one shard of several.
    """
    if index := find_index(path):
        return require_all_shards(_files_of_index(index, required))
    if path.is_file():
        if (match := SHARD.fullmatch(path.name)) and int(match["total"]) > 1:
            raise ValueError(
                f"{path} is one of {int(match['total'])} shards: pass the directory that holds all of them, or their index."
            )
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist.")
    for pattern in ("*.safetensors", "*.bin", "*.pth", "*.pt"):
        if files := [file for file in sorted(path.glob(pattern)) if file.name not in NOT_WEIGHTS]:
            return require_all_shards(files)
    if required:
        raise FileNotFoundError(
            f"{path} has no .bin, .pth, .pt or .safetensors file."
            + (" It is DeepSpeed's: run its zero_to_fp32.py first." if (path / "zero_to_fp32.py").is_file() else "")
        )
    return []


def find_index(path: Path) -> Path | None:
    """Return the index of a sharded checkpoint: `path` itself or one in the directory `path`, or None.

    Raises:
        ValueError: Several indices in a directory.
    """
    if path.name.endswith(".index.json"):
        return path
    for pattern in ("model.safetensors.index.json", "*.bin.index.json", "*.index.json"):
        if indices := sorted(path.glob(pattern)):
            if indices[1:]:
                raise ValueError(
                    f"{path} has several indices ({listed(index.name for index in indices)}); pass one of them."
                )
            return indices[0]
    return None


def keys_in_index(path: Path) -> dict[str, list[str]]:
    """Return the keys that each file of a sharded checkpoint must have by its index, `{}` without an index."""
    index = find_index(path)
    keys: dict[str, list[str]] = {}
    for key, file in read_json(index)["weight_map"].items() if index else ():
        keys.setdefault(file, []).append(key)
    return keys


def require_all_shards(files: list[Path]) -> list[Path]:
    """Return `files` unchanged if they hold all shards of each set whose names count them (`model-00001-of-00004.bin`).

    Raises:
        FileNotFoundError: A shard is missing. The message names the missing files.
    """
    sets: dict[tuple[str, str, str], dict[int, int]] = {}  # (before, total, after) -> {number: its digits}
    for file in files:
        if match := SHARD.fullmatch(file.name):
            digits = sets.setdefault((match["before"], match["total"], match["after"]), {})
            digits[int(match["number"])] = len(match["number"])
    for (before, total, after), digits in sets.items():
        first = min(1, *digits)  # Hugging Face counts from 1, others from 0
        width = max(digits.values())
        missing = [
            f"{before}{number:0{width}d}-of-{total}{after}"
            for number in range(first, first + min(int(total), 100_000))
            if number not in digits
        ]
        if missing:
            raise FileNotFoundError(
                f"{files[0].parent} has {len(digits)} of {int(total)} shards, {listed(missing, 4)} "
                f"{'are' if missing[1:] else 'is'} missing: copy or download the whole set, and pass its directory or index."
            )
    return files


def _files_of_index(path: Path, required: bool) -> list[Path]:
    weight_map = read_json(path).get("weight_map")
    names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    # A bare name: a path that leads elsewhere is not a file of this checkpoint.
    if wrong := [
        name
        for name in names
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or len(name) > 255
    ]:
        raise ValueError(
            f"{path}: weight_map must name files beside it, got {short_repr(wrong[0])}; download it again."
        )
    names = sorted(set(names))
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing == names and not required:
        return []  # a base downloaded without its weights
    if missing:
        raise FileNotFoundError(
            f"{path} lists {listed(missing)}, which {'are' if missing[1:] else 'is'} not beside it."
        )
    return [path.parent / name for name in names]


@dataclass
class LazyTensor:
    """A tensor that has not been read yet. `dtype` is None for a type that torch does not have."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> LazyTensor:
        """Return a tensor that is in memory already, for functions that take unread ones."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.detach().cpu)


class CheckpointSource:
    """The tensors of one command-line option, under their names in our model.

    Args:
        option: The option, for messages.
        path: A file, an index or a directory; None for tensors that come from no file.
        prefix: Put before each key to make it a full name of the original, one of `keys.PREFIXES`.
        required: False allows a directory without weights.

    Attributes:
        tensors: `{our name: LazyTensor}`.
        lora: `{our name of the adapted weight: {"A": LazyTensor, "B": LazyTensor}}`.
        dropped: `{key: reason}`.

    Raises:
        ValueError: Another model's tensors, keys that are neither converted nor dropped, several tensors for one parameter,
            several LoRA adapters. All keys of one kind are listed.
    """

    def __init__(self, option: str, path: Path | None, prefix: str = "", required: bool = True):
        self.option, self.path = option, path
        self.tensors: dict[str, LazyTensor] = {}
        self.lora: dict[str, dict[str, LazyTensor]] = {}
        self.dropped: dict[str, str] = {}
        self._prefix = prefix
        self._unknown: list[str] = []
        self._origins: dict[tuple, Path] = {}  # (name of the parameter, LoRA matrix and adapter) -> its file
        self._repeated: dict[tuple[str, str], list[str]] = {}  # (file, other file) -> keys of the same parameters
        self._read_names(path, required)
        self._check()

    def _read_names(self, path: Path | None, required: bool) -> None:
        if path is None:
            return
        tensors: dict[tuple[Path, str], LazyTensor] = {}
        expected = keys_in_index(path)
        for file in weight_files(path, required):
            weights = WeightFile(file)
            types = weights.tensors()
            if missing := [key for key in expected.get(file.name, ()) if key not in types]:
                raise ValueError(
                    f"{file} lacks {listed(missing, 4)}, which its index lists: the two are of different checkpoints. Copy or "
                    "download the whole set again."
                )
            tensors |= {(file, key): LazyTensor(*type_, partial(weights.read, key)) for key, type_ in types.items()}
        refuse_other_kinds([full_name(key).removeprefix(self._prefix) for _, key in tensors], self.option, path)
        for (file, key), tensor in tensors.items():
            self._add(key, tensor, file)

    def _add(self, key: str, tensor: LazyTensor, file: Path) -> None:
        name = full_name(key, self._prefix)
        if reason := reason_to_drop(name):
            self.dropped[key] = reason
            return
        lora = lora_part(name)
        ours = to_ours(lora[0] if lora else name)
        if ours is None:
            self._unknown.append(key)
            return
        parameter = (ours, lora and lora[1:])
        if parameter in self._origins:
            self._repeated.setdefault((self._origins[parameter].name, file.name), []).append(key)
            return
        self._origins[parameter] = file
        if lora:
            self.lora.setdefault(ours, {})[lora[1]] = tensor
        else:
            self.tensors[ours] = tensor

    def _check(self) -> None:
        if self._repeated:
            (one, other), keys = next(iter(self._repeated.items()))
            if one == other:
                raise ValueError(f"{self.path}: {one} has two tensors for the same parameter: {listed(keys)}.")
            raise ValueError(
                f"{self.path} holds several checkpoints: {one} and {other} both have {listed(keys, 3)}. Pass one file."
            )
        if self._unknown:
            raise ValueError(
                f"{self.option} {self.path}: {len(self._unknown)} keys are unknown and would be lost: "
                f"{listed(self._unknown)}."
            )
        adapters = {lora[1] for _, lora in self._origins if lora}
        if len(adapters) > 1:
            raise ValueError(f"{self.path} holds several LoRA adapters ({listed(adapters)}); only one can be merged.")

    def floating_dtype(self) -> torch.dtype:
        """Return the floating type that most of the numbers have, float32 if there are none."""
        count: dict[torch.dtype, int] = {}
        for tensor in (*self.tensors.values(), *(matrix for pair in self.lora.values() for matrix in pair.values())):
            if tensor.dtype is not None and tensor.dtype.is_floating_point:
                count[tensor.dtype] = count.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
        return max(count, key=count.__getitem__) if count else torch.float32


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a file, an index or a directory under the names they have there.

    Raises:
        FileNotFoundError: There are no weights, or a shard is missing.
        ValueError: A file cannot be read, a key is in two files, or numbers are not finite. The message names them.
    """
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        weights = WeightFile(file)
        for key in weights.tensors():
            if key in state:
                raise ValueError(f"{path} holds several checkpoints: {file.name} and another file both have {key}.")
            state[key] = weights.read(key)
    return state
