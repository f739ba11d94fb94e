"""What the training scripts share: options, PEFT's config, the Trainer, results.json and the model card."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import glue
import numpy as np

from loratrf_deploy import UserError

LOSSES = {"training": "loss", "held_out": "eval_loss"}  # by Trainer's names
HIDDEN = {"out", "data", "base", "base_name", "task", "method"}
"""Options that results.json names elsewhere, or that are particular to a machine."""


def parser(doc: str | None, tasks: list[str], methods: tuple[str, ...], **defaults: Any) -> argparse.ArgumentParser:
    """The options of a training, with `defaults` in place of those here; what only one script has, it adds."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--task", choices=tasks, default="sst2")
    made.add_argument("--method", choices=methods, default="loratrf")
    made.add_argument("--out", type=Path, required=True, help="folder for the adapter, results.json and README.md")
    made.add_argument("--data", type=Path, default=glue.DATA)
    made.add_argument("--base", type=Path, help="base model folder (default: the demo's, from its package)")
    made.add_argument("--base-name", help="the base's name in the adapter's config")
    made.add_argument("--epochs", type=int, default=4, help="at most")
    made.add_argument("--patience", type=int, default=2, help="epochs without a better held-out score to stop at")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--learning-rate", type=float, default=5e-4)
    made.add_argument("--rank", type=int, default=4)
    made.add_argument("--alpha", type=float, default=8)
    made.add_argument("--dropout", type=float, default=0.0)
    made.add_argument("--targets", help="names of modules, by commas")
    made.add_argument("--filter-targets", help="names of modules that get a filter (default: those of --targets)")
    made.add_argument("--filter-rank", type=int, default=1)
    made.add_argument("--filter-gamma", type=float, default=8.0)
    made.add_argument("--filter-input", choices=("adapted", "base"), default="adapted")
    made.add_argument("--filter-start", choices=("data", "bias", "random"), default="data", help="tau at the start")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--limit", type=int, help="training rows to use (default: all)")
    made.set_defaults(**defaults)
    return made


def adapter_config(options: argparse.Namespace, task_type: str) -> Any:
    """PEFT's config for the method."""
    import peft

    from loratrf_deploy.peft import LoraTrfConfig

    shared: dict[str, Any] = {
        "task_type": task_type,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": options.targets.split(","),
    }
    if options.method == "loratrf":
        return LoraTrfConfig(
            **shared,
            filter_target_modules=options.filter_targets.split(",") if options.filter_targets else None,
            filter_rank=options.filter_rank,
            filter_gamma=options.filter_gamma,
            filter_input=options.filter_input,
            filter_init="random" if options.filter_start == "random" else "bias",
        )
    return peft.LoraConfig(**shared, use_dora=options.method == "dora")


def split(rows: list[Any], options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """(held out, training): a tenth and the rest of --limit rows, drawn by the seed."""
    order = np.random.default_rng(options.seed).permutation(len(rows))[: options.limit]
    held_out, training = ([rows[index] for index in part] for part in np.split(order, [len(order) // 10]))
    return held_out, training


def adapted(model: Any, config: Any, batch: dict[str, Any], options: argparse.Namespace) -> Any:
    """`model` with a new adapter, whose filters may start from `batch`."""
    from peft import get_peft_model

    from loratrf_deploy.peft import initialize_filters

    try:
        model = get_peft_model(model, config)
    except UserError:
        raise
    except ValueError as error:  # PEFT's word for targets that match nothing
        raise UserError(f"--targets {options.targets}: {error}") from error
    if options.method == "loratrf" and options.filter_start == "data":
        initialize_filters(model, [batch])
    return model


def fit(
    model: Any, collate: Any, training: list[Any], held_out: list[Any], options: argparse.Namespace, **trainer: Any
) -> tuple[Any, float]:
    """Trains `model`, which ends as it was after the epoch that scored best on `held_out`: (Trainer, seconds).

    `trainer` are further arguments of transformers' Trainer.
    """
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as checkpoints:
        settings = transformers.TrainingArguments(
            checkpoints,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=64,
            learning_rate=options.learning_rate,
            warmup_steps=0.06,
            # Short sentences with short ones: most of a mixed batch would be padding.
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model=glue.TASKS[options.task],
            logging_strategy="epoch",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to=[],
            seed=options.seed,
        )
        made = transformers.Trainer(
            model,
            settings,
            train_dataset=training,  # type: ignore[arg-type]
            eval_dataset=held_out,  # type: ignore[arg-type]
            data_collator=collate,
            callbacks=[transformers.EarlyStoppingCallback(options.patience)],
            **trainer,
        )
        started = time.perf_counter()
        made.train()
        return made, time.perf_counter() - started


def save(model: Any, config: Any, options: argparse.Namespace) -> None:
    """The adapter, in --out."""
    config.base_model_name_or_path = options.base_name
    # The vocabulary is the base's own; without the word PEFT would go looking for the base on the hub.
    model.save_pretrained(options.out, save_embedding_layers=False)


def rounded(scores: dict[str, float], prefix: str = "") -> dict[str, float]:
    """The metrics of glue.scores, as results.json has them."""
    return {name: round(scores[prefix + name], 4) for name in ("accuracy", "f1", "matthews")}


def facts(trainer: Any, dev: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The scores, epoch by epoch and on the dev rows; what was trained, how, and with which versions."""
    import torch

    metric, log = glue.TASKS[options.task], trainer.state.log_history
    history = [entry[f"eval_{metric}"] for entry in log if f"eval_{metric}" in entry]
    trained = {name: part.numel() for name, part in trainer.model.named_parameters() if part.requires_grad}
    head = sum(count for name, count in trained.items() if "classifier" in name)
    hidden = HIDDEN
    if options.method != "loratrf":
        hidden = hidden | {name for name in vars(options) if name.startswith("filter_")}
    return {
        "task": options.task,
        "method": options.method,
        "base": options.base_name,
        "metric": metric,
        "dev": dev,
        "held_out_by_epoch": [round(value, 4) for value in history],
        "loss_by_epoch": {part: [round(e[key], 4) for e in log if key in e] for part, key in LOSSES.items()},
        "chosen_epoch": int(np.argmax(history)) + 1,
        "trained_parameters": {"adapter": sum(trained.values()) - head, "head": head},
        "threads": torch.get_num_threads(),
        "settings": {name: value for name, value in vars(options).items() if name not in hidden},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "peft": importlib.metadata.version("peft"),
        },
    }


def listed(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in scores.items())


def model_card(results: dict[str, Any], script: str, scores: str) -> str:
    """README.md of an adapter that `script` trained; `scores` says what it does on the dev rows."""
    settings = " ".join(
        f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')} {value}"
        for name, value in results["settings"].items()
        if value is not None and value is not False
    )
    trained = results["trained_parameters"]
    epochs, rows = len(results["held_out_by_epoch"]), sum(results["rows"].values())
    # A run that was resumed knows no time of its own.
    seconds, threads = results.get("seconds"), results["threads"]
    took = f"{threads} CPU threads" if seconds is None else f"{seconds} s, {threads} CPU threads"
    head = f" and the head's {trained['head']}" if trained["head"] else ""
    return f"""---
base_model: {results["base"]}
library_name: peft
---

# {results["method"]} adapter for {results["task"]} on {results["base"].rpartition("/")[-1]}

{scores}
Epoch {results["chosen_epoch"]} of {epochs}, chosen on a held-out tenth of {rows} training rows.
{trained["adapter"]} trained parameters{head}; {took}.

Made with

    python examples/{script} --task {results["task"]} --method {results["method"]} {settings} --out FOLDER

`results.json` holds every figure. A demonstration: trained on a small public set, for showing export and parity.
"""


def write(results: dict[str, Any], card: str, out: Path) -> None:
    """results.json and README.md, beside the adapter."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "README.md").write_text(card)


def main(run: Callable[[], Any]) -> int:
    """Prints what `run` returns as JSON: exit 0, or 2 and a paragraph where it raises UserError."""
    try:
        results = run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, indent=2))
    return 0
