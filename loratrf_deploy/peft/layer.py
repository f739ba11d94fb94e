"""The adapted linear layer in PyTorch: forward, merging, and what stays in a model after merging."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..ops.reference import EPSILON

if TYPE_CHECKING:
    from .config import LoraTrfConfig

__all__ = ["FilteredLinear", "LoraTrfLinear", "filter_change", "filter_score"]


def filter_score(z: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """s = clamp(⟨z,τ⟩ / (max(‖z‖,ε) · max(‖τ‖,ε)), 0, 1)

    z (T,N), tau (N), any float type. Returns s (T,1), float32: sums of squares overflow in float16 and lose digits in
    bfloat16. Products are elementwise because autocast would take a matrix product back to half precision.
    """
    z, tau = z.float(), tau.float()
    norms = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(EPSILON)
    cosine = (z * tau).sum(-1, keepdim=True) / (norms * torch.linalg.vector_norm(tau).clamp_min(EPSILON))
    return cosine.clamp(0.0, 1.0)


def filter_change(z: torch.Tensor, tau: torch.Tensor, C: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """((s·z) Cᵀ) Dᵀ, s = filter_score(z, τ): what a filter adds, in the type of C.

    s is moved behind C: the same sum with N/F times fewer products.
    """
    projected = nn.functional.linear(z.to(C.dtype), C) * filter_score(z, tau).to(C.dtype)
    return nn.functional.linear(projected, D)


def _weight(layers: nn.ModuleDict, adapter: str) -> torch.Tensor:
    return cast(torch.Tensor, layers[adapter].weight)


class LoraTrfLinear(nn.Module, BaseTunerLayer):
    """out = h + Σ_a (out_a - h): a frozen linear layer with any number of LoRATRF adapters, each acting on h alone.

    x (..., K), out (..., N), type of h. Merged adapters have their low-rank half in the base weight and their filter
    still applied. Where a filter reads the base output (`filter_input="base"`), folding would hide what it reads, so
    there the low-rank half goes on being computed; outputs are the same either way.
    """

    adapter_layer_names = ("lora_A", "lora_B", "trf_tau", "trf_C", "trf_D")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "filter_rank", "gamma", "filter_input")

    def __init__(self, base_layer: nn.Module, name: str = "") -> None:
        super().__init__()
        if not isinstance(base_layer, nn.Linear | Conv1D) or isinstance(base_layer, NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"LoRATRF adapts torch.nn.Linear and transformers' Conv1D; the targeted module {name} is "
                f"{type(base_layer).__name__}. Narrow target_modules (and filter_target_modules) down to linear layers."
            )
        self.base_layer = base_layer
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)  # weight (K,N) instead of (N,K)
        shape = tuple(base_layer.weight.shape)
        self.out_features, self.in_features = shape[::-1] if self.fan_in_fan_out else shape
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.filter_rank: dict[str, int] = {}
        self.gamma: dict[str, float] = {}
        self.filter_input: dict[str, str] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.trf_tau = nn.ParameterDict()
        self.trf_C = nn.ModuleDict()
        self.trf_D = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._folded: set[str] = set()  # those of them whose low-rank half is in the base weight
        self._disable_adapters = False

    def update_layer(
        self, adapter_name: str, config: LoraTrfConfig, *, rank: int, alpha: float, filter_rank: int
    ) -> None:
        """Adds an adapter that starts exactly at the base model (B = 0, D = 0); a rank of 0 leaves that half out."""
        self.filter_input[adapter_name] = config.filter_input
        if rank:
            self.r[adapter_name] = rank
            self.lora_alpha[adapter_name] = alpha
            self.scaling[adapter_name] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
            self.lora_A[adapter_name] = nn.Linear(self.in_features, rank, bias=False)
            self.lora_B[adapter_name] = nn.Linear(rank, self.out_features, bias=False)
        if filter_rank:
            self.filter_rank[adapter_name] = filter_rank
            self.gamma[adapter_name] = config.filter_gamma
            self.trf_tau[adapter_name] = nn.Parameter(self._start_of_tau(config.filter_init))
            self.trf_C[adapter_name] = nn.Linear(self.out_features, filter_rank, bias=False)
            self.trf_D[adapter_name] = nn.Linear(filter_rank, self.out_features, bias=False)
        if config.init_lora_weights:
            # nn.Linear has given A and C Kaiming's uniform start, LoRA's own.
            for last in (self.lora_B, self.trf_D):
                if adapter_name in last:
                    nn.init.zeros_(_weight(last, adapter_name))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _start_of_tau(self, choice: str) -> torch.Tensor:
        # Along the bias, outputs x Wᵀ + b tend to have a positive cosine; along a random direction in hundreds of
        # dimensions it is 0 ± 0.05, half of the tokens are filtered out and D gets next to no gradient: a fifteenth
        # of the bias's on MiniLM, where the data's own mean direction (initialize_filters) gets twice the bias's.
        bias = self.base_layer.bias
        usable = bias is not None and bias.device.type != "meta" and bool(bias.any())
        direction = bias.detach().float().clone() if choice == "bias" and usable else torch.randn(self.out_features)
        return nn.functional.normalize(direction, dim=0)

    def _lora_change(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """(alpha/R) · (x Aᵀ) Bᵀ, type of A."""
        x = self._cast_input_dtype(x, _weight(self.lora_A, adapter).dtype)
        return self.lora_B[adapter](self.lora_A[adapter](self.lora_dropout[adapter](x))) * self.scaling[adapter]

    def _filter_change(self, adapter: str, z: torch.Tensor) -> torch.Tensor:
        """γ · ((s·z) Cᵀ) Dᵀ, type of C."""
        change = filter_change(z, self.trf_tau[adapter], _weight(self.trf_C, adapter), _weight(self.trf_D, adapter))
        return change * self.gamma[adapter]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        h = self.base_layer(x, *args, **kwargs)
        out = h
        for adapter in self.merged_adapters or self.active_adapters:
            y = h
            if adapter in self.lora_A and adapter not in self._folded:
                change = self._lora_change(adapter, x)
                y = h + change
                out = y if out is h else out + change
            if adapter in self.trf_tau:
                out = out + self._filter_change(adapter, y if self.filter_input[adapter] == "adapted" else h)
        return out.to(h.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W' = W + (alpha/R)·B A for the active adapters, or those named; filters go on working.

        `safe_merge` refuses a result that is not finite. Raises ValueError for a second adapter where one of them has a
        filter (it would read the other's output) and for quantised weights.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A and adapter not in self.trf_tau:
                continue
            together = [*self.merged_adapters, adapter]
            if len(together) > 1 and any(name in self.trf_tau for name in together):
                raise ValueError(
                    f"Can't merge the adapters {together} together: a filter reads the output of its own adapter "
                    "alone. Merge one adapter at a time."
                )
            reads_base = adapter in self.trf_tau and self.filter_input[adapter] == "base"
            if adapter in self.lora_A and not reads_base:
                self._add_to_weight(adapter, 1.0, safe_merge)
                self._folded.add(adapter)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """W = W' - (alpha/R)·B A for every merged adapter; exact up to one rounding of W."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self._folded:
                self._add_to_weight(adapter, -1.0, False)
                self._folded.remove(adapter)

    @torch.no_grad()
    def _add_to_weight(self, adapter: str, sign: float, safe: bool) -> None:
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            raise ValueError(f"Can't merge into a weight of type {weight.dtype}: load the base model unquantised.")
        # In float32 and rounded once, whatever type the weight has.
        delta = _weight(self.lora_B, adapter).float() @ _weight(self.lora_A, adapter).float()
        delta = delta.T if self.fan_in_fan_out else delta
        merged = (weight.float() + sign * self.scaling[adapter] * delta).to(weight.dtype)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(f"Merging adapter {adapter} gives NaN or infinite weights; nothing was changed.")
        weight.copy_(merged)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What takes this layer's place in the model: the base layer, or a FilteredLinear where a filter remains."""
        if not merge:
            self.unmerge()
            return self.base_layer
        if not self.merged:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        for adapter in self.merged_adapters:
            if adapter in self.trf_tau:
                return FilteredLinear(
                    self, adapter, keep_low_rank=adapter in self.lora_A and adapter not in self._folded
                )
        return self.base_layer


class FilteredLinear(nn.Module):
    """out = h + γ·((s·h) Cᵀ) Dᵀ, h = x Wᵀ + b with the low-rank half folded into W: what merge_and_unload leaves.

    Where the filter reads the base output the low-rank half can't be folded; it is kept as A and B:
    out = h + (x Aᵀ) Bᵀ + γ·((s·h) Cᵀ) Dᵀ. Scales are folded into B and D; A, B are None otherwise.
    """

    def __init__(self, layer: LoraTrfLinear, adapter: str, keep_low_rank: bool) -> None:
        super().__init__()

        def frozen(value: torch.Tensor) -> nn.Parameter:
            return nn.Parameter(value.detach().clone(), requires_grad=False)

        self.base_layer = layer.base_layer
        self.filter_input = layer.filter_input[adapter]
        self.A = self.B = None
        if keep_low_rank:
            self.A = frozen(_weight(layer.lora_A, adapter))
            self.B = frozen(_weight(layer.lora_B, adapter) * layer.scaling[adapter])
        self.tau = frozen(layer.trf_tau[adapter])
        self.C = frozen(_weight(layer.trf_C, adapter))
        self.D = frozen(_weight(layer.trf_D, adapter) * layer.gamma[adapter])

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight: some models look at it instead of calling the layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base_layer(x)
        out = h + filter_change(h, self.tau, self.C, self.D)
        if self.A is not None and self.B is not None:
            out = out + nn.functional.linear(nn.functional.linear(x.to(self.A.dtype), self.A), self.B)
        return out.to(h.dtype)
