"""Times a causal language model in int4 on the CPU: no adapter, merged, separate, swappable, mixed rows, the builder's.

    python benchmarks/bench_llm.py [--layers 4] [--rank 8] [--runs 5] [--rounds 4] [--threads 2] [--clock wall|cpu]
                                   [--vocabulary 128256] [--keep FOLDER] [--out bench.json]

LLaMA-3.2-1B's dimensions (hidden 2048, ffn 8192, 32 heads, 8 key/value heads, 128256 tokens, tied) with random weights
and `--layers` layers; R = F = `--rank` on all linear layers. Prefill is 128 tokens, decode the next 32, batch 1. In a
round the deployments run one after the other, in a random order; a figure is the median over rounds of the ratio to
"no adapter" in the same round. Where a model's weights come to lie in memory is worth some per cent, and stays so for a
process: every `--runs` is a process of its own that loads them in another order. `--clock cpu` counts the CPU time of
the one thread, which a busy machine disturbs far less (it needs --threads 1).

Swappable models run with their adapter active, through onnxruntime-genai's own Adapters; what the change costs the
host is printed below. The mixed table is a batch of `--rows` rows: each under its own of as many LoRA adapters, against
all under one, against a fixed adapter and none (decode alone).

The last table is the error in the logits: against the same int4 base with the exact adapter, computed in float32.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og

from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.export.genai import build
from loratrf_deploy.genai.generate import CONFIG_FILE, load_model
from loratrf_deploy.parity.onnx_runs import run_session, session_in_memory
from loratrf_deploy.parity.quantised import exact_arithmetic
from loratrf_deploy.pytorch.quiet import quiet

PREFILL, DECODE = 128, 32
REFERENCE = "no adapter"
DIGITS = {"prefill_ms": 2, "prefill_ratio": 3, "decode_ms": 2, "decode_ratio": 3}
Times = dict[str, dict[str, list[float]]]


def main() -> None:
    sizes = {"layers": 4, "rank": 8, "vocabulary": 128256}
    parser = common.parser(__doc__, **sizes, rounds=4, threads=os.cpu_count(), clock="wall", keep=None, out=None)
    parser.add_argument("--runs", type=int, default=5, help="processes of so many rounds")
    parser.add_argument("--rows", type=int, default=16, help="of the mixed batch; 0 leaves it out")
    args = common.parse(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            models = deployments(folder, args.layers, args.rank, args.vocabulary)
            mixed = mixed_model(folder, args.rank, args.rows) if args.rows else None
        for path in [*models.values(), *filter(None, [mixed])]:
            set_threads(path.parent, args.threads)
        timings = measure(models, args.runs, args.rounds, args.clock)
        rows = measure_rows(models, mixed, args.rows, args.runs * args.rounds, args.clock) if mixed else {}
        errors = logit_errors(models)
    threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
    result = {
        "machine": f"{common.cpu_name()}, {threads}, {args.clock} clock",
        "versions": f"ORT {ort.__version__}, GenAI {og.__version__}",
        "model": f"LLaMA-3.2-1B's dimensions, {args.layers} layers, {args.vocabulary} tokens, int4",
        "adapter": f"R = F = {args.rank} on all linear layers",
        "rounds": args.runs * args.rounds,
        "timings": timings,
        "mixed": rows,
        "errors": errors,
    }
    common.save(args.out, result)
    print(
        "; ".join(str(result[name]) for name in ("model", "adapter", "machine", "versions"))
        + f"; {args.runs} x {args.rounds} rounds\n"
    )
    columns = ["deployment", f"prefill {PREFILL}, ms", "ratio", "decode, ms per token", "ratio"]
    cells = ([name, *(f"{row[part]:.{digits}f}" for part, digits in DIGITS.items())] for name, row in timings.items())
    print(common.table(columns, cells), end="\n\n")
    swaps = [f"{name} {1e3 * row['swap_ms']:.0f} us" for name, row in timings.items() if "swap_ms" in row]
    print(f"set_active_adapter: {', '.join(swaps)}", end="\n\n")
    if rows:
        columns = [f"decode of {args.rows} rows", "ms per step", "ratio to no adapter", "ratio to one adapter"]
        cells = ([name, *(f"{value:.3f}" for value in row.values())] for name, row in rows.items())
        print(common.table(columns, cells), end="\n\n")
    columns = ["LoRA, error in the logits", "int4 weights, float32 arithmetic", "as shipped (int8 activations)"]
    print(common.table(columns, ([name, *(f"{value:.2e}" for value in row.values())] for name, row in errors.items())))


def deployments(folder: Path, layers: int, rank: int, vocabulary: int) -> dict[str, Path]:
    """name -> model.onnx, REFERENCE first."""
    base = folder / "base"
    if not base.is_dir():
        common.make_llama(base, layers, vocabulary)
    models = {REFERENCE: folder / "bare" / "model.onnx"}
    if not models[REFERENCE].is_file():
        build(base, models[REFERENCE], "int4", "cpu", {})
    for kind in ("lora", "loratrf"):
        adapter = folder / f"{kind}-{rank}"
        if not adapter.is_dir():
            common.make_adapter(base, adapter, kind, rank)
        for mode in ("merged", "separate", "swappable"):
            if (kind, mode) == ("loratrf", "merged"):
                continue
            how: dict[str, Any] = {"swappable": "base"} if mode == "swappable" else {"mode": mode}
            model = folder / f"{kind}-{rank}-{mode}" / "model.onnx"
            models[f"{mode} {'LoRATRF' if kind == 'loratrf' else 'LoRA'}"] = model
            if not model.is_file():
                export_adapter(
                    adapter,
                    model,
                    ExportOptions(base_model=base, quantize="int4", bundle_library=True, check=False, **how),
                )
    own = folder / f"own-{rank}" / "model.onnx"
    models["the builder's own LoRA"] = own
    if not own.is_file():
        build(base, own, "int4", "cpu", {"adapter_path": str(folder / f"lora-{rank}")})
    return models


def mixed_model(folder: Path, rank: int, rows: int) -> Path:
    """One model of `rows` LoRA adapters."""
    adapters = {f"a{number}": folder / f"mixed-{rank}-{number}" for number in range(rows)}
    for path in adapters.values():
        if not path.is_dir():
            common.make_adapter(folder / "base", path, "lora", rank)
    model = folder / f"mixed-{rank}-{rows}" / "model.onnx"
    if not model.is_file():
        options = ExportOptions(base_model=folder / "base", quantize="int4", bundle_library=True, check=False)
        export_grouped(adapters, model, options)
    return model


def measure_rows(
    models: dict[str, Path], mixed: Path, rows: int, rounds: int, clock_name: str
) -> dict[str, dict[str, float]]:
    """Median milliseconds of a decode step of a batch of `rows`, and ratios to no adapter and to one for all rows."""
    clock, one = common.CLOCKS[clock_name], "one adapter for all rows"
    loaded = {"mixed": load_model(mixed.parent)}
    loaded |= {name: load_model(models[name].parent) for name in (REFERENCE, "separate LoRA")}
    ids = {
        one: np.zeros(rows, np.int64),
        "an adapter for each row": np.arange(rows),
        "none, in a mixed model": -np.ones(rows, np.int64),
    }
    prompt = np.random.default_rng(0).integers(0, 1000, (rows, 16)).astype(np.int32)
    times: dict[str, list[float]] = {name: [] for name in (REFERENCE, "separate LoRA", *ids)}
    for round_ in range(rounds + 1):
        for name in common.shuffled(times, f"rows {round_}"):
            model = loaded.get(name, loaded["mixed"])
            params = og.GeneratorParams(model)
            length = prompt.shape[1] + DECODE + 1
            params.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=rows)
            generator = og.Generator(model, params)
            if name in ids:
                generator.set_model_input("adapter_ids", ids[name])
            generator.append_tokens(prompt)
            generator.generate_next_token()
            step = common.timed(generator.generate_next_token, DECODE, clock)
            if round_:
                times[name].append(step)
    return {
        name: {
            "ms": 1e3 * statistics.median(values),
            "ratio": common.ratio(values, times[REFERENCE]),
            "to_one": common.ratio(values, times[one]),
        }
        for name, values in times.items()
    }


def set_threads(folder: Path, threads: int) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=4))


def measure(models: dict[str, Path], runs: int, rounds: int, clock: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of prefill and decode, and median per-round ratios to REFERENCE."""
    times: Times = {name: {} for name in models}
    for run in range(runs):
        # A fresh process each time: forked ones would share what is in memory already.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            for name, parts in pool.submit(measure_once, models, rounds, clock, run).result().items():
                for part, values in parts.items():
                    times[name].setdefault(part, []).extend(values)
    return common.parts(times, REFERENCE)


def measure_once(models: dict[str, Path], rounds: int, clock_name: str, seed: int) -> Times:
    """Seconds of prefill and seconds per token of decode, by deployment and round."""
    clock = common.CLOCKS[clock_name]
    loaded = {name: load_model(models[name].parent) for name in common.shuffled(models, seed)}
    vocabulary = json.loads((models[REFERENCE].parent / CONFIG_FILE).read_text())["model"]["vocab_size"]
    prompt = np.random.default_rng(0).integers(0, vocabulary, PREFILL).astype(np.int32)
    adapters = {name: og.Adapters(model) for name, model in loaded.items() if "swappable" in name}
    for name, own in adapters.items():
        own.load(str(next(models[name].parent.glob("*.onnx_adapter"))), "it")
    times: Times = {name: {"prefill": [], "decode": []} | ({"swap": []} if name in adapters else {}) for name in models}
    for round_ in range(rounds + 1):
        for name in common.shuffled(models, f"{seed} {round_}"):
            params = og.GeneratorParams(loaded[name])
            length = PREFILL + DECODE + 1
            params.set_search_options(max_length=length, min_length=length, do_sample=False)
            generator = og.Generator(loaded[name], params)
            if own := adapters.get(name):
                swap = common.timed(
                    lambda generator=generator, own=own: generator.set_active_adapter(own, "it"), clock=clock
                )
                times[name]["swap"].append(swap)
            prefill = common.timed(lambda generator=generator: generator.append_tokens(prompt), clock=clock)
            generator.generate_next_token()  # takes the token that the prefill's logits say
            decode = common.timed(generator.generate_next_token, DECODE, clock)
            if round_:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
    return times


def logit_errors(models: dict[str, Path]) -> dict[str, dict[str, float]]:
    """max|a-b| / max|b| of the logits, b: our separate LoRA without the library, in float32 arithmetic."""
    ids = np.random.default_rng(1).integers(0, 1000, (1, 32))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def logits(name: str, *, exact: bool, library: bool) -> Any:
        graph = ir.load(models[name])
        width = json.loads((models[name].parent / CONFIG_FILE).read_text())["model"]["decoder"]["head_size"]
        for value in graph.graph.inputs:
            if value.name.startswith("past_key_values."):
                value.shape = ir.Shape([*value.shape[:-1], width])
        if exact:
            exact_arithmetic(graph)
        return run_session(session_in_memory(graph, models[name], library=library), batch, ["logits"])["logits"]

    expected = logits("separate LoRA", exact=True, library=False)
    rows = {}
    for name in ("separate LoRA", "the builder's own LoRA"):
        rows[name] = {
            kind: float(np.abs(logits(name, exact=exact, library=True) - expected).max() / np.abs(expected).max())
            for kind, exact in (("exact", True), ("shipped", False))
        }
    return rows


if __name__ == "__main__":
    main()
