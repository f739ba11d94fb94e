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

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import onnxruntime_genai as og
import torch
import transformers

from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.export.genai import build
from loratrf_deploy.genai.generate import CONFIG_FILE, load_model
from loratrf_deploy.parity.onnx_runs import run_session, session_in_memory
from loratrf_deploy.parity.quantised import exact_arithmetic
from loratrf_deploy.pytorch.quiet import quiet

PREFILL, DECODE = 128, 32
REFERENCE = "no adapter"
Times = dict[str, dict[str, list[float]]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a causal language model in int4 in every deployment.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="of each run")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--keep", type=Path, help="folder for the models, used again where they are there already")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts one thread: add --threads 1")
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
        "machine": f"{_cpu()}, {threads}, {args.clock} clock",
        "versions": f"ORT {ort.__version__}, GenAI {og.__version__}",
        "model": f"LLaMA-3.2-1B's dimensions, {args.layers} layers, {args.vocabulary} tokens, int4",
        "adapter": f"R = F = {args.rank} on all linear layers",
        "rounds": args.runs * args.rounds,
        "timings": timings,
        "errors": errors,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(
        "; ".join(str(result[name]) for name in ("model", "adapter", "machine", "versions"))
        + f"; {args.runs} x {args.rounds} rounds\n"
    )
    print(f"| deployment | prefill {PREFILL}, ms | ratio | decode, ms per token | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, row in timings.items():
        cells = (f"{row[f'{part}_ms']:.2f} | {row[f'{part}_ratio']:.3f}" for part in ("prefill", "decode"))
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| LoRA, error in the logits | int4 weights, float32 arithmetic | as shipped (int8 activations) |")
    print("| --- | ---: | ---: |")
    for name, row in errors.items():
        print(f"| {name} | {row['exact']:.2e} | {row['shipped']:.2e} |")


def deployments(folder: Path, layers: int, rank: int, vocabulary: int) -> dict[str, Path]:
    """name -> model.onnx, REFERENCE first."""
    base = folder / "base"
    if not base.is_dir():
        _base(base, layers, vocabulary)
    models = {REFERENCE: folder / "bare" / "model.onnx"}
    if not models[REFERENCE].is_file():
        build(base, models[REFERENCE], "int4", "cpu", {})
    for kind in ("lora", "loratrf"):
        adapter = folder / f"{kind}-{rank}"
        if not adapter.is_dir():
            _adapter(base, adapter, kind, rank)
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
    rows: dict[str, dict[str, float]] = {}
    for name in models:
        rows[name] = {}
        for part, values in times[name].items():
            ratios = [a / b for a, b in zip(values, times[REFERENCE][part], strict=True)]
            rows[name] |= {f"{part}_ms": 1e3 * statistics.median(values), f"{part}_ratio": statistics.median(ratios)}
    return rows


def measure_once(models: dict[str, Path], rounds: int, clock_name: str, seed: int) -> Times:
    """Seconds of prefill and seconds per token of decode, by deployment and round."""
    clock, order = CLOCKS[clock_name], list(models)
    random.Random(seed).shuffle(order)
    loaded = {name: load_model(models[name].parent) for name in order}
    vocabulary = json.loads((models[REFERENCE].parent / CONFIG_FILE).read_text())["model"]["vocab_size"]
    prompt = np.random.default_rng(0).integers(0, vocabulary, PREFILL).astype(np.int32)
    times: Times = {name: {"prefill": [], "decode": []} for name in models}
    for round_ in range(rounds + 1):
        random.Random(f"{seed} {round_}").shuffle(order)
        for name in order:
            params = og.GeneratorParams(loaded[name])
            length = PREFILL + DECODE + 1
            params.set_search_options(max_length=length, min_length=length, do_sample=False)
            generator = og.Generator(loaded[name], params)
            begin = clock()
            generator.append_tokens(prompt)
            prefill = clock() - begin
            generator.generate_next_token()  # takes the token that the prefill's logits say
            begin = clock()
            for _ in range(DECODE):
                generator.generate_next_token()
            if round_:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append((clock() - begin) / DECODE)
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


def _base(path: Path, layers: int, vocabulary: int, dtype: str = "bfloat16") -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer = path.parent / "tokenizer"
    _tokenizer().save_pretrained(tokenizer)
    for file in tokenizer.iterdir():
        shutil.copy(file, path)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _adapter(base: Path, path: Path, kind: str, rank: int) -> None:
    import peft

    from loratrf_deploy.peft import LoraTrfConfig

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": names, "task_type": "CAUSAL_LM"}
    config = (
        LoraTrfConfig(filter_rank=rank, filter_gamma=1, **options) if kind == "loratrf" else peft.LoraConfig(**options)
    )
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "trf_" in name:
                value.copy_(0.02 * torch.randn(value.shape, generator=generator))
    adapted.save_pretrained(path)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
