"""Settings of a LoRATRF adapter, and its place in PEFT's list of kinds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from peft import PeftConfig
from peft.utils import (
    PeftType,
)

from ..errors import UserError

__all__ = ["LoraTrfConfig", "peft_type"]


def peft_type() -> PeftType:
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
        self.peft_type = peft_type()
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
