"""What parity adds for causal language models: greedy generation, token by token."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.adapter_file import SUFFIX, write_values
from ..formats.images import IMAGE_SIZES, PIXELS, takes_images
from ..genai.folder import takes_uneven_rows
from ..genai.generate import CONFIG_FILE, GenerationFailed, decode_rows, load_model
from ..pytorch.base import Inputs
from ..pytorch.oracle import layers_off
from ..pytorch.shapes import text_config
from ..runtime.session import library_path
from .case import Case
from .figures import Figures
from .images import image_batches, token_edge
from .result import LIBRARY, NO_ADAPTER, Check, Status, Variant

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    *("TOKENS", "Greedy", "check_greedy", "check_greedy_rows", "compare_tokens", "linked_folder", "torch_greedy"),
]

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


@dataclass(frozen=True)
class Greedy:
    """PyTorch's likeliest tokens after `prompt`, one by one, and the scores (V) that each was chosen by.

    `images` are what of the prompt isn't text, as `decode_rows` takes it.
    """

    prompt: list[int]
    tokens: list[int]
    scores: list[NDArray[Any]]
    images: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def what(self) -> str:
        return f"{len(self.tokens)} greedy tokens{', images' if self.images else ''}"


def torch_greedy(model: Any, config: dict[str, Any], row: int = 0) -> Greedy:
    """What PyTorch's `model` continues a random prompt with, through its own cache; no end-of-sequence token among it.

    `config` is the export's genai_config.json. Each `row` has a prompt of its own, of its own length: 12, 9, 6, 3, 12;
    12 all of them where rows must be of one length.
    """
    facts, rng = config["model"], np.random.default_rng(row)
    length = min(facts.get("context_length", _PROMPT + TOKENS), _PROMPT + TOKENS)
    count = max(length - _PROMPT, 1)
    shorter = 3 * (row % 4) if takes_uneven_rows(config) else 0
    size, vocabulary = max(length - count - shorter, 1), text_config(model.config).vocab_size
    prompt = rng.integers(0, vocabulary, size)
    # Where one stands at the end of a row, onnxruntime-genai takes it for padding.
    prompt = np.where(prompt == _pad(config), (prompt + 1) % vocabulary, prompt)
    tokens, scores = _continued(model, {"input_ids": prompt[None]}, count, facts)
    return Greedy(prompt.tolist(), tokens, scores)


def torch_greedy_seen(model: Any, config: dict[str, Any]) -> Greedy:
    """As `torch_greedy`, of a prompt with two images of different size."""
    facts, prompt = config["model"], image_batches(model.config)[-1]
    images = {name: prompt[name] for name in (PIXELS, IMAGE_SIZES)}
    tokens, scores = _continued(model, {"input_ids": prompt["input_ids"], **images}, TOKENS, facts)
    counts = (prompt[IMAGE_SIZES] // token_edge(model.config)).prod(axis=1)
    return Greedy(prompt["input_ids"][0].tolist(), tokens, scores, images | {"num_image_tokens": counts})


def _continued(
    model: Any, prompt: Inputs, count: int, facts: Mapping[str, Any]
) -> tuple[list[int], list[NDArray[Any]]]:
    """The `count` likeliest tokens after `prompt`, and the scores that each was chosen by, end-of-sequence left out."""
    import torch

    stops = [] if facts.get("eos_token_id") is None else facts["eos_token_id"]  # 0 is a token too
    tokens: list[int] = []
    scores: list[NDArray[Any]] = []
    inputs, cache = {name: torch.from_numpy(value) for name, value in prompt.items()}, None
    with torch.no_grad():
        for _ in range(count):
            outputs = model(**inputs, past_key_values=cache, use_cache=True)
            cache, score = outputs.past_key_values, outputs.logits[0, -1].float().numpy()
            score[stops] = -np.inf
            tokens.append(int(score.argmax()))
            scores.append(score)
            inputs = {"input_ids": torch.tensor([[tokens[-1]]])}
    return tokens, scores


def check_greedy(case: Case) -> list[Check]:
    """Whether onnxruntime-genai takes the tokens that PyTorch takes: greedy, TOKENS of them, with and without library.

    A swappable model is given the adapter through onnxruntime-genai's own Adapters, a grouped one in a slot, and runs
    without one too. A token
    that differs is a tie where PyTorch's two scores are closer than the errors allowed; what follows a tie is another
    text and isn't compared. Where it takes images, a prompt with some too. Requires a case with a genai_config.
    """
    prompts = [torch_greedy, *([torch_greedy_seen] if takes_images(case.genai_config) else [])]
    return [check for prompt in prompts for check in _check_greedy(case, prompt)]


def _check_greedy(case: Case, greedy: Callable[[Any, dict[str, Any]], Greedy]) -> list[Check]:
    config = case.genai_config or {}
    right = greedy(case.base.model, config)
    variants = dict(LIBRARY)
    expected = dict.fromkeys(variants, right)
    swappable = case.manifest and case.manifest.swappable
    if swappable:
        variants[NO_ADAPTER] = False
        is_base = swappable.default == "base" or case.grouped
        with layers_off(case.base.model) if is_base else contextlib.nullcontext():
            expected[NO_ADAPTER] = greedy(case.base.model, config)
    checks = []
    for variant, library in variants.items():
        try:
            got = _generate(case, expected[variant], library=library, adapter_on=variant != NO_ADAPTER)
        except (UserError, RuntimeError) as error:  # GenAI's own errors are plain RuntimeErrors
            checks.append(Check(variant, right.what, _status(error), _without_folder(error)))
            continue
        checks.append(compare_tokens(variant, right.what, got, expected[variant], case.tolerance))
    return checks


def _generate(case: Case, right: Greedy, *, library: bool, adapter_on: bool) -> list[int]:
    """What onnxruntime-genai makes of the prompt, a swappable model with the adapter of `case` or without."""
    with linked_folder(case.model, case.graph, case.genai_config or {}, library=library) as folder:
        model, active = load_model(folder), None
        if case.manifest is not None and adapter_on:
            import onnxruntime_genai as og

            file = folder / f"adapter{SUFFIX}"
            write_values(file, case.weights)
            active = (og.Adapters(model), "adapter")
            active[0].load(str(file), active[1])
        ids = [0 if adapter_on else -1] if case.grouped else None
        count = len(right.tokens)
        made = decode_rows(
            model,
            [right.prompt],
            count,
            pad=0,
            stop=False,
            active=active,
            adapter_ids=ids,
            images=right.images,
            search={},
        )
        return [int(tokens[0]) for tokens in made]


def check_greedy_rows(
    model: Path, graph: ir.Model, config: dict[str, Any], rows: Mapping[str, Greedy], tolerance: float
) -> list[Check]:
    """Whether each row of one batch gets the tokens that PyTorch takes for it alone, with and without the library.

    `rows` are by name and in the order of the slots of the grouped `model`, the base's last. Its `graph` and `config`
    run. Ties as in `check_greedy`.
    """
    checks = []
    for variant, library in LIBRARY.items():
        try:
            with linked_folder(model, graph, config, library=library) as folder:
                got = _generate_rows(folder, list(rows.values()), _pad(config))
        except (UserError, RuntimeError) as error:  # GenAI's own errors are plain RuntimeErrors
            reason = _without_folder(error)
            checks += [Check(variant, f"{right.what} ({name})", _status(error), reason) for name, right in rows.items()]
            continue
        checks += [
            compare_tokens(variant, f"{right.what} ({name})", own, right, tolerance)
            for own, (name, right) in zip(got, rows.items(), strict=True)
        ]
    return checks


def _generate_rows(folder: Path, rows: Sequence[Greedy], pad: int) -> list[list[int]]:
    """What onnxruntime-genai makes of all prompts in one batch, each row under its own slot, the last under none."""
    prompts, ids = [row.prompt for row in rows], [*range(len(rows) - 1), -1]
    made = decode_rows(
        load_model(folder), prompts, len(rows[0].tokens), pad=pad, stop=False, adapter_ids=ids, search={}
    )
    return [list(row) for row in zip(*(tokens.tolist() for tokens in made), strict=True)]


def _pad(config: dict[str, Any]) -> int:
    return config["model"].get("pad_token_id", 0)


def _status(error: Exception) -> Status:
    """Of a check that gave no tokens: what can't be tried here is skipped, what doesn't run is wrong."""
    return "skipped" if isinstance(error, UserError) and not isinstance(error, GenerationFailed) else "failed"


def _without_folder(error: Exception) -> str:
    return str(UserError(re.sub(r"/\.?loratrf-parity-\w+", "", str(error))))


def compare_tokens(variant: Variant, name: str, got: list[int], right: Greedy, tolerance: float) -> Check:
    """The check `name` whether `got` are the tokens of `right`.

    Where they part, PyTorch's scores s of the two decide: s(right) - s(got) <= 2·tolerance·max|s| is a tie, and passes.
    """
    tokens = right.tokens
    equal = next((at for at, pair in enumerate(zip(got, tokens, strict=False)) if pair[0] != pair[1]), len(got))
    share = equal / len(tokens)
    if equal == len(tokens):
        return Check(variant, name, "passed", "", Figures(0.0, 0.0, 1.0, 1.0, 0, len(tokens), len(tokens)))
    reason = f"{len(got)} tokens came instead of {len(tokens)}"
    if equal < len(got):
        score = right.scores[equal]
        margin = float(score[tokens[equal]] - score[got[equal]])
        largest = float(np.abs(score[np.isfinite(score)]).max())
        reason = f"token {equal + 1} is {got[equal]}, PyTorch takes {tokens[equal]}"
        if margin <= 2 * tolerance * largest:
            return Check(variant, name, "passed", f"{reason}: a tie, {equal} tokens before it agree")
        reason += f" by a margin of {margin:.2e} (largest logit {largest:.2e})"
    figures = Figures(float("nan"), float("nan"), float("nan"), share, 0, len(tokens), len(tokens))
    return Check(variant, name, "failed", reason, figures)
