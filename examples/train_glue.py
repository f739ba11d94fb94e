"""Fine-tunes LoRATRF (or LoRA, DoRA, the head alone) on all-MiniLM-L6-v2 for one GLUE task, with PEFT and Trainer.

    python examples/train_glue.py --task sst2 --out my-adapter
    python examples/train_glue.py --task sst2 --out my-adapter --method lora

A tenth of the training rows is held out to choose the epoch; dev rows are looked at once, at the end. Beside the
adapter it writes results.json and a model card. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import glue
import tuning

import minilm

METHODS = ("loratrf", "lora", "dora", "head")
# The pooler too: all-MiniLM's is small noise with a bias of 0, and the classifier sees nothing else.
TARGETS = "query,value,attention.output.dense,output.dense,pooler.dense"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    defaults = {"base_name": minilm.BASE_NAME, "targets": TARGETS}
    return tuning.parser(__doc__, list(glue.TASKS), METHODS, **defaults).parse_args(given)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains on nine tenths of the training rows and saves the adapter; returns what results.json is to hold."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(options.seed)
    base = options.base or minilm.base_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    held_out, training = tuning.split(tokens(tokenizer, glue.read(options.data, options.task, "train")), options)

    config = None if options.method == "head" else tuning.adapter_config(options, "SEQ_CLS")
    model = adapted(base, config, collate([dict(row) for row in training[:64]]), options)
    trainer, seconds = tuning.fit(
        model,
        collate,
        training,
        held_out,
        options,
        compute_metrics=lambda output: glue.scores(output.predictions.argmax(-1), output.label_ids),
    )
    dev = trainer.evaluate(tokens(tokenizer, glue.read(options.data, options.task, "dev")), metric_key_prefix="dev")
    if config is not None:
        tuning.save(model, config, options)
    rows = {"training": len(training), "held_out": len(held_out)}
    return tuning.facts(trainer, tuning.rounded(dev, "dev_"), options) | {"rows": rows, "seconds": round(seconds)}


def tokens(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    encoded = [dict(tokenizer(*glue.texts(row), truncation=True, max_length=glue.MAX_LENGTH)) for row in rows]
    return [entry | {"labels": row["label"]} for entry, row in zip(encoded, rows, strict=True)]


def adapted(base: Path, config: Any, batch: dict[str, Any], options: argparse.Namespace) -> Any:
    """The base with a new adapter; without a config, its head alone to train."""
    import transformers

    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    if config is not None:
        return tuning.adapted(model, config, batch, options)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains; writes results.json and the model card beside the adapter."""
    results = train(options)
    scores = f"Dev set, looked at once after training: {tuning.listed(results['dev'])}."
    tuning.write(results, tuning.model_card(results, "train_glue.py", scores), options.out)
    return results


def main() -> int:
    options = arguments()
    return tuning.main(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
