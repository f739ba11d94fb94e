"""Perplexity of deployments of one adapter on a text file: which of them loses how much.

perplexity = exp(mean of -log p(token | what comes before it in its window)), the first token of each window left out.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import read_adapter
from ..errors import UserError
from ..formats.images import takes_images
from ..formats.manifest import MANIFEST, read_manifest
from ..genai.generate import decoder_config
from ..pytorch.base import GENERATION, Inputs, Outputs, max_sequence, tokenizer_of
from ..pytorch.oracle import load_reference, run_torch
from ..pytorch.shapes import text_config
from ..runtime.session import create_session
from .images import with_images
from .onnx_runs import run_session

__all__ = ["WINDOW", "Row", "perplexities"]

WINDOW = 512
"""Tokens that are judged together."""


@dataclass(frozen=True)
class Row:
    """A deployment's perplexity, and log(perplexity) less that of PyTorch with the adapter, in nats per token."""

    name: str
    perplexity: float
    loss: float


def perplexities(
    text: str | Path,
    adapter: str | Path,
    models: Sequence[str | Path],
    base_model: str | Path | None = None,
    *,
    window: int = WINDOW,
    trust_remote_code: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """exp(-mean log p) of the text file `text` for PyTorch with the adapter, then without it, then each of `models`.

    `models` are exported causal language models (model.onnx), run as they are shipped. The tokens are cut into windows
    of `window`, each judged by itself. `trust_remote_code` as in `check_parity`. Raises UserError where a file, the
    adapter or a model is at fault.
    """
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The text file {text} can't be read: {error}. Expected UTF-8 text.") from error
    for model in models:
        if not os.path.isfile(model):
            raise UserError(f"No model at {model}: expected the --out of loratrf-export.")
    step("loading PyTorch's model")
    read = read_adapter(adapter)
    base = load_reference(read, base_model, trust_remote_code=trust_remote_code)
    if base.task != GENERATION:
        raise UserError(f"The adapter {adapter} is for {base.task}; perplexity is for causal language models.")
    tokenizer, source = tokenizer_of(read, base)
    if tokenizer is None:
        raise UserError(f"There is no tokenizer in {source}. Save it with the base model or the adapter.")
    tokens = np.asarray(tokenizer(content)["input_ids"], dtype=np.int64)
    window = min(window, max_sequence(text_config(base.model.config)) or window)
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

    losses = {
        name: judged(name, functools.partial(run_torch, base, adapter_on=adapter_on))
        for name, adapter_on in (("PyTorch", True), ("PyTorch without the adapter", False))
    }
    base.model.to("meta")  # its memory is the next model's
    for model in models:
        name = _name(Path(model))
        losses[name] = judged(name, functools.partial(_run, Path(model), create_session(model)))
    return [Row(name, math.exp(loss), loss - losses["PyTorch"]) for name, loss in losses.items()]


def _run(model: Path, session: Any, batch: Inputs) -> Outputs:
    if takes_images(decoder_config(model)):
        (batch,) = with_images(model, [batch])
    return run_session(session, batch, outputs=["logits"])


def _negative_log_likelihood(logits: NDArray[Any], tokens: NDArray[np.int64]) -> float:
    """-Σ log p(tokens[i+1] | tokens[:i+1]), logits (S,V), in float64."""
    scores = logits[:-1].astype(np.float64)
    largest = scores.max(-1, keepdims=True)
    log_sums = largest[:, 0] + np.log(np.exp(scores - largest).sum(-1))
    return float((log_sums - scores[np.arange(len(scores)), tokens[1:]]).sum())


def _name(model: Path) -> str:
    """The path, with what the manifest beside it says of the export."""
    try:
        manifest = read_manifest(model.with_name(MANIFEST))
    except UserError:  # a model of another maker
        return str(model)
    return f"{model} ({manifest.mode}{'' if manifest.quantize == 'none' else f', {manifest.quantize}'})"
