"""Perplexity of deployments of one adapter on a text file: which of them loses how much.

perplexity = exp(mean of -log p(token | what comes before it in its window)), the first token of each window left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cli.shared import command, progress, quiet
from ..errors import UserError

__all__ = ["Row", "main", "perplexities"]

WINDOW = 512
"""Tokens that are judged together."""


@dataclass(frozen=True)
class Row:
    """A deployment's perplexity, and log(perplexity) less that of PyTorch with the adapter, in nats per token."""

    name: str
    perplexity: float
    loss: float


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-perplexity --text FILE --adapter PATH --model a/model.onnx ...: exit 0 done, 2 the input is at fault."""
    args = _parser().parse_args(argv)
    with progress() as step, quiet():
        rows = perplexities(args.text, args.adapter, args.model, args.base_model, window=args.window, step=step)
    width = max(len(row.name) for row in rows)
    print(f"{'deployment':<{width}}  {'perplexity':>12}  log(perplexity) - PyTorch's")
    for row in rows:
        print(f"{row.name:<{width}}  {row.perplexity:>12.4f}  {row.loss:>+27.6f}")
    return 0


def perplexities(
    text: str | Path,
    adapter: str | Path,
    models: Sequence[str | Path],
    base_model: str | Path | None = None,
    *,
    window: int = WINDOW,
    step: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """exp(-mean log p) of the text file `text` for PyTorch with the adapter, then without it, then each of `models`.

    `models` are exported causal language models (model.onnx), run as they are shipped. The tokens are cut into windows
    of `window`, each judged by itself. Raises UserError where a file, the adapter or a model is at fault.
    """
    from ..adapters.adapter import read_adapter
    from ..pytorch.base import GENERATION, load_reference, load_tokenizer, max_sequence
    from ..runtime.session import create_session

    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The text file {text} can't be read: {error}. Expected UTF-8 text.") from error
    for model in models:
        if not Path(model).is_file():
            raise UserError(f"No model at {model}: expected the --out of loratrf-export.")
    step("loading PyTorch's model")
    read = read_adapter(adapter)
    base = load_reference(read, base_model)
    if base.task != GENERATION:
        raise UserError(f"The adapter {adapter} is for {base.task}; perplexity is for causal language models.")
    own = (read.path / "tokenizer_config.json").is_file()
    source = str(read.path if own else base.path)
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise UserError(f"There is no tokenizer in {source}. Save it with the base model or the adapter.")
    tokens = np.asarray(tokenizer(content)["input_ids"], dtype=np.int64)
    window = min(window, max_sequence(base.model.config) or window)
    windows = [part for at in range(0, len(tokens), window) if len(part := tokens[at : at + window]) > 1]
    if not windows:
        raise UserError(f"The text file {text} has {len(tokens)} tokens. Expected two at least.")

    def judged(name: str, run: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]) -> float:
        total = 0.0
        for number, part in enumerate(windows, 1):
            step(f"{name}, window {number} of {len(windows)}")
            ids = part[None]
            logits = run({"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
            total += _negative_log_likelihood(logits[0], part)
        return total / sum(len(part) - 1 for part in windows)

    from .layers import run_onnx, run_torch

    losses = {
        name: judged(name, functools.partial(run_torch, base, adapter_on=adapter_on))
        for name, adapter_on in (("PyTorch", True), ("PyTorch without the adapter", False))
    }
    base.model.to("meta")  # its memory is the next model's
    for model in models:
        name = _name(Path(model))
        losses[name] = judged(name, functools.partial(run_onnx, create_session(model), outputs=["logits"]))
    return [Row(name, math.exp(loss), loss - losses["PyTorch"]) for name, loss in losses.items()]


def _negative_log_likelihood(logits: NDArray[Any], tokens: NDArray[np.int64]) -> float:
    """-Σ log p(tokens[i+1] | tokens[:i+1]), logits (S,V), in float64."""
    scores = logits[:-1].astype(np.float64)
    largest = scores.max(-1, keepdims=True)
    log_sums = largest[:, 0] + np.log(np.exp(scores - largest).sum(-1))
    return float((log_sums - scores[np.arange(len(scores)), tokens[1:]]).sum())


def _name(model: Path) -> str:
    """The path, with what the manifest beside it says of the export."""
    try:
        manifest = json.loads((model.parent / "loratrf.json").read_text())
        quantize = "" if manifest["quantize"] == "none" else f", {manifest['quantize']}"
        return f"{model} ({manifest['mode']}{quantize})"
    except (OSError, ValueError, KeyError, TypeError):
        return str(model)


def _parser() -> argparse.ArgumentParser:
    from ..cli.generate import count

    parser = argparse.ArgumentParser(
        prog="loratrf-perplexity",
        description="Perplexity of exported causal language models on a text, beside PyTorch's with the adapter and "
        "without it: which deployment loses how much.",
    )
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text file")
    parser.add_argument("--adapter", required=True, type=Path, help="adapter directory")
    parser.add_argument("--base-model", help="folder or hub name of the base model (default: what the adapter names)")
    parser.add_argument("--model", required=True, action="append", type=Path, help="exported model.onnx; repeatable")
    parser.add_argument("--window", type=count, default=WINDOW, help=f"tokens judged together (default: {WINDOW})")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
