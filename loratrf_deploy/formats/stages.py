"""export.json, which says which file is which stage of a model that generates: transformers' own format, read back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..adapters.json_text import parse_json
from ..errors import UserError
from ..files import read_regular

__all__ = ["CROSS", "DECODER", "ENCODER", "ENCODER_FILE", "STAGES_FILE", "Stages", "read_stages", "stages_of"]

STAGES_FILE = "export.json"
DECODER, ENCODER = "decode", "encoder"
"""Names of stages there: the first takes tokens and a cache, as transformers' own exports call it."""
ENCODER_FILE = "encoder.onnx"
CROSS = "cross_key_values."
"""Begins the names of what an encoder gives and its decoder takes: keys and values of attention to the input."""


@dataclass(frozen=True)
class Stages:
    """The graphs of a model that generates; `encoder` is None where a decoder goes on from its prompt."""

    decoder: Path
    encoder: Path | None


def stages_of(model: Path) -> Stages | None:
    """Those of the folder that `model` lies in, None where it is no decoder that an export.json names."""
    if not os.path.isfile(model.with_name(STAGES_FILE)):
        return None
    stages = read_stages(model.parent)
    return stages if stages.decoder.name == model.name else None


def read_stages(folder: Path) -> Stages:
    """Those of `folder`. Raises UserError where its export.json can't be read, or names no decoder in the folder."""
    path = folder / STAGES_FILE
    raw = read_regular(path)
    try:
        content = parse_json(raw)
        files = {name: entry["file"] for name, entry in content["components"].items()}
        if foreign := [name for name in files.values() if name in ("", "..") or name != Path(name).name]:
            raise ValueError(f"it names the file {foreign[0]!r:.80}, expected one in its own folder")
        encoder = files.get(ENCODER)
        return Stages(folder / files[DECODER], None if encoder is None else folder / encoder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is not what loratrf-export writes ({type(error).__name__}: {error}). Export the model again."
        ) from error
