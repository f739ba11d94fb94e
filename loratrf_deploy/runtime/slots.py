"""One adapter a row: the adapters of a grouped model, whose graph inputs hold one adapter's weights per slot.

A grouped export writes into loratrf.json which weights those are (`RuntimeWeight`, without the slots' dimension), and
`fit` turns an adapter into values for them; here they become the (S, ...) arrays that the graph takes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.manifest import Swappable
from ..formats.swappable import Default, RuntimeWeight
from ..ops.schemas import ADAPTER_IDS, Device
from .bound import BoundWeights, Request

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["OnePerRow", "Slot", "SlotBank", "Slots"]


B = TypeVar("B")


class Slots:
    """values[name][slot] = the weight `name` of the adapter in that slot, zero-padded to the highest rank of all slots.

    `values` is what the graph takes: by input name, (S, ...) arrays of each weight's type. An empty slot is all zeros:
    the base's output where there is no head, zeros from a head.
    """

    def __init__(self, weights: Sequence[RuntimeWeight], count: int):
        self.values: dict[str, NDArray[Any]] = {}
        self._weights, self._count, self._ranks = tuple(weights), count, dict[str, int]()
        self._allocate()

    def put(self, slot: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Fills a slot with what `fit` gave, in place; where a rank is higher than any so far, arrays are replaced."""
        ranks = self._ranks_of(values)
        if any(rank > self._ranks[symbol] for symbol, rank in ranks.items()):
            self._ranks = {symbol: max(rank, self._ranks[symbol]) for symbol, rank in ranks.items()}
            self._allocate()
        for weight in self._weights:
            value, row = values[weight.name], self.values[weight.name][slot]
            row[...] = 0
            # Ranks beyond those of the arrays are zeros: a half that the adapter lacks has rank 1 there.
            part = tuple(slice(min(old, new)) for old, new in zip(row.shape, value.shape, strict=True))
            row[part] = value[part]

    def resize(self, count: int) -> None:
        """`count` slots from now on, the first ones as they are; arrays are replaced."""
        self._count = count
        self._allocate()

    def _ranks_of(self, values: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """By symbol, the rank that these values need: 0 for a half of nothing but zeros."""
        ranks = dict.fromkeys(self._ranks, 0)
        for weight in self._weights:
            for dim, size in zip(weight.shape, values[weight.name].shape, strict=True):
                if isinstance(dim, str) and values[weight.name].any():
                    ranks[dim] = max(ranks[dim], size)
        return ranks

    def _allocate(self) -> None:
        """Arrays of the present ranks, with what the old ones held."""
        for weight in self._weights:
            for dim in weight.shape:
                if isinstance(dim, str):
                    self._ranks.setdefault(dim, 0)
            shape = [self._ranks[dim] if isinstance(dim, str) else dim for dim in weight.shape]
            old = self.values.get(weight.name)
            if old is not None and old.shape == (self._count, *shape):
                continue
            try:
                new = np.zeros((self._count, *shape), weight.dtype)
            except (MemoryError, ValueError) as error:  # numpy's own limits
                raise UserError(
                    f"{weight.name} takes {self._count} x {shape} values of {weight.dtype} here, more than there is "
                    "memory for. Load fewer adapters, or of lower rank, if it is not loratrf.json that is damaged."
                ) from error
            if old is not None:
                new[tuple(map(slice, old.shape))] = old
            self.values[weight.name] = new


_FIRST_SLOTS = 8


class Slot:
    """The place of one adapter, its own for as long as anybody refers to this object."""

    def __init__(self, number: int):
        self.number = number


class SlotBank(Generic[B]):
    """Many adapters in the (S, ...) arrays of a grouped model, `B` being what `bind` makes of all arrays for a run.

    Slots that no run names are not read by the kernels. `shares` says whether what is bound are views of the arrays.
    """

    def __init__(
        self,
        swappable: Swappable,
        bind: Callable[[Mapping[str, NDArray[Any]]], B],
        shares: Callable[[B, Mapping[str, NDArray[Any]]], bool] = lambda bound, values: False,
    ):
        self._bind, self._shares = bind, shares
        self._slots, self._count = Slots(swappable.weights, _FIRST_SLOTS), _FIRST_SLOTS
        self._free = list(range(_FIRST_SLOTS))
        self._bound: B | None = None
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
            # Runs that have begun keep what they were given. Views of the same arrays have the new adapter already.
            if self._bound is not None and not self._shares(self._bound, self._slots.values):
                self._bound = None
            return slot

    def values(self, slot: Slot) -> Mapping[str, NDArray[Any]]:
        """What `place` was given, padded with zeros to the ranks of the arrays, in copies: slots are used again."""
        with self._lock:
            return {name: array[slot.number].copy() for name, array in self._slots.values.items()}

    def bound(self) -> B:
        """The arrays as they are now, bound."""
        with self._lock:
            if self._bound is None:
                self._bound = self._bind(dict(self._slots.values))
            return self._bound


class OnePerRow:
    """The adapters of a grouped model in ONNX Runtime."""

    default: Default = "base"

    def __init__(self, session: onnxruntime.InferenceSession, device: Device, swappable: Swappable):
        self._bank = SlotBank(
            swappable,
            lambda values: BoundWeights(session, device, values),
            lambda bound, values: device == "cpu" and bound.views(values),
        )
        self.place, self.values = self._bank.place, self._bank.values

    def run(self, request: Request, resident: Callable[[Any], Slot]) -> dict[str, NDArray[Any]]:
        """Output name -> value, each row under its own adapter; `resident` gives what `place` made of it."""
        if request.scale != 1:
            raise UserError(f"scale is {request.scale}, but a model of --adapters has no scale per run. Expected 1.")
        rows = (np.shape(next(iter(request.inputs.values()))) or (0,))[0]
        names = [request.adapter] * rows if request.adapters is None else list(request.adapters)
        if len(names) != rows:
            raise UserError(f"adapters names {len(names)} adapters for {rows} rows: expected one per row.")
        # Held until the run ends: a slot is free for others when nobody has it any more.
        slots = [None if name is None else resident(name) for name in names]
        ids = np.array([-1 if slot is None else slot.number for slot in slots], np.int64)
        return self._bank.bound().run({**request.inputs, ADAPTER_IDS: ids}, request.outputs)
