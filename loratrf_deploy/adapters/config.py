"""adapter_config.json: what its fields may hold, which modules it targets, and which scale each module gets.

The matching rules are PEFT's; no framework is imported. A config comes from a stranger: every field that is read later
is checked here, once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_regular
from .json_text import parse_json
from .patterns import Matcher

__all__ = [
    *("ADAPTED_TYPES", "matches_target", "not_exportable_reason", "not_separable_reason", "rank_and_scale"),
    "read_config",
]

ADAPTED_TYPES = ("LORATRF", "LORA")
"""Kinds whose layers this package keeps apart from the base model."""

# PEFT's other kinds: they can only be exported merged, through PEFT itself.
# fmt: off
_OTHER_TYPES = frozenset((
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADALORA", "ADAMSS", "BOFT",
    "ADAPTION_PROMPT", "IA3", "BEFT", "LILY", "LOHA", "LOKR", "OFT", "POLY", "LN_TUNING", "VERA", "FROD", "PVERA",
    "FOURIERFT", "GLORA", "XLORA", "HRA", "VBLORA", "UNILORA", "CPT", "MISS", "BONE", "RANDLORA", "ROAD",
    "TRAINABLE_TOKENS", "HIRA", "SHIRA", "C3A", "WAVEFT", "OSF", "DELORA", "GRALORA", "CARTRIDGE", "TINYLORA",
    "PSOFT", "PEANUT", "SHADOW", "SUPERTUNING", "DEFT",
))
# fmt: on
_TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM", "SEQ_2_SEQ_LM")

# Initialisations that leave the base weights as they are: once trained, such an adapter is plain LoRA.
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")

# Fields that, when set, make an adapter more than a low-rank product beside a frozen layer. VeLoRA is not among them:
# it changes the backward pass alone.
_NOT_SEPARABLE_FIELDS = {
    "use_qalora": "its low-rank half reads pooled inputs",
    "use_bdlora": "its low-rank factors are block-diagonal",
    "kasa_config": "it truncates the base weights",
    "arrow_config": "it routes tokens between several adapters",
    "monteclora_config": "it samples its weights",
    "layer_replication": "it repeats layers of the base model",
    "trainable_token_indices": "it trains token embeddings",
    "target_parameters": "it adapts bare parameters instead of linear layers",
    "megatron_config": "its layers are split between devices",
}

# Kinds that never fold into weights. A SHADOW adapter names a model that PEFT loads without asking who wrote it, XLORA
# names other adapters, prompt kinds a tokenizer or a pickle file.
# fmt: off
_NEVER_FOLDS = frozenset((
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "POLY", "SHADOW", "XLORA",
))
# fmt: on
_RETRAIN = "Train LoRA, LoRATRF or another kind that folds"
# Initialisations that change the base by gradients or data: PEFT can't redo them when it loads the adapter.
_LOST_STARTS = ("lora_ga", "corda")

_LONGEST = 1 << 22
"""Bytes: rank_pattern may name tens of thousands of layers."""
_MOST_NAMES = 50_000
"""In a list. The layers of the largest models are as many; every one is held against every module."""

# How PEFT puts a pattern of a field into the one that it matches; the others have to match the whole path as they are.
_AT_END = r"(.*\.)?({})$"
_FORMS = {
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "rank_pattern": _AT_END,
    "alpha_pattern": _AT_END,
}
_ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."


def read_config(path: Path) -> dict[str, Any]:
    """The fields of the adapter_config.json at `path`, every field that this package reads checked for type and range.

    Raises UserError naming the field, its value and what was expected.
    """
    raw = read_regular(path, path.parent, _LONGEST)
    try:
        config = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}). Expected the file that PEFT's save_pretrained writes; "
            "fetch or save the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise UserError(
            f"{path} holds a JSON {type(config).__name__}, expected an object with PEFT's adapter settings."
        )
    return _Checker(path, config).checked()


class _Checker:
    """Holds a config against what each field may be; fields that nobody reads pass through."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.matcher = Matcher(path)

    def checked(self) -> dict[str, Any]:
        kind = self.config.get("peft_type")
        if not isinstance(kind, str) or kind not in _OTHER_TYPES.union(ADAPTED_TYPES):
            self.fail("peft_type", '"LORATRF", "LORA" or another kind that PEFT 0.21 knows')
        self.one_of("task_type", (None, *_TASK_TYPES))
        self.text("base_model_name_or_path")
        self.text("revision")
        mapping = self.config.get("auto_mapping")
        if mapping is not None and not (
            isinstance(mapping, dict) and all(isinstance(value, str | None) for value in mapping.values())
        ):
            self.fail("auto_mapping", "null or an object of strings")
        self.names("modules_to_save", text=False)
        if kind not in ADAPTED_TYPES:
            return self.config
        self.rank("r")
        self.number("lora_alpha")
        self.one_of("bias", (None, "none", "all", "lora_only"))
        for field in ("use_rslora", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"):
            self.one_of(field, (None, True, False))
        initialisation = self.config.get("init_lora_weights")
        if not (initialisation is None or isinstance(initialisation, bool | str)):
            self.fail("init_lora_weights", "true, false or a name")
        for field in ("target_modules", "exclude_modules", "layers_pattern"):
            self.names(field)
        layers = self.config.get("layers_to_transform")
        if not (layers is None or _is_index(layers) or (isinstance(layers, list) and all(map(_is_index, layers)))):
            self.fail("layers_to_transform", "null, a layer number or a list of them")
        tokens = self.config.get("alora_invocation_tokens")
        if not (tokens is None or (isinstance(tokens, list) and tokens and all(map(_is_index, tokens)))):
            self.fail("alora_invocation_tokens", "null or a list of token ids")
        self.pattern("rank_pattern", self.rank)
        self.pattern("alpha_pattern", self.number)
        if kind == "LORATRF":
            self.names("filter_target_modules")
            self.one_of("filter_input", ("adapted", "base"))
            self.rank("filter_rank")
            self.number("filter_gamma")
        return self.config

    def fail(self, field: str, expected: str, value: Any = None) -> None:
        value = self.config.get(field) if value is None else value
        shown = json.dumps(value, ensure_ascii=False, default=repr)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        stated = f"is {shown}" if field.split("[")[0] in self.config else "is missing"
        raise UserError(
            f"{self.path}: {field} {stated}, expected {expected}. Correct the field, or "
            "save the adapter again with PEFT."
        )

    def one_of(self, field: str, allowed: tuple[Any, ...]) -> None:
        value = self.config.get(field)
        # 1 == True in Python, so the type is compared as well.
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            self.fail(field, "one of " + ", ".join(json.dumps(choice) for choice in allowed))

    def text(self, field: str) -> None:
        if not isinstance(self.config.get(field), str | None):
            self.fail(field, "null or a string")

    def rank(self, field: str, *value: Any) -> None:
        number = value[0] if value else self.config.get(field)
        if number is None or not _is_index(number) or number < 1:
            self.fail(field, "a whole number of at least 1", number)

    def number(self, field: str, *value: Any) -> None:
        number = value[0] if value else self.config.get(field)
        if isinstance(number, bool) or not isinstance(number, int | float) or not _is_finite(number):
            self.fail(field, "a finite number", number)

    def names(self, field: str, text: bool = True) -> None:
        value = self.config.get(field)
        if isinstance(value, str) and text:
            self.regex(field, value)
        elif not (value is None or (isinstance(value, list) and all(isinstance(name, str) and name for name in value))):
            self.fail(field, "null, a list of names" + (" or a regular expression" if text else ""))
        elif value and len(value) > _MOST_NAMES:
            self.fail(field, f"at most {_MOST_NAMES} names")
        elif value and field in _FORMS:
            for name in value:
                self.regex(field, name)

    def pattern(self, field: str, check: Any) -> None:
        value = self.config.get(field)
        if value is None:
            return
        if not isinstance(value, dict):
            self.fail(field, "an object from module names to numbers")
        for name, number in value.items():
            self.regex(field, name)
            check(f"{field}[{json.dumps(name)}]", number)

    def regex(self, field: str, value: str) -> None:
        if fault := self.matcher.fault(_embedded(field, value)):
            self.fail(field, f"a valid regular expression ({fault})", value)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def not_separable_reason(config: Mapping[str, Any]) -> str | None:
    """Why the adapter's layers can't be kept beside an unchanged base model, in words; None where they can."""
    if config["peft_type"] not in ADAPTED_TYPES:
        return f"peft_type {config['peft_type']}"
    for field, why in _NOT_SEPARABLE_FIELDS.items():
        if config.get(field):
            value = config[field]
            return f"{field}={value if isinstance(value, bool) else '...'}: {why}"
    initialisation = config.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.lower() not in _PLAIN_INITIALISATIONS:
        # Saved with path_initial_model_for_weight_conversion, such an adapter states true here and is plain LoRA.
        return f'init_lora_weights="{initialisation}": training started from changed base weights'
    return None


def not_exportable_reason(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why an adapter can neither be kept beside the base model nor be folded into it, and what to do; None elsewhere.

    PEFT needs to know more than config and weights for these, or has no merge for them.
    """
    start = config.get("init_lora_weights")
    if config["peft_type"] in _NEVER_FOLDS:
        return f"peft_type {config['peft_type']} has nothing that folds into the base model's weights", _RETRAIN
    if config.get("megatron_config"):  # names a module that is imported
        return "megatron_config says that its layers are split between devices", _RETRAIN
    if config.get("layer_replication"):
        return (
            "layer_replication makes copies of the base model's layers, so that the model is no longer the base's",
            "Save the model with its copied layers as a base of its own, and train an adapter on that",
        )
    if isinstance(start, str) and start.lower() in _LOST_STARTS:
        return (
            f'init_lora_weights="{start}" trained it from changed base weights that its file doesn\'t record, so '
            "nobody can restore them",
            "Save it again from the training run, converted to plain LoRA: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)",
        )
    why = not_separable_reason(config) or ("use_dora=True" if config.get("use_dora") else None)
    if config.get("alora_invocation_tokens") and why:
        return (
            f"it is active only after its invocation tokens, which separate layers alone can be, and has {why}",
            "Train it without that, or without alora_invocation_tokens",
        )
    if config.get("alora_invocation_tokens") and config.get("task_type") not in (None, "CAUSAL_LM"):
        return (
            "it is active only after its invocation tokens, and only causal language models, not "
            f"{config['task_type']}, are run so",
            "Train it without alora_invocation_tokens",
        )
    return None


def _embedded(field: str, pattern: str) -> str:
    return _FORMS.get(field, "{}").replace("{}", pattern, 1)


def matches_target(
    config: Mapping[str, Any], module: str, field: str = "target_modules", matcher: Matcher | None = None
) -> bool:
    """Whether PEFT would adapt `module` (its path in the base model) under this config.

    1. `exclude_modules` (regular expression, or names by suffix) and `modules_to_save` win over targets.
    2. A string is a regular expression over the whole path, "all-linear" every module.
    3. A list names whole paths, or suffixes after a dot; suffixes are subject to layers_to_transform: the first number
       in the path (after layers_pattern, if given) must be listed.
    `field="filter_target_modules"` asks for the filter half: null there means the same modules as target_modules.
    One `matcher` for many modules bounds the time of all of them. Raises UserError where it is spent.
    """
    matcher = matcher or Matcher("The adapter's config")
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str):
        if excluded and matcher.fullmatch(excluded, module):
            return False
    elif _has_suffix(module, excluded):
        return False
    saved = config.get("modules_to_save") or ()
    if any(matcher.match(_embedded("modules_to_save", name), module) for name in saved):
        return False

    targets = config.get(field)
    if targets is None and field == "filter_target_modules":
        targets = config.get("target_modules")
    if targets is None:
        return False
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or matcher.fullmatch(targets, module) is not None
    if module in targets:
        return True
    return _has_suffix(module, targets) and _layer_is_chosen(config, module, matcher)


def _has_suffix(module: str, names: Any) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _layer_is_chosen(config: Mapping[str, Any], module: str, matcher: Matcher) -> bool:
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    names = config.get("layers_pattern") or ()
    names = [names] if isinstance(names, str) else names
    for pattern in [_embedded("layers_pattern", name) for name in names] or [_ANY_LAYER]:
        if found := matcher.match(pattern, module):
            if found["idx"] is None:  # an alternative of the pattern that has no number behind it
                return False
            index = int(found["idx"])
            return index == chosen if isinstance(chosen, int) else index in chosen
    return False


def rank_and_scale(config: Mapping[str, Any], module: str, matcher: Matcher | None = None) -> tuple[int, float]:
    """(R, alpha/R), or (R, alpha/√R) with use_rslora, for one module, after rank_pattern and alpha_pattern.

    A pattern is a regular expression over the end of the path, at a dot; the first one that fits wins. `matcher` as in
    `matches_target`.
    """
    matcher = matcher or Matcher("The adapter's config")
    rank: int = _by_pattern(config, "rank_pattern", module, config["r"], matcher)
    alpha: float = _by_pattern(config, "alpha_pattern", module, config["lora_alpha"], matcher)
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Mapping[str, Any], field: str, module: str, default: Any, matcher: Matcher) -> Any:
    for pattern, value in (config.get(field) or {}).items():
        if matcher.match(_embedded(field, pattern), module):
            return value
    return default
