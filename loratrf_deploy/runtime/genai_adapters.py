"""Adapters in onnxruntime-genai's memory, and the generator that runs rows of tokens under them."""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.adapter_file import SUFFIX, write_values
from ..ops.schemas import ADAPTER_IDS

if TYPE_CHECKING:
    import onnxruntime_genai as og

__all__ = ["GenaiAdapters", "Placed", "decode_rows"]

GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
"""onnxruntime-genai's folders have sampling defaults of their own; here a search is greedy unless it says otherwise."""


class Placed:
    """Weights that onnxruntime-genai holds under a key of their own, for as long as anybody refers to this object."""

    def __init__(self, adapters: og.Adapters, key: str):
        self.adapters, self.key = adapters, key


class GenaiAdapters:
    """What `og.Adapters` holds of one model. Any thread."""

    def __init__(self, model: og.Model):
        import onnxruntime_genai as og

        self._adapters, self._keys = og.Adapters(model), itertools.count()

    def place(self, values: Mapping[str, NDArray[Any]]) -> Placed:
        """`values` by graph input, in memory; onnxruntime-genai takes them from a file alone, which goes again."""
        key = str(next(self._keys))
        with tempfile.TemporaryDirectory(prefix="loratrf-") as folder:
            file = Path(folder) / f"{key}{SUFFIX}"
            write_values(file, values)
            self._adapters.load(str(file), key)
        placed = Placed(self._adapters, key)
        weakref.finalize(placed, self._adapters.unload, key).atexit = False
        return placed


def decode_rows(
    model: og.Model,
    rows: Sequence[Sequence[int]],
    pad: int,
    count: int,
    *,
    placed: Placed | None,
    ids: Sequence[int] | None = None,
    prefix: Sequence[int] = (),
    stop: bool = True,
    search: Mapping[str, Any],
) -> Iterator[NDArray[np.int32]]:
    """Yields the next token of every row, up to `count` times; a row that ended gets `pad`, or what follows its end.

    Rows are padded on the right, where onnxruntime-genai looks for padding; so of several rows none may end in `pad`.
    `placed` is what all rows run under, `ids` (rows) are the adapter_ids of a grouped model. `prefix` are tokens before
    a single row that run without `placed`. Raises UserError where onnxruntime-genai refuses.
    """
    import onnxruntime_genai as og

    longest = max(map(len, rows))
    length = len(prefix) + longest + count
    tokens = np.full((len(rows), longest), pad, np.int32)
    for row, own in zip(tokens, rows, strict=True):
        row[: len(own)] = own
    params = og.GeneratorParams(model)
    adapter_ids = None if ids is None else np.array(ids, np.int64)  # is read in place: must outlive the generator
    try:
        limits = {"max_length": length, "min_length": 0 if stop else length, "batch_size": len(rows)}
        params.set_search_options(**{**GREEDY, **search, **limits})
        generator = og.Generator(model, params)
        if adapter_ids is not None:
            generator.set_model_input(ADAPTER_IDS, adapter_ids)
        if len(prefix):
            generator.append_tokens(np.array(prefix, np.int32))
        if placed is not None:
            generator.set_active_adapter(placed.adapters, placed.key)
        generator.append_tokens(tokens)
    except Exception as error:  # plain RuntimeErrors
        raise UserError(
            f"onnxruntime-genai refuses {len(rows)} rows of up to {longest} tokens and {count} more: {error}"
        ) from error
    try:
        while not generator.is_done():
            generator.generate_next_token()
            yield generator.get_next_tokens()
    finally:
        # Before `placed`: what a generator uses, onnxruntime-genai doesn't unload.
        del generator
