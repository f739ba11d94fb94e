"""Time and peak memory of an export, against transformers' OnnxExporter alone on the bare base.

    python benchmarks/bench_export.py [--rounds 3] [--out bench.json]

BERT-base's shape, LoRATRF with R = F = 8 on query and value. Each run is a process of its own; ours and the exporter's
alternate, and a figure is the median over rounds of the ratio in the same round. Both write the model to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BASELINE = """
import sys, torch, transformers
from transformers.exporters.exporter_onnx import OnnxExporter, OnnxConfig
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
ids = torch.randint(0, 30000, (2, 16))
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1, max=512)
config = OnnxConfig(
    ort_fusions="cpu",
    opset_version=20,
    dynamic_shapes={name: {0: batch, 1: sequence} for name in inputs},
    prefer_deferred_runtime_asserts_over_guards=True,
)
OnnxExporter().export(model, inputs, config=config).save_pretrained(sys.argv[2])
"""
OURS = "import sys; from loratrf_deploy.cli.export import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of an export against OnnxExporter alone.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, adapter = _inputs(folder)

        def ours(*more: str) -> list[str]:
            model = str(folder / "out" / "model.onnx")
            return [OURS, "--adapter", str(adapter), "--base-model", str(base), "--out", model, *more]

        commands = {
            "OnnxExporter on the base": [BASELINE, str(base), str(folder / "baseline")],
            "merged, --no-check": ours("--no-check"),
            "separate, --no-check": ours("--no-check", "--mode", "separate"),
            "separate, with the parity check": ours("--mode", "separate"),
        }
        runs: dict[str, list[tuple[float, float]]] = {key: [] for key in commands}
        for _ in range(args.rounds):
            for key, command in commands.items():
                runs[key].append(_run(command))
    reference = runs["OnnxExporter on the base"]
    rows = []
    print(f"| export of BERT-base ({args.rounds} rounds) | s | peak MB | time ratio | memory ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for key, values in runs.items():
        seconds, memory = (statistics.median(value[index] for value in values) for index in (0, 1))
        ratios = [
            statistics.median(a[index] / b[index] for a, b in zip(values, reference, strict=True)) for index in (0, 1)
        ]
        rows.append({"name": key, "seconds": seconds, "peak_mb": memory, "ratios": ratios})
        print(f"| {key} | {seconds:.1f} | {memory:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


def _run(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MB) of one Python process."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed with {process.returncode}: {error}")
    return seconds, usage.ru_maxrss / 1e3


def _inputs(folder: Path) -> tuple[Path, Path]:
    from bench_encoder import _adapter, _base

    base = _base(folder / "base", "bert-base")
    return base, _adapter(base, folder / "adapter", "loratrf")


if __name__ == "__main__":
    main()
