"""What a transcript begins behind: Whisper's tokens for the start, a language, a task, and that there are no times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

__all__ = ["Speech"]


@dataclass(frozen=True)
class Speech:
    """The tokens in front of a transcript, as transformers' generate() of Whisper finds them in a generation_config.

    `forced` are those behind `start` where neither a language nor a task is asked for, None a language to be detected.
    """

    start: int
    languages: Mapping[str, int]
    tasks: Mapping[str, int]
    no_times: int | None
    language: str | None
    task: str | None
    forced: tuple[int | None, ...]
    multilingual: bool

    @classmethod
    def of(cls, start: int, own: Mapping[str, Any], general: Mapping[str, Any]) -> Speech:
        """By a generation_config.json, and the config.json beside it. Raises ValueError, TypeError or AttributeError
        for values that are none."""
        given = own.get("forced_decoder_ids") or general.get("forced_decoder_ids") or ()
        pairs = [(int(at), None if token is None else int(token)) for at, token in given]
        no_times = own.get("no_timestamps_token_id")
        languages, tasks = (
            {str(name): int(token) for name, token in (own.get(key) or {}).items()}
            for key in ("lang_to_id", "task_to_id")
        )
        for name in ("language", "task"):
            if not isinstance(own.get(name), str | None):
                raise ValueError(f"{name} is {own[name]!r}, expected a word")
        return cls(
            start,
            languages,
            tasks,
            None if no_times is None else int(no_times),
            own.get("language"),
            own.get("task"),
            tuple(token for number, (at, token) in enumerate(pairs, 1) if at == number),
            bool(own.get("is_multilingual", True)),
        )

    @property
    def known(self) -> tuple[int, ...]:
        """All tokens that may be among those in front."""
        few = [self.start, *self.forced, self.no_times]
        return (*(token for token in few if token is not None), *self.languages.values(), *self.tasks.values())

    def tokens(self, language: str | None = None, task: str | None = None) -> list[int | None]:
        """Those in front of a transcript, None where the language stands that is to be detected.

        Raises UserError for a `language` or `task` that the model has none for.
        """
        if not self.multilingual and (asked := language or task):
            raise UserError(f"The model knows English alone, and is asked for {asked!r}. Leave language and task out.")
        language, task = language or self.language, task or self.task
        found: list[int | None] = [self.start]
        if language is None and task is None:
            found += self.forced
        if language is not None:
            found[1:2] = [self._language(language)]
            task = task or ("transcribe" if self.tasks else None)
        elif self.languages and (len(found) < 2 or found[1] is None):
            found[1:2] = [None]
        if task is not None:
            found.append(_of(task, self.tasks, "task"))
        if self.no_times is not None and found[-1] != self.no_times:
            found.append(self.no_times)
        return [token for at, token in enumerate(found) if token is not None or (at == 1 and self.languages)]

    def is_time(self, token: int) -> bool:
        """Whether `token` stands for a time, which is no part of the text."""
        return self.no_times is not None and token > self.no_times

    def _language(self, name: str) -> int:
        return _of(
            name.lower().strip("<|>"), {key.strip("<|>"): token for key, token in self.languages.items()}, "language"
        )


def _of(name: str, known: Mapping[str, int], what: str) -> int:
    if name in known:
        return known[name]
    if not known:
        raise UserError(
            f"The {what} {name!r} can't be asked for: the model's generation_config.json names no {what}s. Leave it "
            "out, or save a newer generation_config.json beside the base model and export it again."
        )
    raise UserError(f"{name!r} is no {what} of this model. Expected one of: {', '.join(sorted(known))}.")
