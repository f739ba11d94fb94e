"""Fine-tunes LoRA or LoRATRF on SmolLM2-135M-Instruct to answer one GLUE task in a word, with PEFT and Trainer.

    python examples/train_smollm2.py --task sst2 --method lora --out my-adapter

The prompt is a chat (instructions.py); the loss is that of the answer's two tokens, the word and the end of the turn.
A tenth of the training rows is held out to choose the epoch; dev rows are looked at once, at the end, in float32: the
adapter and the base, each by which of the two words it finds likelier. Beside the adapter it writes results.json and a
model card. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import glue
import instructions
import numpy as np
import smollm2
import tuning
from numpy.typing import NDArray

from loratrf_deploy import UserError

METHODS = ("lora", "loratrf")
DEFAULTS: dict[str, Any] = {
    "method": "lora",
    "base_name": smollm2.BASE_NAME,
    "epochs": 2,
    "learning_rate": 1e-3,
    "batch": 8,
    "targets": "q_proj,k_proj,v_proj,o_proj",
    "filter_targets": "o_proj,down_proj",
}
ANSWER = 2
"""Tokens that are learned: the word and the end of the turn."""
BATCH = 32


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    made = tuning.parser(__doc__, list(instructions.INSTRUCTIONS), METHODS, **DEFAULTS)
    made.add_argument(
        "--bfloat16", action="store_true", help="of the frozen weights while training: faster where the CPU has it"
    )
    return made.parse_args(given)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains on nine tenths of the training rows and saves the adapter; returns what results.json is to hold."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.set_seed(options.seed)
    base = options.base or smollm2.base_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left")
    collate = Answers(tokenizer)
    held_out, training = tuning.split(
        tokens(tokenizer, options.task, glue.read(options.data, options.task, "train")), options
    )

    config = tuning.adapter_config(options, "CAUSAL_LM")
    first = collate(training[:64])
    del first["labels"]
    model = tuning.adapted(load(base, "bfloat16" if options.bfloat16 else "float32"), config, first, options)
    words = word_tokens(tokenizer, options.task)
    trainer, seconds = tuning.fit(
        model,
        collate,
        training,
        held_out,
        options,
        compute_loss_func=loss,
        preprocess_logits_for_metrics=lambda logits, labels: logits[:, 0, words].float(),
        compute_metrics=lambda output: glue.scores(
            output.predictions.argmax(-1), (output.label_ids[:, 0] == words[1]).astype(int)
        ),
    )
    tuning.save(model, config, options)
    rows = {"training": len(training), "held_out": len(held_out)}
    return tuning.facts(trainer, dev_scores(base, options), options) | {"rows": rows, "seconds": round(seconds)}


def load(base: Path, dtype: str) -> Any:
    """The base as it trains and is scored."""
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    model.config.use_cache = False
    # The answer's hidden states are a slice, for which torch would copy the vocabulary's matrix once a row.
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return model


def word_tokens(tokenizer: Any, task: str) -> list[int]:
    """The token of each of the task's two answers. UserError where the tokenizer cuts one up."""
    words = instructions.INSTRUCTIONS[task].words
    found = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    if any(len(parts) != 1 for parts in found):
        raise UserError(
            f"The answers {' and '.join(words)} are the tokens {found} of this base's tokenizer, expected one token "
            f"each. Take {smollm2.BASE_NAME} as the base, or other words in examples/instructions.py."
        )
    return [parts[0] for parts in found]


def tokens(tokenizer: Any, task: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row's prompt and the word, as input; the word and the end of the turn, as labels."""
    words, chat = word_tokens(tokenizer, task), instructions.INSTRUCTIONS[task].chat
    entries = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(chat(*glue.texts(row)), add_generation_prompt=True, tokenize=False)
        word = words[row["label"]]
        ids = [*tokenizer.encode(prompt, add_special_tokens=False), word]
        entries.append({"input_ids": ids, "labels": [word, tokenizer.eos_token_id]})
    return entries


class Answers:
    """Rows of one batch, padded on the left: every answer stands at the end, and nothing else needs the vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        inputs = [{"input_ids": row["input_ids"]} for row in rows]
        batch = dict(self._tokenizer.pad(inputs, padding=True, return_tensors="pt"))
        return batch | {"labels": torch.tensor([row["labels"] for row in rows]), "logits_to_keep": ANSWER}


def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """Mean of -log p over the answers' tokens, labels (B,2)."""
    import torch

    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten())


def dev_scores(base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Of the saved adapter and of the base under the same prompts, both in float32."""
    import transformers
    from peft import PeftModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left")
    model = PeftModel.from_pretrained(load(base, "float32"), options.out).eval()
    rows = glue.read(options.data, options.task, "dev")
    labels = np.array([row["label"] for row in rows])
    found = tuning.rounded(glue.scores(guesses(model, tokenizer, options.task, rows), labels))
    with model.disable_adapter():
        base_found = tuning.rounded(glue.scores(guesses(model, tokenizer, options.task, rows), labels))
    majority = tuning.rounded(glue.scores(np.full_like(labels, round(float(labels.mean()))), labels))
    return found | {"base": base_found, "majority": majority}


def guesses(model: Any, tokenizer: Any, task: str, rows: list[dict[str, Any]]) -> NDArray[np.int64]:
    """0 or 1 for each row: which of the task's two words `model` finds likelier as the answer."""
    import torch

    entries, words, collate = tokens(tokenizer, task, rows), word_tokens(tokenizer, task), Answers(tokenizer)
    guessed = np.empty(len(rows), np.int64)
    order = np.argsort([len(entry["input_ids"]) for entry in entries], kind="stable")
    for chunk in np.array_split(order, range(BATCH, len(order), BATCH)):
        batch = collate([entries[index] for index in chunk])
        del batch["labels"]
        with torch.inference_mode():
            guessed[chunk] = model(**batch).logits[:, 0, words].argmax(-1).numpy()
    return guessed


def model_card(results: dict[str, Any]) -> str:
    dev = results["dev"]
    own = {name: value for name, value in dev.items() if name in ("accuracy", "f1", "matthews")}
    scores = f"""Dev set, looked at once after training: {tuning.listed(own)}.
The base under the same prompt: {tuning.listed(dev["base"])}.
The majority's answer always: {tuning.listed(dev["majority"])}."""
    if deployed := results.get("deployed"):
        rows, shipped = deployed["rows"], {name: deployed[name] for name in ("accuracy", "f1")}
        scores += f"""
Exported ({deployed["export"]}), the first {rows} dev rows: {tuning.listed(shipped)};
PyTorch on the same rows: accuracy {deployed["pytorch"]["accuracy"]}; {deployed["changed"]} answers differ."""
    return tuning.model_card(results, "train_smollm2.py", scores)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains; writes results.json and the model card beside the adapter."""
    results = train(options)
    tuning.write(results, model_card(results), options.out)
    return results


def main() -> int:
    options = arguments()
    return tuning.main(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
