"""What parity adds for models in stages: a cache that grows, and greedy tokens beside PEFT's own generate()."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UserError
from ..pytorch.base import DECODER_INPUT, Inputs, Outputs, max_sequence
from ..pytorch.shapes import text_config
from ..runtime.sound import Samples, Spectrogram
from ..runtime.staged_session import StagedSession
from .case import Case
from .checks import parity_checks
from .greedy import TOKENS, Greedy, compare_tokens
from .onnx_runs import no_library
from .result import LIBRARY, Check, Step
from .torch_runs import TorchOutputs

__all__ = ["check_stages"]

_STEPS = 16
"""Tokens that are given one by one; those before them go in together."""
_FIRST = 4
"""Tokens that Whisper's answers come behind, at most: start, language, task, no times."""


def check_stages(case: Case, expected: TorchOutputs, step: Step) -> list[Check]:
    """Whether logits are right behind a cache that has grown, and whether PEFT's generate() takes the same tokens.

    Requires a case with `stages`.
    """
    checks = []
    step("PyTorch generates")
    prompt = _sound(case) if case.base.row_shape else _prompt(case)
    right = _generate(case, prompt)
    even = [at for at, batch in enumerate(case.batches) if DECODER_INPUT in batch or batch["attention_mask"].all()]
    on = [expected.on[at] for at in even]
    for variant, library in LIBRARY.items():
        step(f"generating {variant}")
        made = _run(case, prompt, len(right.tokens), even, library=library)
        steps = made if isinstance(made, UserError) else made[0]
        for check in parity_checks(variant, steps, ("logits",), on, [None] * len(on), case.tolerance):
            checks.append(replace(check, output="logits, token by token"))
        if isinstance(made, UserError):
            checks.append(replace(checks[-1], output=right.what))
        else:
            checks.append(compare_tokens(variant, right.what, made[1], right, case.tolerance))
    return checks


def _run(
    case: Case, prompt: list[int] | Samples, count: int, even: Sequence[int], *, library: bool
) -> tuple[list[Outputs], list[int]] | UserError:
    """The logits of the batches `even`, token by token, and what the model makes of `prompt`, or why not."""
    if library and (absent := no_library()):
        return absent
    try:
        session = StagedSession(case.model, library=library)
        steps = [_step_by_step(session, case.batches[at]) for at in even]
        return steps, list(session.generate_tokens(prompt, max_new_tokens=count, stop=False))
    except Exception as error:  # onnxruntime's exceptions share no public base class
        return error if isinstance(error, UserError) else UserError(f"ONNX Runtime fails in {case.model}: {error}")


def _step_by_step(session: StagedSession, batch: Inputs) -> Outputs:
    """The logits of a batch whose decoder's rows are of one length: behind a cache there is no padding."""
    ids = batch[DECODER_INPUT if DECODER_INPUT in batch else "input_ids"]
    running = session.begin(batch)
    first = max(ids.shape[1] - _STEPS, 1)
    parts = [ids[:, :first], *(ids[:, at : at + 1] for at in range(first, ids.shape[1]))]
    return {"logits": np.concatenate([running.step(part) for part in parts], axis=1)}


def _prompt(case: Case) -> list[int]:
    config, rng = text_config(case.base.model.config), np.random.default_rng(0)
    length = min(12, (max_sequence(config) or 1 << 30) // 2)
    prompt = rng.integers(0, config.vocab_size, length)
    pad = config.pad_token_id
    return np.where(prompt == pad, (prompt + 1) % config.vocab_size, prompt).tolist()


def _sound(case: Case) -> Samples:
    """A voice of three tones that wander, and noise, for half of the time that the model takes."""
    spectrogram, rng = Spectrogram.read(case.model.parent), np.random.default_rng(0)
    times = np.arange(spectrogram.chunk_length * spectrogram.sampling_rate // 2) / spectrogram.sampling_rate
    tones = [np.sin(2 * np.pi * pitch * times * (1 + 0.2 * np.sin(5 * times))) for pitch in (140, 420, 1900)]
    return (0.2 * np.mean(tones, axis=0) + 0.02 * rng.standard_normal(times.size)).astype(np.float32)


def _generate(case: Case, prompt: list[int] | Samples) -> Greedy:
    """What PEFT's own generate() makes of `prompt`, and the scores that each token was chosen by.

    Sound goes through transformers' own feature extractor. No token ends it before all are made, as with `stop` False.
    """
    import torch

    base, inputs = case.base, dict[str, Any]()
    longest = max_sequence(text_config(base.model.config))
    if base.row_shape:
        from transformers import WhisperFeatureExtractor

        extractor = WhisperFeatureExtractor.from_pretrained(str(case.model.parent))
        features = extractor(
            np.asarray(prompt), sampling_rate=extractor.sampling_rate, return_tensors="pt"
        ).input_features
        inputs, first = {"input_features": features, "return_timestamps": False}, _FIRST
    else:
        ids = torch.tensor([prompt])
        inputs, first = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1 if base.answers else len(prompt)
    count = TOKENS if longest is None else min(TOKENS, longest - first)
    with torch.no_grad():
        made: Any = base.model.generate(
            **inputs,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    scores = [score[0].float().numpy() for score in made.scores]
    return Greedy([], made.sequences[0, -len(scores) :].tolist(), scores)
