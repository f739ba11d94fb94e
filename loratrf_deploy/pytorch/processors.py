"""The settings of what makes a model's inputs of images and sound: those files of adapter or base, as texts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.json_text import parse_json
from ..errors import UserError
from ..files import read_regular
from .base import BaseModel

__all__ = ["processor_files"]

_FILES = ("preprocessor_config.json", "processor_config.json")
_LONGEST = 1 << 20


def processor_files(adapter: Adapter, base: BaseModel) -> dict[str, str]:
    """name -> JSON: the settings of image processor, feature extractor and processor, the adapter's own if it has some.

    They are read, never run: a processor that is Python of their own (auto_map) goes by what else they say of it.
    Raises UserError for files that are no settings, or not of their folder.
    """
    own = {name: adapter.path / name for name in _FILES if os.path.lexists(adapter.path / name)}
    paths = own or {name: path for name in _FILES if (path := _of_base(base, name)) is not None}
    return {name: _settings(path) for name, path in paths.items()}


def _of_base(base: BaseModel, name: str) -> Path | None:
    """Where a file of the base is, in its folder or the hub's cache; None where it has none of this name."""
    from transformers.utils import cached_file

    if os.path.isdir(base.path):
        path = Path(base.path) / name
        return path if os.path.lexists(path) else None
    try:
        found = cached_file(base.path, name, revision=base.revision)
    except Exception:  # no such name, no such file: errors come in many classes
        return None
    return Path(found) if found else None


def _settings(path: Path) -> str:
    raw = read_regular(path, path.parent, _LONGEST)
    try:
        settings = parse_json(raw)
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no processor's settings: {error}. Save the processor there again, "
            "AutoProcessor.from_pretrained(...).save_pretrained(folder), or remove the file if the export is to have "
            "none."
        ) from error
    return json.dumps(_without_code(settings), indent=2) + "\n"


def _without_code(settings: Any) -> Any:
    if isinstance(settings, dict):
        return {key: _without_code(value) for key, value in settings.items() if key != "auto_map"}
    return settings
