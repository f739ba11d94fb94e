"""The oracle of parity: the adapter as PEFT itself runs it, in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..ops.dtypes import DType
from .base import BaseModel, Inputs, load_base

if TYPE_CHECKING:
    import torch


__all__ = ["bare_reference", "layers_off", "load_reference", "merge_adapter", "plain_name", "run_torch"]


def load_reference(
    adapter: Adapter, base_model: str | Path | None = None, *, dtype: DType = "float32", merge: bool = False
) -> BaseModel:
    """The adapter as PEFT itself runs it, in float32: PeftModel.from_pretrained on `load_base`. The oracle of parity.

    With `dtype` "float16" every weight is rounded to float16 first (after merging, with `merge`) and the arithmetic
    stays in float32: what a float16 export should compute, so that an error of the export can't hide behind the
    rounding of weights that the user asked for. An aLoRA is active throughout: where it begins is the caller's to say.
    Raises UserError where PEFT refuses the adapter.
    """
    import peft
    import torch

    from .. import peft as _loratrf  # noqa: F401  (registers LORATRF)

    base = load_base(adapter, base_model, dtype="float32")
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter.path))
        if adapter.invocation_tokens is not None:
            config.alora_invocation_tokens = None
        model = peft.PeftModel.from_pretrained(base.model, str(adapter.path), config=config).eval()
        if dtype != "float32":
            if merge:
                merge_adapter(model)
            model = model.to(getattr(torch, dtype)).float()
    except Exception as error:
        raise UserError(f"PEFT {peft.__version__} can't load the adapter {adapter.path}: {error}") from error
    return BaseModel(model, base.path, base.task, base.input_names, base.untrained)


def bare_reference(adapter: Adapter, base_model: str | Path | None = None, *, dtype: DType = "float32") -> BaseModel:
    """The base without its adapter, rounded to `dtype`; parameters that it has no values of its own for are zero."""
    import torch

    base = load_base(adapter, base_model, dtype="float32")
    for name, parameter in base.model.named_parameters():
        if name in base.untrained:
            parameter.data.zero_()
    base.model.to(getattr(torch, dtype)).float()
    return base


def merge_adapter(model: Any) -> None:
    """PEFT's merge_adapter, but an embedding that is tied to an adapted head keeps its own values."""
    import torch

    embedding = model.get_base_model().get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        users = [module for module in model.modules() if getattr(module, "weight", None) is embedding.weight]
        if len(users) > 1:
            embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.merge_adapter()


def run_torch(
    base: BaseModel, batch: Inputs, *, adapter_on: bool = True, heads_off: Collection[str] = ()
) -> dict[str, NDArray[Any]]:
    """PyTorch's outputs by name. With adapter_on=False the adapter's layers are off; a trained head stays, but for
    those in `heads_off`, which are the base's own again.

    PEFT's own disable_adapter would bring back the untrained head too, and the head alone would then look like an
    effect of the adapter. The adapted model is called itself, not through PeftModel's forward, which loses inputs on
    the way: PeftModelForQuestionAnswering (PEFT 0.21) drops token_type_ids.
    """
    import torch
    from peft import PeftModel

    model = base.model.get_base_model() if isinstance(base.model, PeftModel) else base.model
    with torch.no_grad(), contextlib.nullcontext() if adapter_on else layers_off(base.model, heads_off):
        outputs = model(**{name: torch.from_numpy(value) for name, value in batch.items()})
    return {name: value.numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def plain_name(path: str) -> str:
    """A module's path in the base model: PEFT's prefix and its wrapper of a saved head removed."""
    return path.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


@contextlib.contextmanager
def layers_off(model: torch.nn.Module, heads: Collection[str] = ()) -> Iterator[None]:
    """Inside, the adapter's layers are switched off, and saved modules named in `heads` are the base's own again."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    layers: list[Any] = [
        module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        or (isinstance(module, ModulesToSaveWrapper) and plain_name(name) in heads)
    ]
    # Switched off, a merged layer takes its adapter out of the weights, which not every kind undoes exactly.
    merged = {
        layer: layer.get_base_layer().weight.detach().clone() for layer in layers if getattr(layer, "merged", False)
    }
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for layer, weight in merged.items():
            layer.merge()
            layer.get_base_layer().weight.data.copy_(weight)
