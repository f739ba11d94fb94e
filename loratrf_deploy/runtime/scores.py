"""From scores to a token: what a generation_config.json rules out, then the likeliest token or one drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rules", "choose"]

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Rules:
    """What transformers' generate() does to the scores of a greedy search, by the names of its configuration.

    In its order, for one row: a repetition penalty, n-grams and tokens that may not come, a least length, tokens that
    must come first and last.
    """

    stops: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Rules:
        """Those of a generation_config.json. Raises ValueError or TypeError for values that are none."""
        return cls(
            stops=_tokens(config.get("eos_token_id")),
            repetition_penalty=float(config.get("repetition_penalty") or 1.0),
            no_repeat_ngram_size=int(config.get("no_repeat_ngram_size") or 0),
            bad_words_ids=tuple(map(_tokens, config.get("bad_words_ids") or ())),
            min_length=int(config.get("min_length") or 0),
            min_new_tokens=int(config.get("min_new_tokens") or 0),
            forced_bos_token_id=next(iter(_tokens(config.get("forced_bos_token_id"))), None),
            forced_eos_token_id=_tokens(config.get("forced_eos_token_id")),
            suppress_tokens=_tokens(config.get("suppress_tokens")),
            begin_suppress_tokens=_tokens(config.get("begin_suppress_tokens")),
        )

    def apply(self, scores: Scores, before: Sequence[int], begin: int, last: bool) -> Scores:
        """`scores` (V) of the token that follows `before`, of which `begin` were given; `last` is that no more come."""
        scores = scores.astype(np.float32)
        if self.repetition_penalty != 1:
            seen = sorted(set(before))
            own = scores[seen]
            scores[seen] = np.where(own < 0, own * self.repetition_penalty, own / self.repetition_penalty)
        scores[self._repeated(before)] = -np.inf
        # The end of the text can't be forbidden by a word: generate() takes such words out.
        for word in [word for word in self.bad_words_ids if word not in {(stop,) for stop in self.stops}]:
            if tuple(before[len(before) - len(word) + 1 :]) == word[:-1]:
                scores[word[-1]] = -np.inf
        if len(before) < self.min_length or len(before) - begin < self.min_new_tokens:
            scores[list(self.stops)] = -np.inf
        if self.forced_bos_token_id is not None and len(before) == 1:
            scores = _only(scores, (self.forced_bos_token_id,))
        if self.forced_eos_token_id and last:
            scores = _only(scores, self.forced_eos_token_id)
        scores[list(self.suppress_tokens)] = -np.inf
        first = begin + (begin == 1 and self.forced_bos_token_id is not None)
        if len(before) == first:
            scores[list(self.begin_suppress_tokens)] = -np.inf
        return scores

    def _repeated(self, before: Sequence[int]) -> list[int]:
        """Tokens that would end an n-gram which was there before."""
        size = self.no_repeat_ngram_size
        if not size or len(before) + 1 < size:
            return []
        end = list(before[len(before) - size + 1 :])
        starts = range(len(before) - size + 1)
        return [before[at + size - 1] for at in starts if list(before[at : at + size - 1]) == end]


def choose(scores: Scores, rng: np.random.Generator | None, temperature: float = 1.0, top_p: float = 1.0) -> int:
    """The likeliest token; with `rng` one drawn from softmax(scores / temperature), among the fewest likeliest ones
    whose probabilities add up to `top_p`."""
    if rng is None:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")
    logits = scores[order].astype(np.float64) / temperature
    shares = np.exp(logits - logits[0])
    shares /= shares.sum()
    # The first is always among them; the one that passes top_p too.
    shares[1:][np.cumsum(shares)[:-1] >= top_p] = 0
    return int(rng.choice(order, p=shares / shares.sum()))


def _only(scores: Scores, tokens: Sequence[int]) -> Scores:
    forced = np.full_like(scores, -np.inf)
    forced[list(tokens)] = 0
    return forced


def _tokens(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(map(int, value if isinstance(value, list | tuple) else [value]))
