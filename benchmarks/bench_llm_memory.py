"""Peak memory and time of exporting a causal language model, against the size of its float32 weights.

    python benchmarks/bench_llm_memory.py [--layers 16] [--checkpoint float32|bfloat16] [--keep FOLDER] [--case NAME]

LLaMA-3.2-1B's dimensions with random weights, LoRATRF with R = F = 8 on all linear layers. Each export is a process of
its own, without the parity check. `weights` is what the graph's weights take in float32, the tied ones once.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from bench_export import OURS, _run
from bench_llm import _adapter, _base
from safetensors import safe_open

CASES = {
    "separate, float32": ("--mode", "separate"),
    "merged, float32": ("--mode", "merged"),
    "separate, int4": ("--mode", "separate", "--quantize", "int4"),
    "merged, int4": ("--mode", "merged", "--quantize", "int4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of exporting a causal language model.")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--checkpoint", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--keep", type=Path, help="folder for the base and the adapter, used again if there")
    parser.add_argument("--case", choices=CASES, action="append", help="repeatable; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        base, adapter = folder / "base", folder / "adapter"
        if not base.is_dir():
            _base(base, args.layers, 128256, args.checkpoint)
        if not adapter.is_dir():
            _adapter(base, adapter, "loratrf", 8)
        weights = 4 * sum(_values(file) for file in base.glob("*.safetensors"))
        print(f"{args.layers} layers, {args.checkpoint} checkpoint, weights in float32: {weights / 1e9:.2f} GB\n")
        print("| export | s | peak GB | peak / float32 weights |\n| --- | ---: | ---: | ---: |")
        for case in args.case or CASES:
            out = folder / "out" / "model.onnx"
            options = ["--adapter", str(adapter), "--base-model", str(base), "--out", str(out), "--no-check"]
            seconds, megabytes = _run([OURS, *options, *CASES[case]])
            shutil.rmtree(out.parent)
            print(f"| {case} | {seconds:.0f} | {megabytes / 1e3:.2f} | {1e6 * megabytes / weights:.2f} |", flush=True)


def _values(file: Path) -> int:
    total = 0
    with safe_open(file, "numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            size = 1
            for length in tensors.get_slice(name).get_shape():
                size *= length
            total += size
    return total


if __name__ == "__main__":
    main()
