"""Fair timing: what is compared runs in turns, in a random order in every round, on the same rows.

A figure over another is the median of the rounds' own ratios: a machine whose speed drifts is then unfair to none.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .deployments import Deployment

__all__ = ["WARM_UP", "Figures", "cpu_name", "interleaved", "measure", "ratio"]

WARM_UP = 2
"""Rounds at the start that don't count."""

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Figures:
    """Of one part of a deployment at one shape: the milliseconds that half and 99 % of the rounds take at most, the
    median ratio to the first deployment's; and what it does in a second: rows, tokens of prompts, new tokens."""

    deployment: str
    batch: int
    sequence: int
    part: str
    p50_ms: float
    p99_ms: float
    ratio: float
    per_second: float


def interleaved(
    calls: Mapping[K, Callable[..., Any]], rounds: int, inputs: Callable[[int], Sequence[Any]] = lambda round_: ()
) -> dict[K, list[float]]:
    """Seconds by name, one call each per round, in a random order; a round's calls share the same `inputs(round)`."""
    times: dict[K, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + WARM_UP):
        given, order = inputs(round_), list(calls)
        random.Random(round_).shuffle(order)
        for name in order:
            begin = time.perf_counter()
            calls[name](*given)
            if round_ >= WARM_UP:
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def measure(deployments: Sequence[Deployment], batch: int, sequence: int, rounds: int, tokens: int) -> list[Figures]:
    """The figures of every part of every deployment, on random rows of that shape.

    The parts of a model that generates are "prompt", with the token that follows, and "token", each of the `tokens`
    after that.
    """

    def rows(round_: int) -> list[Any]:
        return [one.rows(batch, sequence, np.random.default_rng(round_)) for one in deployments]

    calls = {
        (number, part): lambda *given, number=number, call=call: call(given[number])
        for number, one in enumerate(deployments)
        for part, call in one.calls.items()
    }
    times = interleaved(calls, rounds, rows)
    for number in range(len(deployments) if deployments[0].generates else 0):
        first, more = times.pop((number, "first")), times.pop((number, "more"))
        times |= {
            (number, "prompt"): first,
            (number, "token"): [max(b - a, 1e-9) / tokens for a, b in zip(first, more, strict=True)],
        }
    return [
        Figures(
            *(deployments[number].name, batch, sequence, part),
            p50_ms=1e3 * statistics.median(seconds),
            p99_ms=1e3 * float(np.percentile(seconds, 99)),
            ratio=ratio(seconds, times[0, part]),
            per_second=(batch * sequence if part == "prompt" else batch) / statistics.median(seconds),
        )
        for (number, part), seconds in sorted(times.items(), key=lambda row: (row[0][1], row[0][0]))
    ]


def cpu_name() -> str:
    """As the system calls it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
