"""The oracle of parity: the adapter as PEFT itself runs it, in float32."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.fits import check_exportable
from ..errors import UserError, some
from ..formats.embedding import SENTENCE_EMBEDDING
from ..ops.dtypes import DType
from .base import BaseModel, Inputs, load_base
from .bounded import bounded_patterns
from .embedding import pooled

if TYPE_CHECKING:
    import torch


__all__ = [
    *("apply_adapter", "bare_reference", "layers_off", "load_reference", "merge_adapter", "plain_name", "run_torch"),
    *("tie_equal", "untie_adapted"),
]


def load_reference(
    adapter: Adapter,
    base_model: str | Path | None = None,
    *,
    dtype: DType = "float32",
    merge: bool = False,
    trust_remote_code: bool = False,
) -> BaseModel:
    """The adapter as PEFT itself runs it, in float32: PeftModel.from_pretrained on `load_base`. The oracle of parity.

    With `dtype` "float16" every weight is rounded to float16 first (after merging, with `merge`) and the arithmetic
    stays in float32: what a float16 export should compute, so that an error of the export can't hide behind the
    rounding of weights that the user asked for. An aLoRA is active throughout: where it begins is the caller's to say.
    Raises UserError where PEFT refuses the adapter.
    """
    import torch

    base = load_base(adapter, base_model, dtype="float32", trust_remote_code=trust_remote_code)
    model = apply_adapter(adapter, base.model).eval()
    if dtype != "float32":
        if merge:
            merge_adapter(model)
        model = model.to(getattr(torch, dtype)).float()
    return dataclasses.replace(base, model=model)


def apply_adapter(adapter: Adapter, model: Any) -> Any:
    """PEFT's own model of `adapter` on the torch `model`, in place; an aLoRA is active throughout.

    Raises UserError where PEFT refuses the adapter, or passes over part of it: it leaves layers without weights in the
    file as they were initialised, and weights without a layer in the file.
    """
    check_exportable(adapter)  # before PEFT sees it: some of these kinds would read more than the adapter
    import peft

    from .. import peft as _loratrf  # noqa: F401  (registers LORATRF)

    try:
        config = peft.PeftConfig.from_pretrained(str(adapter.path))
        if adapter.invocation_tokens is not None:
            config.alora_invocation_tokens = None
        with bounded_patterns(adapter.path):
            applied = peft.PeftModel.from_pretrained(model, str(adapter.path), config=config)
            wanted = set(peft.get_peft_model_state_dict(applied, save_embedding_layers=False))
    except Exception as error:
        raise UserError(f"PEFT {peft.__version__} can't load the adapter {adapter.path}: {error}") from error
    # What of the base is saved beside an adapter, such as embeddings of another size, goes by its own name.
    foreign = adapter.tensors - wanted - set(applied.state_dict())
    problems = [f"its config wants {key}, which the file doesn't hold" for key in sorted(wanted - adapter.tensors)]
    problems += [f"its file holds {key}, which the config leaves out" for key in sorted(foreign)]
    if problems:
        raise UserError(
            f"The adapter {adapter.path} contradicts itself: {some(problems, '; ')}. Config and weights are not of one "
            "training run, or one of them was edited: save the adapter again with PEFT's save_pretrained."
        )
    return applied


def bare_reference(
    adapter: Adapter,
    base_model: str | Path | None = None,
    *,
    dtype: DType = "float32",
    trust_remote_code: bool = False,
) -> BaseModel:
    """The base without its adapter, rounded to `dtype`; parameters that it has no values of its own for are zero."""
    import torch

    base = load_base(adapter, base_model, dtype="float32", trust_remote_code=trust_remote_code)
    for name, parameter in base.model.named_parameters():
        if name in base.untrained:
            parameter.data.zero_()
    base.model.to(getattr(torch, dtype)).float()
    return base


def merge_adapter(model: Any) -> None:
    """PEFT's merge_adapter, but what is tied to an adapted layer keeps its own values, and a bias finds a place."""
    untie_adapted(model)
    _give_biases_places(model)
    model.merge_adapter()


def _give_biases_places(model: Any) -> None:
    """A zero bias for each layer without one whose adapter brings one (lora_bias), which PEFT refuses to merge."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        if any(getattr(layer, "lora_bias", {}).values()) and isinstance(base, torch.nn.Linear) and base.bias is None:
            base.bias = torch.nn.Parameter(base.weight.new_zeros(base.out_features), requires_grad=False)


def untie_adapted(model: Any) -> None:
    """Gives each adapted layer whose weight another module shares, as embeddings and heads do, a copy of its own.

    PEFT's merge writes into the weight, and so into whatever is tied to it, which PEFT's own forward leaves alone.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    users = Counter(id(module._parameters.get("weight")) for module in model.modules())
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is not None and users[id(weight)] > 1:
            users[id(weight)] -= 1
            base.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)


def tie_equal(model: Any) -> None:
    """Lets head and embedding of `model` share one weight where theirs are equal, as where both got the same tokens."""
    import torch

    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:  # a network without either, such as ResNet
        return
    linear = isinstance(embedding, torch.nn.Embedding) and isinstance(head, torch.nn.Linear)
    if linear and torch.equal(head.weight, embedding.weight):
        head.weight = embedding.weight


def run_torch(
    base: BaseModel, batch: Inputs, *, adapter_on: bool = True, heads_off: Collection[str] = ()
) -> dict[str, NDArray[Any]]:
    """PyTorch's outputs by name. With adapter_on=False the adapter's layers are off; a trained head stays, but for
    those in `heads_off`, which are the base's own again.

    PEFT's own disable_adapter would bring back the untrained head too, and the head alone would then look like an
    effect of the adapter. The adapted model is called itself, not through PeftModel's forward, which loses inputs on
    the way: PeftModelForQuestionAnswering (PEFT 0.21) drops token_type_ids. The base's `embedding` is made of its
    tokens in float64.
    """
    import torch
    from peft import PeftModel

    model = base.model.get_base_model() if isinstance(base.model, PeftModel) else base.model
    with torch.no_grad(), contextlib.nullcontext() if adapter_on else layers_off(base.model, heads_off):
        outputs = model(**{name: torch.from_numpy(value) for name, value in batch.items()})
    named = {name: value.numpy() for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    if base.embedding is not None:
        named[SENTENCE_EMBEDDING] = pooled(named["last_hidden_state"], batch["attention_mask"], base.embedding)
    return named


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
