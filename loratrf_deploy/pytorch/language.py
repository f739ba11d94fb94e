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


def language_part(adapter: Adapter, model: Any) -> tuple[Adapter, tuple[str, ...]]:
    """What of `adapter` is in the decoder, the embedding or the head of `model`, and the modules that aren't.

    Prompts without images never reach these: what the model answers to a text is the same without them. Of a model
    that doesn't see it is the adapter as it is. Raises UserError where nothing of it is in the language part.
    """
    if not sees(model):
        return adapter, ()
    parts = (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings())
    within = [f"{name}." for name, module in model.named_modules() if any(module is part for part in parts)]
    part, left = _part(adapter, within)
    if left and not (part.layers or part.biases or part.modules_to_save):
        raise UserError(
            f"The adapter {adapter.path} changes only what sees images in the {type(model).__name__} ({some(left)}), "
            "and what is exported of such a model reads texts, for which it makes no difference. Train it on the "
            "language part (target_modules of its decoder's layers), or serve it with PEFT."
        )
    return part, left


def language_part_for(adapter: Adapter, modules: Collection[str]) -> tuple[Adapter, tuple[str, ...]]:
    """As `language_part`, for an exported model that takes adapters at its `modules`, which alone are at hand."""
    within = {module.rpartition(_LANGUAGE)[0] + _LANGUAGE for module in modules if _LANGUAGE in module}
    return _part(adapter, [*within, "lm_head."]) if within else (adapter, ())


def _part(adapter: Adapter, within: Collection[str]) -> tuple[Adapter, tuple[str, ...]]:
    split: list[dict[str, Any]] = [adapter.layers, adapter.biases, adapter.modules_to_save]
    kept = [{name: value for name, value in own.items() if f"{name}.".startswith(tuple(within))} for own in split]
    left = dict.fromkeys(name for own, rest in zip(split, kept, strict=True) for name in own if name not in rest)
    layers, biases, saved = kept
    return dataclasses.replace(adapter, layers=layers, biases=biases, modules_to_save=saved), tuple(left)


def left_out(modules: Collection[str]) -> list[str]:
    """What to tell the user of the `modules` that `language_part` left out: a warning, or nothing."""
    return [
        f"this adapter changes {len(modules)} modules that see images ({some(modules)}). They are left out: the model "
        "reads texts, whose answers are the same without them."
    ] * bool(modules)
