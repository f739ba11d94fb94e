"""Reading LoRA and LoRATRF adapters as PEFT saves them, with numpy alone: no torch, no transformers, no PEFT.

An adapter comes from a stranger. Its JSON, its safetensors header, its names, shapes and numbers are all checked
before anything uses them, and pickle files are never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, some
from ..files import open_regular, readable
from ..ops.schemas import FilterInput
from .config import ADAPTED_TYPES, matches_target, not_separable_reason, rank_and_scale, read_config
from .hub import fetched, folder_name
from .patterns import Matcher
from .weights_file import CONFIG_FILE, WeightsFile, find_weights

__all__ = ["EMBEDDINGS", "Adapter", "LayerAdapter", "matches_target", "read_adapter", "saved_owner"]

Array = NDArray[np.float32]

_PREFIX = "base_model.model."

# Suffix of a key -> which matrix of LayerAdapter it is.
_PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".trf_tau": "tau",
    ".trf_C.weight": "C",
    ".trf_D.weight": "D",
}
_SHAPES = {"A": "RK", "B": "NR", "lora_bias": "N", "magnitude": "N", "tau": "N", "C": "FN", "D": "NF"}
# Parts of a key that give away an adapter that is more than low-rank products, whatever its config says.
_NOT_SEPARABLE_KEYS = {
    ".lora_diag": "KaSA diagonals",
    ".token_adapter.": "trainable token embeddings",
}
_TABLE = ".lora_embedding_"
# Fields with which the low-rank half of an embedding table is more than that.
_TABLE_MERGES = {
    "use_dora": "DoRA of an embedding table",
    "ensure_weight_tying": "low-rank adaptation of an embedding table that is tied to the head's",
    "alora_invocation_tokens": "low-rank adaptation of an embedding table in an aLoRA",
}
# Saved, but read by the backward pass alone.
_TRAINING_ONLY = (".lora_velora_embed",)
# Modules whose weights PEFT saves beside the adapter when the vocabulary was resized or embeddings were targeted.
EMBEDDINGS = ("embed_tokens", "lm_head", "word_embeddings", "wte", "embed_in", "embed_out", "shared", "tok_embeddings")


@dataclass(frozen=True)
class LayerAdapter:
    """y = h + scale·(x Aᵀ)Bᵀ, out = y + gamma·((s·z) Cᵀ)Dᵀ with z = y or h: one adapted linear layer.

    Or an `embedding` table, y = E[ids] + scale·(A[:, ids])ᵀBᵀ: x is one-hot, and K the number of its rows.
    A (R,K), B (N,R), tau (N), C (F,N), D (N,F), lora_bias (N): float32, C-contiguous, None for an absent half. Scales
    are not folded in. A `magnitude` (N) is DoRA's, of which `pytorch.dora` makes `gain` and `offset` (N) with the base
    at hand: h is gain⊙h + offset then, and B and scale have the gain in them.
    """

    name: str
    A: Array | None
    B: Array | None
    tau: Array | None
    C: Array | None
    D: Array | None
    lora_bias: Array | None
    scale: float
    gamma: float
    magnitude: Array | None = None
    gain: Array | None = None
    offset: Array | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """R, or 0 without a low-rank half."""
        return 0 if self.A is None else self.A.shape[0]

    @property
    def filter_rank(self) -> int:
        """F, or 0 without a filter."""
        return 0 if self.C is None else self.C.shape[0]

    @property
    def in_features(self) -> int | None:
        """K, or None where there is a filter alone: a filter doesn't see the layer's input."""
        return None if self.A is None else self.A.shape[1]

    @property
    def out_features(self) -> int:
        """N."""
        part = self.B if self.B is not None else self.D
        assert part is not None  # read_adapter makes no layer without either half
        return part.shape[0]

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        trained = (self.A, self.B, self.tau, self.C, self.D, self.lora_bias, self.magnitude)
        return sum(part.size for part in trained if part is not None)

    def scaled_B(self) -> Array:
        """scale·B (N,R) float32: what an operator without a scale takes. ValueError without a low-rank half."""
        return _scaled(self.name, "B", self.B, self.scale)

    def scaled_D(self) -> Array:
        """gamma·D (N,F) float32: what an operator without a scale takes. ValueError without a filter."""
        return _scaled(self.name, "D", self.D, self.gamma)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read and checked. `layers` is empty where `not_separable` says why.

    `tensors` are the names of all that its weights file holds.
    """

    path: Path
    config: dict[str, Any]
    peft_type: str
    task_type: str | None
    filter_input: FilterInput
    layers: dict[str, LayerAdapter]
    biases: dict[str, NDArray]
    modules_to_save: dict[str, dict[str, NDArray]]
    not_separable: str | None
    base_model: str | None
    sha256: str
    dtype: str
    tensors: frozenset[str]

    @property
    def name(self) -> str:
        """Its folder's name, on the hub its own there."""
        return folder_name(self.path)

    @property
    def is_dora(self) -> bool:
        """Whether its layers have magnitudes, which PEFT calls LORA too."""
        return self.peft_type == "LORA" and bool(self.config.get("use_dora"))

    @property
    def copies(self) -> list[str]:
        """Adapted layers whose frozen weight the file holds too, as PEFT saves it of embeddings and heads."""
        return [path for path in self.modules_to_save if path in self.layers]

    @property
    def warning(self) -> str | None:
        """That its layers change nothing, and why; None where one changes something, or only PEFT can tell."""
        reasons = [reason for layer in self.layers.values() for reason in _idle(layer)]
        if None in reasons or not reasons:
            return None
        kept = [*self.modules_to_save, *(["its biases"] if self.biases else [])]
        only = f" Only what it brings whole can matter: {some(kept)}." if kept else ""
        return f"this adapter changes no layer: {some(list(dict.fromkeys(map(str, reasons))))}.{only}"

    @property
    def invocation_tokens(self) -> tuple[int, ...] | None:
        """Of an aLoRA: the tokens from whose last occurrence in a prompt on it is active; None for others."""
        tokens = self.config.get("alora_invocation_tokens")
        return tuple(tokens) if tokens else None


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in the folder `path`: adapter_config.json and adapter_model.safetensors, in PEFT's layout.

    What is no folder here may be a name on the hub, ORG/NAME or ORG/NAME@REVISION: see `fetched`. Weights come back as
    float32 from float64, float32, float16 or bfloat16. Raises UserError with what is wrong, what was expected and what
    to do.
    """
    path = fetched(path)
    weights = find_weights(path)
    config = read_config(path / CONFIG_FILE)
    with open_regular(weights, path) as opened, readable(weights):
        file = WeightsFile(weights, opened)
        tensors, dtypes = file.unread(), file.dtypes
        # By names and shapes alone: what is not the config's is refused before anything of it is in memory.
        parts = _Parts(weights, config, tensors)
        sha256 = file.read_into(tensors)
    return Adapter(
        path=path,
        config=config,
        peft_type=config["peft_type"],
        task_type=config.get("task_type"),
        # A plain LoRA has no filter, whatever its config says of one.
        filter_input=config.get("filter_input", "adapted") if config["peft_type"] == "LORATRF" else "adapted",
        layers=parts.layers,
        biases=parts.biases,
        modules_to_save=parts.modules_to_save,
        not_separable=parts.not_separable,
        base_model=config.get("base_model_name_or_path"),
        sha256=sha256,
        # Files of several types are rare; float32 holds what they say.
        dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        tensors=frozenset(tensors),
    )


@dataclass
class _Parts:
    """Sorts the tensors of a file: layers, biases, saved modules; what is left over is an error."""

    file: Path
    config: dict[str, Any]
    tensors: dict[str, NDArray]
    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    biases: dict[str, NDArray] = field(default_factory=dict)
    modules_to_save: dict[str, dict[str, NDArray]] = field(default_factory=dict)
    not_separable: str | None = None

    def __post_init__(self) -> None:
        self._matcher = Matcher(self.file)
        self.not_separable = not_separable_reason(self.config)
        if self.config["peft_type"] in ADAPTED_TYPES:
            self.not_separable = self.not_separable or self._telltale()
        layers: dict[str, dict[str, NDArray]] = {}
        tables: dict[str, bool] = {}
        unused = []
        for key, value in self.tensors.items():
            name = key.removeprefix(_PREFIX)
            suffix = next((suffix for suffix in _PARTS if name.endswith(suffix)), None)
            if name == key:
                unused.append(key)
            elif suffix:
                module, part = name.removesuffix(suffix), _PARTS[suffix]
                if part in ("A", "B") and tables.setdefault(module, _TABLE in suffix) != (_TABLE in suffix):
                    self._fail(module, "it has weights of an embedding table and of a linear layer")
                layers.setdefault(module, {})[part] = value
            elif not name.endswith(_TRAINING_ONLY) and not self._keep(name, value):
                unused.append(key)
        if self.not_separable:
            return
        if unused:
            raise UserError(
                f"{self.file} holds tensors that no rule uses: {some(unused)}. Expected keys such as "
                f"{_PREFIX}<module>.lora_A.weight; save the adapter with PEFT's save_pretrained."
            )
        if not layers:
            raise UserError(
                f"{self.file} holds no adapter weights (no ...lora_A.weight or ...trf_tau among its "
                f"{len(self.tensors)} tensors). Save the adapter again with PEFT's save_pretrained."
            )
        for name, parts in sorted(layers.items()):
            self.layers[name] = self._layer(name, parts, embedding=tables.get(name, False))

    def _telltale(self) -> str | None:
        for key, value in self.tensors.items():
            for part, why in _NOT_SEPARABLE_KEYS.items():
                if part in key:
                    return f"{why} ({key})"
            if _TABLE in key:
                for option, why in _TABLE_MERGES.items():
                    if self.config.get(option):
                        return f"{why} ({key})"
            if key.endswith(".lora_A.weight"):
                if value.ndim > 2:
                    return f"low-rank adaptation of a convolution ({key})"
                if ".base_layer." in key:
                    return f"nested adapted layers, as in MultiheadAttention ({key})"
        return None

    def _keep(self, name: str, value: NDArray) -> bool:
        """Files a bias or a saved module's parameter; False where the tensor is neither."""
        if self.config.get("bias") == "all" and (".original_module." in name or ".modules_to_save." in name):
            # PEFT saves a wrapped head's bias under these names too; the plain name holds the value.
            return True
        owner = saved_owner(name, self.config.get("modules_to_save") or ())
        if owner is None:
            # Below an adapted head, PEFT saves the frozen layer's weight too.
            module, _, parameter = name.replace(".base_layer.weight", ".weight").rpartition(".")
            owner = module if parameter == "weight" and module.rpartition(".")[2] in EMBEDDINGS else None
            if owner is not None:
                self.modules_to_save.setdefault(owner, {})["weight"] = value
                return True
        if owner is not None:
            self.modules_to_save.setdefault(owner, {})[name[len(owner) + 1 :]] = value
            return True
        if name.endswith(".bias") and self.config.get("bias") in ("all", "lora_only"):
            self.biases[name.replace(".base_layer.bias", ".bias")] = value
            return True
        return False

    def _layer(self, name: str, parts: dict[str, NDArray], *, embedding: bool) -> LayerAdapter:
        for half, members in (("low-rank half", ("A", "B")), ("filter", ("tau", "C", "D"))):
            absent = [member for member in members if member not in parts]
            if absent and len(absent) < len(members):
                self._fail(name, f"its {half} is incomplete: {', '.join(absent)} missing")
        if embedding and (self.config["peft_type"] != "LORA" or parts.keys() != {"A", "B"}):
            self._fail(name, 'an embedding table has lora_embedding_A and lora_embedding_B alone, and peft_type "LORA"')
        if "lora_bias" in parts and "A" not in parts:
            self._fail(name, "it has lora_B.bias but no lora_A and lora_B")
        if "A" in parts and ("lora_bias" in parts) != (biased := bool(self.config.get("lora_bias"))):
            held = "no lora_B.bias" if biased else "lora_B.bias"
            self._fail(name, f"lora_bias is {json.dumps(self.config.get('lora_bias'))}, but the file holds {held}")
        if "A" in parts and ("magnitude" in parts) != (dora := bool(self.config.get("use_dora"))):
            held = "no lora_magnitude_vector" if dora else "lora_magnitude_vector"
            self._fail(name, f"use_dora is {json.dumps(self.config.get('use_dora'))}, but the file holds {held}")
        if "tau" in parts and self.config["peft_type"] != "LORATRF":
            self._fail(name, f'it has a filter, but peft_type is "{self.config["peft_type"]}" instead of "LORATRF"')

        rank, scale = rank_and_scale(self.config, name, self._matcher)
        filter_rank = self.config.get("filter_rank", 0)
        # N and K are the layer's own: taken from one matrix each, they must hold for the others.
        outs = next(parts[part].shape for part in ("B", "tau") if part in parts)[:1]
        ins = parts["A"].shape[1:] if "A" in parts else ()
        expected = {
            "A": (rank, *ins[:1]),
            "B": (*outs, rank),
            "lora_bias": outs,
            "magnitude": outs,
            "tau": outs,
            "C": (filter_rank, *outs),
            "D": (*outs, filter_rank),
        }
        for part in (part for part in _SHAPES if part in parts):
            value = parts[part]
            if value.shape != expected[part] or 0 in value.shape or value.ndim != len(_SHAPES[part]):
                sizes = f"R = {rank}, F = {filter_rank} from the config"
                self._fail(
                    name,
                    f"{part} has shape {value.shape}, expected ({', '.join(_SHAPES[part])}) with {sizes}, "
                    f"N from {'B' if 'B' in parts else 'tau'}: {expected[part]}",
                )
        return LayerAdapter(
            name=name,
            **{part: parts.get(part) for part in _SHAPES},
            scale=scale,
            gamma=float(self.config.get("filter_gamma", 1.0)) if self.config["peft_type"] == "LORATRF" else 1.0,
            embedding=embedding,
        )

    def _fail(self, name: str, problem: str) -> None:
        raise UserError(f"{self.file}, layer {name}: {problem}. Save the adapter again with PEFT's save_pretrained.")


def saved_owner(name: str, saved: Iterable[str]) -> str | None:
    """The outermost module on the way to parameter `name` that modules_to_save, `saved`, covers; endings count."""
    steps = name.split(".")[:-1]
    for depth in range(1, len(steps) + 1):
        module = ".".join(steps[:depth])
        if any(module.endswith(ending) for ending in saved):
            return module
    return None


def _idle(layer: LayerAdapter) -> list[str | None]:
    """Of each half that the layer has: why it changes nothing, or None where it changes something."""
    reasons: list[str | None] = []
    if layer.A is not None and layer.B is not None:
        # Whether a magnitude is the base's own, only the base tells.
        biased = layer.magnitude is not None or (layer.lora_bias is not None and layer.lora_bias.any())
        prefix = "lora_embedding" if layer.embedding else "lora"
        zero = [f"{prefix}_{name} is zero" for name, part in (("A", layer.A), ("B", layer.B)) if not part.any()]
        whole = zero[0] if zero else None
        reasons.append("lora_alpha is 0" if layer.scale == 0 and layer.magnitude is None else None if biased else whole)
    if layer.tau is not None and layer.C is not None and layer.D is not None:
        zero = [f"trf_{name} is zero" for name, part in zip("CD", (layer.C, layer.D), strict=True) if not part.any()]
        zero += [] if layer.tau.any() else ["trf_tau is zero"]
        reasons.append("filter_gamma is 0" if layer.gamma == 0 else zero[0] if zero else None)
    return reasons


def _scaled(name: str, part: str, value: Array | None, factor: float) -> Array:
    if value is None:
        raise ValueError(f"layer {name} has no {part}")
    with np.errstate(over="ignore"):
        scaled = np.ascontiguousarray(value * np.float32(factor), dtype=np.float32)
    if not (math.isfinite(factor) and np.isfinite(scaled).all()):
        raise UserError(
            f"Layer {name}: {part} times its scale {factor} exceeds float32. Check lora_alpha and filter_gamma."
        )
    return scaled
