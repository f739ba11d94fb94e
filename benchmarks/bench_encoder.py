"""Times a whole encoder: base, merged, separate with the library, separate without, and PEFT eager.

    python benchmarks/bench_encoder.py [--model bert-base|minilm] [--kind loratrf|lora] [--threads 2] [--rounds 15]
                                       [--device cuda] [--out bench.json]

The adapter has R = F = 8 on query and value. All deployments run in one process, one call each per round, in a random
order; a figure is the median over rounds of the ratio to `merged` in the same round, so that a machine whose speed
drifts is unfair to none. Prints a Markdown table. With `--device cuda` everything is float16, in ONNX Runtime's CUDA
provider and PyTorch's; token ids go there and logits come back within the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers

from loratrf_deploy import create_session, read_adapter
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.export.graph import finish, trace
from loratrf_deploy.pytorch.base import load_base, sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference
from loratrf_deploy.pytorch.quiet import quiet
from loratrf_deploy.runtime.session import PROVIDERS

SHAPES = [(1, 16), (1, 128), (8, 16), (8, 128)]
REFERENCE = "merged"


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a whole encoder in every deployment.")
    parser.add_argument("--model", choices=["bert-base", "minilm"], default="bert-base")
    parser.add_argument("--kind", choices=["loratrf", "lora"], default="loratrf")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=PROVIDERS, default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, quiet():
        calls, reference = deployments(Path(folder), args.model, args.kind, args.threads, args.device)
        rows = [measure(calls, reference, batch, sequence, args.rounds) for batch, sequence in SHAPES]
    result = {
        "machine": f"{cpu()}, {args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name(),
        "versions": f"ORT {ort.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "model": args.model,
        "adapter": f"{args.kind}, R = F = 8 on query and value",
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['model']}, {result['adapter']}; {result['machine']}; {result['versions']}; {args.rounds} rounds\n")
    names = list(calls)
    print(f"| batch x sequence | {REFERENCE}, ms | " + " | ".join(f"{name} / {REFERENCE}" for name in names[1:]) + " |")
    print("| --- |" + " ---: |" * len(names))
    for row in rows:
        ratios = " | ".join(f"{row['ratios'][name]:.3f}" for name in names[1:])
        print(f"| {row['batch']} x {row['sequence']} | {row['ms']:.2f} | {ratios} |")


def deployments(folder: Path, model: str, kind: str, threads: int, device: str) -> tuple[dict[str, Callable], Any]:
    """name -> call(inputs), `merged` first; and the PyTorch reference that inputs are drawn for."""
    base = make_base(folder / "base", model)
    adapter_path = make_adapter(base, folder / "adapter", kind)
    dtype = "float16" if device == "cuda" else "float32"
    for mode in ("merged", "separate"):
        out = folder / mode / "model.onnx"
        export_adapter(
            adapter_path, out, ExportOptions(base_model=base, mode=mode, dtype=dtype, device=device, check=False)
        )
    adapter = read_adapter(adapter_path)
    bare = load_base(adapter, base, dtype=dtype)
    inputs = {
        name: torch.from_numpy(value) for name, value in sample_inputs(bare, batch=2, sequence=16, seed=0).items()
    }
    program = trace(bare.model, inputs, device=device)
    finish(program)
    ir.save(program, folder / "base.onnx", external_data="base.onnx.data")
    reference = load_reference(adapter, base)
    torch_model = reference.model.to(device, getattr(torch, dtype))

    def onnx_call(path: Path, library: bool) -> Callable:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        session = create_session(path, library=library, providers=[PROVIDERS[device]], options=options)
        return lambda feeds: session.run(None, feeds)

    def eager(feeds: dict[str, np.ndarray]) -> Any:
        with torch.inference_mode():
            output = torch_model(**{name: torch.from_numpy(value).to(device) for name, value in feeds.items()})
            return output.logits.cpu()

    calls = {
        "merged": onnx_call(folder / "merged" / "model.onnx", True),
        "base": onnx_call(folder / "base.onnx", False),
        "separate, library": onnx_call(folder / "separate" / "model.onnx", True),
        "separate, no library": onnx_call(folder / "separate" / "model.onnx", False),
        "PEFT eager": eager,
    }
    return calls, reference


def measure(calls: dict[str, Callable], reference: Any, batch: int, sequence: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of the reference deployment and median per-round ratios of the others to it."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for round_ in range(rounds + 2):
        feeds = sample_inputs(reference, batch=batch, sequence=sequence, seed=round_, padding=False)
        random.Random(round_).shuffle(order)
        for name in order:
            begin = time.perf_counter()
            calls[name](feeds)
            if round_ >= 2:
                times[name].append(time.perf_counter() - begin)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times[REFERENCE], strict=True)) for name in calls
    }
    return {"batch": batch, "sequence": sequence, "ms": 1e3 * statistics.median(times[REFERENCE]), "ratios": ratios}


def make_base(path: Path, model: str) -> Path:
    """BERT-base's shape with random weights, or MiniLM with a random head."""
    torch.manual_seed(0)
    if model == "minilm":
        import sys

        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
        from minilm import base_path

        network = transformers.AutoModelForSequenceClassification.from_pretrained(str(base_path()))
    else:
        network = transformers.BertForSequenceClassification(transformers.BertConfig())
    network.save_pretrained(path)
    return path


def make_adapter(base: Path, path: Path, kind: str) -> Path:
    import peft

    from loratrf_deploy.peft import LoraTrfConfig

    options = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    config = (
        LoraTrfConfig(filter_rank=8, filter_gamma=1, **options) if kind == "loratrf" else peft.LoraConfig(**options)
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name or "trf_" in name:
                value.copy_(0.02 * torch.randn(value.shape, generator=generator))
    adapted.save_pretrained(path)
    return path


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
