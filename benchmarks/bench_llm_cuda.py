"""Times a LLaMA layer stack in ONNX Runtime on a GPU: no adapter, merged, separate LoRA and LoRATRF.

    python benchmarks/bench_llm_cuda.py [--layers 4] [--vocabulary 32064] [--rank 8] [--prefill 512] [--decode 64]
                                        [--rounds 15] [--device cuda|cpu] [--out bench.json]

LLaMA-3.2-1B's layers in float16 with random weights; a quarter of its layers and of its tokens, so that the head has
its share of the whole model. R = F = `--rank` on all linear layers, batch 1. onnxruntime-genai's builder makes the
graphs (its CPU build will do); they run in plain ONNX Runtime sessions: keys and values stay in buffers on the
device, past and present in one, as GroupQueryAttention wants them, and the logits stay there too. The tokens are
given, not chosen. A time is the host's, from the ids in host memory to the end of the run.

In a round the deployments run one after the other, in a random order; a figure is the median over rounds of the ratio
to "merged LoRA" in the same round. The last column is max|a-b| / max|b| of the last logits: merged against a run of
all tokens at once, LoRA against merged, LoRATRF against its definition in standard ops; more than rounding explains
is an error. `--device cpu` runs all of it in float32 on a CPU, to try the script out.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from loratrf_deploy import create_session
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.export.genai import build, check_precision
from loratrf_deploy.genai.generate import CONFIG_FILE
from loratrf_deploy.pytorch.quiet import quiet
from loratrf_deploy.runtime.session import PROVIDERS

REFERENCE = "merged LoRA"
DTYPES = {"cuda": "float16", "cpu": "float32"}
WHOLE = "all tokens at once"
TWINS = {
    REFERENCE: WHOLE,
    "separate LoRA": REFERENCE,
    "separate LoRA, no library": REFERENCE,
    "separate LoRATRF": "separate LoRATRF, no library",
}
"""What computes the same."""
TOLERANCES = {"float16": 1e-2, "float32": 1e-4}


class Decoder:
    """One deployment, with room for `length` tokens in its cache."""

    def __init__(self, model: Path, library: bool, device: str, length: int) -> None:
        self._session = create_session(model, library=library, providers=[PROVIDERS[device]])
        self._binding, self._device = self._session.io_binding(), device
        config = json.loads((model.parent / CONFIG_FILE).read_text())["model"]["decoder"]
        empty = np.zeros((1, config["num_key_value_heads"], length, config["head_size"]), DTYPES[device])
        for value in self._session.get_inputs():
            if value.name.startswith("past_key_values."):
                cache = ort.OrtValue.ortvalue_from_numpy(empty, device)
                self._binding.bind_ortvalue_input(value.name, cache)
                self._binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)

    def step(self, ids: NDArray[np.int64], seen: int) -> float:
        """Runs `ids` behind `seen` tokens that the cache holds; returns the seconds that it took."""
        mask = np.ones((1, seen + len(ids)), np.int64)
        begin = time.perf_counter()
        self._binding.bind_cpu_input("input_ids", ids[None])
        self._binding.bind_cpu_input("attention_mask", mask)
        self._binding.bind_output("logits", self._device)
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return time.perf_counter() - begin

    def logits(self) -> NDArray[np.float64]:
        """Of the last token that ran."""
        logits = self._binding.get_outputs()[-1]  # outputs come in the order in which they were bound first
        return logits.numpy()[0, -1].astype(np.float64)


def main() -> None:
    parser = common.parser(__doc__, layers=4, vocabulary=32064, rank=8, rounds=15, device="cuda", out=None)
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, quiet():
        models = deployments(Path(folder), args.layers, args.rank, args.vocabulary, args.device)
        length = args.prefill + args.decode
        decoders = {name: Decoder(*model, args.device, length) for name, model in models.items()}
        ids = np.random.default_rng(0).integers(0, args.vocabulary, length)
        rows = measure(decoders, ids, args.prefill, args.rounds)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    result = {"machine": machine, "onnxruntime": ort.__version__, **vars(args), "rows": rows}
    common.save(args.out, result)
    print(f"{args.layers} of LLaMA-3.2-1B's layers, {args.vocabulary} tokens, {DTYPES[args.device]}, ", end="")
    print(f"R = F = {args.rank}; {machine}, ONNX Runtime {ort.__version__}; {args.rounds} rounds\n")
    columns = ["deployment", f"prefill {args.prefill}, ms", "ratio", "decode, ms per token", "ratio", "error"]
    cells = []
    for name, row in rows.items():
        figures = [f"{row[part]:.3f}" for part in ("prefill_ms", "prefill_ratio", "decode_ms", "decode_ratio")]
        cells.append([name, *figures, f"{row['error']:.1e}" if name in TWINS else ""])
    print(common.table(columns, cells))
    if wrong := [name for name in TWINS if not rows[name]["error"] < TOLERANCES[DTYPES[args.device]]]:
        sys.exit(f"error: {', '.join(wrong)}: the logits are wrong")


def deployments(folder: Path, layers: int, rank: int, vocabulary: int, device: str) -> dict[str, tuple[Path, bool]]:
    """name -> (model, with the library?)."""
    base, dtype = folder / "base", DTYPES[device]
    common.make_llama(base, layers, vocabulary)

    def export(kind: str, mode: str) -> Path:
        adapter, model = folder / kind, folder / f"{kind}-{mode}" / "model.onnx"
        if not adapter.is_dir():
            common.make_adapter(base, adapter, kind, rank)
        export_adapter(
            adapter, model, ExportOptions(base_model=base, mode=mode, dtype=dtype, device=device, check=False)
        )
        return model

    bare = folder / "bare" / "model.onnx"
    build(base, bare, check_precision(device, "none", dtype), device, {})
    lora, loratrf = (export(kind, "separate") for kind in ("lora", "loratrf"))
    return {
        "no adapter": (bare, False),
        REFERENCE: (export("lora", "merged"), False),
        "separate LoRA": (lora, True),
        "separate LoRA, no library": (lora, False),
        "separate LoRATRF": (loratrf, True),
        "separate LoRATRF, no library": (loratrf, False),
    }


def measure(decoders: dict[str, Decoder], ids: NDArray[np.int64], prefill: int, rounds: int) -> dict[str, Any]:
    """By deployment: median milliseconds, median ratios to REFERENCE in the same round, and the logits' error."""
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in decoders}
    logits = {}
    for round_ in range(rounds + common.WARM_UP):
        for name in common.shuffled(decoders, round_):
            first = decoders[name].step(ids[:prefill], 0)
            rest = [decoders[name].step(ids[seen : seen + 1], seen) for seen in range(prefill, len(ids))]
            if round_ >= common.WARM_UP:
                times[name]["prefill"].append(first)
                times[name]["decode"].append(statistics.mean(rest))
            logits[name] = decoders[name].logits()
    decoders[REFERENCE].step(ids, 0)
    logits[WHOLE] = decoders[REFERENCE].logits()
    rows: dict[str, Any] = common.parts(times, REFERENCE)
    for name in rows:
        if twin := TWINS.get(name):
            rows[name]["error"] = float(np.abs(logits[name] - logits[twin]).max() / np.abs(logits[twin]).max())
    return rows


if __name__ == "__main__":
    main()
