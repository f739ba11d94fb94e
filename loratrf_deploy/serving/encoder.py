"""An encoder behind the server: texts to tokens, batches to embeddings and classes. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, some
from ..formats.embedding import SENTENCE_EMBEDDING, Embedding
from ..formats.manifest import MANIFEST, read_manifest
from ..formats.settings import read_settings
from ..ops.library import is_built
from ..runtime.adapter_session import AdapterSession, Answer
from ..runtime.session import quiet_options
from ..runtime.text import read_tokenizer
from .batcher import Row
from .catalogue import broken
from .errors import ApiError

__all__ = ["CLASSIFY", "EMBED", "Classes", "Encoder", "Tokens"]

EMBED, CLASSIFY = "embed", "classify"
"""What a row wants."""
_TEXTS = "text-classification"
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_PADDED_POSITIONS = ("roberta", "camembert", "xlm-roberta", "mpnet", "longformer", "data2vec-text", "luke", "esm")
"""Begin how families are called whose positions start behind the padding's id."""


class Tokens(NamedTuple):
    """A text as the model reads it."""

    ids: Sequence[int]
    types: Sequence[int]


class Classes(NamedTuple):
    """What a text is classified as: a probability for each label."""

    labels: Sequence[str]
    probabilities: Sequence[float]


class Encoder:
    """An exported encoder that takes adapters, one a run or one a row. Raises UserError where `folder` has none."""

    def __init__(self, folder: Path, *, max_bytes: int | None = None, threads: int = 0):
        self._folder = folder
        manifest = read_manifest(folder / MANIFEST)
        self.session = AdapterSession(
            folder / "model.onnx", library=is_built(), max_bytes=max_bytes, options=quiet_options(threads)
        )
        assert manifest.swappable is not None  # the session has asked
        self.mixed, self.task = bool(manifest.swappable.slots), manifest.task
        """Whether rows of one batch may have adapters of their own; what the model was exported for."""
        self._types = {value.name: value.type for value in self.session.inputs}
        if foreign := [name for name in self._types if name not in _INPUTS]:
            raise UserError(
                f"{folder} takes {some(foreign)}, and texts alone are served. Run it with AdapterSession, in a program "
                "of your own."
            )
        self.embedding: Embedding | None = manifest.embedding
        tasks = manifest.swappable.tasks
        logits = "logits" if not tasks and self.task == _TEXTS else None
        if _TEXTS in tasks:
            logits = tasks[_TEXTS].outputs.get("logits")
        self._outputs = {EMBED: SENTENCE_EMBEDDING if self.embedding else None, CLASSIFY: logits}
        config = read_settings(folder / "config.json")
        self._labels: Mapping[str, Any] = config.get("id2label") or {}
        self._several = config.get("problem_type") == "multi_label_classification"
        self._tokenizer = read_tokenizer(folder)
        self._read_sizes(config)

    def _read_sizes(self, config: Mapping[str, Any]) -> None:
        """The longest text, the token of padding and the number of tokens there are."""
        path = self._folder / "tokenizer_config.json"
        own = read_settings(path) if path.is_file() else {}
        try:
            self._pad = int(config.get("pad_token_id") or 0)
            self._vocabulary = int(config["vocab_size"])
            positions = int(config["max_position_embeddings"])
            if str(config.get("model_type")).startswith(_PADDED_POSITIONS):
                positions -= self._pad + 1
            self.longest = int(min(positions, own.get("model_max_length") or positions))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{self._folder / 'config.json'} doesn't say how long texts may be, and how many tokens there are "
                f"({error!r}). Export the model again with loratrf-export."
            ) from error

    def check(self, wanted: str) -> None:
        """400 where the model doesn't give what is `wanted`."""
        if self._outputs[wanted] is None:
            how = {
                EMBED: "Embeddings come of models that were exported with --pooling: mean, cls, last or auto",
                CLASSIFY: f"Classes come of models and adapters of the task {_TEXTS}",
            }
            raise ApiError(400, f"This model is for {self.task}. {how[wanted]}.", "wrong_task", param="model")

    def tokens(self, text: str | Sequence[int]) -> Tokens:
        """A text, or tokens as they are, for the model. 400 where it is longer than the model reads."""
        if isinstance(text, str):
            encoded = self._tokenizer.encode(text)
            made = Tokens(encoded.ids, encoded.type_ids)
        else:
            made = Tokens(text, [0] * len(text))
            if foreign := [token for token in text if not 0 <= token < self._vocabulary]:
                raise ApiError(
                    400,
                    f"The input has token {foreign[0]}, the model knows 0 to {self._vocabulary - 1}.",
                    "unknown_token",
                    param="input",
                )
        if not 0 < len(made.ids) <= self.longest:
            raise ApiError(
                400,
                f"The input has {len(made.ids)} tokens, and the model reads 1 to {self.longest}. Shorten or split it.",
                "context_length_exceeded",
                param="input",
            )
        return made

    def run(self, rows: Sequence[Row[Tokens]]) -> list[NDArray[np.float32] | Classes | ApiError]:
        """What each row wants, in one run of the model. ApiError for what is an adapter's fault."""
        # Rows of one adapter stand next to each other, where the kernels are fastest.
        order = sorted(range(len(rows)), key=lambda at: rows[at].adapter or "")
        own = [rows[at] for at in order]
        feeds = self._feeds(own)
        outputs = list(dict.fromkeys(name for row in own if (name := self._outputs[row.wanted])))
        adapters = [row.adapter for row in own]
        try:
            if self.mixed:
                found = self.session.answers(feeds, adapters, outputs=outputs)
            else:
                values = self.session.run(feeds, adapter=adapters[0], outputs=outputs)
                found = [Answer({name: value[at] for name, value in values.items()}) for at in range(len(own))]
        except UserError as error:
            raise broken(adapters[0], error) from error  # of several rows each is run again, and fails for itself
        answers: list[Any] = [None] * len(rows)
        for at, row, answer in zip(order, own, found, strict=True):
            answers[at] = self._answer(row, answer)
        return answers

    def _feeds(self, rows: Sequence[Row[Tokens]]) -> dict[str, NDArray[np.int64]]:
        shape = len(rows), max(row.length for row in rows)
        feeds = {name: np.zeros(shape, np.int64) for name in self._types}
        if "input_ids" in feeds:
            feeds["input_ids"].fill(self._pad)
        for at, row in enumerate(rows):
            values: dict[str, Any] = {
                "input_ids": row.tokens.ids,
                "attention_mask": 1,
                "token_type_ids": row.tokens.types,
            }
            for name, feed in feeds.items():
                feed[at, : row.length] = values[name]
        return feeds

    def _answer(self, row: Row[Tokens], answer: Answer) -> NDArray[np.float32] | Classes | ApiError:
        value = answer.outputs.get(self._outputs[row.wanted] or "")
        if value is None:
            return ApiError(
                400,
                f"The adapter {row.adapter!r} is for {answer.task}. /classify takes adapters for {_TEXTS}, and "
                "/v1/embeddings those for feature-extraction.",
                "wrong_task",
                param="model",
            )
        value = value.astype(np.float32)
        if row.wanted == EMBED:
            return value
        names = answer.labels or [str(self._labels.get(str(at), f"LABEL_{at}")) for at in range(len(value))]
        return Classes(names, _probabilities(value, self._several or len(value) == 1))


def _probabilities(logits: NDArray[np.float32], several: bool) -> list[float]:
    """softmax, or with `several` labels at once, or one alone, a sigmoid of each."""
    if several:
        return (1 / (1 + np.exp(-logits.astype(np.float64)))).tolist()
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return (powers / powers.sum()).tolist()
