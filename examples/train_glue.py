"""Fine-tunes LoRATRF (or LoRA, DoRA, the head alone) on all-MiniLM-L6-v2 for one GLUE task, with PEFT and Trainer.

    python examples/train_glue.py --task sst2 --out my-adapter
    python examples/train_glue.py --task sst2 --out my-adapter --method lora

A tenth of the training rows is held out to choose the epoch; dev rows are looked at once, at the end. Beside the
adapter it writes results.json and a model card. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import glue
import numpy as np

import minilm
from loratrf_deploy import UserError

METHODS = ("loratrf", "lora", "dora", "head")
LOSSES = {"training": "loss", "held_out": "eval_loss"}  # by Trainer's names
# The pooler too: all-MiniLM's is small noise with a bias of 0, and the classifier sees nothing else.
TARGETS = "query,value,attention.output.dense,output.dense,pooler.dense"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=glue.TASKS, default="sst2")
    parser.add_argument("--method", choices=METHODS, default="loratrf")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter, results.json and README.md")
    parser.add_argument("--data", type=Path, default=glue.DATA)
    parser.add_argument("--base", type=Path, help="base model folder (default: all-MiniLM-L6-v2 from its package)")
    parser.add_argument("--base-name", default=minilm.BASE_NAME, help="the base's name in the adapter's config")
    parser.add_argument("--epochs", type=int, default=4, help="at most")
    parser.add_argument("--patience", type=int, default=2, help="epochs without a better held-out score to stop at")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=float, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--targets", default=TARGETS, help="names of modules, by commas")
    parser.add_argument("--filter-targets", help="names of modules that get a filter (default: those of --targets)")
    parser.add_argument("--filter-rank", type=int, default=1)
    parser.add_argument("--filter-gamma", type=float, default=8.0)
    parser.add_argument("--filter-input", choices=("adapted", "base"), default="adapted")
    parser.add_argument("--filter-start", choices=("data", "bias", "random"), default="data", help="tau at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="training rows to use (default: all)")
    return parser.parse_args(given)


def adapter_config(options: argparse.Namespace) -> Any:
    """PEFT's config for the method; None for the head alone."""
    import peft

    from loratrf_deploy.peft import LoraTrfConfig

    shared: dict[str, Any] = {
        "task_type": "SEQ_CLS",
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
    return None if options.method == "head" else peft.LoraConfig(**shared, use_dora=options.method == "dora")


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains on nine tenths of the training rows and saves the adapter; returns what results.json is to hold."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(options.seed)
    base = options.base or minilm.base_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    rows = tokens(tokenizer, glue.read(options.data, options.task, "train"))
    order = np.random.default_rng(options.seed).permutation(len(rows))[: options.limit]
    held_out, training = ([rows[index] for index in part] for part in np.split(order, [len(order) // 10]))

    config = adapter_config(options)
    model = adapted(base, config, collate([dict(row) for row in training[:64]]), options)
    trainer, seconds = fit(model, collate, training, held_out, options)
    dev = trainer.evaluate(tokens(tokenizer, glue.read(options.data, options.task, "dev")), metric_key_prefix="dev")
    if config is not None:
        config.base_model_name_or_path = options.base_name
        # The vocabulary is the base's own; without the word PEFT would go looking for the base on the hub.
        model.save_pretrained(options.out, save_embedding_layers=False)
    rows_of = {"training": len(training), "held_out": len(held_out)}
    return facts(trainer, dev, options) | {"rows": rows_of, "seconds": round(seconds)}


def tokens(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    encoded = [dict(tokenizer(*glue.texts(row), truncation=True, max_length=glue.MAX_LENGTH)) for row in rows]
    return [entry | {"labels": row["label"]} for entry, row in zip(encoded, rows, strict=True)]


def adapted(base: Path, config: Any, batch: dict[str, Any], options: argparse.Namespace) -> Any:
    """The base with a new adapter, whose filters may start from `batch`; without a config, its head alone to train."""
    import transformers
    from peft import get_peft_model

    from loratrf_deploy.peft import initialize_filters

    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    if config is None:
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
        return model
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
    model: Any, collate: Any, training: list[Any], held_out: list[Any], options: argparse.Namespace
) -> tuple[Any, float]:
    """Trains `model`, which ends as it was after the epoch that scored best on `held_out`: (Trainer, seconds)."""
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
        trainer = transformers.Trainer(
            model,
            settings,
            train_dataset=training,  # type: ignore[arg-type]
            eval_dataset=held_out,  # type: ignore[arg-type]
            data_collator=collate,
            compute_metrics=lambda output: glue.scores(output.predictions.argmax(-1), output.label_ids),
            callbacks=[transformers.EarlyStoppingCallback(options.patience)],
        )
        started = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - started


def facts(trainer: Any, dev: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """The scores, epoch by epoch and on the dev rows; what was trained, how, and with which versions."""
    import torch

    metric, log = glue.TASKS[options.task], trainer.state.log_history
    history = [entry[f"eval_{metric}"] for entry in log if f"eval_{metric}" in entry]
    trained = {name: part.numel() for name, part in trainer.model.named_parameters() if part.requires_grad}
    head = sum(count for name, count in trained.items() if "classifier" in name)
    hidden = {"out", "data", "base", "base_name", "task", "method"}
    if options.method != "loratrf":
        hidden |= {name for name in vars(options) if name.startswith("filter_")}
    return {
        "task": options.task,
        "method": options.method,
        "base": options.base_name,
        "metric": metric,
        "dev": {name: round(dev[f"dev_{name}"], 4) for name in ("accuracy", "f1", "matthews")},
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


def model_card(results: dict[str, Any]) -> str:
    settings = " ".join(
        f"--{name.replace('_', '-')} {value}" for name, value in results["settings"].items() if value is not None
    )
    trained = results["trained_parameters"]
    scores = ", ".join(f"{name} {value}" for name, value in results["dev"].items())
    epochs, rows = len(results["held_out_by_epoch"]), sum(results["rows"].values())
    seconds, threads = results["seconds"], results["threads"]
    return f"""---
base_model: {results["base"]}
library_name: peft
---

# {results["method"]} adapter for {results["task"]} on all-MiniLM-L6-v2

Dev set, looked at once after training: {scores}.
Epoch {results["chosen_epoch"]} of {epochs}, chosen on a held-out tenth of {rows} training rows.
{trained["adapter"]} trained parameters and the head's {trained["head"]}; {seconds} s, {threads} CPU threads.

Made with

    python examples/train_glue.py --task {results["task"]} --method {results["method"]} {settings} --out FOLDER

`results.json` holds every figure. A demonstration: trained on a small public set, for showing export and parity.
"""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains; writes results.json and the model card beside the adapter."""
    results = train(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "README.md").write_text(model_card(results))
    return results


def main() -> int:
    options = arguments()
    try:
        results = run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
