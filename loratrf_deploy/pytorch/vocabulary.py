"""The table of token embeddings, also where it was resized for an adapter, which brings it then."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..errors import UserError, some

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["resize_vocabulary", "token_table", "without_copies"]


def token_table(model: Any) -> torch.nn.Embedding | None:
    """The embeddings of input_ids, of two towers those of the texts; None where it has none, as for images."""
    import torch

    part: Any
    for part in (model, getattr(model, "text_model", None)):
        with contextlib.suppress(NotImplementedError, AttributeError):
            if isinstance(table := part.get_input_embeddings(), torch.nn.Embedding):
                return table
    return None


def resize_vocabulary(model: PreTrainedModel, adapter: Adapter) -> set[str]:
    """Gives `model`, in place, as many rows of embeddings as `adapter` brings; returns the parameters that grew.

    As the training script did, with resize_token_embeddings: input and output embeddings alike, and config.vocab_size.
    Where nothing is brought, or what is brought has the model's size, the model stays as it is. Raises UserError where
    rows would be random that nobody brings.
    """
    try:
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # a network without either, such as ResNet
        return set()
    paths = [path for path, module in model.named_modules() if any(module is entry for entry in embeddings)]
    saved = [adapter.modules_to_save.get(path, {}).get("weight") for path in paths]
    brought = {value.shape[0] for value in saved if value is not None and value.ndim == 2}
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    own = {before[f"{path}.weight"][0] for path in paths if f"{path}.weight" in before}
    if len(brought) != 1 or brought == own:
        return set()  # what doesn't fit is for `check_fits` to say
    (rows,) = brought
    model.resize_token_embeddings(rows, mean_resizing=False)
    grown = {name for name, value in model.state_dict().items() if tuple(value.shape) > before[name]}
    missing = sorted(
        name
        for name in grown
        if name.rpartition(".")[2] not in adapter.modules_to_save.get(name.rpartition(".")[0], {})
    )
    if missing:
        raise UserError(
            f"The adapter {adapter.path} brings {rows} rows of embeddings, where the base model has {min(own)}, but "
            f"not those of {some(missing)}: the new ones would be random. Save it again from the training run with all "
            "of them: save_pretrained(..., save_embedding_layers=True)."
        )
    return grown


def without_copies(adapter: Adapter, model: Any) -> Adapter:
    """`adapter` without the weights that PEFT saved of layers that it adapts, where they are those of its base `model`.

    It saves them of embed_tokens and lm_head whether they were trained or not. Requires `check_fits` to have passed.
    """
    import torch

    saved = dict(adapter.modules_to_save)
    for path in adapter.copies:
        own = model.get_submodule(path).weight.detach().float()
        if saved[path].keys() == {"weight"} and torch.equal(own, torch.from_numpy(saved[path]["weight"])):
            del saved[path]
    return dataclasses.replace(adapter, modules_to_save=saved)
