"""Generating text with an exported causal language model. Needs onnxruntime-genai alone: no torch, no transformers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..ops.schemas import ADAPTER_IDS
from .folder import CONFIG_FILE, decoder_config, read_config, safe_folder

if TYPE_CHECKING:
    import onnxruntime_genai as og

__all__ = [
    "CONFIG_FILE",
    "GenerationFailed",
    "decode_rows",
    "decoder_config",
    "generate_tokens",
    "load_model",
    "load_model_and_tokenizer",
    "read_config",
]

_QUIET = {"log_severity_level": 4}
"""What goes wrong is an exception; ONNX Runtime's log would print a stranger's names raw."""
_GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


class GenerationFailed(UserError):
    """onnxruntime-genai holds the model and doesn't run it, or not any further."""


def load_model(folder: str | Path, *, trust_library: bool = False) -> og.Model:
    """onnxruntime-genai's model of an exported folder, with our custom-op library where genai_config.json names one.

    A library of the folder's own is native code of whoever made it: it is loaded with `trust_library` alone, and so is
    what else `safe_folder` refuses. Raises UserError where onnxruntime-genai or the folder is missing, or it refuses
    what is there.
    """
    with _opened(Path(folder), trust_library) as (model, _):
        return model


def load_model_and_tokenizer(
    folder: str | Path, *, trust_library: bool = False, threads: int = 0
) -> tuple[og.Model, og.Tokenizer]:
    """As `load_model`, with the folder's tokenizer; `threads` are ONNX Runtime's, 0 as many as the CPU has cores."""
    with _opened(Path(folder), trust_library, threads) as (model, opened):
        try:
            return model, _genai().Tokenizer(model)
        except Exception as error:  # plain RuntimeErrors
            detail = str(error).replace(str(opened), str(folder))
            raise UserError(
                f"{folder} has no tokenizer that generation can use ({detail}). Export the model again with "
                "loratrf-export."
            ) from error


@contextlib.contextmanager
def _opened(folder: Path, trust_library: bool, threads: int = 0) -> Iterator[tuple[og.Model, Path]]:
    """The model, and the folder that it was opened in while that is there."""
    og = _genai()
    with safe_folder(folder, trust_library=trust_library) as opened:
        try:
            config = og.Config(str(opened))
            options = _QUIET | ({"intra_op_num_threads": threads} if threads else {})
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            model = og.Model(config)
        except Exception as error:  # plain RuntimeErrors
            detail = str(error).replace(str(opened), str(folder))
            raise UserError(f"onnxruntime-genai {og.__version__} can't load {folder}: {detail}") from error
        yield model, opened


def _genai() -> Any:
    try:
        import onnxruntime_genai as og
    except ModuleNotFoundError as error:
        raise UserError(
            "onnxruntime-genai is not installed. Install it: `pip install 'loratrf-deploy[genai]'`."
        ) from error
    return og


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
    least: int = 0,
    images: Mapping[str, NDArray[Any]] | None = None,
    search: Mapping[str, Any],
) -> Iterator[NDArray[np.int32]]:
    """Yields the next token of every row, up to `count` times; what comes for a row that has ended means nothing.

    Rows are padded with `pad` on the right, where onnxruntime-genai looks for padding; so of several rows none may end
    in `pad`. `active` is an adapter that onnxruntime-genai holds, by its name there; `adapter_ids` (rows) are a grouped
    model's. `prefix` are tokens before a single row that run without `active`. The cache holds `least` tokens at least
    (`cache_window`). `images` are what a single row sees: pixel_values, image_sizes and num_image_tokens, how many
    tokens each image has in the row. `search` are onnxruntime-genai's search options (do_sample, temperature, top_k,
    top_p, ...); without any it is greedy, whatever the folder's own defaults are. Raises GenerationFailed where
    onnxruntime-genai refuses, such as more tokens than the context holds.
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
        limits = {"max_length": max(length, least), "min_length": 0 if stop else length, "batch_size": len(rows)}
        params.set_search_options(**{**_GREEDY, **search, **limits})
        generator = og.Generator(model, params)
        if ids is not None:
            generator.set_model_input(ADAPTER_IDS, ids)
        if len(prefix):
            generator.append_tokens(np.array(prefix, np.int32))
        if active is not None:
            generator.set_active_adapter(*active)
        if images:
            generator.set_inputs(_with_tokens(images, tokens))
        else:
            generator.append_tokens(tokens)
    except Exception as error:  # plain RuntimeErrors
        raise GenerationFailed(
            f"onnxruntime-genai refuses {longest} tokens of prompt and {count} more: {error}"
        ) from error
    try:
        for made in range(count):
            if generator.is_done():
                return
            try:
                generator.generate_next_token()
            except Exception as error:  # a plain RuntimeError
                raise GenerationFailed(
                    f"onnxruntime-genai fails after {longest} tokens of prompt and {made} more: {error} Export the "
                    "model again with loratrf-export, which proves that it generates."
                ) from error
            yield generator.get_next_tokens()
    finally:
        # Before whoever holds the adapter: what a generator uses, onnxruntime-genai doesn't unload.
        del generator


def _with_tokens(images: Mapping[str, NDArray[Any]], tokens: NDArray[np.int32]) -> og.NamedTensors:
    """What onnxruntime-genai's own processor would give."""
    import onnxruntime_genai as og

    tensors = og.NamedTensors()
    for name, value in {"input_ids": tokens, **images}.items():
        tensors[name] = og.Tensor(np.ascontiguousarray(value))
    return tensors
