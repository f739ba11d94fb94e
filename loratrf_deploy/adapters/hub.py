"""Adapters by their names on the hub: fetched, or found in its cache here, by huggingface_hub where it is installed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import realpath

__all__ = ["fetched", "folder_name", "is_hub_name"]

_NAME = re.compile(r"(?![.-])[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
# What an adapter is read from. Optimizers and checkpoints of its training stay where they are.
# fmt: off
_FILES = [
    "adapter_config.json", _WEIGHTS, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "spiece.model", "sentencepiece*", "chat_template*", "additional_chat_templates/*", "modules.json",
    "[0-9]_*/config.json",
]
# fmt: on


def is_hub_name(path: str | Path) -> bool:
    """Whether `path` is nothing here, and could be ORG/NAME or ORG/NAME@REVISION on the hub."""
    return _NAME.fullmatch(str(path)) is not None and not os.path.lexists(path)


def fetched(path: str | Path) -> Path:
    """`path`, or the folder in the hub's cache where it is a name there; HF_HUB_OFFLINE=1 asks the cache alone.

    Raises UserError where neither hub nor cache have it.
    """
    if not is_hub_name(path):
        return Path(path)
    name, _, revision = str(path).partition("@")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise UserError(
            f"No folder at {path}. If it is an adapter on the hub, huggingface_hub fetches it: `pip install "
            "huggingface_hub`."
        ) from error
    at = revision or None
    try:
        with _no_bars():
            folder = Path(snapshot_download(name, revision=at, allow_patterns=_FILES))
            if not (folder / _WEIGHTS).is_file():  # then the error says how a pickle is converted
                with contextlib.suppress(Exception):
                    snapshot_download(name, revision=at, allow_patterns=[_PICKLE])
    except Exception as error:  # hub and network errors come in many classes
        asked = "its cache alone, HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else type(error).__name__
        raise UserError(
            f"No folder at {os.path.abspath(path)}, and no adapter {path} to be had from the hub ({asked}) or its "
            f"cache ({constants.HF_HUB_CACHE}). Pass its folder, or its name there: ORG/NAME or ORG/NAME@REVISION."
        ) from error
    return folder


def folder_name(path: Path) -> str:
    """What an adapter in the folder `path` is called: in a hub's cache NAME, elsewhere as the folder."""
    real = realpath(path)
    model = real.parent.parent.name
    return model.rpartition("--")[2] if real.parent.name == "snapshots" and model.startswith("models--") else real.name


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Within, huggingface_hub shows no progress: commands show their own, and nothing in a pipe."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
