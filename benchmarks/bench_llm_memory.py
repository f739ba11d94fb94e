"""Peak memory and time of exporting a causal language model, against the size of its float32 weights.

    python benchmarks/bench_llm_memory.py [--layers 16] [--checkpoint float32|bfloat16] [--keep FOLDER] [--case NAME]

LLaMA-3.2-1B's dimensions with random weights, LoRATRF with R = F = 8 on all linear layers. Each export is a process of
its own, without the parity check. `weights` is what the graph's weights take in float32, the tied ones once.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import common
from safetensors import safe_open

CASES = {
    "separate, float32": ("--mode", "separate"),
    "merged, float32": ("--mode", "merged"),
    "separate, int4": ("--mode", "separate", "--quantize", "int4"),
    "merged, int4": ("--mode", "merged", "--quantize", "int4"),
}


def main() -> None:
    parser = common.parser(__doc__, layers=16, keep=None)
    parser.add_argument("--checkpoint", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--case", choices=CASES, action="append", help="repeatable; default: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        base, adapter = folder / "base", folder / "adapter"
        if not base.is_dir():
            common.make_llama(base, args.layers, 128256, args.checkpoint)
        if not adapter.is_dir():
            common.make_adapter(base, adapter, "loratrf")
        weights = 4 * sum(values(file) for file in base.glob("*.safetensors"))
        print(f"{args.layers} layers, {args.checkpoint} checkpoint, weights in float32: {weights / 1e9:.2f} GB\n")
        print(common.head(["export", "s", "peak GB", "peak / float32 weights"]))
        for case in args.case or CASES:
            out = folder / "out" / "model.onnx"
            seconds, megabytes = common.measured_export(adapter, base, out, "--no-check", *CASES[case])
            shutil.rmtree(out.parent)
            cells = [f"{seconds:.0f}", f"{megabytes / 1e3:.2f}", f"{1e6 * megabytes / weights:.2f}"]
            print(common.line([case, *cells]), flush=True)


def values(file: Path) -> int:
    with safe_open(file, "numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 (no mapping)


if __name__ == "__main__":
    main()
