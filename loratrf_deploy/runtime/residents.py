"""Adapters by name: read from files that are held against the model, kept in memory, put aside and read again."""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, some
from ..formats.adapter_file import AdapterFile, Origin, read_adapter_file
from ..formats.blend import Blend, blend
from ..formats.manifest import AdapterId, Manifest, Swappable
from ..formats.swappable import check_matches, largest_file
from ..ops.schemas import Device

__all__ = ["AdapterInfo", "Choice", "Residents", "check_scale"]

Choice: TypeAlias = "str | Mapping[str, float]"
"""The name of a loaded adapter, or a blend of several: {name: weight}."""

P = TypeVar("P")

_LARGEST = float(np.finfo(np.float32).max)


def check_scale(scale: float) -> None:
    """UserError where weights can't be scaled by it: weights are scaled in float32."""
    try:
        if isinstance(scale, Real) and abs(float(scale)) <= _LARGEST:
            return
    except OverflowError:  # a whole number beyond any float
        pass
    raise UserError(f"scale is {reprlib.repr(scale)}, expected a finite number that float32 holds, such as 1 or 0.5.")


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: its file, the memory that its weights take, and whether they are in memory now.

    In a model of --adapters also its task, and what the labels of its head are called; None in older files.
    """

    path: Path
    bytes: int
    resident: bool
    task: str | None = None
    labels: tuple[str, ...] | None = None


class Residents(Generic[P]):
    """The adapters of a session on the model at `model`, `P` being what `place` makes of an adapter's values.

    Every method may be called from any number of threads; whoever has what `place` made keeps it, whatever is unloaded
    or replaced meanwhile. `max_bytes` limits the memory of those kept here, blends included: the ones that were used
    least recently are put aside, and read again from their files, or blended again, when they are asked for. `values`
    gives back what `place` was given, where that is still in memory.
    """

    def __init__(
        self,
        model: Path,
        manifest: Manifest,
        swappable: Swappable,
        place: Callable[[Mapping[str, NDArray[Any]]], P],
        max_bytes: int | None,
        *,
        values: Callable[[P], Mapping[str, NDArray[Any]]] | None = None,
        device: Device = "cpu",
    ):
        self._model, self._manifest, self._swappable, self._place = model, manifest, swappable, place
        self._max_bytes, self._placed_values, self._device = max_bytes, values, device
        self._largest = largest_file(swappable.weights)
        self._lock = threading.Lock()
        self._entries: dict[str | Blend, _Entry[P]] = {}  # least recently used first
        self.evictions = 0
        """How often one was put aside for another's room."""

    def infos(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name, the one that was used least recently first."""
        with self._lock:
            return {
                name: AdapterInfo(
                    entry.path,
                    entry.bytes,
                    entry.weights is not None,
                    entry.origin.adapter.task,
                    entry.origin.adapter.labels,
                )
                for name, entry in self._entries.items()
                if isinstance(name, str) and isinstance(entry, _Loaded)
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
        weights = self._place(file.values)
        entry = _Loaded(bytes=file.bytes, weights=weights, path=file.path, crc32=file.crc32, origin=file.origin)
        with self._lock:
            known = self._entries.pop(name, None)
            if isinstance(known, _Loaded) and not replace:
                self._entries[name] = known
                raise UserError(
                    f"An adapter {name!r} is loaded already, from {known.path}. Choose another name, unload it first, "
                    "or pass replace=True."
                )
            self._entries[name] = entry
            self._drop_blends(name)
            self._put_aside(entry)

    def unload(self, name: str) -> None:
        """Forgets the adapter `name`; its memory is freed when nobody uses it any more. UserError if unknown."""
        with self._lock:
            if self._entries.pop(name, None) is None:
                raise self._unknown(name)
            self._drop_blends(name)

    def origin(self, name: str) -> Origin:
        """What the file of the adapter `name` says of itself. UserError if unknown."""
        with self._lock:
            entry = self._entries.get(name)
        if not isinstance(entry, _Loaded):
            raise self._unknown(name)
        return entry.origin

    def resident(self, choice: Choice, scale: float = 1.0) -> P:
        """What `place` made of an adapter or a blend times `scale`: what is in memory, or is read or blended now.

        Raises UserError where a name is unknown, or the blend can't be made (`formats.blend`) or exceeds `max_bytes`.
        """
        return self.identified(choice, scale)[0]

    def identified(self, choice: Choice, scale: float = 1.0) -> tuple[P, AdapterId]:
        """`resident`, and which adapter that is; of a blend one of its parts, whose heads are the same."""
        wanted: str | Blend = choice  # type: ignore[assignment]
        if not isinstance(choice, str) or scale != 1:  # the usual case first: this is a part of every run
            weights = choice if isinstance(choice, Mapping) else {choice: 1.0}
            wanted = Blend.of(weights).times(scale)
        with self._lock:
            if wanted is not choice:
                # Listed before its parts are read: whatever replaces one of them meanwhile drops the blend too.
                self._entries.setdefault(wanted, _Entry())
            entry = self._entries.pop(wanted, None)
            if entry is None:
                raise self._unknown(wanted)
            self._entries[wanted] = entry  # now the one that was used last
            if entry.weights is not None and entry.origin is not None:
                return entry.weights, entry.origin.adapter
        with entry.reading:
            placed = entry.weights
            if placed is None:
                placed = self._place(self._values(wanted, entry))
                with self._lock:
                    entry.weights = placed
                    self._put_aside(entry)
        assert entry.origin is not None  # of a file, or of the first of the parts that were just blended
        return placed, entry.origin.adapter

    def _values(self, wanted: str | Blend, entry: _Entry[P]) -> Mapping[str, NDArray[Any]]:
        if isinstance(entry, _Loaded):
            file = self._read(entry.path)
            if file.crc32 != entry.crc32:
                raise UserError(
                    f"The adapter {wanted!r} was put aside, or is to be blended, and its file {entry.path} has changed "
                    "since it was loaded. Load it again with replace=True."
                )
            return file.values
        assert isinstance(wanted, Blend)
        try:
            parts = {part: self._part(part) for part, _ in wanted.parts}
            entry.origin = self.origin(wanted.parts[0][0])
            values = blend(wanted, parts, self._swappable.weights, self._device)
            entry.bytes = sum(value.nbytes for value in values.values())
            self._check_size(f"The blend {wanted}", entry.bytes)
        except UserError:
            with self._lock:
                if self._entries.get(wanted) is entry:
                    del self._entries[wanted]
            raise
        return values

    def _part(self, name: str) -> Mapping[str, NDArray[Any]]:
        """The weights of the adapter `name` for a blend, which is no use of it: what is put aside stays so."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise self._unknown(name)
            weights = entry.weights
        if weights is None or self._placed_values is None:
            return self._values(name, entry)
        return self._placed_values(weights)

    def _drop_blends(self, part: str) -> None:
        """Forgets the blends that `part` is in. Requires the lock."""
        for name in [name for name in self._entries if isinstance(name, Blend) and part in dict(name.parts)]:
            del self._entries[name]

    def _check_room(self, path: Path, size: int) -> None:
        """UserError where a file is larger than an adapter of this model can be, or than `max_bytes`."""
        if size > self._largest:
            raise UserError(
                f"{path} has {size} bytes, and an adapter of {self._model} at most {self._largest}. Is it another "
                "model's, or damaged? Convert the adapter again."
            )
        self._check_size(path, size)

    def _check_size(self, what: object, size: int) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise UserError(f"{what} takes {size} bytes, more than max_bytes, which is {self._max_bytes}.")

    def _put_aside(self, latest: _Entry[P]) -> None:
        """Frees what exceeds max_bytes, `latest` last. Requires the lock."""
        if self._max_bytes is None:
            return
        resident = [(name, entry) for name, entry in self._entries.items() if entry.weights is not None]
        taken = sum(entry.bytes for _, entry in resident)
        for name, entry in resident:
            if taken <= self._max_bytes:
                break
            if entry is latest:
                continue
            taken -= entry.bytes
            self.evictions += 1
            if isinstance(name, Blend):  # nothing of it needs to be remembered
                del self._entries[name]
            else:
                entry.weights = None

    def _read(self, path: Path) -> AdapterFile:
        file = read_adapter_file(path, lambda size: self._check_room(path, size))
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
        loaded = some([repr(known) for known in self._entries if isinstance(known, str)], limit=20) or "none"
        return UserError(f"No adapter {name!r} is loaded. Loaded: {loaded}. Load it first: load({name!r}, PATH).")


@dataclass(kw_only=True)
class _Entry(Generic[P]):
    """A blend, or an adapter; `weights` is None while they are not in memory. Guarded by the lock of its keeper."""

    bytes: int = 0
    weights: P | None = None
    origin: Origin | None = None
    reading: threading.Lock = field(default_factory=threading.Lock)


@dataclass(kw_only=True)
class _Loaded(_Entry[P]):
    """An adapter, and the file that it is read from again."""

    path: Path
    crc32: int
    origin: Origin
