"""The language part of a vision-language model, and what of an adapter is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import UserError, some
from .shapes import text_config

__all__ = ["language_part", "language_part_for", "left_out", "sees"]

_LANGUAGE = "language_model."
"""What transformers calls the language part of the models that onnxruntime-genai's builder makes."""


def sees(model: Any) -> bool:
    """Whether the torch `model` is a vision-language model: one that generates and has a part for images."""
    return text_config(model.config) is not model.config and model.can_generate()


def language_part(adapter: Adapter, model: Any, *, images: bool = False) -> tuple[Adapter, Adapter | None]:
    """What of `adapter` is in the decoder, the embedding or the head of `model`, and what isn't.

    Prompts without images never reach the latter: what the model answers to a text is the same without it. Of a model
    that doesn't see it is the adapter as it is. Raises UserError where nothing of it is in the language part and the
    export won't take `images`.
    """
    if not sees(model):
        return adapter, None
    parts = (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings())
    within = [f"{name}." for name, module in model.named_modules() if any(module is part for part in parts)]
    part, rest = _split(adapter, within)
    if rest is not None and not images and not _modules(part):
        raise UserError(
            f"The adapter {adapter.path} changes only what sees images in the {type(model).__name__} "
            f"({some(_modules(rest))}), and what is exported of such a model reads texts, for which it makes no "
            "difference. Train it on the language part (target_modules of its decoder's layers), or serve it with "
            "PEFT. docs/vision-language.md says which models see, and how they are exported."
        )
    return part, rest


def language_part_for(adapter: Adapter, modules: Collection[str]) -> tuple[Adapter, Adapter | None]:
    """As `language_part`, for an exported model that takes adapters at its `modules`, which alone are at hand."""
    within = {module.rpartition(_LANGUAGE)[0] + _LANGUAGE for module in modules if _LANGUAGE in module}
    return _split(adapter, [*within, "lm_head."]) if within else (adapter, None)


def left_out(rest: Adapter | None) -> list[str]:
    """What to tell the user of the `rest` of an adapter that is left out: a warning, or nothing."""
    if rest is None:
        return []
    return [
        f"this adapter changes what sees images ({some(_modules(rest))}). That is left out: the model reads texts, "
        "whose answers are the same without it."
    ]


def _split(adapter: Adapter, within: Collection[str]) -> tuple[Adapter, Adapter | None]:
    """What of `adapter` is at a path that begins as one of `within`, and what isn't, None where all is."""
    begins = tuple(within)

    def part(inside: bool) -> Adapter:
        split: list[dict[str, Any]] = [
            {name: value for name, value in own.items() if f"{name}.".startswith(begins) is inside}
            for own in (adapter.layers, adapter.biases, adapter.modules_to_save)
        ]
        return dataclasses.replace(adapter, layers=split[0], biases=split[1], modules_to_save=split[2])

    rest = part(False)
    return part(True), rest if _modules(rest) else None


def _modules(adapter: Adapter) -> list[str]:
    return list({**adapter.layers, **adapter.biases, **adapter.modules_to_save})
