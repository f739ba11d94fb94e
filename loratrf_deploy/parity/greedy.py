"""What parity adds for causal language models: greedy generation, token by token."""

from __future__ import annotations

import contextlib
import copy
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
from ..formats.adapter_file import SUFFIX, Origin, write_adapter_file
from ..genai.generate import CONFIG_FILE, generate_tokens, load_model
from ..pytorch.oracle import layers_off
from ..runtime.session import library_path
from .case import Case
from .figures import Figures
from .result import LIBRARY, NO_ADAPTER, Check, Variant

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


__all__ = ["TOKENS", "check_greedy", "linked_folder"]

TOKENS = 64
_PROMPT = 12


@contextlib.contextmanager
def linked_folder(model: Path, graph: ir.Model, config: dict[str, Any], *, library: bool) -> Iterator[Path]:
    """Yields a copy of the model's folder with `graph` for the model, the custom-op library registered or not.

    `config` is its genai_config.json. The weights are hard links where the file system has them, since
    onnxruntime-genai reads nothing outside its folder.
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
        config = copy.deepcopy(config)
        options = config["model"]["decoder"]["session_options"]
        options.pop("custom_ops_library", None)
        if library:
            own = library_path()
            (folder / own.name).unlink(missing_ok=True)
            shutil.copy(own, folder)
            options["custom_ops_library"] = own.name
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        yield folder


def check_greedy(case: Case) -> list[Check]:
    """Whether onnxruntime-genai takes the tokens that PyTorch takes: greedy, TOKENS of them, with and without library.

    A swappable model is given the adapter through onnxruntime-genai's own Adapters, and runs without one too. A token
    that differs is a tie where PyTorch's two scores are closer than the errors allowed; what follows a tie is another
    text and isn't compared. Requires a case with a genai_config.
    """
    facts, rng = (case.genai_config or {})["model"], np.random.default_rng(0)
    length = min(facts.get("context_length", _PROMPT + TOKENS), _PROMPT + TOKENS)
    count = max(length - _PROMPT, 1)
    prompt = rng.integers(0, case.base.model.config.vocab_size, length - count)
    stops = facts.get("eos_token_id") or []
    stops = [stops] if isinstance(stops, int) else stops
    right = _torch_greedy(case.base.model, prompt, count, stops)
    variants = dict(LIBRARY)
    expected = dict.fromkeys(variants, right)
    swappable = case.manifest and case.manifest.swappable
    if swappable:
        variants[NO_ADAPTER] = False
        off = layers_off(case.base.model) if swappable.default == "base" else contextlib.nullcontext()
        with off:
            expected[NO_ADAPTER] = _torch_greedy(case.base.model, prompt, count, stops)
    checks, name = [], f"{count} greedy tokens"
    for variant, library in variants.items():
        try:
            got = _generate(case, prompt.tolist(), count, library=library, adapter_on=variant != NO_ADAPTER)
        except UserError as error:
            checks.append(Check(variant, name, "skipped", re.sub(r"/\.?loratrf-parity-\w+", "", str(error))))
            continue
        checks.append(_compare_tokens(variant, name, got, *expected[variant], case.tolerance))
    return checks


def _generate(case: Case, prompt: list[int], count: int, *, library: bool, adapter_on: bool) -> list[int]:
    """What onnxruntime-genai makes of `prompt`, a swappable model with the adapter of `case` or without."""
    with linked_folder(case.model, case.graph, case.genai_config or {}, library=library) as folder:
        model, active = load_model(folder), None
        if case.manifest is not None and adapter_on:
            import onnxruntime_genai as og

            file = folder / f"adapter{SUFFIX}"
            write_adapter_file(file, case.weights, Origin.of(case.adapter, case.manifest))
            active = (og.Adapters(model), "adapter")
            active[0].load(str(file), active[1])
        return list(generate_tokens(model, prompt, count, stop=False, active=active))


def _compare_tokens(
    variant: Variant, name: str, got: list[int], tokens: list[int], scores: list[NDArray[Any]], tolerance: float
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
