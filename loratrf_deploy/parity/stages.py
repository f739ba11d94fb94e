"""What parity adds for models in stages: a cache that grows, and greedy tokens beside PEFT's own generate()."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import UserError
from ..pytorch.base import DECODER_INPUT, Inputs, Outputs, max_sequence
from ..pytorch.shapes import text_config
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


def check_stages(case: Case, expected: TorchOutputs, step: Step) -> list[Check]:
    """Whether logits are right behind a cache that has grown, and whether PEFT's generate() takes the same tokens.

    Requires a case with `stages`.
    """
    checks = []
    step("PyTorch generates")
    right = _generate(case)
    even = [at for at, batch in enumerate(case.batches) if DECODER_INPUT in batch or batch["attention_mask"].all()]
    on = [expected.on[at] for at in even]
    for variant, library in LIBRARY.items():
        step(f"generating {variant}")
        made = _run(case, right, even, library=library)
        steps = made if isinstance(made, UserError) else made[0]
        for check in parity_checks(variant, steps, ("logits",), on, [None] * len(on), case.tolerance):
            checks.append(replace(check, output="logits, token by token"))
        if isinstance(made, UserError):
            checks.append(replace(checks[-1], output=right.what))
        else:
            checks.append(compare_tokens(variant, right.what, made[1], right, case.tolerance))
    return checks


def _run(
    case: Case, right: Greedy, even: Sequence[int], *, library: bool
) -> tuple[list[Outputs], list[int]] | UserError:
    """The logits of the batches `even`, token by token, and what the model makes of the prompt, or why not."""
    if library and (absent := no_library()):
        return absent
    try:
        session = StagedSession(case.model, library=library)
        steps = [_step_by_step(session, case.batches[at]) for at in even]
        return steps, list(session.generate_tokens(right.prompt, max_new_tokens=len(right.tokens), stop=False))
    except Exception as error:  # onnxruntime's exceptions share no public base class
        return error if isinstance(error, UserError) else UserError(f"ONNX Runtime fails in {case.model}: {error}")


def _step_by_step(session: StagedSession, batch: Inputs) -> Outputs:
    """The logits of a batch whose decoder's rows are of one length: behind a cache there is no padding."""
    ids = batch.get(DECODER_INPUT, batch["input_ids"])
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


def _generate(case: Case) -> Greedy:
    """What PEFT's own generate() makes of a random prompt, and the scores that each token was chosen by.

    No token ends it before all are made, as with `stop` False.
    """
    import torch

    base, prompt = case.base, _prompt(case)
    longest = max_sequence(text_config(base.model.config))
    answers = bool(base.model.config.is_encoder_decoder)
    count = TOKENS if longest is None else min(TOKENS, longest - (1 if answers else len(prompt)))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        made: Any = base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    scores = [score[0].float().numpy() for score in made.scores]
    return Greedy(prompt, made.sequences[0, -len(scores) :].tolist(), scores)
