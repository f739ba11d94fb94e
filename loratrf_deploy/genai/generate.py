"""Generating text with an exported causal language model. Needs onnxruntime-genai alone: no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..ops.schemas import ADAPTER_IDS

if TYPE_CHECKING:
    import onnxruntime_genai as og

__all__ = ["CONFIG_FILE", "decode_rows", "decoder_config", "generate_tokens", "load_model", "read_config"]

CONFIG_FILE = "genai_config.json"

_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def load_model(folder: str | Path) -> og.Model:
    """onnxruntime-genai's model of an exported folder, with the custom-op library where its genai_config.json names it.

    Raises UserError where onnxruntime-genai or the folder is missing, or it refuses what is there.
    """
    try:
        import onnxruntime_genai as og
    except ModuleNotFoundError as error:
        raise UserError(
            "onnxruntime-genai is not installed. Install it: `pip install 'loratrf-deploy[genai]'`."
        ) from error
    folder = Path(folder)
    read_config(folder)
    try:
        return og.Model(str(folder))
    except Exception as error:  # plain RuntimeErrors
        raise UserError(f"onnxruntime-genai {og.__version__} can't load {folder}: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's genai_config.json. Raises UserError where there is none that can be read."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]
    except OSError as error:
        raise UserError(
            f"{folder} has no {CONFIG_FILE} that can be read ({error.strerror or error}). Expected a folder that "
            "loratrf-export wrote for a causal language model."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}). Export the model again with loratrf-export.") from error
    return config


def decoder_config(model: Path) -> dict[str, Any] | None:
    """The genai_config.json beside `model`, None where it is no decoder that onnxruntime-genai loads."""
    if not (model.parent / CONFIG_FILE).is_file():
        return None
    config = read_config(model.parent)
    return config if config["model"]["decoder"].get("filename") == model.name else None


def generate_tokens(
    model: og.Model,
    prompt: Sequence[int],
    count: int,
    *,
    stop: bool = True,
    active: tuple[og.Adapters, str] | None = None,
    **search: Any,
) -> Iterator[int]:
    """Yields up to `count` tokens that follow the tokens `prompt`; fewer where an end-of-sequence token is `stop`.

    Further arguments as in `decode_rows`, of which this is one row.
    """
    for tokens in decode_rows(model, [prompt], count, pad=0, stop=stop, active=active, search=search):
        yield int(tokens[0])


def decode_rows(
    model: og.Model,
    rows: Sequence[Sequence[int]],
    count: int,
    *,
    pad: int,
    stop: bool = True,
    active: tuple[og.Adapters, str] | None = None,
    adapter_ids: Sequence[int] | None = None,
    prefix: Sequence[int] = (),
    search: Mapping[str, Any],
) -> Iterator[NDArray[np.int32]]:
    """Yields the next token of every row, up to `count` times; what comes for a row that has ended means nothing.

    Rows are padded with `pad` on the right, where onnxruntime-genai looks for padding; so of several rows none may end
    in `pad`. `active` is an adapter that onnxruntime-genai holds, by its name there; `adapter_ids` (rows) are a grouped
    model's. `prefix` are tokens before a single row that run without `active`. `search` are onnxruntime-genai's
    search options (do_sample, temperature, top_k, top_p, ...); without any it is greedy, whatever the folder's own
    defaults are. Raises UserError where onnxruntime-genai refuses, such as more tokens than the context holds.
    """
    import onnxruntime_genai as og

    longest = max(map(len, rows))
    length = len(prefix) + longest + count
    tokens = np.full((len(rows), longest), pad, np.int32)
    for row, own in zip(tokens, rows, strict=True):
        row[: len(own)] = own
    ids = None if adapter_ids is None else np.array(adapter_ids, np.int64)  # read in place: must outlive the generator
    params = og.GeneratorParams(model)
    try:
        limits = {"max_length": length, "min_length": 0 if stop else length, "batch_size": len(rows)}
        params.set_search_options(**{**_GREEDY, **search, **limits})
        generator = og.Generator(model, params)
        if ids is not None:
            generator.set_model_input(ADAPTER_IDS, ids)
        if len(prefix):
            generator.append_tokens(np.array(prefix, np.int32))
        if active is not None:
            generator.set_active_adapter(*active)
        generator.append_tokens(tokens)
    except Exception as error:  # plain RuntimeErrors
        raise UserError(f"onnxruntime-genai refuses {longest} tokens of prompt and {count} more: {error}") from error
    try:
        while not generator.is_done():
            generator.generate_next_token()
            yield generator.get_next_tokens()
    finally:
        # Before whoever holds the adapter: what a generator uses, onnxruntime-genai doesn't unload.
        del generator
