"""The method's own claim: does LoRATRF, with a third fewer parameters than LoRA, score as well or better?

    python benchmarks/bench_method.py --train [CONFIG ...] [--processes 2]    # trains what has no record yet
    python benchmarks/bench_method.py                                         # tables and pictures from the records

MiniLM on RTE, MRPC, CoLA and SST-2 with examples/train_glue.py. Configurations are chosen by the held-out tenth of
train on CHOICE_TASKS with a seed of its own, and their dev scores are never recorded; those compared are trained on
every task with three seeds. One run after another is appended to method.jsonl, so a stopped --train goes on where it
was. Each process has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).with_name("method.jsonl")
ADAPTERS = ROOT / "build" / "method"
sys.path.insert(0, str(ROOT / "examples"))

EPOCHS = {"rte": 5, "mrpc": 4, "cola": 4, "sst2": 3}
METRICS = {"rte": "accuracy", "mrpc": "accuracy", "cola": "matthews", "sst2": "accuracy"}
SEEDS = (0, 1, 2)
CHOICE_TASKS = ("cola", "mrpc")
CHOICE_SEED = 100


@dataclass(frozen=True)
class Config:
    """Arguments of train_glue.py; `fixed_s` puts s = 1 in every filter, which leaves τ without a part."""

    arguments: str
    fixed_s: bool = False


TARGETS = "query,value,attention.output.dense,output.dense,pooler.dense"
SHARED = f"--dropout 0 --batch 16 --learning-rate 5e-4 --targets {TARGETS}"
LORA = f"{SHARED} --method lora"
TRF = f"{SHARED} --method loratrf"

REFERENCE = "LoRA R=8"
BEST = "LoRATRF"
COMPARED: dict[str, Config] = {
    REFERENCE: Config(f"{LORA} --rank 8 --alpha 16"),
    BEST: Config(f"{TRF} --rank 4 --alpha 8 --filter-rank 1 --filter-gamma 8"),
    "LoRA R=4": Config(f"{LORA} --rank 4 --alpha 8"),
}
CHOICES: dict[str, Config] = {}


def adapter_folder(name: str, task: str, seed: int) -> Path:
    return ADAPTERS / name.replace(" ", "-") / f"{task}-{seed}"


def settings(config: Config, task: str, seed: int) -> list[str]:
    """What decides a run, and what its record is found by."""
    return [*config.arguments.split(), "--task", task, "--seed", str(seed), "--epochs", str(EPOCHS[task])]


def train(name: str, config: Config, task: str, seed: int, arguments: list[str]) -> dict[str, Any]:
    """One run in a process of its own; returns its record."""
    import torch
    import train_glue

    from loratrf_deploy import _peft_layer

    torch.set_num_threads(1)
    score = _peft_layer.filter_score
    if config.fixed_s:
        _peft_layer.filter_score = lambda z, tau: torch.ones_like(z[..., :1], dtype=torch.float32)
    try:
        out = adapter_folder(name, task, seed)
        results = train_glue.train(train_glue.arguments([*arguments, "--out", str(out)]))
    finally:
        _peft_layer.filter_score = score
    metric = METRICS[task]
    record = {
        "config": name,
        "task": task,
        "seed": seed,
        "arguments": " ".join(arguments),
        "parameters": results["trained_parameters"]["adapter"],
        "held_out": results["held_out_by_epoch"],
        "seconds": results["seconds"],
    }
    if name in COMPARED:
        record["dev"] = results["dev"][metric]
    return record


def records() -> dict[tuple[str, str], dict[str, Any]]:
    """(configuration, arguments) -> record."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {(record["config"], record["arguments"]): record for record in map(json.loads, lines)}


def runs() -> list[tuple[str, Config, str, int]]:
    compared = [(name, config, task, seed) for seed in SEEDS for name, config in COMPARED.items() for task in EPOCHS]
    choices = [(name, config, task, CHOICE_SEED) for task in CHOICE_TASKS for name, config in CHOICES.items()]
    return [*choices, *compared]


def train_missing(names: list[str], processes: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    done = records()
    wanted = []
    for name, config, task, seed in runs():
        arguments = settings(config, task, seed)
        if (name, " ".join(arguments)) not in done and (not names or name in names):
            wanted.append((name, config, task, seed, arguments))
    print(f"{len(wanted)} runs to do, {len(done)} recorded", flush=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for run in as_completed([pool.submit(train, *run) for run in wanted]):
            record = run.result()
            with RECORDS.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


def compared(rows: list[dict[str, Any]]) -> str:
    """Markdown: dev scores in percent, mean ± standard deviation over seeds; the mean of a seed is over all tasks."""
    lines = [
        f"| configuration | trained | of LoRA R = 8 | {' | '.join(EPOCHS)} | mean |",
        f"| --- | ---: | ---: | {'---: | ' * len(EPOCHS)}---: |",
    ]
    for name in COMPARED:
        scores = table(rows, name)
        if scores is None:
            continue
        parameters = next(row["parameters"] for row in rows if row["config"] == name)
        reference = next(row["parameters"] for row in rows if row["config"] == REFERENCE)
        cells = [f"{column.mean():.1f} ± {column.std(ddof=1):.1f}" for column in (*scores.T, scores.mean(1))]
        lines.append(f"| {name} | {parameters} | {parameters / reference:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], name: str) -> NDArray[np.float64] | None:
    """Dev scores in percent of a configuration, (seeds, tasks); None while a run is missing."""
    scores = {(row["seed"], row["task"]): 100 * row["dev"] for row in rows if row["config"] == name}
    if any((seed, task) not in scores for seed in SEEDS for task in EPOCHS):
        return None
    return np.array([[scores[seed, task] for task in EPOCHS] for seed in SEEDS])


def chosen(rows: list[dict[str, Any]]) -> str:
    """Markdown: held-out scores in percent of the configurations that were chosen from."""
    lines = [
        f"| configuration | trained | {' | '.join(CHOICE_TASKS)} |",
        f"| --- | ---: | {'---: | ' * len(CHOICE_TASKS)}",
    ]
    for name in CHOICES:
        scores = {row["task"]: row for row in rows if row["config"] == name}
        if scores:
            cells = [f"{100 * scores[task]['held_out']:.1f}" if task in scores else "" for task in CHOICE_TASKS]
            parameters = next(iter(scores.values()))["parameters"]
            lines.append(f"| {name} | {parameters} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_scores(rows: list[dict[str, Any]], file: Path) -> None:
    """Mean dev score against trained parameters, one point a configuration, bars of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, config in COMPARED.items():
        scores = table(rows, name)
        if scores is None:
            continue
        parameters = next(row["parameters"] for row in rows if row["config"] == name)
        means = scores.mean(1)
        colour = {"loratrf": "tab:red", "lora": "tab:blue", "dora": "tab:green"}.get(method(config), "tab:gray")
        axes.errorbar(parameters / 1000, means.mean(), means.std(ddof=1), fmt="o", capsize=3, color=colour)
        axes.annotate(name, (parameters / 1000, means.mean()), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set_xlabel("trained parameters of the adapter, thousands")
    axes.set_ylabel("mean dev score, four tasks, %")
    axes.grid(alpha=0.3)
    figure.savefig(file, metadata={"Date": None})


def filter_scores(adapter: Path, task: str) -> dict[str, NDArray[np.float32]]:
    """s of every dev token by the filter's module, in the order of the forward pass. Padding is left out."""
    import glue
    import torch
    import transformers
    from peft import PeftModel

    import loratrf_deploy.peft
    import minilm
    from loratrf_deploy import _peft_layer

    base = minilm.base_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(model, adapter).eval()
    layers = {
        id(part.trf_tau["default"]): name.removeprefix("base_model.model.bert.").removeprefix("encoder.layer.")
        for name, part in model.named_modules()
        if isinstance(part, loratrf_deploy.peft.LoraTrfLinear) and part.trf_tau
    }
    found: dict[str, list[NDArray[np.float32]]] = {}
    original = _peft_layer.filter_score

    def recorded(z: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        score = original(z, tau)
        found.setdefault(layers[id(tau)], []).append(score.flatten().numpy())
        return score

    _peft_layer.filter_score = recorded
    try:
        for row in glue.read(glue.DATA, task, "dev"):  # one by one: no padding
            with torch.inference_mode():
                model(**tokenizer(*glue.texts(row), truncation=True, max_length=glue.MAX_LENGTH, return_tensors="pt"))
    finally:
        _peft_layer.filter_score = original
    return {name: np.concatenate(parts) for name, parts in found.items()}


def draw_filters(name: str, file: Path) -> None:
    """For every filter the distribution of s over dev tokens: 5 to 95 %, quartiles, median, and the share of s = 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, task in zip(figure.subplots(2, 2, sharey=True).flat, EPOCHS, strict=True):
        scores = filter_scores(adapter_folder(name, task, SEEDS[0]), task)
        quantiles = np.array([np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]) for values in scores.values()]).T
        place = np.arange(len(scores))
        axes.vlines(place, quantiles[0], quantiles[4], color="tab:red", alpha=0.3, linewidth=6)
        axes.vlines(place, quantiles[1], quantiles[3], color="tab:red", linewidth=6)
        axes.plot(place, quantiles[2], "k_", markersize=8, label="median of s")
        axes.plot(place, [(values == 0).mean() for values in scores.values()], "b.", label="share of tokens with s = 0")
        axes.set_xticks(place, list(scores), rotation=90, fontsize=7)
        axes.set_title(task)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def method(config: Config) -> str:
    words = config.arguments.split()
    return words[words.index("--method") + 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="*", metavar="CONFIG", help="train these configurations (none named: all)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.train is not None:
        train_missing(options.train, options.processes)
        return 0
    rows = list(records().values())
    print(compared(rows), chosen(rows), sep="\n\n")
    draw_scores(rows, ROOT / "docs" / "method-scores.svg")
    draw_filters(BEST, ROOT / "docs" / "method-filters.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
