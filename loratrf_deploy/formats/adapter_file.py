"""Files of run-time adapters, .onnx_adapter: ONNX Runtime's own format, and behind it a block that says what it fits.

    flatbuffer of onnxruntime/lora/adapter_format   names, shapes, values: all that ONNX Runtime's loader reads
    JSON                                            the adapter, hashes of base and graph
    uint64 length of the JSON | uint32 crc32 of all before this line | b"LORATRF1", little-endian

The reader takes nothing of a file on trust and needs numpy alone; the writer is ONNX Runtime's.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.json_text import parse_json
from ..errors import UserError, some
from ..files import open_regular, readable
from ..ops.dtypes import RUN_TIME_DTYPES
from .decode import decode
from .manifest import AdapterId, Manifest

__all__ = ["SUFFIX", "AdapterFile", "Origin", "read_adapter_file", "write_adapter_file", "write_values"]

SUFFIX = ".onnx_adapter"
_MAGIC = b"LORATRF1"
_END = struct.Struct("<QI8s")
_FORMAT = 1
_LONGEST_DESCRIPTION = 1 << 20


@dataclass(frozen=True)
class Origin:
    """What an .onnx_adapter says of itself: which adapter it is, of which base, for which export (model.onnx).

    An aLoRA is active from the last occurrence of its `invocation_tokens` in a prompt on.
    """

    adapter: AdapterId
    base_sha256: str | None
    model_sha256: str
    format: int = _FORMAT
    invocation_tokens: tuple[int, ...] | None = None

    @classmethod
    def of(cls, adapter: Adapter, manifest: Manifest, known_as: AdapterId | None = None) -> Origin:
        """That of `adapter`, where need be `known_as` more than its own name, for the model of `manifest`."""
        return cls(
            known_as or AdapterId.of(adapter),
            manifest.base.sha256,
            manifest.model.sha256,
            invocation_tokens=adapter.invocation_tokens,
        )


@dataclass(frozen=True)
class AdapterFile:
    """What is in an .onnx_adapter. `values` by graph input are read-only views of one block of `bytes` bytes."""

    path: Path
    values: dict[str, NDArray[Any]]
    origin: Origin
    bytes: int
    crc32: int


def write_adapter_file(path: Path, values: Mapping[str, NDArray[Any]], origin: Origin) -> None:
    """Writes `values` (graph input -> float32 or float16) and `origin` to `path`, then reads them back."""
    write_values(path, values)
    text = json.dumps(asdict(origin)).encode()
    with path.open("r+b") as file:
        checksum = zlib.crc32(text, zlib.crc32(file.read()))
        file.write(text + _END.pack(len(text), checksum, _MAGIC))
    again = read_adapter_file(path).values
    if again.keys() != values.keys() or any(not np.array_equal(again[name], values[name]) for name in values):
        raise RuntimeError(f"{path} doesn't hold what ONNX Runtime was given to write")


def write_values(path: Path, values: Mapping[str, NDArray[Any]]) -> None:
    """Writes `values` to `path` in ONNX Runtime's adapter format alone, for its own loaders: without an origin.

    Raises OSError where it can't be written.
    """
    import onnxruntime

    content = onnxruntime.AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(1)
    content.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    try:
        content.export_adapter(str(path))
    except (RuntimeError, UnicodeError) as error:
        raise OSError("ONNX Runtime can't write it: the disk is full, or files may not be that large") from error


def read_adapter_file(path: str | Path, check_size: Callable[[int], None] = lambda size: None) -> AdapterFile:
    """The adapter in the file `path`: every offset and size, the checksum and every value checked. Raises UserError.

    `check_size` is told how many bytes it has before they are read, and may raise one too.
    """
    path = Path(path)
    try:
        with open_regular(path) as file, readable(path):
            size = os.fstat(file.fileno()).st_size
            length, checksum = _read_end(path, file, size)
            check_size(size)
            block = np.empty(size, np.uint8)
            file.seek(0)
            if file.readinto(block.data) != size:
                raise UserError(f"{path} changed while it was read. Wait until it is written, and read it again.")
    except MemoryError as error:
        raise UserError(f"{path} has {size} bytes, more than there is memory for. Is it the right file?") from error
    block.flags.writeable = False
    raw, end = block.data, size - _END.size - length
    try:
        if zlib.crc32(raw[: -_END.size]) != checksum:
            raise ValueError("its checksum is wrong")
        origin = decode(Origin, parse_json(bytes(raw[end : -_END.size])), "its description")
        if origin.format != _FORMAT:
            raise ValueError(f"its format is {origin.format}, this version of loratrf-deploy reads {_FORMAT}")
        values = _Reader(block[:end]).parameters()
        if broken := [name for name, value in values.items() if not _is_finite(value)]:
            raise ValueError(f"it holds NaN or infinite values in {some(broken)}")
    except (ValueError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is damaged ({error}). Convert or copy the adapter again.") from error
    return AdapterFile(path, values, origin, size, checksum)


def _read_end(path: Path, file: BinaryIO, size: int) -> tuple[int, int]:
    """(length of the JSON, checksum). UserError where the file doesn't end as ours do, or has no room for that JSON."""
    begin = file.read(8)
    file.seek(max(size - _END.size, 0))
    end = file.read(_END.size)
    length, checksum, magic = _END.unpack(end) if len(end) == _END.size else (0, 0, b"")
    if magic == _MAGIC and length <= min(size - _END.size, _LONGEST_DESCRIPTION):
        return length, checksum
    foreign = begin[4:] == b"TORT"
    raise UserError(
        f"{path} "
        + ("has no block at its end that says which model it fits" if foreign else "is not an adapter file")
        + ": it was truncated, or loratrf-export didn't write it. Expected a file of loratrf-export --adapter PATH "
        f"--onto model.onnx --out NAME{SUFFIX}."
    )


def _is_finite(value: NDArray[Any]) -> bool:
    """np.isfinite(value).all(); of float16, where numpy is slow, by the bits but the sign: Inf and NaN come last."""
    if value.dtype == np.float16:
        return bool((value.view(np.uint16) & 0x7FFF).max() < 0x7C00)
    return bool(np.isfinite(value).all())


class _Reader:
    """Reads the flatbuffer. struct and the slices below raise where an offset leaves the block; none is negative."""

    def __init__(self, block: NDArray[np.uint8]):
        self._block, self._raw = block, block.data

    def parameters(self) -> dict[str, NDArray[Any]]:
        """Table Adapter {format_version, adapter_version, model_version: int32; parameters: [Parameter]}."""
        if bytes(self._raw[4:8]) != b"TORT":
            raise ValueError("it is not in ONNX Runtime's adapter format")
        root = self._unsigned(0)
        version = self._field(root, 0)
        if version is None or self._int("<i", version) != 1:
            raise ValueError("its format of ONNX Runtime's is not version 1")
        values: dict[str, NDArray[Any]] = {}
        start, count = self._vector(self._field(root, 3), 4)
        for position in range(start, start + 4 * count, 4):
            name, value = self._parameter(position + self._unsigned(position))
            if name in values:
                raise ValueError(f"it holds {name} twice")
            values[name] = value
        return values

    def _parameter(self, table: int) -> tuple[str, NDArray[Any]]:
        """Table Parameter {name: string; dims: [int64]; data_type: int32; raw_data: [uint8]}."""
        start, count = self._vector(self._field(table, 0), 1)
        name = bytes(self._raw[start : start + count]).decode()
        start, count = self._vector(self._field(table, 1), 8)
        if count > 8:
            raise ValueError(f"{name} has {count} dimensions")
        shape = struct.unpack_from(f"<{count}q", self._raw, start)
        kind = self._field(table, 2)
        dtype = RUN_TIME_DTYPES.get(0 if kind is None else self._int("<i", kind))
        if dtype is None:
            raise ValueError(f"{name} is neither float32 nor float16")
        start, count = self._vector(self._field(table, 3), 1)
        elements = 1
        for size in shape:
            if size < 1:
                raise ValueError(f"{name} has the shape {shape}")
            elements *= size
        if elements * np.dtype(dtype).itemsize != count:
            raise ValueError(f"{name} has the shape {shape} but {count} bytes")
        data = self._block[start : start + count]
        if start % np.dtype(dtype).itemsize:
            data = data.copy()
        return name, data.view(dtype).reshape(shape)

    def _field(self, table: int, number: int) -> int | None:
        """Where a table's field lies, None where it is absent."""
        vtable = table - self._int("<i", table)
        if vtable < 0:
            raise ValueError("an offset leaves the file")
        if 4 + 2 * number >= self._int("<H", vtable):
            return None
        offset = self._int("<H", vtable + 4 + 2 * number)
        return table + offset if offset else None

    def _vector(self, field: int | None, size: int) -> tuple[int, int]:
        """(start, count) of a vector of elements of `size` bytes, held against the block; (0, 0) where it is absent."""
        if field is None:
            return 0, 0
        begin = field + self._unsigned(field)
        start, count = begin + 4, self._unsigned(begin)
        if start + count * size > len(self._raw):
            raise ValueError("an offset leaves the file")
        return start, count

    def _unsigned(self, position: int) -> int:
        return self._int("<I", position)

    def _int(self, code: str, position: int) -> int:
        return struct.unpack_from(code, self._raw, position)[0]
