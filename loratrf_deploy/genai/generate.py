"""Generating text with an exported causal language model. Needs onnxruntime-genai alone: no torch, no transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    import onnxruntime_genai

__all__ = ["CONFIG_FILE", "decoder_config", "generate_tokens", "load_model", "read_config"]

CONFIG_FILE = "genai_config.json"

_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def load_model(folder: str | Path) -> onnxruntime_genai.Model:
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
    model: onnxruntime_genai.Model,
    prompt: Sequence[int],
    count: int,
    *,
    stop: bool = True,
    adapter: tuple[onnxruntime_genai.Adapters, str] | None = None,
    **search: Any,
) -> Iterator[int]:
    """Yields up to `count` tokens that follow the tokens `prompt`; fewer where an end-of-sequence token is `stop`.

    `adapter` is one that onnxruntime-genai has loaded, and its name there; None is the model as it is. `search` are
    onnxruntime-genai's search options (do_sample, temperature, top_k, top_p, ...); with none of them it
    is greedy, whatever the folder's own defaults are. Raises UserError where prompt and `count` exceed the context.
    """
    import onnxruntime_genai as og

    length = len(prompt) + count
    params = og.GeneratorParams(model)
    try:
        params.set_search_options(
            **{**_GREEDY, **search}, max_length=length, min_length=0 if stop else length, batch_size=1
        )
        generator = og.Generator(model, params)
        if adapter is not None:
            generator.set_active_adapter(*adapter)
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
    except Exception as error:  # plain RuntimeErrors
        raise UserError(
            f"onnxruntime-genai refuses {len(prompt)} tokens of prompt and {count} more: {error}"
        ) from error
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])
