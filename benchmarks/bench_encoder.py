"""Times a whole encoder: base, merged, separate with the library, separate without, int8, and PEFT eager.

    python benchmarks/bench_encoder.py [--model bert-base|minilm] [--kind loratrf|lora] [--threads 2] [--rounds 15]
                                       [--device cuda] [--out bench.json]

The adapter has R = F = 8 on query and value. All deployments run in one process, one call each per round, in a random
order; a figure is the median over rounds of the ratio to `merged` in the same round, so that a machine whose speed
drifts is unfair to none. Prints a Markdown table, and the files' sizes. On a CPU there are merged and separate in int8
besides, and what ONNX Runtime's quantize_dynamic (per channel, 7 bits) makes of the merged model. With `--device cuda`
everything is float16, in ONNX Runtime's CUDA provider and PyTorch's; token ids go there and logits come back within the
time.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers
from onnxruntime.quantization import QuantType, quantize_dynamic

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
    args = common.parser(
        __doc__, model="bert-base", kind="loratrf", threads=os.cpu_count(), rounds=15, device="cpu", out=None
    ).parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, quiet():
        calls, reference = deployments(Path(folder), args.model, args.kind, args.threads, args.device)
        sizes = {model.parent.name: megabytes(model.parent) for model in sorted(Path(folder).glob("*/model.onnx"))}
        rows = [measure(calls, reference, batch, sequence, args.rounds) for batch, sequence in SHAPES]
    machine = f"{common.cpu_name()}, {args.threads} threads"
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    result = {
        "machine": machine,
        "versions": f"ORT {ort.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "model": args.model,
        "adapter": f"{args.kind}, R = F = 8 on query and value",
        "rows": rows,
        "megabytes": sizes,
    }
    common.save(args.out, result)
    print(f"{result['model']}, {result['adapter']}; {result['machine']}; {result['versions']}; {args.rounds} rounds\n")
    columns = ["batch x sequence", f"{REFERENCE}, ms", *(f"{name} / {REFERENCE}" for name in list(calls)[1:])]
    cells = []
    for row in rows:
        ratios = [f"{ratio:.3f}" for ratio in row["ratios"].values()]
        cells.append([f"{row['batch']} x {row['sequence']}", f"{row['ms']:.2f}", *ratios[1:]])
    print(common.table(columns, cells))
    print("\nMegabytes: " + ", ".join(f"{name} {size:.1f}" for name, size in sizes.items()))


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*")) / 1e6


def deployments(folder: Path, model: str, kind: str, threads: int, device: str) -> tuple[dict[str, Callable], Any]:
    """name -> call(inputs), `merged` first; and the PyTorch reference that inputs are drawn for."""
    base = common.make_base(folder / "base", model)
    adapter_path = common.make_adapter(base, folder / "adapter", kind)
    dtype = "float16" if device == "cuda" else "float32"
    quantisations = ("none",) if device == "cuda" else ("none", "int8")
    for mode in ("merged", "separate"):
        for quantize in quantisations:
            options = ExportOptions(
                base_model=base, mode=mode, dtype=dtype, device=device, quantize=quantize, check=False
            )
            export_adapter(adapter_path, folder / f"{mode}-{quantize}" / "model.onnx", options)
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
        options = common.session_options(threads)
        session = create_session(path, library=library, providers=[PROVIDERS[device]], options=options)
        return lambda feeds: session.run(None, feeds)

    def eager(feeds: dict[str, np.ndarray]) -> Any:
        with torch.inference_mode():
            output = torch_model(**{name: torch.from_numpy(value).to(device) for name, value in feeds.items()})
            return output.logits.cpu()

    calls = {
        "merged": onnx_call(folder / "merged-none" / "model.onnx", True),
        "base": onnx_call(folder / "base.onnx", False),
        "separate, library": onnx_call(folder / "separate-none" / "model.onnx", True),
        "separate, no library": onnx_call(folder / "separate-none" / "model.onnx", False),
        "PEFT eager": eager,
    }
    if device == "cpu":
        other = folder / "quantize_dynamic" / "model.onnx"
        other.parent.mkdir()
        quantize_dynamic(
            folder / "merged-none" / "model.onnx",
            other,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        calls |= {
            "merged int8": onnx_call(folder / "merged-int8" / "model.onnx", True),
            "separate int8": onnx_call(folder / "separate-int8" / "model.onnx", True),
            "quantize_dynamic": onnx_call(other, True),
        }
    return calls, reference


def measure(calls: dict[str, Callable], reference: Any, batch: int, sequence: int, rounds: int) -> dict[str, Any]:
    """Median milliseconds of the reference deployment and median per-round ratios of the others to it."""

    def feeds(round_: int) -> list[Any]:
        return [sample_inputs(reference, batch=batch, sequence=sequence, seed=round_, padding=False)]

    times = common.interleaved(calls, rounds, feeds)
    milliseconds, ratios = 1e3 * statistics.median(times[REFERENCE]), common.ratios(times, REFERENCE)
    return {"batch": batch, "sequence": sequence, "ms": milliseconds, "ratios": ratios}


if __name__ == "__main__":
    main()
