"""The JSON files beside a model that transformers writes: config.json, generation_config.json and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.json_text import parse_json
from ..errors import UserError
from ..files import read_regular

__all__ = ["read_settings"]


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        content = parse_json(read_regular(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Export the model again with loratrf-export.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected an object. Export the model again.")
    return content
