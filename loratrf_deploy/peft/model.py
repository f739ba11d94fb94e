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
from types import SimpleNamespace
from typing import Any

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
    register_peft_method,
)
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import UserError
from .config import LoraTrfConfig, peft_type
from .layer import FilteredLinear, LoraTrfLinear

__all__ = ["FilteredLinear", "LoraTrfLinear", "LoraTrfModel", "initialize_filters"]


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


if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="loratrf", config_cls=LoraTrfConfig, model_cls=LoraTrfModel, prefix=LoraTrfModel.prefix)
