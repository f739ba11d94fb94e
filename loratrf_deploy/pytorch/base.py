"""From a validated adapter and its base to torch models: the bare base, PEFT's own model, and sample inputs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.fits import check_fits
from ..errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "GENERATION",
    "TASKS",
    "BaseModel",
    "Inputs",
    "Outputs",
    "load_base",
    "load_tokenizer",
    "max_sequence",
    "sample_inputs",
    "tokenizer_of",
]

Inputs = dict[str, NDArray[Any]]
"""A batch by input name: ids (batch, sequence) int64, or pixels (batch, channels, H, W) float32."""
Outputs = dict[str, NDArray[Any]]
"""What a model gives for a batch, by output name."""

GENERATION = "text-generation"
TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
    "CAUSAL_LM": GENERATION,
}
"""PEFT's task type -> the task's name on the hub. An adapter without one takes its task from the class it was trained
on; image classification has no PEFT task type of its own."""

_TASK_OF_CLASS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForCausalLM": GENERATION,
    "LMHeadModel": GENERATION,
    "Model": "feature-extraction",
}


@dataclass(frozen=True)
class BaseModel:
    """A torch model in eval mode with what the export needs to know of it.

    `untrained` are parameters that the checkpoint has no values for: random, until the adapter brings them.
    `parameters` are the bare base's, by name, with their shapes.
    """

    model: Any  # PreTrainedModel, or PeftModel from load_reference
    path: str
    task: str
    input_names: tuple[str, ...]
    untrained: frozenset[str]
    parameters: dict[str, tuple[int, ...]]


def load_base(adapter: Adapter, base_model: str | Path | None = None, *, dtype: str = "auto") -> BaseModel:
    """The adapter's base in eval mode, with the head that the adapter's task needs, adapter not attached.

    `base_model` is a folder or a hub name; None takes the adapter's own base_model_name_or_path. `dtype` "auto" keeps
    the checkpoint's. Never unpickles and never runs the checkpoint's code. Raises UserError where the base can't be
    had, isn't this adapter's, or would leave weights random that the adapter doesn't bring.
    """
    from transformers import AutoConfig

    name = str(base_model or adapter.base_model or "")
    if not name:
        raise UserError(
            f"The adapter {adapter.path} doesn't say which base model it was trained on (base_model_name_or_path is "
            "empty). Pass it: --base-model PATH."
        )
    if base_model is not None and not Path(name).is_dir() and (Path(name).exists() or name.startswith(("/", ".", "~"))):
        raise UserError(f"The base model {name} is not a folder: expected one with config.json and model.safetensors.")
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # hub, file and JSON errors come in many classes
        raise UserError(_not_found(name, base_model, error)) from error
    task = _task(adapter, config)
    if (labels := _num_labels(adapter)) is not None and labels != config.num_labels:
        config.num_labels = labels
    model, untrained = _load(adapter, name, config, task, dtype)
    parameters = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_fits(adapter, parameters, conv1d=_conv1d(model))
    return BaseModel(model, name, task, _input_names(model, name, task), frozenset(untrained), parameters)


def sample_inputs(
    base: BaseModel, *, batch: int, sequence: int, seed: int, padding: bool = True
) -> dict[str, NDArray[Any]]:
    """Random inputs of the model's own sizes: ids (batch, sequence) int64, or pixels (batch, channels, H, W) float32.

    With `padding`, every row but the first is right-padded to its own random length, as a tokenizer does. `sequence`
    is cut to what the model's position embeddings hold.
    """
    rng = np.random.default_rng(seed)
    config = base.model.config
    if "pixel_values" in base.input_names:
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        pixels = rng.standard_normal((batch, config.num_channels, height, width), dtype=np.float32)
        return {"pixel_values": pixels}
    sequence = min(sequence, max_sequence(config) or sequence)
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    ids = rng.integers(0, config.vocab_size, (batch, sequence))
    # RoBERTa counts positions by ids that aren't padding: a padding id inside a sentence never comes from a tokenizer.
    ids = np.where(ids == pad, (pad + 1) % config.vocab_size, ids)
    mask = np.ones_like(ids)
    if padding and sequence > 1:
        lengths = rng.integers(1, sequence, batch)
        lengths[0] = sequence
        mask = (np.arange(sequence) < lengths[:, None]).astype(np.int64)
        ids = np.where(mask == 1, ids, pad)
    values = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in base.input_names:
        types = max(int(getattr(config, "type_vocab_size", 1) or 1), 1)
        values["token_type_ids"] = np.sort(rng.integers(0, types, ids.shape), axis=1)
    return {name: values[name] for name in base.input_names}


def max_sequence(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the position embeddings hold, None where nothing bounds it."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    # RoBERTa's positions start behind its padding index.
    offset = (config.pad_token_id or 0) + 1 if config.model_type in _ROBERTA_POSITIONS else 0
    return positions - offset


_ROBERTA_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "data2vec-text", "mpnet"}


def _task(adapter: Adapter, config: PreTrainedConfig) -> str:
    """The adapter's task: from its task type, else from the class it was trained on, else from the base's class."""
    from transformers.models.auto import modeling_auto

    if adapter.task_type in TASKS:
        task = TASKS[adapter.task_type]
        if task == "text-classification":
            images = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
            texts = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
            if config.model_type in images and config.model_type not in texts:
                return "image-classification"
        return task
    known = ", ".join([*TASKS, "image classification"])
    if adapter.task_type is not None:
        raise UserError(
            f"The adapter's task_type is {adapter.task_type}, which this version can't export. Supported: {known}."
        )
    trained_on = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    for name in [trained_on, *(config.architectures or [])]:
        for suffix, task in _TASK_OF_CLASS.items():
            if isinstance(name, str) and name.endswith(suffix):
                return task
    raise UserError(
        f"The adapter {adapter.path} has no task_type, and neither the class it was trained on ({trained_on}) nor its "
        f"base's ({config.architectures}) tells one that can be exported. Supported: {known}. Set task_type in "
        "adapter_config.json."
    )


def _num_labels(adapter: Adapter) -> int | None:
    """The number of labels of the classification head that the adapter brings, None where it brings none."""
    for path, tensors in adapter.modules_to_save.items():
        if path.rsplit(".", 1)[-1] in ("classifier", "score", "qa_outputs"):
            for name in ("out_proj.weight", "weight"):
                if name in tensors:
                    return int(tensors[name].shape[0])
    return None


def _load(
    adapter: Adapter, name: str, config: PreTrainedConfig, task: str, dtype: str
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the parameters that its checkpoint doesn't hold."""
    from optimum.exporters.tasks import TasksManager

    auto_class = TasksManager.get_model_class_for_task(task, framework="pt")

    def load(**options: Any) -> tuple[PreTrainedModel, set[str]]:
        model, info = auto_class.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        mismatched = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
        return model.eval(), set(info["missing_keys"]) | mismatched

    brought = tuple(f"{path}." for path in adapter.modules_to_save)
    try:
        model, random = load()
        if task == "feature-extraction" and random and all(key.startswith("pooler.") for key in random):
            model, random = load(add_pooling_layer=False)
    except Exception as error:
        raise UserError(
            f"The base model {name} can't be loaded for {task}: {error} Expected a folder or hub name with config.json "
            "and safetensors weights of a model that transformers knows."
        ) from error
    if missing := sorted(key for key in random if not key.startswith(brought)):
        raise UserError(
            f"The base model {name} has no weights for {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''} "
            f"(needed for {task}), or weights of another shape, and the adapter {adapter.path} doesn't bring them in "
            "modules_to_save: they would be random. Pass the base that the adapter was trained on (--base-model), or "
            "train the adapter with these modules in modules_to_save."
        )
    return model, random


def _conv1d(model: torch.nn.Module) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _input_names(model: PreTrainedModel, name: str, task: str) -> tuple[str, ...]:
    """The inputs that the tokenizer gives and the model takes, in the tokenizer's order."""
    takes = inspect.signature(model.forward).parameters
    if task == "image-classification" or "input_ids" not in takes:
        return ("pixel_values",)
    names = ["input_ids", "attention_mask"]
    if tokenizer := load_tokenizer(name):
        names = [entry for entry in tokenizer.model_input_names if entry in takes]
    elif (getattr(model.config, "type_vocab_size", 0) or 0) > 1 and "token_type_ids" in takes:
        names.append("token_type_ids")
    return tuple(names)


def tokenizer_of(adapter: Adapter, base: str | Path) -> tuple[Any | None, Path]:
    """The adapter's own tokenizer where its folder has one, else that of the folder or hub name `base`; and where."""
    source = adapter.path if (adapter.path / "tokenizer_config.json").is_file() else Path(base)
    return load_tokenizer(source), source


def load_tokenizer(path: str | Path) -> Any | None:
    """The tokenizer saved in `path`, None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path))
    except Exception:  # no tokenizer files, or one that needs packages that are not here
        return None


def _not_found(name: str, base_model: object, error: Exception) -> str:
    if Path(name).is_dir():
        return f"The base model folder {name} has no usable config.json: {error}"
    source = "--base-model" if base_model is not None else "the adapter's base_model_name_or_path"
    return (
        f"The base model {name} ({source}) is neither a folder here nor to be had from the hub or its local cache. "
        "Pass the folder that holds it: --base-model PATH."
    )
