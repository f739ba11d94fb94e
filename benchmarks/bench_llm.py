"""Times a causal language model in int4 on the CPU: no adapter, merged, separate LoRA and LoRATRF, the builder's LoRA.

    python benchmarks/bench_llm.py [--layers 4] [--rank 8] [--runs 5] [--rounds 4] [--threads 2] [--clock wall|cpu]
                                   [--vocabulary 128256] [--keep FOLDER] [--out bench.json]

LLaMA-3.2-1B's dimensions (hidden 2048, ffn 8192, 32 heads, 8 key/value heads, 128256 tokens, tied) with random weights
and `--layers` layers; R = F = `--rank` on all linear layers. Prefill is 128 tokens, decode the next 32, batch 1. In a
round the deployments run one after the other, in a random order; a figure is the median over rounds of the ratio to
"no adapter" in the same round. Where a model's weights come to lie in memory is worth some per cent, and stays so for a
process: every `--runs` is a process of its own that loads them in another order. `--clock cpu` counts the CPU time of
the one thread, which a busy machine disturbs far less (it needs --threads 1).

The second table is the error in the logits: against the same int4 base with the exact adapter, computed in float32.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og

from loratrf_deploy.export import ExportOptions, export_adapter
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
    args = common.parse(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            models = deployments(folder, args.layers, args.rank, args.vocabulary)
        for path in models.values():
            set_threads(path.parent, args.threads)
        timings = measure(models, args.runs, args.rounds, args.clock)
        errors = logit_errors(models)
    threads = f"{args.threads} thread{'s' if args.threads > 1 else ''}"
    result = {
        "machine": f"{common.cpu_name()}, {threads}, {args.clock} clock",
        "versions": f"ORT {ort.__version__}, GenAI {og.__version__}",
        "model": f"LLaMA-3.2-1B's dimensions, {args.layers} layers, {args.vocabulary} tokens, int4",
        "adapter": f"R = F = {args.rank} on all linear layers",
        "rounds": args.runs * args.rounds,
        "timings": timings,
        "errors": errors,
    }
    common.save(args.out, result)
    print(
        "; ".join(str(result[name]) for name in ("model", "adapter", "machine", "versions"))
        + f"; {args.runs} x {args.rounds} rounds\n"
    )
    columns = ["deployment", f"prefill {PREFILL}, ms", "ratio", "decode, ms per token", "ratio"]
    rows = ([name, *(f"{row[part]:.{digits}f}" for part, digits in DIGITS.items())] for name, row in timings.items())
    print(common.table(columns, rows), end="\n\n")
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
        for mode in ("merged", "separate"):
            if (kind, mode) == ("loratrf", "merged"):
                continue
            model = folder / f"{kind}-{rank}-{mode}" / "model.onnx"
            models[f"{mode} {'LoRATRF' if kind == 'loratrf' else 'LoRA'}"] = model
            if not model.is_file():
                export_adapter(
                    adapter,
                    model,
                    ExportOptions(base_model=base, mode=mode, quantize="int4", bundle_library=True, check=False),
                )
    own = folder / f"own-{rank}" / "model.onnx"
    models["the builder's own LoRA"] = own
    if not own.is_file():
        build(base, own, "int4", "cpu", {"adapter_path": str(folder / f"lora-{rank}")})
    return models


def set_threads(folder: Path, threads: int) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=4))


def measure(models: dict[str, Path], runs: int, rounds: int, clock: str) -> dict[str, dict[str, float]]:
    """Median milliseconds of prefill and decode, and median per-round ratios to REFERENCE."""
    times: Times = {name: {"prefill": [], "decode": []} for name in models}
    for run in range(runs):
        # A fresh process each time: forked ones would share what is in memory already.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            for name, parts in pool.submit(measure_once, models, rounds, clock, run).result().items():
                for part, values in parts.items():
                    times[name][part] += values
    return common.parts(times, REFERENCE)


def measure_once(models: dict[str, Path], rounds: int, clock_name: str, seed: int) -> Times:
    """Seconds of prefill and seconds per token of decode, by deployment and round."""
    clock = common.CLOCKS[clock_name]
    loaded = {name: load_model(models[name].parent) for name in common.shuffled(models, seed)}
    vocabulary = json.loads((models[REFERENCE].parent / CONFIG_FILE).read_text())["model"]["vocab_size"]
    prompt = np.random.default_rng(0).integers(0, vocabulary, PREFILL).astype(np.int32)
    times: Times = {name: {"prefill": [], "decode": []} for name in models}
    for round_ in range(rounds + 1):
        for name in common.shuffled(models, f"{seed} {round_}"):
            params = og.GeneratorParams(loaded[name])
            length = PREFILL + DECODE + 1
            params.set_search_options(max_length=length, min_length=length, do_sample=False)
            generator = og.Generator(loaded[name], params)
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
