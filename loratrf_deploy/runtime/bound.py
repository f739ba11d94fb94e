"""Adapters in memory, as ONNX Runtime takes them: one adapter's own weights, or the slots that many share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.swappable import RuntimeWeight
from .slots import Slots

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["BoundWeights", "Slot", "SlotBank"]

_SPARE_BINDINGS = 4
"""Bindings kept ready for threads that run at once; each is some 20 kB."""
_FIRST_SLOTS = 8


class BoundWeights:
    """Run-time weights, bound: a run binds its few inputs and outputs beside them. Never changes.

    On a device, weights travel there here and never in a run; `there` holds those that already did.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        device: str,
        values: Mapping[str, NDArray[Any]],
        there: Mapping[str, onnxruntime.OrtValue] = MappingProxyType({}),
    ):
        import onnxruntime

        self._session, self._device, self._arrays = session, device, values
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
        return all(self._arrays[name] is value for name, value in values.items())

    def scaled(self, scale: float, names: Sequence[str]) -> BoundWeights:
        """The same weights with `names` times `scale`, made for one run; the others are shared."""
        scaled = {name: self._arrays[name] * self._arrays[name].dtype.type(scale) for name in names}
        rest = {name: value for name, value in self._values.items() if name not in scaled}
        return BoundWeights(self._session, self._device, {**self._arrays, **scaled}, rest)


class Slot:
    """The place of one adapter in a SlotBank, its own for as long as anybody refers to this object."""

    def __init__(self, number: int):
        self.number = number


class SlotBank:
    """Many adapters in the (S, ...) arrays of a grouped model. Slots that no run names are not read by the kernels."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str, weights: Sequence[RuntimeWeight]):
        self._session, self._device = session, device
        self._slots, self._count = Slots(weights, _FIRST_SLOTS), _FIRST_SLOTS
        self._free = list(range(_FIRST_SLOTS))
        self._bound: BoundWeights | None = None
        self._lock = threading.Lock()

    def place(self, values: Mapping[str, NDArray[Any]]) -> Slot:
        """Copies an adapter into a slot that nobody uses; runs in other slots may go on meanwhile."""
        with self._lock:
            if not self._free:
                self._free += range(self._count, 2 * self._count)
                self._count *= 2
                self._slots.resize(self._count)
            slot = Slot(self._free.pop())
            weakref.finalize(slot, self._free.append, slot.number).atexit = False
            self._slots.put(slot.number, values)
            # Runs that have begun keep the arrays that they were given. Arrays that are the same in host memory have
            # the new adapter already, since what is bound are views of them.
            if self._device != "cpu" or self._bound is None or not self._bound.views(self._slots.values):
                self._bound = None
            return slot

    def weights(self) -> BoundWeights:
        """The arrays as they are now, bound."""
        with self._lock:
            if self._bound is None:
                self._bound = BoundWeights(self._session, self._device, dict(self._slots.values))
            return self._bound
