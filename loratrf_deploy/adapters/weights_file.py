"""An adapter's files: found, read and refused. Nothing here knows what the tensors mean.

safetensors: uint64 length of the header, little-endian | JSON {name: {dtype, shape, data_offsets}} | the tensors
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, some
from ..files import readable
from .json_text import parse_json

__all__ = ["CONFIG_FILE", "Stored", "WeightsFile", "find_weights"]

CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_FLOATS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_INTEGERS: dict[str, Any] = {"I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}

# A mixture of experts with 72,000 adapter tensors has a header of 12 MB.
_LONGEST_HEADER = 1 << 25
_LONGEST_NAME, _MOST_STEPS, _MOST_DIMENSIONS = 500, 50, 8
_PIECE, _HUGE = 1 << 22, 1 << 30


def find_weights(path: Path) -> Path:
    """The weights file of the adapter folder `path`, or a UserError that says what to do instead."""
    with readable(path):
        return _find(path)


def _find(path: Path) -> Path:
    if path.is_file():
        beside = (path.parent / CONFIG_FILE).is_file()
        remedy = f"Pass {path.parent}." if beside else "Unpack it if it is an archive, and pass the folder in it."
        raise UserError(f"{path} is a file, expected an adapter's folder, which has {CONFIG_FILE}. {remedy}")
    if not path.is_dir():
        raise UserError(
            f"No folder at {path}: expected an adapter folder as PEFT's save_pretrained writes it, or a name on the "
            "hub: ORG/NAME or ORG/NAME@REVISION."
        )
    if not (path / CONFIG_FILE).is_file():
        inner = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG_FILE}"))
        hint = f"Did you mean {some(inner, ' or ')}?" if inner else "Save the adapter with PEFT's save_pretrained."
        raise UserError(f"{path} has no {CONFIG_FILE}, so it is not an adapter folder. {hint}")
    weights = path / _WEIGHTS_FILE
    if weights.is_file():
        return weights
    if (path / _PICKLE_FILE).is_file():
        raise UserError(
            f"{path / _PICKLE_FILE} is a pickle file, which can run code when it is opened, so it is refused. Convert "
            f'it once, in that folder: python -c "import torch, safetensors.torch as s; t = '
            f"torch.load('{_PICKLE_FILE}', map_location='cpu', weights_only=True); s.save_file({{k: "
            f"v.clone().contiguous() for k, v in t.items()}}, '{_WEIGHTS_FILE}')\""
        )
    raise UserError(f"{path} has no {_WEIGHTS_FILE}. The folder is incomplete: fetch or save the adapter again.")


@dataclass(frozen=True)
class Stored:
    """A tensor that a file says it has: its type and shape there, and how many bytes that are."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    bytes: int

    @property
    def read_as(self) -> np.dtype[Any]:
        """Floats are widened to float32."""
        return np.dtype(np.float32) if self.dtype in _FLOATS.values() else self.dtype


class WeightsFile:
    """A safetensors file that is open, its header held against its size: nothing else of it is read yet.

    `stored` are the tensors by name, in the order in which they lie in the file. Raises UserError for anything else.
    """

    def __init__(self, path: Path, file: BufferedReader):
        self._path, self._file = path, file
        try:
            self._header = self._read_header()
            self.stored = _stored(self._header, os.fstat(file.fileno()).st_size)
        except _NotThisType as error:
            raise UserError(
                f"{path}: {error}, expected float32, float16 or bfloat16. Save the adapter again in one of these types."
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not a valid safetensors file ({error}): truncated, or not what its name says. Fetch or "
                "save the adapter again."
            ) from error

    @property
    def dtypes(self) -> set[str]:
        """Names of the float types that it stores."""
        return {entry.dtype.name for entry in self.stored.values() if entry.dtype in _FLOATS.values()}

    def unread(self) -> dict[str, NDArray]:
        """The tensors as `read_into` will fill them: their shapes can be judged, and take no memory so far."""
        wanted = sum(math.prod(entry.shape) * entry.read_as.itemsize for entry in self.stored.values())
        try:
            if wanted > _memory():
                raise MemoryError
            return {name: np.empty(entry.shape, entry.read_as) for name, entry in self.stored.items()}
        except MemoryError as error:
            raise UserError(
                f"{self._path} takes {wanted / 1e9:.1f} GB in memory (as float32), more than there is here. Is it an "
                "adapter? Fetch or save it again, or read it on a larger machine."
            ) from error

    def read_into(self, tensors: Mapping[str, NDArray]) -> str:
        """Fills what `unread` gave; returns the file's sha256. Raises UserError for NaN and infinite values."""
        self._check_stored()
        digest = hashlib.sha256(self._header)
        room = np.empty(_PIECE, np.uint8)
        broken = [name for name, entry in self.stored.items() if not self._read(entry, tensors[name], digest, room)]
        if self._file.read(1):
            raise self._changed()
        if broken:
            raise UserError(
                f"{self._path} holds NaN or infinite values (or values beyond float32) in {some(broken)}. Training "
                "diverged or the file is damaged: take an earlier checkpoint or train again with a lower learning rate."
            )
        return digest.hexdigest()

    def _read(self, entry: Stored, tensor: NDArray, digest: hashlib._Hash, room: NDArray[np.uint8]) -> bool:
        """Whether all values are finite. Read piece by piece: another type is nowhere whole but in `tensor`."""
        finite, flat, step = True, tensor.reshape(-1), _PIECE // entry.dtype.itemsize
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            same = part.dtype == entry.dtype
            raw = part.view(np.uint8) if same else room[: part.size * entry.dtype.itemsize]
            if self._file.readinto(raw.data) != raw.size:
                raise self._changed()
            digest.update(raw.data)
            if not same:
                with np.errstate(over="ignore"):  # becomes infinite, which is reported by name
                    part[...] = raw.view(entry.dtype)
            finite = finite and (part.dtype.kind != "f" or bool(np.isfinite(part).all()))
        return finite

    def _check_stored(self) -> None:
        """UserError for gigabytes of which next to nothing is on the disk: weights are no zeros."""
        status = os.fstat(self._file.fileno())
        stored = 512 * getattr(status, "st_blocks", 0)  # 0 where a file system doesn't say
        if status.st_size > _HUGE and 0 < stored < status.st_size // 8:
            raise UserError(
                f"{self._path} has {status.st_size} bytes, of which {stored} are on the disk: the rest was never "
                "written. Fetch or save the adapter again."
            )

    def _changed(self) -> UserError:
        return UserError(f"{self._path} changed while it was read. Wait until it is written, and read it again.")

    def _read_header(self) -> bytes:
        begin = self._file.read(8)
        if len(begin) < 8:
            raise ValueError(f"it has {len(begin)} bytes")
        length = int.from_bytes(begin, "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"its header has {length} bytes, expected at most {_LONGEST_HEADER}")
        header = begin + self._file.read(length)
        if len(header) < 8 + length:
            raise ValueError("it ends within its header")
        return header


class _NotThisType(ValueError):
    """A tensor of a type that is not read."""


def _stored(header: bytes, size: int) -> dict[str, Stored]:
    """What the header says, held against the file's size. ValueError where they disagree, or a tensor is none."""
    entries = parse_json(header[8:], strict=True)
    if not isinstance(entries, dict):
        raise ValueError("its header is no object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ is no object of texts")
    found = []
    for name, entry in entries.items():
        if len(name) > _LONGEST_NAME or name.count(".") > _MOST_STEPS:
            raise ValueError(f"a tensor's name has {len(name)} characters and {name.count('.')} dots")
        found.append((_span(name, entry), name, _entry(name, entry)))
    # The tensors follow each other, without a gap, from the header to the end.
    end = len(header)
    for (begin, stop), name, entry in sorted(found, key=lambda item: item[0]):
        if begin + len(header) != end or stop - begin != entry.bytes:
            raise ValueError(f"{name} has the shape {entry.shape}, which is not what its place in the file holds")
        end = stop + len(header)
    if end != size:
        raise ValueError(f"it has {size} bytes, its header describes {end}")
    return {name: entry for _, name, entry in sorted(found, key=lambda item: item[0])}


def _entry(name: str, entry: dict[str, Any]) -> Stored:
    kind, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(shape, list) or not all(_is_size(dim) for dim in shape):
        raise ValueError(f"the shape of {name} is none")
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions, expected at most {_MOST_DIMENSIONS}")
    adapter_part = ".lora_" in name or ".trf_" in name
    dtype = _FLOATS.get(str(kind)) or (None if adapter_part else _INTEGERS.get(str(kind)))
    if dtype is None:
        raise _NotThisType(f"{name} is stored as {str(kind)[:20]}")
    return Stored(np.dtype(dtype), tuple(shape), math.prod(shape) * np.dtype(dtype).itemsize)


def _span(name: str, entry: Any) -> tuple[int, int]:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(span, list) or len(span) != 2 or not all(_is_size(place) for place in span):
        raise ValueError(f"it doesn't say where {name} is")
    return span[0], span[1]


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _memory() -> float:
    """Bytes of memory that this machine has, or that its container may use."""
    try:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        memory = math.inf
    try:
        return min(memory, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return memory
