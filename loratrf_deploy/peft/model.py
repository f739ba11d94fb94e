"""LoRATRF as a PEFT method: importing this module registers it, and PEFT and Trainer then work as with LoRA.

    import loratrf_deploy.peft
    model = get_peft_model(model, loratrf_deploy.peft.LoraTrfConfig(target_modules=["query", "value"]))

    h   = x Wᵀ + b                                          base output               (T,N)
    y   = h + (alpha/R) · (x Aᵀ) Bᵀ                         low-rank adaptation       (T,N)
    z   = y if filter_input == "adapted", h if "base"
    s   = clamp( ⟨z,τ⟩ / (max(‖z‖,ε) · max(‖τ‖,ε)), 0, 1 )  task-aware filter, one scalar per token
    out = y + γ · ((s · z) Cᵀ) Dᵀ                           task-relevant enhancement

A (R,K), B (N,R), τ (N), C (F,N), D (N,F). Source: LoRATRF, arXiv 2412.09827; the filter's form follows TOAST,
arXiv 2305.15542. The abstract fixes neither which representation the filter reads nor where filters sit, so both are
settings: `filter_input`, `filter_target_modules`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    register_peft_method,
)
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import UserError
from .layer import FilteredLinear, LoraTrfLinear

__all__ = ["FilteredLinear", "LoraTrfConfig", "LoraTrfLinear", "LoraTrfModel", "initialize_filters"]


def _peft_type() -> PeftType:
    """PeftType.LORATRF, added to PEFT's enum on the first call.

    PEFT asks for a member of its enum and offers no way to add one, so the member is made as Enum makes its own: a str
    of the enum's class with a name and a value, listed by name and by value.
    """
    if "LORATRF" not in PeftType.__members__:
        member = str.__new__(PeftType, "LORATRF")
        member._name_ = member._value_ = "LORATRF"
        PeftType._member_map_["LORATRF"] = member
        PeftType._value2member_map_["LORATRF"] = member
        PeftType._member_names_.append("LORATRF")
        if hasattr(PeftType, "_hashable_values_"):  # where Python 3.13 and later look for `in`
            cast(Any, PeftType)._hashable_values_.append("LORATRF")
        type.__setattr__(PeftType, "LORATRF", member)
    return PeftType["LORATRF"]


@dataclass
class LoraTrfConfig(PeftConfig):
    """Settings of a LoRATRF adapter; those shared with LoRA mean what they mean there.

    The default ranks and scales are those of docs/method.md, on MiniLM 64 % of the parameters of LoRA with R = 8.
    Raises UserError for values that no layer could be built from.
    """

    r: int = field(default=4, metadata={"help": "R, the rank of the low-rank half."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules with a low-rank half: names by suffix, a regular expression or 'all-linear'; [] is none."
        },
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    lora_alpha: float = field(default=8, metadata={"help": "The low-rank half is scaled by alpha/R."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A, in training."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha/√R instead."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Other R by module name pattern."})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Other alpha by module name pattern."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Base weights are stored (K,N); set by the layer's type, kept for readers."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'lora_only'."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer numbers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "B = 0 and D = 0 at the start; False starts them random, for tests."}
    )
    filter_rank: int = field(default=1, metadata={"help": "F, the rank of the filter's projection."})
    filter_gamma: float = field(default=8.0, metadata={"help": "γ, the scale of the filtered representation."})
    filter_input: str = field(
        default="adapted", metadata={"help": "The filter reads the layer's 'adapted' or its 'base' output."}
    )
    filter_target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules that get a filter; None: those of target_modules, []: none."}
    )
    filter_init: str = field(
        default="bias",
        metadata={"help": "τ at the start: 'bias' (the layer's own bias; random where it has none) or 'random'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _peft_type()
        for name in ("target_modules", "exclude_modules", "filter_target_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._check("r", self.r >= 1, "at least 1; for filters alone set target_modules=[]")
        self._check("filter_rank", self.filter_rank >= 1, "at least 1; for no filters set filter_target_modules=[]")
        self._check("filter_input", self.filter_input in ("adapted", "base"), '"adapted" or "base"')
        self._check("filter_init", self.filter_init in ("bias", "random"), '"bias" or "random"')
        self._check("bias", self.bias in ("none", "all", "lora_only"), '"none", "all" or "lora_only"')
        self._check("lora_dropout", 0.0 <= self.lora_dropout < 1.0, "at least 0 and below 1")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError(
                "layers_to_transform needs target_modules as a list of names; a regular expression can say it."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern needs layers_to_transform: the numbers of the layers to adapt.")

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, sets as sorted lists: a saved config is the same file every time."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise UserError(f"LoraTrfConfig: {name} is {getattr(self, name)!r}, expected {expected}.")


class LoraTrfModel(BaseTuner):
    """A model whose targeted linear layers are LoraTrfLinear. Made by `peft.get_peft_model`."""

    # PEFT wants a prefix per method; "lora_" is taken by LoRA. Which tensors belong to an adapter PEFT takes from the
    # layers themselves, so lora_A and lora_B are saved all the same.
    prefix = "trf_"
    tuner_layer_cls = LoraTrfLinear
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT. With a state_dict PEFT takes the layers from its keys, which it cuts at the prefix."""
        if kwargs.get("state_dict") is not None:
            keys = kwargs["state_dict"].items()
            kwargs["state_dict"] = {key.replace(".lora_", ".trf_lora_"): value for key, value in keys}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT is content when any module matched: a misspelt half would be left out without a word.
        layers = [part for part in model.modules() if isinstance(part, LoraTrfLinear)]
        for name, weights in (("target_modules", "lora_A"), ("filter_target_modules", "trf_tau")):
            wanted = getattr(self.peft_config[adapter_name], name)
            if wanted and not any(adapter_name in getattr(layer, weights) for layer in layers):
                shown = sorted(wanted) if isinstance(wanted, set) else wanted
                raise UserError(
                    f"{name} is {shown!r}, which matches no module of {type(model).__name__}. Expected names as "
                    "model.named_modules() has them, or their last parts, such as 'query'; [] leaves that half out."
                )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if isinstance(peft_config.filter_target_modules, str):
            # PEFT resolves "all-linear" for target_modules alone.
            stand_in: Any = SimpleNamespace(
                target_modules=peft_config.filter_target_modules, task_type=peft_config.task_type
            )
            _maybe_include_all_linear_layers(stand_in, self.model)
            peft_config.filter_target_modules = stand_in.target_modules
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        low_rank = check_target_module_exists(peft_config, key)
        return low_rank or _gets_filter(peft_config, key) or low_rank

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank_key = get_pattern_key(peft_config.rank_pattern.keys(), current_key)
        alpha_key = get_pattern_key(peft_config.alpha_pattern.keys(), current_key)
        low_rank = bool(check_target_module_exists(peft_config, current_key))
        layer = target if isinstance(target, LoraTrfLinear) else LoraTrfLinear(target, current_key)
        layer.update_layer(
            adapter_name,
            peft_config,
            rank=peft_config.rank_pattern.get(rank_key, peft_config.r) if low_rank else 0,
            alpha=peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha),
            filter_rank=peft_config.filter_rank if _gets_filter(peft_config, current_key) else 0,
        )
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # an additional adapter is not trainable until it is made active
            self._replace_module(parent, target_name, layer, target)
        peft_config.fan_in_fan_out = layer.fan_in_fan_out

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As in PEFT; a file that lacks weights of the adapter is refused instead of leaving layers as initialised."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        absent = sorted(_filter_state_dict_by_key_prefixes(model.state_dict(), prefixes).keys() - remapped.keys())
        if absent:
            raise UserError(
                f"The adapter's weights are incomplete: nothing for {', '.join(absent[:5])}"
                f"{f' and {len(absent) - 5} more' if len(absent) > 5 else ''}. Its config targets these layers; save "
                "the adapter again, or load the base model that it was trained on."
            )
        return remapped


def _gets_filter(config: LoraTrfConfig, key: str) -> bool:
    targets = config.target_modules if config.filter_target_modules is None else config.filter_target_modules
    rules = SimpleNamespace(
        target_modules=targets,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    return bool(check_target_module_exists(rules, key))


@torch.no_grad()
def initialize_filters(
    model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], adapter_name: str = "default"
) -> None:
    """τ = mean over tokens of z/‖z‖: every filter starts along the mean direction of what it reads.

    Call it before training. `batches` are the model's keyword arguments; a few dozen sentences of the task do. Padding
    is left out where a batch has an attention_mask of z's leading shape.
    """
    layers = [part for part in model.modules() if isinstance(part, LoraTrfLinear) and adapter_name in part.trf_tau]
    sums: dict[LoraTrfLinear, torch.Tensor] = {}
    mask: torch.Tensor | None = None

    def collect(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        # D = 0 before training, so the layer's output is z.
        z = nn.functional.normalize(output.float(), dim=-1)
        kept = z[mask] if mask is not None and mask.shape == z.shape[:-1] else z.flatten(0, -2)
        sums[layer] = sums.get(layer, 0.0) + kept.sum(0)

    handles = [layer.register_forward_hook(collect) for layer in layers]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    for layer, direction in sums.items():
        tau = layer.trf_tau[adapter_name]
        tau.copy_(nn.functional.normalize(direction, dim=0).to(tau))


if _peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="loratrf", config_cls=LoraTrfConfig, model_cls=LoraTrfModel, prefix=LoraTrfModel.prefix)
