"""The method's own claim: does LoRATRF, with a third fewer parameters than LoRA, score as well or better?

    python benchmarks/bench_method.py --train [CONFIG ...] [--processes 2]    # trains what has no record yet
    python benchmarks/bench_method.py [--figures docs]                        # tables (and pictures) from the records

MiniLM on RTE, MRPC, CoLA and SST-2 with examples/train_glue.py, one thread a process. One run after another is appended
to method.jsonl, so that a stopped --train goes on where it was; its adapters are kept in build/method. CHOICES were
chosen from by the held-out tenth of CoLA's train, with a seed of their own; their dev scores are not recorded. COMPARED
are trained on every task with three seeds, VARIANTS on CoLA. What each part of the method does is measured where noise
is smaller, in bench_method_lm.py.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import numpy as np
from numpy.typing import NDArray

RECORDS = Path(__file__).with_name("method.jsonl")
ADAPTERS = common.ROOT / "build" / "method"

EPOCHS = {"rte": 5, "mrpc": 4, "cola": 4, "sst2": 3}
LEARNED = ("mrpc", "cola", "sst2")  # RTE stays next to the majority class, whatever is trained
SEEDS = (0, 1, 2)
CHOICE_SEED = 100

BLOCKS = "--dropout 0 --targets query,value,attention.output.dense,output.dense"
SHARED = f"{BLOCKS},pooler.dense"
BATCH = "--batch 16 --learning-rate"
LORA = f"{SHARED} --method lora --rank 8 --alpha 16"
TRF = f"{SHARED} --method loratrf {BATCH} 5e-4"
HALVES = f"{TRF} --rank 4 --alpha 8"

REFERENCE, BEST, HALF = "LoRA R=8", "LoRATRF", "LoRA R=4"
COMPARED = {
    REFERENCE: f"{LORA} {BATCH} 5e-4",
    BEST: f"{HALVES} --filter-rank 1 --filter-gamma 8",
    HALF: f"{SHARED} --method lora {BATCH} 5e-4 --rank 4 --alpha 8",
    "LoRA R=2": f"{SHARED} --method lora {BATCH} 5e-4 --rank 2 --alpha 4",
    "DoRA R=4": f"{SHARED} --method dora {BATCH} 5e-4 --rank 4 --alpha 8",
    "head alone": f"--method head {BATCH} 5e-4",
}
FFN = ",".join(f"layer.{number}.output.dense" for number in range(6))
VARIANTS = {
    "LoRATRF, alpha = 16": f"{TRF} --rank 4 --alpha 16 --filter-rank 1 --filter-gamma 8",
    "R=8, and F=4 in LoRA's place on the FFN outputs": "--dropout 0 --targets query,value,attention.output.dense,"
    f"pooler.dense --method loratrf {BATCH} 5e-4 --rank 8 --alpha 16 --filter-targets {FFN} --filter-rank 4 "
    "--filter-gamma 8",
}
OUTPUTS = "--filter-targets attention.output.dense,output.dense,pooler.dense"
CHOICES = {
    "LoRA R=8, no pooler, batch 32, 1e-3": f"{BLOCKS} --method lora --rank 8 --alpha 16 --learning-rate 1e-3",
    "LoRA R=8, no pooler, batch 32, 3e-3": f"{BLOCKS} --method lora --rank 8 --alpha 16 --learning-rate 3e-3",
    "LoRA R=8, batch 32, 2e-3": f"{LORA} --learning-rate 2e-3",
    "LoRA R=8, batch 32, 4e-3": f"{LORA} --learning-rate 4e-3",
    "LoRA R=8, 1e-3": f"{LORA} {BATCH} 1e-3",
    "LoRA R=8, 5e-4": f"{LORA} {BATCH} 5e-4",
    "LoRA R=8, 2.5e-4": f"{LORA} {BATCH} 2.5e-4",
    "R=4, F=2 on outputs, γ=1": f"{HALVES} {OUTPUTS} --filter-rank 2",
    "R=4, F=2 on outputs, γ=8": f"{HALVES} {OUTPUTS} --filter-rank 2 --filter-gamma 8",
    "R=4, F=1 everywhere, γ=1": f"{HALVES} --filter-rank 1",
    "R=4, F=1 everywhere, γ=8": f"{HALVES} --filter-rank 1 --filter-gamma 8",
    "R=3, F=2 everywhere, γ=8": f"{TRF} --rank 3 --alpha 6 --filter-rank 2 --filter-gamma 8",
}


@dataclass(frozen=True)
class Run:
    name: str
    config: str  # arguments of train_glue.py
    task: str
    seed: int

    @property
    def arguments(self) -> str:
        """What decides the run, and what its record is found by."""
        return f"{self.config} --task {self.task} --seed {self.seed} --epochs {EPOCHS[self.task]}"

    @property
    def folder(self) -> Path:
        return ADAPTERS / self.name.replace(" ", "-") / f"{self.task}-{self.seed}"


def runs() -> list[Run]:
    return [
        *(Run(name, config, "cola", CHOICE_SEED) for name, config in CHOICES.items()),
        *(Run(name, config, task, seed) for seed in SEEDS for name, config in COMPARED.items() for task in EPOCHS),
        *(Run(name, config, "cola", seed) for seed in SEEDS for name, config in VARIANTS.items()),
    ]


def train(run: Run) -> dict[str, Any]:
    """Trains one adapter in this process; returns its record."""
    import torch
    import train_glue

    torch.set_num_threads(1)
    results = train_glue.run(train_glue.arguments([*run.arguments.split(), "--out", str(run.folder)]))
    record = {
        "config": run.name,
        "task": run.task,
        "seed": run.seed,
        "arguments": run.arguments,
        "parameters": results["trained_parameters"]["adapter"],
        "held_out": results["held_out_by_epoch"],
        "loss": results["loss_by_epoch"],
        "seconds": results["seconds"],
    }
    return record if run.seed == CHOICE_SEED else record | {"dev": results["dev"][results["metric"]]}


def train_missing(names: list[str], processes: int) -> None:
    done = {(record["config"], record["arguments"]) for record in common.read_records(RECORDS)}
    wanted = [run for run in runs() if (run.name, run.arguments) not in done and (not names or run.name in names)]
    print(f"{len(wanted)} runs to do, {len(done)} recorded", flush=True)
    common.append_records(train, wanted, RECORDS, processes)


def dev_scores(
    rows: list[dict[str, Any]], name: str, tasks: tuple[str, ...] = tuple(EPOCHS)
) -> NDArray[np.float64] | None:
    """Dev scores in percent of a configuration, (seeds, tasks); None while a run is missing."""
    scores = {(row["seed"], row["task"]): 100 * row["dev"] for row in rows if row["config"] == name and "dev" in row}
    if any((seed, task) not in scores for seed in SEEDS for task in tasks):
        return None
    return np.array([[scores[seed, task] for task in tasks] for seed in SEEDS])


def size(rows: list[dict[str, Any]], name: str) -> int:
    return next(row["parameters"] for row in rows if row["config"] == name)


def compared(rows: list[dict[str, Any]]) -> str:
    """Markdown: dev scores in percent, mean ± standard deviation over seeds; the means of a seed are over tasks.

    A configuration is shown once the tasks that are learned are done.
    """
    columns = ["configuration", "trained", "of LoRA R = 8", *EPOCHS, "mean", f"mean of {', '.join(LEARNED)}"]
    lines = [common.head(columns)]
    for name in COMPARED:
        if dev_scores(rows, name, LEARNED) is None:
            continue
        found = [dev_scores(rows, name, tasks) for tasks in (*((task,) for task in EPOCHS), tuple(EPOCHS), LEARNED)]
        cells = ["not trained" if scores is None else mean_and_deviation(scores.mean(1)) for scores in found]
        share = size(rows, name) / size(rows, REFERENCE)
        lines.append(common.line([name, size(rows, name), f"{share:.1%}", *cells]))
    lines.append("")
    for one, other, tasks in (
        (BEST, REFERENCE, tuple(EPOCHS)),
        (BEST, REFERENCE, LEARNED),
        (HALF, REFERENCE, LEARNED),
        (BEST, HALF, LEARNED),
    ):
        pair = dev_scores(rows, one, tasks), dev_scores(rows, other, tasks)
        if pair[0] is not None and pair[1] is not None:
            difference = (pair[0] - pair[1]).mean(1)
            error = difference.std(ddof=1) / len(SEEDS) ** 0.5
            figures = f"{difference.mean():+.2f} ± {error:.2f} (standard error)"
            lines.append(f"- {one} - {other}, mean of {', '.join(tasks)}: {figures}")
    return "\n".join(lines)


def mean_and_deviation(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def varied(rows: list[dict[str, Any]]) -> str:
    """Markdown: CoLA, in other placements and scales. Held-out is the best epoch's."""
    cells = []
    for name in (REFERENCE, BEST, *VARIANTS):
        scores = dev_scores(rows, name, ("cola",))
        if scores is not None:
            held_out = [100 * max(row["held_out"]) for row in rows if (row["config"], row["task"]) == (name, "cola")]
            figures = map(mean_and_deviation, (np.array(held_out), scores[:, 0]))
            cells.append([name, size(rows, name), *figures])
    return common.table(["configuration", "trained", "held out", "dev"], cells)


def chosen(rows: list[dict[str, Any]]) -> str:
    """Markdown: held-out score in percent after each epoch of the configurations that were chosen from."""
    cells = [
        [name, row["parameters"], ", ".join(f"{100 * score:.1f}" for score in row["held_out"])]
        for name in CHOICES
        for row in rows
        if row["config"] == name
    ]
    return common.table(["configuration", "trained", "held out, CoLA, by epoch"], cells)


def draw_scores(rows: list[dict[str, Any]], file: Path) -> None:
    """Mean dev score of the learned tasks against trained parameters, with bars of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, config in COMPARED.items():
        scores = dev_scores(rows, name, LEARNED)
        if scores is None:
            continue
        parameters, means = size(rows, name), scores.mean(1)
        colour = {"loratrf": "tab:red", "lora": "tab:blue", "dora": "tab:green"}.get(method(config), "tab:gray")
        axes.errorbar(parameters / 1000, means.mean(), means.std(ddof=1), fmt="o", capsize=3, color=colour)
        axes.annotate(name, (parameters / 1000, means.mean()), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set_xlabel("trained parameters of the adapter, thousands")
    axes.set_ylabel(f"mean dev score of {', '.join(LEARNED)}, %")
    axes.grid(alpha=0.3)
    axes.margins(x=0.15)  # room for the last name
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """The same picture gives the same file; text stays text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "loratrf"}):
        figure.savefig(file, metadata={"Date": None})


def filter_scores(adapter: Path, task: str) -> dict[str, NDArray[np.float32]]:
    """s of every dev token by the filter's module, in the order of the forward pass. Padding is left out."""
    import glue
    import torch
    import transformers
    from peft import PeftModel

    import loratrf_deploy.peft
    import minilm
    from loratrf_deploy.peft import layer

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
    original = layer.filter_score

    def recorded(z: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        score = original(z, tau)
        found.setdefault(layers[id(tau)], []).append(score.flatten().numpy())
        return score

    with patch.object(layer, "filter_score", recorded):
        for row in glue.read(glue.DATA, task, "dev"):  # one by one: no padding
            with torch.inference_mode():
                model(**tokenizer(*glue.texts(row), truncation=True, max_length=glue.MAX_LENGTH, return_tensors="pt"))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def draw_filters(name: str, file: Path) -> None:
    """For every filter the distribution of s over dev tokens: 5 to 95 %, quartiles, median, and the share of s = 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), layout="constrained")
    for axes, task in zip(figure.subplots(2, 2, sharey=True).flat, EPOCHS, strict=True):
        scores = filter_scores(Run(name, COMPARED[name], task, SEEDS[0]).folder, task)
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
    save(figure, file)


def method(config: str) -> str:
    words = config.split()
    return words[words.index("--method") + 1]


def main() -> int:
    parser = common.parser(__doc__, processes=os.cpu_count())
    parser.add_argument("--train", nargs="*", metavar="CONFIG", help="train these configurations (none named: all)")
    parser.add_argument("--figures", type=Path, help="folder for the pictures (needs the `figures` extra)")
    options = parser.parse_args()
    if options.train is not None:
        train_missing(options.train, options.processes)
        return 0
    rows = common.read_records(RECORDS)
    print(compared(rows), varied(rows), chosen(rows), sep="\n\n")
    if options.figures:
        draw_scores(rows, options.figures / "method-scores.svg")
        absent = [run.folder for run in runs() if (run.name, run.seed) == (BEST, SEEDS[0]) and not run.folder.is_dir()]
        if absent:
            print(f"error: no adapter in {absent[0]}; the picture of s needs those of {BEST}, seed 0", file=sys.stderr)
            return 2
        draw_filters(BEST, options.figures / "method-filters.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
