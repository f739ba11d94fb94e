"""Dev scores of one adapter side by side: PyTorch with PEFT, and the exported ONNX model with and without our library.

    python examples/score_glue.py --model out/model.onnx --adapter examples/adapters/minilm-sst2-loratrf

The ONNX side uses onnxruntime and the tokenizer.json beside the model, nothing else. Without --adapter it runs alone.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import glue
import numpy as np
from numpy.typing import NDArray

import minilm
from loratrf_deploy import UserError, create_session

Batch = dict[str, NDArray[np.int64]]
BATCH = 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model.onnx in its export folder")
    parser.add_argument("--adapter", type=Path, help="adapter folder, to run PyTorch beside it (needs torch and PEFT)")
    parser.add_argument("--task", choices=glue.TASKS, default="sst2")
    parser.add_argument("--data", type=Path, default=glue.DATA)
    parser.add_argument("--base", type=Path, help="base model folder (default: all-MiniLM-L6-v2 from its package)")
    return parser.parse_args()


def batches(folder: Path, rows: list[dict[str, Any]]) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """(row numbers, model inputs): padded batches, short sentences with short ones."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"No tokenizer at {file}. Pass --model FOLDER/model.onnx as loratrf-export wrote it.")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(glue.MAX_LENGTH)
    tokenizer.enable_padding()
    order = np.argsort([sum(map(len, glue.texts(row))) for row in rows], kind="stable")
    for chunk in np.array_split(order, range(BATCH, len(order), BATCH)):
        texts = [glue.texts(rows[index]) for index in chunk]
        encoded = tokenizer.encode_batch([text if len(text) == 2 else text[0] for text in texts])
        yield (
            chunk,
            {
                "input_ids": np.array([entry.ids for entry in encoded], np.int64),
                "attention_mask": np.array([entry.attention_mask for entry in encoded], np.int64),
                "token_type_ids": np.array([entry.type_ids for entry in encoded], np.int64),
            },
        )


def onnx_model(path: Path, library: bool) -> Callable[[Batch], NDArray]:
    session = create_session(path, library=library)
    names = {entry.name for entry in session.get_inputs()}
    return lambda batch: session.run(["logits"], {name: value for name, value in batch.items() if name in names})[0]


def torch_model(adapter: Path, base: Path) -> Callable[[Batch], NDArray]:
    import torch
    import transformers
    from peft import PeftModel

    import loratrf_deploy.peft  # registers LORATRF with PEFT

    assert loratrf_deploy.peft
    transformers.utils.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model = PeftModel.from_pretrained(model, adapter).eval()

    def run(batch: Batch) -> NDArray:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits.numpy()

    return run


def score(options: argparse.Namespace) -> None:
    rows = glue.read(options.data, options.task, "dev")
    labels = np.array([row["label"] for row in rows])
    models: dict[str, Callable[[Batch], NDArray]] = {}
    if options.adapter:
        models["PyTorch, PEFT"] = torch_model(options.adapter, options.base or minilm.base_path())
    models["ONNX, standard ops"] = onnx_model(options.model, library=False)
    try:
        models["ONNX, custom ops"] = onnx_model(options.model, library=True)
    except UserError as error:
        print(f"Without the custom-op library: {error}", file=sys.stderr)

    inputs = list(batches(options.model.parent, rows))
    first: NDArray | None = None
    print(f"{options.task} dev, {len(rows)} rows")
    print(f"{'':20}{'accuracy':>10}{'F1':>8}{'Matthews':>10}{'rows/s':>8}  answers changed, worst logit difference")
    for name, run in models.items():
        run(inputs[0][1])
        logits = np.empty((len(rows), 2), np.float32)
        started = time.perf_counter()
        for chunk, batch in inputs:
            logits[chunk] = run(batch)
        speed = len(rows) / (time.perf_counter() - started)
        got = glue.scores(logits.argmax(-1), labels)
        first = logits if first is None else first
        changed = np.count_nonzero(logits.argmax(-1) != first.argmax(-1))
        difference = "" if first is logits else f"{changed}, {np.abs(logits - first).max():.1e}"
        print(
            f"{name:20}{got['accuracy']:10.4f}{got['f1']:8.4f}{got['matthews']:10.4f}{speed:8.0f}  {difference}",
            flush=True,
        )


def main() -> int:
    try:
        score(arguments())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
