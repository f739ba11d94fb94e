"""Time and peak memory of an export, against transformers' OnnxExporter alone on the bare base.

    python benchmarks/bench_export.py [--rounds 3] [--out bench.json]

BERT-base's shape, LoRATRF with R = F = 8 on query and value. Each run is a process of its own; ours and the exporter's
alternate, and a figure is the median over rounds of the ratio in the same round. Both write the model to disk.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import common

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
REFERENCE = "OnnxExporter on the base"


def main() -> None:
    args = common.parser(__doc__, rounds=3, out=None).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = common.make_base(folder / "base", "bert-base")
        adapter = common.make_adapter(base, folder / "adapter", "loratrf")

        def ours(*more: str) -> tuple[float, float]:
            return common.measured_export(adapter, base, folder / "out" / "model.onnx", *more)

        calls = {
            REFERENCE: lambda: common.measured(BASELINE, base, folder / "baseline"),
            "merged, --no-check": lambda: ours("--no-check"),
            "separate, --no-check": lambda: ours("--no-check", "--mode", "separate"),
            "separate, with the parity check": lambda: ours("--mode", "separate"),
        }
        runs: dict[str, list[tuple[float, float]]] = {key: [] for key in calls}
        for _ in range(args.rounds):
            for key, call in calls.items():
                runs[key].append(call())
    columns = {key: list(zip(*values, strict=True)) for key, values in runs.items()}  # all seconds, all megabytes
    rows = [
        {
            "name": key,
            "seconds": statistics.median(values[0]),
            "peak_mb": statistics.median(values[1]),
            "ratios": [common.ratio(values[index], columns[REFERENCE][index]) for index in (0, 1)],
        }
        for key, values in columns.items()
    ]
    head = [f"export of BERT-base ({args.rounds} rounds)", "s", "peak MB", "time ratio", "memory ratio"]
    cells = (
        [row["name"], f"{row['seconds']:.1f}", f"{row['peak_mb']:.0f}", *(f"{ratio:.2f}" for ratio in row["ratios"])]
        for row in rows
    )
    print(common.table(head, cells))
    common.save(args.out, rows)


if __name__ == "__main__":
    main()
