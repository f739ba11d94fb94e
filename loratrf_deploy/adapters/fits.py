"""An adapter held against its base model, and its config against its file. numpy alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from numpy.typing import NDArray

from ..errors import UserError, some
from .adapter import EMBEDDINGS, Adapter, saved_owner
from .config import matches_target, not_exportable_reason
from .patterns import Matcher

__all__ = ["check_exportable", "check_fits", "contradictions"]

_MOVED = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
    "model.layers.": "model.language_model.layers.",
    "model.embed_tokens": "model.language_model.embed_tokens",
    **{f"{part}.": f"model.{part}." for part in ("vision_tower", "visual", "multi_modal_projector")},
}
"""How the layers of vision-language models began before transformers 4.52, and how they begin since."""

_HALVES = (("target_modules", "A", "low-rank"), ("filter_target_modules", "tau", "filter"))
# What PEFT takes for the head of a model for sequence classification.
_HEADS = ("classifier", "score")


def check_exportable(adapter: Adapter) -> None:
    """UserError for an adapter that can be exported in no mode at all, so that nobody is sent from one to the other."""
    if found := not_exportable_reason(adapter.config):
        why, remedy = found
        raise UserError(f"The adapter {adapter.path} can't be exported: {why}. {remedy}.")


def check_fits(
    adapter: Adapter,
    base_parameters: Mapping[str, tuple[int, ...]],
    *,
    conv1d: Collection[str] = (),
    tables: Collection[str] | None = None,
) -> None:
    """Whether the adapter belongs to this base model: UserError naming everything that doesn't fit, or nothing.

    `base_parameters` maps parameter names of the base to shapes: weight (N,K), or (K,N) for the module paths in
    `conv1d` (GPT-2's Conv1D) and in `tables` (embeddings), where it is known which these are. Checked: adapted modules
    exist, are of the adapter's kind and have its sizes; trained biases and saved modules exist, fit and are complete;
    and all that `contradictions` finds.
    """
    _check_not_moved(adapter, base_parameters)
    problems = []
    for name, layer in adapter.layers.items():
        shape = base_parameters.get(f"{name}.weight")
        if shape is None:
            problems.append(f"the base model has no layer {name}")
            continue
        if tables is not None and layer.embedding != (name in tables):
            kinds = ("no embedding table", "an embedding table") if layer.embedding else ("an embedding table", "none")
            problems.append(f"{name} is {kinds[0]} in the base model, {kinds[1]} in the adapter")
            continue
        turned = layer.embedding or name in conv1d
        outs, ins = (*shape, 0, 0)[1::-1] if turned else (*shape, 0, 0)[:2]
        if layer.out_features != outs or layer.in_features not in (None, ins):
            expected = f"{layer.in_features or 'any'} -> {layer.out_features}"
            problems.append(f"{name} maps {ins} -> {outs} features in the base model, {expected} in the adapter")
    problems += contradictions(adapter, base_parameters)
    for name, bias in adapter.biases.items():
        problems += _misfit(name, bias, base_parameters)
    for module, parameters in adapter.modules_to_save.items():
        for name, value in parameters.items():
            problems += _misfit(f"{module}.{name}", value, base_parameters)
    if problems:
        base = f" (trained on {adapter.base_model})" if adapter.base_model else ""
        raise UserError(
            f"The adapter {adapter.path}{base} does not fit this base model: {some(problems, '; ')}. Load the base "
            "model that the adapter was trained on, with the same number of labels and vocabulary, or save "
            "the adapter again."
        )


def _check_not_moved(adapter: Adapter, base_parameters: Mapping[str, tuple[int, ...]]) -> None:
    """UserError, with the command that mends it, where the base has all of the adapter's layers by newer names."""
    absent = [name for name in adapter.layers if f"{name}.weight" not in base_parameters]
    moved = {old: new for old, new in _MOVED.items() if any(name.startswith(old) for name in absent)}

    def is_there(name: str) -> bool:
        return any(
            name.startswith(old) and f"{new}{name.removeprefix(old)}.weight" in base_parameters
            for old, new in moved.items()
        )

    if absent and all(map(is_there, absent)):
        names = {f"base_model.model.{old}": f"base_model.model.{new}" for old, new in moved.items()}
        raise UserError(
            f"The adapter {adapter.path} names layers as transformers did before 4.52 ({absent[0]}); since then a "
            "vision-language model's language part is model.language_model. Give its file the new names, in the "
            "adapter's folder: "
            "`python -c \"import safetensors.torch as s; f = 'adapter_model.safetensors'; t = s.load_file(f); "
            f"[t.update({{b + k[len(a):]: t.pop(k)}}) for a, b in {names}.items() for k in list(t) "
            "if k.startswith(a)]; s.save_file(t, f, {'format': 'pt'})\"`."
        )


def contradictions(adapter: Adapter, base_parameters: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Where config and file of an adapter say different things, each in words; what PEFT would pass over in silence.

    What the config targets or saves must be in the file: PEFT leaves the rest as it was initialised. What the file
    holds the config must target: PEFT doesn't load the rest.
    """
    problems, matcher = [], Matcher(adapter.path)
    saved = adapter.config.get("modules_to_save") or ()
    for parameter, shape in base_parameters.items():
        module, _, kind = parameter.rpartition(".")
        if adapter.not_separable is None and kind == "weight" and len(shape) > 1:
            problems += _half_missing(adapter, module, matcher)
        owner = saved_owner(parameter, saved)
        if owner and parameter[len(owner) + 1 :] not in adapter.modules_to_save.get(owner, {}):
            problems.append(f"modules_to_save covers {parameter}, but the file doesn't hold it")
        if kind == "bias" and owner is None and _trains_bias(adapter, module) and parameter not in adapter.biases:
            problems.append(f'bias is "{adapter.config["bias"]}", but the file doesn\'t hold {parameter}')
    for module, layer in adapter.layers.items():
        problems += [
            f"the file holds {what} weights for {module}, which {config_field} leaves out"
            for config_field, part, what in _HALVES
            if getattr(layer, part) is not None and not _targets(adapter, module, config_field, matcher)
        ]
    return problems


def _half_missing(adapter: Adapter, module: str, matcher: Matcher) -> list[str]:
    """The halves that the config wants at the layer `module` of the base, and the file doesn't hold."""
    layer = adapter.layers.get(module)
    return [
        f"{config_field} covers {module}, but the file holds no {what} weights for it"
        for config_field, part, what in _HALVES
        if (part == "A" or adapter.peft_type == "LORATRF")
        # What "all-linear" covers only the model knows: a name doesn't say that it is a linear layer's.
        and not _is_all_linear(adapter, config_field)
        and _targets(adapter, module, config_field, matcher)
        and getattr(layer, part, None) is None
    ]


def _trains_bias(adapter: Adapter, module: str) -> bool:
    bias = adapter.config.get("bias")
    return adapter.not_separable is None and (bias == "all" or (bias == "lora_only" and module in adapter.layers))


def _targets(adapter: Adapter, module: str, config_field: str, matcher: Matcher) -> bool:
    """Whether PEFT would put that half at the layer `module`; of "all-linear" it leaves out the output head."""
    head = _is_all_linear(adapter, config_field) and (
        module.rpartition(".")[2] in EMBEDDINGS or (adapter.task_type == "SEQ_CLS" and module in _HEADS)
    )
    return not head and matches_target(adapter.config, module, config_field, matcher)


def _is_all_linear(adapter: Adapter, config_field: str) -> bool:
    targets = adapter.config.get(config_field)
    if targets is None and config_field == "filter_target_modules":
        targets = adapter.config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _misfit(name: str, value: NDArray, base_parameters: Mapping[str, tuple[int, ...]]) -> list[str]:
    if name not in base_parameters:
        return [f"the base model has no {name}"]
    if tuple(base_parameters[name]) != value.shape:
        return [f"{name} is {tuple(base_parameters[name])} in the base model, {value.shape} in the adapter"]
    return []
