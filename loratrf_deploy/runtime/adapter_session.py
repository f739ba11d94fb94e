"""One model and many resident adapters: each run names its own, or one per row. Needs neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..errors import UserError, some
from ..formats.manifest import MANIFEST, AdapterId, Swappable, check_files, read_swappable
from ..formats.swappable import Default
from ..ops.schemas import ADAPTER_IDS, Device
from .bound import OnePerRun, Request
from .residents import AdapterInfo, Choice, Residents, check_scale
from .session import PROVIDERS, OwnProcess, create_session
from .slots import OnePerRow

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["AdapterInfo", "AdapterSession", "Answer"]

_DEVICES: dict[str, Device] = {PROVIDERS["cuda"]: "cuda"}
"""Where an execution provider keeps its weights; the others work in host memory."""


@dataclass(frozen=True)
class Answer:
    """What one row of a batch is answered: its adapter's `outputs` by name, without the batch's dimension.

    `task` is the adapter's, `labels` are what the last dimension of its logits stands for, where it classifies. Both
    are None for a row of the base, which has all outputs, and of files of older versions.
    """

    outputs: dict[str, NDArray[Any]]
    task: str | None = None
    labels: tuple[str, ...] | None = None


class AdapterSession:
    """outputs = model(inputs; weights of one adapter), the adapter named in each run, or in each row of a batch.

    Where an adapter can be named, so can a blend of several, {name: weight}: y = h + Σᵢ wᵢ·(alphaᵢ/Rᵢ)·(x Aᵢᵀ)Bᵢᵀ.

    Opens a model of `loratrf-export --swappable` (one adapter per run) or `--adapters` (one per row), as
    `create_session` does, with the same `library`, `providers` and `options`; no adapter is loaded at first. The files
    are held against the hashes in loratrf.json first, weights by samples of their bytes. Every method may be called
    from any number of threads; a run that has begun keeps its adapters, whatever is unloaded or replaced meanwhile. A
    session belongs to its process: in one that is forked from it every method raises RuntimeError.
    `max_bytes` limits the memory of resident adapters and blends: those that were used least recently are put aside,
    and read again from their files, or blended again, when a run names them. Raises UserError for a model that takes
    no adapters, or isn't as it was exported.
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
        self._process = OwnProcess(type(self).__name__)
        manifest, swappable = read_swappable(model)
        self._tasks = swappable.tasks
        check_files(Path(model).parent, manifest)
        self._session = create_session(model, library=library, providers=providers, options=options)
        _check_inputs(model, self._session, swappable)
        own = {ADAPTER_IDS, *(weight.name for weight in swappable.weights)}
        self._inputs = [value.name for value in self._session.get_inputs() if value.name not in own]
        self._names = set(self._inputs)
        self._outputs = [value.name for value in self._session.get_outputs()]
        device = _DEVICES.get(self._session.get_providers()[0], "cpu")
        way = OnePerRow if swappable.slots else OnePerRun
        self._way: OnePerRun | OnePerRow = way(self._session, device, swappable)
        self._residents: Residents[Any] = Residents(
            Path(model), manifest, swappable, self._way.place, max_bytes, values=self._way.values, device=device
        )

    @property
    def inputs(self) -> list[onnxruntime.NodeArg]:
        """What `run` takes, as ONNX Runtime has it: name, type and shape of each."""
        return [value for value in self._session.get_inputs() if value.name in self._names]

    @property
    def default(self) -> Default:
        """What adapter None stands for: "base" or "adapter", as the model was exported; always the base in rows.

        "required": a run must name one.
        """
        return self._way.default

    @property
    def adapters(self) -> dict[str, AdapterInfo]:
        """The loaded adapters by name, the one that was used least recently first."""
        self._process.check()
        return self._residents.infos()

    @property
    def evictions(self) -> int:
        """How often an adapter or a blend was put aside so far, for another to stay within `max_bytes`."""
        return self._residents.evictions

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Reads the .onnx_adapter file `path` and keeps it as `name`, its weights on the session's device.

        The file is held against the model before anything uses it: hashes of base and graph, and the name, type and
        size of every weight. Raises UserError where it doesn't fit, is damaged, exceeds `max_bytes` alone, or where
        `name` is taken; with `replace` runs that begin from now on use the new adapter.
        """
        self._process.check()
        self._residents.load(name, path, replace=replace)

    def unload(self, name: str) -> None:
        """Forgets the adapter `name`; its memory is freed when the last run that uses it ends. UserError if unknown."""
        self._process.check()
        self._residents.unload(name)

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        adapter: Choice | EllipsisType | None = ...,
        adapters: Sequence[Choice | None] | None = None,
        scale: float = 1.0,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Output name -> value for `inputs` (name -> array as the model takes it) under the loaded `adapter`.

        `adapters` names one per row of the batch instead, for a model of --adapters. None asks for the model's default
        (see `default`), where it has one, in so many words: one of the two must be given. {name: weight} in the place
        of a name asks for a blend of plain LoRA adapters, which is made when it is first named and kept like an adapter
        until one of its parts is unloaded or replaced. `scale` multiplies alpha/R and gamma: y = h + scale·(alpha/R)·(x
        Aᵀ)Bᵀ, out = y + scale·gamma·((s·z) Cᵀ)Dᵀ. At 0.5 a plain LoRA adds half of what it learned to each layer; a
        filter's z and s are those of the layer's y as it then is. At 0 the layers are the base's. A head that the
        adapter brings is the adapter's own at every scale. `outputs` None takes all. Raises UserError for an unknown
        adapter or input, a blend that can't be made (`formats.blend`) or exceeds `max_bytes` alone, or inputs that ONNX
        Runtime refuses.
        """
        self._check(inputs)
        chosen = self._chosen(outputs)
        if (adapter is ...) == (adapters is None):
            raise TypeError("run() takes either adapter=NAME or adapters=[NAME, ...], one per row")
        if type(scale) is not float or scale != 1.0:
            check_scale(scale)
        request = Request(inputs, chosen, adapter, adapters, scale)
        return self._way.run(request, self._residents.resident)

    def answers(
        self, inputs: Mapping[str, Any], adapters: Sequence[Choice | None], *, outputs: Sequence[str] | None = None
    ) -> list[Answer]:
        """For each row what `run(inputs, adapters=adapters)` gives of its adapter's own task, with its own labels.

        The arrays of `run` have more, where tasks or numbers of labels differ. `outputs` are those of the model that
        are computed, None all; a row has those of its own task among them. Raises UserError as `run` does.
        """
        self._check(inputs)
        chosen = self._chosen(outputs)
        ids: list[AdapterId] = []

        def resident(choice: Choice) -> Any:
            placed, identity = self._residents.identified(choice)
            ids.append(identity)
            return placed

        values = self._way.run(Request(inputs, chosen, ..., adapters, 1.0), resident)
        named = iter(ids)
        return [
            self._answer({name: value[row] for name, value in values.items()}, None if choice is None else next(named))
            for row, choice in enumerate(adapters)
        ]

    def _check(self, inputs: Mapping[str, Any]) -> None:
        self._process.check()
        # What is not asked costs nothing: a run of a small model takes no longer than some hundred of such lines.
        if inputs.keys() != self._names:
            raise UserError(f"The inputs are {some(list(inputs))}, the model takes {some(self._inputs)}.")

    def _chosen(self, outputs: Sequence[str] | None) -> Sequence[str]:
        if outputs is not None and (foreign := [name for name in outputs if name not in self._outputs]):
            raise UserError(f"The model has no output {some(foreign)}. It gives {some(self._outputs)}.")
        return self._outputs if outputs is None else list(outputs)

    def _answer(self, row: dict[str, NDArray[Any]], adapter: AdapterId | None) -> Answer:
        if adapter is None:
            return Answer(row)
        part = self._tasks.get(adapter.task or "")
        own = {name: row[name] for name in part.outputs.values() if name in row} if part else row
        if adapter.labels is not None:
            count = len(adapter.labels)
            own = {name: value[..., :count] if "logits" in name else value for name, value in own.items()}
        return Answer(own, adapter.task, adapter.labels)


def _check_inputs(model: str | Path, session: onnxruntime.InferenceSession, swappable: Swappable) -> None:
    """UserError where the graph doesn't take what its loratrf.json says: memory is allocated by the latter."""
    shapes = {value.name: value.shape for value in (*session.get_inputs(), *session.get_overridable_initializers())}

    def agrees(name: str, wanted: Sequence[int | str]) -> bool:
        shape = shapes.get(name)
        dims = ["slots", *wanted] if swappable.slots else wanted
        return (
            shape is not None
            and len(shape) == len(dims)
            and all(isinstance(a, str) or not isinstance(b, int) or a == b for a, b in zip(dims, shape, strict=True))
        )

    if wrong := [weight.name for weight in swappable.weights if not agrees(weight.name, weight.shape)]:
        raise UserError(
            f"{model} doesn't take what the {MANIFEST} beside it says: {some(wrong)} is no input of it, or has another "
            "shape. They are not of one export: export the model again."
        )
    given = {value.name for value in session.get_outputs()}
    if lost := [name for part in swappable.tasks.values() for name in part.outputs.values() if name not in given]:
        raise UserError(
            f"{model} doesn't give what the {MANIFEST} beside it says: {some(lost)} is no output of it. They are not "
            "of one export: export the model again."
        )
