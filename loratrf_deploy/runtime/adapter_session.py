"""One model and many resident adapters: each run names its own, or one per row. Needs neither torch nor onnx."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..errors import UserError, some
from ..formats.adapter_file import AdapterFile, read_adapter_file
from ..formats.manifest import read_swappable
from ..formats.swappable import Default, check_matches
from ..ops.schemas import ADAPTER_IDS, Device
from .bound import BoundWeights, OnePerRun, Request
from .session import PROVIDERS, create_session
from .slots import OnePerRow, Slot

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["AdapterInfo", "AdapterSession"]

_DEVICES: dict[str, Device] = {PROVIDERS["cuda"]: "cuda"}
"""Where an execution provider keeps its weights; the others work in host memory."""


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: its file, the memory that its weights take, and whether they are in memory now."""

    path: Path
    bytes: int
    resident: bool


class AdapterSession:
    """outputs = model(inputs; weights of one adapter), the adapter named in each run, or in each row of a batch.

    Opens a model of `loratrf-export --swappable` (one adapter per run) or `--adapters` (one per row), as
    `create_session` does, with the same `library`, `providers` and `options`; no adapter is loaded at first. Every
    method may be called from any number of threads; a run that has begun keeps its adapters, whatever is unloaded or
    replaced meanwhile. `max_bytes` limits the memory of resident adapters: those that were used least
    recently are put aside, and read again from their files when a run names them. Raises UserError for a model that
    takes no adapters.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        library: bool = True,
        max_bytes: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: onnxruntime.SessionOptions | None = None,
    ):
        self._model = Path(model)
        self._manifest, self._swappable = read_swappable(model)
        self._session = create_session(model, library=library, providers=providers, options=options)
        self._inputs = [value.name for value in self._session.get_inputs() if value.name != ADAPTER_IDS]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}  # least recently used first
        device = _DEVICES.get(self._session.get_providers()[0], "cpu")
        way = OnePerRow if self._swappable.slots else OnePerRun
        self._way: OnePerRun | OnePerRow = way(self._session, device, self._swappable)

    @property
    def default(self) -> Default:
        """What adapter None stands for: "base" or "adapter", as the model was exported; always the base in rows."""
        return self._way.default

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name, the one that was used least recently first."""
        with self._lock:
            return {
                name: AdapterInfo(entry.path, entry.bytes, entry.weights is not None)
                for name, entry in self._entries.items()
            }

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Reads the .onnx_adapter file `path` and keeps it as `name`, its weights on the session's device.

        The file is held against the model before anything uses it: hashes of base and graph, and the name, type and
        size of every weight. Raises UserError where it doesn't fit, is damaged, exceeds `max_bytes` alone, or where
        `name` is taken; with `replace` runs that begin from now on use the new adapter.
        """
        if not isinstance(name, str) or not name:
            raise UserError(f"The adapter's name is {name!r}, expected a text that isn't empty.")
        file = self._read(Path(path))
        if self._max_bytes is not None and file.bytes > self._max_bytes:
            raise UserError(f"{file.path} takes {file.bytes} bytes, more than max_bytes, which is {self._max_bytes}.")
        entry = _Entry(file.path, file.bytes, file.crc32, self._way.place(file.values))
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
        """Forgets the adapter `name`; its memory is freed when the last run that uses it ends. UserError if unknown."""
        with self._lock:
            if self._entries.pop(name, None) is None:
                raise self._unknown(name)

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        adapter: str | EllipsisType | None = ...,
        adapters: Sequence[str | None] | None = None,
        scale: float = 1.0,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Output name -> value for `inputs` (name -> array as the model takes it) under the loaded `adapter`.

        `adapters` names one per row of the batch instead, for a model of --adapters. None asks for the model's default
        (see `default`), in so many words: one of the two must be given. `scale` multiplies alpha/R and
        gamma: y = h + scale·(alpha/R)·(x Aᵀ)Bᵀ, out = y + scale·gamma·((s·z) Cᵀ)Dᵀ. At 0.5 a plain LoRA adds half of
        what it learned to each layer; a filter's z and s are those of the layer's y as it then is. At 0 the layers are
        the base's. A head that the adapter brings is the adapter's own at every scale. `outputs` None takes all. Raises
        UserError for an unknown adapter or input, or inputs that ONNX Runtime refuses.
        """
        wrong = [name for name in self._inputs if name not in inputs] + [
            name for name in inputs if name not in self._inputs
        ]
        if wrong:
            raise UserError(f"The inputs are {some(list(inputs))}, the model takes {some(self._inputs)}.")
        chosen = self._outputs if outputs is None else list(outputs)
        if foreign := [name for name in chosen if name not in self._outputs]:
            raise UserError(f"The model has no output {some(foreign)}. It gives {some(self._outputs)}.")
        if (adapter is ...) == (adapters is None):
            raise TypeError("run() takes either adapter=NAME or adapters=[NAME, ...], one per row")
        if not (isinstance(scale, int | float) and math.isfinite(scale)):
            raise UserError(f"scale is {scale!r}, expected a finite number, such as 1 or 0.5.")
        request = Request(inputs, chosen, adapter, adapters, scale)
        return self._way.run(request, self._resident)  # type: ignore[arg-type]  # it gives what this way placed

    def _resident(self, name: Any) -> BoundWeights | Slot:
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
                weights = self._way.place(file.values)
                with self._lock:
                    entry.weights = weights
                    self._put_aside(entry)
        return weights

    def _put_aside(self, latest: _Entry) -> None:
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
class _Entry:
    """A loaded adapter; `weights` is None while it is put aside. Guarded by the session's lock."""

    path: Path
    bytes: int
    crc32: int
    weights: BoundWeights | Slot | None
    reading: threading.Lock = field(default_factory=threading.Lock)
