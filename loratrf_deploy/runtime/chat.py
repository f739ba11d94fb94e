"""A chat as the text that a model was trained on: by the template beside its tokenizer, in jinja's sandbox."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.json_text import parse_json
from ..errors import UserError, cut, one_line
from ..files import read_regular

__all__ = ["render"]

_TEMPLATE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a template may call by their names."""


def render(folder: Path, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of `messages` by the chat template in `folder`, up to where the model is to answer.

    As transformers' apply_chat_template makes it. Raises UserError without a template, without jinja2, and for messages
    that the template doesn't take.
    """
    template, names = _read(folder)
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError as error:
        raise UserError(
            "A chat goes through the tokenizer's template, which jinja2 fills in, and it is not installed here: `pip "
            "install jinja2`."
        ) from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = refuse
    try:
        given = [dict(message) for message in messages]
        return environment.from_string(template).render(messages=given, add_generation_prompt=True, **names)
    except Exception as error:  # a template fails in as many ways as a program does
        raise UserError(
            f"The chat can't be put through the template in {folder}: {cut(one_line(str(error)), 200)}. Expected "
            'messages of {"role": ..., "content": ...}, with the roles that the model was trained on.'
        ) from error


def _read(folder: Path) -> tuple[str, dict[str, str]]:
    """The template, and the special tokens by their names."""
    config: Any = {}
    try:
        if os.path.isfile(path := folder / _CONFIG):
            config = parse_json(read_regular(path, folder))
        template = config.get("chat_template")
        if os.path.isfile(path := folder / _TEMPLATE):
            template = read_regular(path, folder).decode()
        elif isinstance(template, list):  # several, by their names
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        tokens = {name: value for name in _TOKENS if (value := config.get(name)) is not None}
        names = {name: value if isinstance(value, str) else str(value["content"]) for name, value in tokens.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no file of a tokenizer ({type(error).__name__}: {error}). Export the model again."
        ) from error
    if not isinstance(template, str):
        raise UserError(
            f"{folder} has no chat template: its tokenizer was saved without one, as those of models that aren't for "
            "chats are. Give the text itself, without --chat."
        )
    return template, names


def _as_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
