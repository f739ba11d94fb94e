"""Adapters by name: read from files that are held against the model, kept in memory, put aside and read again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from numpy.typing import NDArray

from ..errors import UserError, some
from ..formats.adapter_file import AdapterFile, read_adapter_file
from ..formats.manifest import Manifest, Swappable
from ..formats.swappable import check_matches

__all__ = ["AdapterInfo", "Choice", "Residents"]

Choice: TypeAlias = "str | Mapping[str, float]"
"""The name of a loaded adapter, or a blend of several: {name: weight}."""

P = TypeVar("P")


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: its file, the memory that its weights take, and whether they are in memory now."""

    path: Path
    bytes: int
    resident: bool


class Residents(Generic[P]):
    """The adapters of a session on the model at `model`, `P` being what `place` makes of an adapter's values.

    Every method may be called from any number of threads; whoever has what `place` made keeps it, whatever is unloaded
    or replaced meanwhile. `max_bytes` limits the memory of those kept here: the ones that were used least recently are
    put aside, and read again from their files when they are asked for.
    """

    def __init__(
        self,
        model: Path,
        manifest: Manifest,
        swappable: Swappable,
        place: Callable[[Mapping[str, NDArray[Any]]], P],
        max_bytes: int | None,
    ):
        self._model, self._manifest, self._swappable, self._place = model, manifest, swappable, place
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry[P]] = {}  # least recently used first

    def infos(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name, the one that was used least recently first."""
        with self._lock:
            return {
                name: AdapterInfo(entry.path, entry.bytes, entry.weights is not None)
                for name, entry in self._entries.items()
            }

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Reads the .onnx_adapter file `path` and keeps it as `name`.

        The file is held against the model before anything uses it: hashes of base and graph, and the name, type and
        size of every weight. Raises UserError where it doesn't fit, is damaged, exceeds `max_bytes` alone, or where
        `name` is taken and not to be replaced.
        """
        if not isinstance(name, str) or not name:
            raise UserError(f"The adapter's name is {name!r}, expected a text that isn't empty.")
        file = self._read(Path(path))
        if self._max_bytes is not None and file.bytes > self._max_bytes:
            raise UserError(f"{file.path} takes {file.bytes} bytes, more than max_bytes, which is {self._max_bytes}.")
        entry = _Entry(file.path, file.bytes, file.crc32, self._place(file.values))
        with self._lock:
            known = self._entries.pop(name, None)
            if known is not None and not replace:
                self._entries[name] = known
                raise UserError(
                    f"An adapter {name!r} is loaded already, from {known.path}. Choose another name, unload it first, "
                    "or pass replace=True."
                )
            self._entries[name] = entry
            self._put_aside(entry)

    def unload(self, name: str) -> None:
        """Forgets the adapter `name`; its memory is freed when nobody uses it any more. UserError if unknown."""
        with self._lock:
            if self._entries.pop(name, None) is None:
                raise self._unknown(name)

    def resident(self, name: Any, scale: float = 1.0) -> P:
        """What `place` made of the adapter `name`; it is read again where it was put aside. UserError if unknown."""
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is None:
                raise self._unknown(name)
            self._entries[name] = entry  # now the one that was used last
            if entry.weights is not None:
                return entry.weights
        with entry.reading:
            weights = entry.weights
            if weights is None:
                file = self._read(entry.path)
                if file.crc32 != entry.crc32:
                    raise UserError(
                        f"The adapter {name!r} was put aside to stay within max_bytes, and its file {entry.path} has "
                        "changed since it was loaded. Load it again with replace=True."
                    )
                weights = self._place(file.values)
                with self._lock:
                    entry.weights = weights
                    self._put_aside(entry)
        return weights

    def _put_aside(self, latest: _Entry[P]) -> None:
        """Frees what exceeds max_bytes, `latest` last. Requires the lock."""
        if self._max_bytes is None:
            return
        resident = [entry for entry in self._entries.values() if entry.weights is not None]
        taken = sum(entry.bytes for entry in resident)
        for entry in resident:
            if taken <= self._max_bytes:
                break
            if entry is not latest:
                entry.weights = None
                taken -= entry.bytes

    def _read(self, path: Path) -> AdapterFile:
        file = read_adapter_file(path)
        origin, base, graph = file.origin, self._manifest.base.sha256, self._manifest.model.sha256
        convert = (
            f"Convert the adapter for this model: loratrf-export --adapter PATH --onto {self._model} --out {path.name}."
        )
        if origin.base_sha256 != base:
            raise UserError(
                f"{path} was made for another base model (sha256 {str(origin.base_sha256)[:12]}) than that of "
                f"{self._model} ({str(base)[:12]}). {convert}"
            )
        if origin.model_sha256 != graph:
            raise UserError(
                f"{path} was made for another export (graph sha256 {origin.model_sha256[:12]}) than {self._model} "
                f"({graph[:12]}). {convert}"
            )
        check_matches(file.values, self._swappable.weights, path)
        return file

    def _unknown(self, name: object) -> UserError:
        loaded = some([repr(known) for known in self._entries], limit=20) or "none"
        return UserError(f"No adapter {name!r} is loaded. Loaded: {loaded}. Load it first: load({name!r}, PATH).")


@dataclass
class _Entry(Generic[P]):
    """A loaded adapter; `weights` is None while it is put aside. Guarded by the lock of those who keep it."""

    path: Path
    bytes: int
    crc32: int
    weights: P | None
    reading: threading.Lock = field(default_factory=threading.Lock)
