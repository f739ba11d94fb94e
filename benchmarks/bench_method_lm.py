"""The method where the number of parameters matters: a small LLaMA moves from code to prose.

    python benchmarks/bench_method_lm.py --train [CONFIG ...] [--processes 2]     # trains what has no record yet
    python benchmarks/bench_method_lm.py                                          # the tables, from the records

The base of bench_perplexity.py (4 layers, 256 wide, trained on Python's standard library), then adapters on eight
tenths of the prose of its help(): 300 steps of 8 x 128 tokens, AdamW. Loss in nats per token on the ninth tenth (held
out, what configurations are chosen by) and on the last (test). Every seed draws its own weights, τ and batches;
configurations of one seed share the batches, so their differences are paired. COMPARED are trained with three seeds,
CHOICES with the first. Records are appended to method_lm.jsonl; those here are of Python 3.11.7, and another Python has
other texts: to measure with it, start without the file.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import numpy as np

RECORDS = Path(__file__).with_name("method_lm.jsonl")
BASE = common.ROOT / "build" / "method_lm"
SEEDS = (0, 1, 2)
BASE_STEPS, STEPS = 600, 300
OUTPUTS = ["o_proj", "down_proj"]


def lora(rank: int, rate: float = 4e-3) -> dict[str, Any]:
    return {"method": "lora", "r": rank, "lora_alpha": 2 * rank, "rate": rate}


def loratrf(**others: Any) -> dict[str, Any]:
    shared = {"method": "loratrf", "r": 4, "lora_alpha": 8, "filter_target_modules": OUTPUTS, "filter_rank": 5}
    return shared | {"filter_gamma": 8.0, "rate": 4e-3} | others


REFERENCE, SAME_SIZE, BEST = "LoRA R=8", "LoRA R=5", "LoRATRF"
COMPARED: dict[str, dict[str, Any]] = {
    REFERENCE: lora(8),
    SAME_SIZE: lora(5),
    "LoRA R=4": lora(4),
    "LoRA R=2": lora(2),
    BEST: loratrf(),
    "s = 1": loratrf(fixed_s=True),
    "τ random": loratrf(start="random"),
    "filter_input base": loratrf(filter_input="base"),
    "γ = 1": loratrf(filter_gamma=1.0),
}
CHOICES: dict[str, dict[str, Any]] = {
    "LoRA R=8, 2e-3": lora(8, 2e-3),
    "LoRA R=8, 8e-3": lora(8, 8e-3),
    "LoRA R=8, 16e-3": lora(8, 16e-3),
    "LoRA R=5, 8e-3": lora(5, 8e-3),
    "LoRA R=5, 16e-3": lora(5, 16e-3),
    "LoRATRF, 2e-3": loratrf(rate=2e-3),
    "LoRATRF, 2e-3, alpha = 16": loratrf(rate=2e-3, lora_alpha=16),
    "LoRATRF, 8e-3": loratrf(rate=8e-3),
    "LoRATRF, 16e-3": loratrf(rate=16e-3),
    "LoRATRF, γ = 32": loratrf(filter_gamma=32.0),
    "R=4, F=10 on down": loratrf(filter_target_modules=["down_proj"], filter_rank=10),
    "R=3, F=6 on k, v, o, down": loratrf(
        r=3, lora_alpha=6, filter_target_modules=["k_proj", "v_proj", *OUTPUTS], filter_rank=6
    ),
    "R=2, F=7 on q, k, v, o, down": loratrf(
        r=2, lora_alpha=4, filter_target_modules=["q_proj", "k_proj", "v_proj", *OUTPUTS], filter_rank=7
    ),
}
CONFIGS = COMPARED | CHOICES


@cache
def corpus() -> tuple[Any, Any, Any, Any, Any]:
    """Tokenizer; tokens of the code, of the prose to train on, held out, and for the test."""
    import bench_perplexity
    import torch

    code, prose = bench_perplexity.texts()
    tokenizer = bench_perplexity.make_tokenizer(code)
    cuts = [0, len(prose) * 8 // 10, len(prose) * 9 // 10, len(prose)]
    parts = [code, *(prose[begin:end] for begin, end in pairwise(cuts))]
    return tokenizer, *(torch.tensor(tokenizer(part)["input_ids"]) for part in parts)


def make_base() -> None:
    import bench_perplexity
    import torch

    torch.set_num_threads(1)  # the sums' order, and with it the base, is the same everywhere
    torch.manual_seed(0)
    tokenizer, code, *_ = corpus()
    model = bench_perplexity.make_model(len(tokenizer))
    bench_perplexity.train(model, code, BASE_STEPS, 1e-3)
    model.save_pretrained(BASE)


def loss(model: Any, tokens: Any) -> float:
    """Mean of -log p(token | those before it in its window of 128), in nats; each window's first token is left out."""
    import torch

    windows = tokens[: len(tokens) // 128 * 128].view(-1, 128)
    with torch.inference_mode():
        losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(64)]
    return sum(losses) / len(windows)


def train(run: tuple[str, int]) -> dict[str, Any]:
    """Trains one adapter in this process; returns its record."""
    import bench_perplexity
    import peft
    import torch
    import transformers

    from loratrf_deploy.peft import LoraTrfConfig, initialize_filters, layer

    torch.set_num_threads(1)
    name, seed = run
    options = dict(CONFIGS[name])
    method, rate = options.pop("method"), options.pop("rate")
    start, fixed_s = options.pop("start", "data"), options.pop("fixed_s", False)
    torch.manual_seed(seed)
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    kind = LoraTrfConfig if method == "loratrf" else peft.LoraConfig
    model: Any = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", target_modules=common.LINEAR, **options))
    _, _, training, held_out, test = corpus()
    if method == "loratrf" and start == "data":
        initialize_filters(model, [{"input_ids": training[: 64 * 128].view(64, 128)}])
    score = layer.filter_score
    if fixed_s:
        score = lambda z, tau: torch.ones_like(z[..., :1], dtype=torch.float32)  # noqa: E731
    torch.manual_seed(1000 + seed)
    with patch.object(layer, "filter_score", score):
        bench_perplexity.train(model, training, STEPS, rate)
        losses = {"held_out": round(loss(model, held_out), 5), "test": round(loss(model, test), 5)}
    # τ has no part in s = 1.
    trained = sum(
        part.numel()
        for key, part in model.named_parameters()
        if part.requires_grad and not (fixed_s and "trf_tau" in key)
    )
    return {"config": name, "seed": seed, "options": CONFIGS[name], "parameters": trained} | losses


def records() -> dict[tuple[str, int], dict[str, Any]]:
    """By configuration and seed; those of the configurations as they are now."""
    rows = common.read_records(RECORDS)
    return {(row["config"], row["seed"]): row for row in rows if CONFIGS.get(row["config"]) == row["options"]}


def train_missing(names: list[str], processes: int) -> None:
    if not BASE.exists():
        make_base()
    done = records()
    runs = [(name, seed) for seed in SEEDS for name in (COMPARED if seed else CONFIGS)]
    wanted = [run for run in runs if run not in done and (not names or run[0] in names)]
    print(f"{len(wanted)} runs to do, {len(done)} recorded", flush=True)
    common.append_records(train, wanted, RECORDS, processes)


def compared(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Markdown: nats per token, mean over seeds, and differences seed by seed with their standard error."""
    others = (REFERENCE, SAME_SIZE, BEST)
    if any((name, seed) not in found for name in others for seed in SEEDS):
        return ""
    rows = []
    for name in COMPARED:
        if all((name, seed) in found for seed in SEEDS):
            test = np.array([found[name, seed]["test"] for seed in SEEDS])
            less = [test - np.array([found[other, seed]["test"] for seed in SEEDS]) for other in others]
            cells = [f"{d.mean():+.4f} ± {d.std(ddof=1) / len(SEEDS) ** 0.5:.4f}" if d.any() else "" for d in less]
            size = found[name, SEEDS[0]]["parameters"]
            share = size / found[REFERENCE, SEEDS[0]]["parameters"]
            rows.append([name, size, f"{share:.1%}", f"{test.mean():.4f}", *cells])
    columns = ["configuration", "trained", f"of {REFERENCE}", "test", *(f"less {name}" for name in others)]
    return common.table(columns, rows)


def chosen(found: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Markdown: held-out nats per token of the first seed."""
    rows = [(name, found[name, SEEDS[0]]) for name in CONFIGS if (name, SEEDS[0]) in found]
    cells = ([name, row["parameters"], f"{row['held_out']:.4f}"] for name, row in rows)
    return common.table(["configuration", "trained", "held out"], cells)


def main() -> None:
    parser = common.parser(__doc__, processes=os.cpu_count())
    parser.add_argument("--train", nargs="*", metavar="CONFIG", help="train these configurations (none named: all)")
    args = parser.parse_args()
    if args.train is not None:
        train_missing(args.train, args.processes)
    found = records()
    print(compared(found), chosen(found), sep="\n\n")


if __name__ == "__main__":
    main()
