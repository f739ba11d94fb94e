"""One adapter a run: its weights in memory, bound to the graph's inputs as ONNX Runtime takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType, MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.manifest import Swappable
from ..ops.schemas import Device
from .residents import Choice

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["BoundWeights", "OnePerRun", "Request"]

_SPARE_BINDINGS = 4
"""Bindings kept ready for threads that run at once; each is some 20 kB."""


class Request(NamedTuple):
    """What `AdapterSession.run` was asked for: an `adapter` for all rows (... where none was named) or one per row."""

    inputs: Mapping[str, Any]
    outputs: Sequence[str]
    adapter: Choice | EllipsisType | None
    adapters: Sequence[Choice | None] | None
    scale: float


class BoundWeights:
    """Run-time weights, bound: a run binds its few inputs and outputs beside them. Never changes.

    On a device, weights travel there here and never in a run; `there` holds those that already did. `arrays` are
    what they were made of, in host memory.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: Device,
        values: Mapping[str, NDArray[Any]],
        there: Mapping[str, onnxruntime.OrtValue] = MappingProxyType({}),
    ):
        import onnxruntime

        self._session, self._device, self.arrays = session, device, values
        # In host memory an OrtValue is a view of its array.
        self._values = {
            name: there[name] if name in there else onnxruntime.OrtValue.ortvalue_from_numpy(value, device)
            for name, value in values.items()
        }
        self._spare: list[onnxruntime.IOBinding] = []  # list's append and pop are atomic

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Output name -> value. Raises UserError for inputs that ONNX Runtime refuses."""
        # ONNX Runtime reads these in place: they must outlive the run.
        arrays = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        try:
            binding = self._spare.pop()
        except IndexError:
            binding = self._session.io_binding()
            for name, value in self._values.items():
                binding.bind_ortvalue_input(name, value)
        try:
            for name, array in arrays.items():
                binding.bind_cpu_input(name, array)
            for name in outputs:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            results = dict(zip(outputs, binding.copy_outputs_to_cpu(), strict=True))
            binding.clear_binding_outputs()
        except Exception as error:  # onnxruntime's exceptions share no public base class
            given = ", ".join(f"{name} {array.shape} {array.dtype}" for name, array in arrays.items())
            raise UserError(f"ONNX Runtime can't run the model on {given}: {error}") from error
        if len(self._spare) < _SPARE_BINDINGS:
            self._spare.append(binding)
        return results

    def views(self, values: Mapping[str, NDArray[Any]]) -> bool:
        """Whether these very arrays are what is bound."""
        return all(self.arrays[name] is value for name, value in values.items())

    def scaled(self, scale: float, names: Sequence[str]) -> BoundWeights:
        """The same weights with `names` times `scale`, made for one run; others are shared. UserError on overflow."""
        scaled = {}
        for name in names:
            value = self.arrays[name]
            with np.errstate(over="ignore", invalid="ignore"):
                scaled[name] = (value.astype(np.float32, copy=False) * np.float32(scale)).astype(
                    value.dtype, copy=False
                )
            if not np.isfinite(scaled[name]).all():
                raise UserError(
                    f"scale is {scale}, with which {name} exceeds {value.dtype}, which the model computes in. Take a "
                    "smaller one."
                )
        rest = {name: value for name, value in self._values.items() if name not in scaled}
        return BoundWeights(self._session, self._device, {**self.arrays, **scaled}, rest)


class OnePerRun:
    """The adapters of a swappable model: each one's weights are graph inputs of their own."""

    def __init__(self, session: onnxruntime.InferenceSession, device: Device, swappable: Swappable):
        self.default = swappable.default
        self._session, self._device = session, device
        self._without = BoundWeights(session, device, {})
        self._scaled = [weight.name for weight in swappable.weights if weight.part in ("B", "D")]

    def place(self, values: Mapping[str, NDArray[Any]]) -> BoundWeights:
        """An adapter's weights on the session's device: in host memory they stay the file's one block."""
        return BoundWeights(self._session, self._device, values)

    def values(self, weights: BoundWeights) -> Mapping[str, NDArray[Any]]:
        """What `place` was given, in host memory."""
        return weights.arrays

    def run(self, request: Request, resident: Callable[[Any], BoundWeights]) -> dict[str, NDArray[Any]]:
        """Output name -> value under the one adapter of `request`; `resident` gives what `place` made of it."""
        if request.adapters is not None:
            raise UserError(
                "This model runs one adapter per batch: name it with adapter=. For one per row, export a model with "
                "loratrf-export --adapters NAME=PATH ..."
            )
        if request.adapter is None:
            if request.scale != 1:
                raise UserError(f"scale is {request.scale} but no adapter is named: there is nothing to scale.")
            if self.default == "required":
                raise UserError(
                    "adapter is None, and this model needs an adapter in every run: it was exported with --swappable "
                    "required. Name a loaded one, or export it with --swappable base."
                )
            return self._without.run(request.inputs, request.outputs)
        weights = resident(request.adapter)
        if request.scale != 1:
            weights = weights.scaled(request.scale, self._scaled)
        return weights.run(request.inputs, request.outputs)
