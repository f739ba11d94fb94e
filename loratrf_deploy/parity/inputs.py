"""What both sides are fed: random batches of awkward sizes, or the rows of a user's JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..pytorch.base import (
    DECODER_INPUT,
    GENERATION,
    Inputs,
    load_tokenizer,
    max_sequence,
    sample_inputs,
    start_token,
)
from ..pytorch.shapes import MAIN_INPUTS, SMALLEST_IMAGE, text_config, wave_length

if TYPE_CHECKING:
    from ..pytorch.base import BaseModel

__all__ = ["complete", "default_inputs", "padding_mask", "read_inputs", "rows"]


_SIZES = ((1, 2, False), (1, 24, False), (3, 9, True), (2, 16, True), (4, 128, True))
"""(batch, sequence, padded): one row, the two special tokens alone, odd sizes, and as long as edge inputs get."""

_TEXTS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("question", "context"))
_TEXT_BATCH = 8
"""Text rows that are tokenised and run together, padded to the longest."""


def default_inputs(base: BaseModel) -> list[Inputs]:
    """Random batches of the model's own sizes, the same ones on every call; for an embedding also padded on the left.

    There, padding must be told from tokens on either side.
    """
    batches = [
        sample_inputs(base, batch=batch, sequence=sequence, seed=seed, padding=padding)
        for seed, (batch, sequence, padding) in enumerate(_SIZES)
    ]
    if base.embedding is not None:
        batches += [
            {name: np.ascontiguousarray(value[:, ::-1]) for name, value in batch.items()} for batch in batches[2:4]
        ]
    return batches


def padding_mask(batch: Inputs) -> NDArray[np.bool_] | None:
    """(B,S), True at tokens that count; None for images, and where outputs are of a decoder, which has no padding."""
    if "attention_mask" not in batch or DECODER_INPUT in batch:
        return None
    return batch["attention_mask"].astype(bool)


def read_inputs(path: str | Path, base: BaseModel, folder: Path) -> list[Inputs]:
    """Batches from the JSON-lines file `path`, each row an object in one of two forms:

    texts, {"text": ...}, {"sentence": ...}, {"sentence1": ..., "sentence2": ...} or {"question": ..., "context": ...},
    tokenised with the tokenizer in `folder` (else the base model's), eight neighbouring rows to a batch; or arrays by
    input name, {"input_ids": [...], ...}, {"pixel_values": [...]} or {"input_values": [...]}, one row of a batch or a
    whole batch. Other keys (labels, ids) are ignored. Raises UserError with the line number.
    """
    path = Path(path)
    # Tokenizers of language models pad on either side, or have no padding token at all.
    most = 1 if base.task == GENERATION else _TEXT_BATCH
    batches: list[Inputs] = []
    texts: list[tuple[str, ...]] = []
    tokenizer = None
    for line, row in rows(path):
        keys = next((keys for keys in _TEXTS if set(keys) <= set(row)), None)
        arrays = [name for name in base.input_names if name in row]
        if not arrays and keys is None:
            forms = "; ".join(", ".join(f'"{key}"' for key in form) for form in _TEXTS)
            raise UserError(
                f"{path}, line {line}: the row has the keys {', '.join(row) or '(none)'}. Expected the model's inputs "
                f"({', '.join(base.input_names)}) or texts under one of: {forms}."
            )
        if texts and (arrays or len(texts) == most or len(keys or ()) != len(texts[0])):
            batches.append(_tokenise(tokenizer, texts, base))
            texts = []
        if arrays:
            try:
                batches.append(complete({name: _array(name, row[name]) for name in arrays}, base))
            except UserError as error:
                raise UserError(f"{path}, line {line}: {error}") from error
            continue
        assert keys is not None  # either arrays or texts, checked above
        if wrong := [key for key in keys if not isinstance(row[key], str)]:
            raise UserError(f"{path}, line {line}: {wrong[0]!r} is {row[wrong[0]]!r}, expected a text.")
        if tokenizer is None:
            tokenizer = _tokenizer(path, line, base, folder)
        texts.append(tuple(row[key] for key in keys))
    if texts:
        batches.append(_tokenise(tokenizer, texts, base))
    if not batches:
        raise UserError(f"{path} has no rows: expected one JSON object a line.")
    return batches


def complete(batch: Inputs, base: BaseModel) -> Inputs:
    """The batch with every input that the model takes, held against the model's sizes; extra inputs are dropped.

    A missing attention_mask or pixel_mask is all ones and missing token_type_ids are zeros, as in transformers. Raises
    UserError.
    """
    if missing := [name for name in base.input_names if name in MAIN_INPUTS and name not in batch]:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{' and '.join(missing)} {verb} missing. The model takes {', '.join(base.input_names)}.")
    values: Inputs = {}
    if "input_ids" in base.input_names:
        values |= _tokens(batch, base)
    if "pixel_values" in base.input_names:
        values |= _images(batch, base)
    elif base.row_shape:
        values[base.main_input] = _fixedrows(base.main_input, batch[base.main_input], base.row_shape)
    elif "input_values" in base.input_names:
        values |= _waves(batch, base)
    values = {name: values[name] for name in base.input_names}
    if base.answers:
        start = np.full((len(values[base.main_input]), 1), start_token(base))
        values[DECODER_INPUT] = np.asarray(batch.get(DECODER_INPUT, start), np.int64)
    return values


def _tokens(batch: Inputs, base: BaseModel) -> Inputs:
    config, main = text_config(base.model.config), "input_ids"
    values = dict(batch)
    values.setdefault("attention_mask", np.ones_like(values[main]))
    values.setdefault("token_type_ids", np.zeros_like(values[main]))
    limits = {
        "input_ids": config.vocab_size,
        "attention_mask": 2,
        "token_type_ids": max(int(getattr(config, "type_vocab_size", 1) or 1), 1),
    }
    rank = 3 if base.task == "multiple-choice" else 2
    completed: Inputs = {}
    for name in base.input_names:
        if name not in values or name.startswith("pixel_"):
            continue
        array = values[name]
        array = array[None] if array.ndim == rank - 1 else array
        if array.ndim != rank or not array.size or array.dtype.kind not in "iu":
            row = "a list, or a list of lists" if rank == 2 else "for each choice a list, or a list of such rows, all"
            raise UserError(
                f"{name} has shape {array.shape} of {array.dtype}, expected whole numbers: {row} of one length."
            )
        if completed and array.shape != completed[main].shape:
            raise UserError(f"{name} has shape {array.shape}, but {main} has {completed[main].shape}.")
        limit = limits.get(name)
        if limit is not None and (array.min() < 0 or array.max() >= limit):
            raise UserError(f"{name} has values from {array.min()} to {array.max()}, the model takes 0 to {limit - 1}.")
        completed[name] = array.astype(np.int64)
    _check_length(completed[main].shape[-1], base)
    return completed


def _images(batch: Inputs, base: BaseModel) -> Inputs:
    if not base.any_size:
        return {"pixel_values": _fixedrows("pixel_values", batch["pixel_values"], base.row_shape)}
    pixels, channels = batch["pixel_values"], base.row_shape[0]
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] != channels or min(pixels.shape[2:]) < SMALLEST_IMAGE or not len(pixels):
        raise UserError(
            f"pixel_values has shape {batch['pixel_values'].shape}, expected ({channels}, height, width) or (batch, "
            f"{channels}, height, width), with at least {SMALLEST_IMAGE} rows and columns."
        )
    size = (len(pixels), *pixels.shape[2:])
    mask = np.asarray(batch.get("pixel_mask", np.ones(size, np.int64)))
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.shape != size or mask.dtype.kind not in "iu" or mask.min() < 0 or mask.max() > 1:
        raise UserError(
            f"pixel_mask has shape {mask.shape} of {mask.dtype}, expected 0 and 1 of the shape of the images, {size}."
        )
    return {"pixel_values": pixels.astype(np.float32), "pixel_mask": mask.astype(np.int64)}


def _fixedrows(name: str, value: NDArray[Any], wanted: tuple[int, ...]) -> NDArray[np.float32]:
    rows = value[None] if value.ndim == len(wanted) else value
    if rows.ndim != len(wanted) + 1 or rows.shape[1:] != wanted or rows.dtype.kind not in "fiu" or not rows.size:
        raise UserError(
            f"{name} has shape {value.shape} of {value.dtype}, expected numbers of shape {wanted} or (batch, "
            f"{', '.join(map(str, wanted))})."
        )
    return rows.astype(np.float32)


def _waves(batch: Inputs, base: BaseModel) -> Inputs:
    shortest = wave_length(base.model.config, 1)
    waves = batch["input_values"]
    waves = waves[None] if waves.ndim == 1 else waves
    if waves.ndim != 2 or not waves.size or waves.dtype.kind not in "fiu" or waves.shape[1] < shortest:
        raise UserError(
            f"input_values has shape {waves.shape} of {waves.dtype}, expected numbers: a list of at least {shortest} "
            "samples, or a list of such lists of one length."
        )
    completed: Inputs = {"input_values": waves.astype(np.float32)}
    if "attention_mask" in base.input_names:
        mask = np.asarray(batch.get("attention_mask", np.ones(waves.shape, np.int64)))
        mask = mask[None] if mask.ndim == 1 else mask
        if mask.shape != waves.shape or mask.dtype.kind not in "iu" or mask.min() < 0 or mask.max() > 1:
            raise UserError(
                f"attention_mask has shape {mask.shape} of {mask.dtype}, expected 0 and 1 of the shape of "
                f"input_values, {waves.shape}."
            )
        completed["attention_mask"] = mask.astype(np.int64)
    return completed


def _check_length(length: int, base: BaseModel) -> None:
    longest = max_sequence(text_config(base.model.config))
    if longest is not None and length > longest:
        raise UserError(f"the sequence has {length} tokens, the model takes at most {longest}.")


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of JSON in the file `path`. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Can't read the inputs {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The inputs {path} are not UTF-8 text: {error}. Expected one JSON object a line.") from error
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line}: not JSON ({error}). Expected one JSON object a line.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line}: a {type(row).__name__}, expected a JSON object with named inputs.")
        yield line, row


def _array(name: str, value: Any) -> NDArray[Any]:
    try:
        array = np.array(value)
    except ValueError as error:
        raise UserError(f"{name} is not an array: its lists differ in length.") from error
    if array.dtype.kind not in "iuf":
        raise UserError(f"{name} is not an array of numbers.")
    return array


def _tokenizer(path: Path, line: int, base: BaseModel, folder: Path) -> Any:
    if "input_ids" not in base.input_names:
        raise UserError(
            f"{path}, line {line}: the row is a text, and the model takes none. Give its inputs instead: "
            f"{', '.join(base.input_names)}."
        )
    trusted = base.trust_remote_code
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted) or load_tokenizer(
        base.path, trust_remote_code=trusted, revision=base.revision
    )
    if tokenizer is None:
        raise UserError(
            f"{path}, line {line}: the row is a text, but neither {folder} nor the base model {base.path} has a "
            f"tokenizer. Give the model's inputs instead: {', '.join(base.input_names)}."
        )
    return tokenizer


def _tokenise(tokenizer: Any, texts: list[tuple[str, ...]], base: BaseModel) -> Inputs:
    longest = min(max_sequence(text_config(base.model.config)) or 512, tokenizer.model_max_length)
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, padding=len(texts) > 1, truncation=True, max_length=longest, return_tensors="np")
    return complete({name: np.asarray(encoded[name]) for name in encoded}, base)
