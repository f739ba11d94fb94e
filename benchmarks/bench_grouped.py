"""Times mixed batches: 64 rows with 1, 8 or 64 different adapters in one grouped model, and 1 to 1024 resident ones.

    python benchmarks/bench_grouped.py [--tokens 1 16 64] [--threads 2] [--rounds 15] [--out bench.json]

First the operator alone (K = N = 768, R = F = 8), then BERT-base with LoRATRF adapters on query and value; random
weights. One session serves all contestants, which differ in adapter_ids (or in how many slots are resident): one call
each per round, in a random order, and a figure is the median of the rounds' ratios to one adapter. Rows of one adapter
stand together, as a server sorts them, or are dealt out in turn. Resident slots that no row names stay zero pages.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnxruntime as ort

from loratrf_deploy import create_session, read_adapter
from loratrf_deploy.export import ExportOptions, export_grouped
from loratrf_deploy.formats.manifest import read_swappable
from loratrf_deploy.ops import kernels
from loratrf_deploy.pytorch.base import load_base, sample_inputs
from loratrf_deploy.pytorch.quiet import quiet

BATCH = 64
DIFFERENT = {"1": (1, True), "8": (8, True), "8 in turn": (8, False), "64": (64, True)}
RESIDENT = (1, 64, 256, 1024)
FIRST = "1"


def main() -> None:
    parser = common.parser(__doc__, threads=os.cpu_count(), rounds=15, out=None)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64], help="per row")
    parser.add_argument("--op-only", action="store_true")
    args = parser.parse_args()
    rows = [operator_row(tokens, args) for tokens in args.tokens]
    if not args.op_only:
        with tempfile.TemporaryDirectory() as folder:
            rows += model_rows(Path(folder), args)
    machine = f"{common.cpu_name()}, {args.threads} threads"
    print(f"{machine}, ONNX Runtime {ort.__version__}, {args.rounds} rounds, {BATCH} rows\n")
    for row in rows:
        ratios = ", ".join(f"{name}: {ratio:.3f}" for name, ratio in row["ratios"].items())
        print(f"{row['what']}: {row['ms']:.2f} ms; {row['by']}: {ratios}")
    common.save(args.out, {"machine": machine, "rows": rows})


def adapter_ids(different: int, together: bool) -> np.ndarray:
    rows = np.arange(BATCH)
    return (rows * different // BATCH if together else rows % different).astype(np.int64)


def measure(what: str, by: str, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of the first call and median per-round ratios of the others to it."""
    times, first = common.interleaved(calls, rounds), next(iter(calls))
    return {"what": what, "by": by, "ms": 1e3 * statistics.median(times[first]), "ratios": common.ratios(times, first)}


def operator_row(tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = [(64, 8, 768), (64, 768, 8), (64, 768), (64, 8, 768), (64, 768, 8)]
    weights = [rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5 for shape in shapes]
    base, x = (rng.standard_normal((BATCH, tokens, 768), np.float32) for _ in range(2))
    out = np.empty_like(base)

    def call(different: int, together: bool) -> Callable[[], None]:
        ids = adapter_ids(different, together)

        def run() -> None:
            for _ in range(repeats):
                kernels.run("GroupedLoraTrf", [base, x, *weights, ids], out, threads=args.threads)

        return run

    repeats = max(1, 256 // tokens)
    calls = {name: call(*which) for name, which in DIFFERENT.items()}
    row = measure(f"operator, {tokens} tokens a row", "different adapters", calls, args.rounds)
    return row | {"ms": row["ms"] / repeats}


def model_rows(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    with quiet():
        base = common.make_base(folder / "base", "bert-base")
        adapter = common.make_adapter(base, folder / "adapter", "loratrf")
        export_grouped({"first": adapter}, folder / "model" / "model.onnx", ExportOptions(base_model=base, check=False))
        reference = load_base(read_adapter(adapter), base)
        _, contract = read_swappable(folder / "model" / "model.onnx")
        session = create_session(folder / "model" / "model.onnx", options=common.session_options(args.threads))
    rng = np.random.default_rng(0)
    slots: dict[int, dict[str, Any]] = {}
    for count in RESIDENT:
        values = {}
        for weight in contract.weights:
            shape = [8 if isinstance(dim, str) else dim for dim in weight.shape]
            value = np.zeros((count, *shape), np.float32)
            value[-BATCH:] = 0.02 * rng.standard_normal((min(count, BATCH), *shape), np.float32)
            values[weight.name] = ort.OrtValue.ortvalue_from_numpy(value)
        slots[count] = values

    def call(inputs: dict[str, Any], count: int, ids: np.ndarray) -> Callable[[], Any]:
        binding = session.io_binding()
        for name, value in (inputs | {"adapter_ids": ids}).items():
            binding.bind_cpu_input(name, value)
        for name, value in slots[count].items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        return lambda: session.run_with_iobinding(binding)

    rows = []
    for tokens in args.tokens:
        inputs = sample_inputs(reference, batch=BATCH, sequence=tokens, seed=0, padding=False)
        calls = {name: call(inputs, BATCH, adapter_ids(*which)) for name, which in DIFFERENT.items()}
        rows.append(measure(f"BERT-base, {tokens} tokens a row", "different adapters", calls, args.rounds))
    inputs = sample_inputs(reference, batch=BATCH, sequence=16, seed=0, padding=False)
    # One adapter in every row, and the last slot: only what lies there unused differs.
    calls = {str(count): call(inputs, count, np.full(BATCH, count - 1)) for count in RESIDENT}
    rows.append(measure("BERT-base, 16 tokens a row", "resident adapters", calls, args.rounds))
    return rows


if __name__ == "__main__":
    main()
