"""What parity adds for causal language models: quantised bases, and greedy generation token by token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..genai.generate import CONFIG_FILE, generate_tokens, load_model, read_config
from ..runtime.session import library_path
from .figures import Figures
from .result import VARIANTS, Check

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ..pytorch.base import BaseModel

__all__ = ["TOKENS", "check_greedy", "is_generating", "linked_folder"]

TOKENS = 64
_PROMPT = 12


def is_generating(model: Path) -> bool:
    """Whether `model` is the decoder of a folder that onnxruntime-genai loads."""
    if not (model.parent / CONFIG_FILE).is_file():
        return False
    return read_config(model.parent)["model"]["decoder"].get("filename") == model.name


@contextlib.contextmanager
def linked_folder(model: Path, graph: ir.Model, *, library: bool) -> Iterator[Path]:
    """Yields a copy of the model's folder with `graph` for the model, and the custom-op library registered or not.

    The weights are hard links where the file system has them: onnxruntime-genai reads nothing outside its folder.
    """
    import onnx_ir as ir

    try:
        aside = tempfile.TemporaryDirectory(prefix=".loratrf-parity-", dir=model.parent)
    except OSError:
        aside = tempfile.TemporaryDirectory(prefix="loratrf-parity-")
    with aside as name:
        folder = Path(name)
        for file in model.parent.iterdir():
            if file.is_file() and file.name not in (model.name, CONFIG_FILE):
                try:
                    os.link(file, folder / file.name)
                except OSError:
                    shutil.copy(file, folder)
        (folder / model.name).write_bytes(ir.to_proto(graph).SerializeToString())
        config = read_config(model.parent)
        options = config["model"]["decoder"]["session_options"]
        options.pop("custom_ops_library", None)
        if library:
            own = library_path()
            (folder / own.name).unlink(missing_ok=True)
            shutil.copy(own, folder)
            options["custom_ops_library"] = own.name
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        yield folder


def check_greedy(model: Path, graph: ir.Model, base: BaseModel, tolerance: float) -> list[Check]:
    """Whether onnxruntime-genai takes the tokens that PyTorch takes: greedy, TOKENS of them, with and without library.

    A token that differs is a tie where PyTorch's two scores are closer than the errors allowed; what follows a tie is
    another text and isn't compared.
    """
    rng = np.random.default_rng(0)
    length = min(read_config(model.parent)["model"].get("context_length", _PROMPT + TOKENS), _PROMPT + TOKENS)
    count = max(length - _PROMPT, 1)
    prompt = rng.integers(0, base.model.config.vocab_size, length - count)
    tokens, scores = _torch_greedy(base.model, prompt, count, _stops(model))
    checks = []
    for variant in VARIANTS[:2]:
        name = f"{count} greedy tokens"
        try:
            with linked_folder(model, graph, library=variant == VARIANTS[0]) as folder:
                got = list(generate_tokens(load_model(folder), prompt.tolist(), count, stop=False))
        except UserError as error:
            checks.append(Check(variant, name, "skipped", re.sub(r"/\.?loratrf-parity-\w+", "", str(error))))
            continue
        checks.append(_compare_tokens(variant, name, got, tokens, scores, tolerance))
    return checks


def _compare_tokens(
    variant: str, name: str, got: list[int], tokens: list[int], scores: list[NDArray[Any]], tolerance: float
) -> Check:
    equal = next((at for at, pair in enumerate(zip(got, tokens, strict=False)) if pair[0] != pair[1]), len(got))
    share = equal / len(tokens)
    if equal == len(tokens):
        return Check(variant, name, "passed", "", Figures(0.0, 0.0, 1.0, 1.0, 0, len(tokens), len(tokens)))
    reason = f"{len(got)} tokens came instead of {len(tokens)}"
    if equal < len(got):
        score = scores[equal]
        margin = float(score[tokens[equal]] - score[got[equal]])
        largest = float(np.abs(score[np.isfinite(score)]).max())
        reason = f"token {equal + 1} is {got[equal]}, PyTorch takes {tokens[equal]}"
        if margin <= 2 * tolerance * largest:
            return Check(variant, name, "passed", f"{reason}: a tie, {equal} tokens before it agree")
        reason += f" by a margin of {margin:.2e} (largest logit {largest:.2e})"
    figures = Figures(float("nan"), float("nan"), float("nan"), share, 0, len(tokens), len(tokens))
    return Check(variant, name, "failed", reason, figures)


def _torch_greedy(
    model: torch.nn.Module, prompt: NDArray[np.int64], count: int, stops: list[int]
) -> tuple[list[int], list[NDArray[Any]]]:
    """The likeliest tokens after `prompt`, one by one with PyTorch's own cache, and the scores (V) of each choice."""
    import torch

    tokens: list[int] = []
    scores: list[NDArray[Any]] = []
    ids, cache = torch.from_numpy(prompt[None]), None
    with torch.no_grad():
        for _ in range(count):
            outputs = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, score = outputs.past_key_values, outputs.logits[0, -1].float().numpy()
            score[stops] = -np.inf
            tokens.append(int(score.argmax()))
            scores.append(score)
            ids = torch.tensor([[tokens[-1]]])
    return tokens, scores


def _stops(model: Path) -> list[int]:
    stops = read_config(model.parent)["model"].get("eos_token_id")
    return [stops] if isinstance(stops, int) else list(stops or [])
