"""From a validated adapter and its base to torch models: the bare base, PEFT's own model, and sample inputs."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.fits import check_fits
from ..errors import UserError, some
from ..files import check_entries, readable, stays_inside
from ..formats.embedding import Embedding
from .shapes import MAIN_INPUTS, main_input, row_shape, takes_mask, wave_length
from .source import OWN_MODEL, Source, find_source, hub_has, needs_trust
from .vocabulary import resize_vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "ANSWERS",
    "DECODER_INPUT",
    "GENERATION",
    "TASKS",
    "BaseModel",
    "Inputs",
    "Outputs",
    "load_base",
    "load_tokenizer",
    "max_sequence",
    "sample_inputs",
    "start_token",
    "tokenizer_of",
]

Inputs = dict[str, NDArray[Any]]
"""A batch by input name: ids (batch, sequence) int64, or float32 pixels (batch, channels, H, W) or sound."""
Outputs = dict[str, NDArray[Any]]
"""What a model gives for a batch, by output name."""

GENERATION = "text-generation"
ANSWERS = "text2text-generation"
"""What an encoder reads and a decoder answers: translation, summaries."""
TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
    "CAUSAL_LM": GENERATION,
    "SEQ_2_SEQ_LM": ANSWERS,
}
"""PEFT's task type -> the task's name on the hub. An adapter without one takes its task from the class it was trained
on; image and audio classification have no PEFT task type of their own."""
DECODER_INPUT = "decoder_input_ids"
"""The tokens of an answer, which go into the decoder; the model's other inputs are the encoder's."""

_OUTPUTS = {
    "question-answering": ("start_logits", "end_logits"),
    "feature-extraction": ("last_hidden_state", "pooler_output"),
}
"""What a model of a task is exported for, where it isn't ("logits",): not its caches, nor what its config adds."""

_TASK_OF_CLASS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCausalLM": GENERATION,
    "LMHeadModel": GENERATION,
    "MTModel": ANSWERS,
    "Model": "feature-extraction",
}


@dataclass(frozen=True)
class BaseModel:
    """A torch model in eval mode with what the export needs to know of it.

    `untrained` are parameters that the checkpoint has no values for: random, until the adapter brings them.
    `parameters` are the bare base's, by name, with their shapes. `trust_remote_code` says whether Python that came with
    it, or with its tokenizer, may run. `row_shape` is that of a row of the main input, () where rows differ in length.
    `revision` is that of the hub which the adapter names. `embedding` is what `run_torch` makes of the tokens, where it
    is to.
    """

    model: Any  # PreTrainedModel, or PeftModel from load_reference
    path: str
    task: str
    input_names: tuple[str, ...]
    untrained: frozenset[str]
    parameters: dict[str, tuple[int, ...]]
    trust_remote_code: bool = False
    row_shape: tuple[int, ...] = ()
    revision: str | None = None
    embedding: Embedding | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it is exported for; a model may lack one, as the pooled output."""
        return _OUTPUTS.get(self.task, ("logits",))

    @property
    def main_input(self) -> str:
        """input_ids, pixel_values or input_values."""
        return next(name for name in self.input_names if name in MAIN_INPUTS)


def load_base(
    adapter: Adapter, base_model: str | Path | None = None, *, dtype: str = "auto", trust_remote_code: bool = False
) -> BaseModel:
    """The adapter's base in eval mode, with the head that the adapter's task needs, adapter not attached.

    `base_model` is a folder or a hub name; None takes the adapter's own base_model_name_or_path. `dtype` "auto" keeps
    the checkpoint's. Never unpickles, and runs no Python of the checkpoint or its tokenizer but with
    `trust_remote_code`. Raises UserError where the base can't be had, isn't this adapter's, needs such Python, or would
    leave weights random that the adapter doesn't bring.
    """
    from transformers import AutoConfig

    source = find_source(adapter, base_model)
    name = source.name
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **source.options)
    except Exception as error:  # hub, file and JSON errors come in many classes
        raise UserError(needs_trust(f"base model {name}", error) or source.not_found(error)) from error
    source.check_weights(config)
    task = _task(adapter, config)
    if (labels := _num_labels(adapter)) is not None and labels != config.num_labels:
        config.num_labels = labels
    model, untrained = _load(adapter, source, config, task, dtype, trust_remote_code)
    untrained |= resize_vocabulary(model, adapter)
    parameters = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_fits(adapter, parameters, conv1d=_conv1d(model))
    input_names = _input_names(model, source, trust_remote_code)
    shape = row_shape(model.config, source, main_input(model, name))
    return BaseModel(
        model, name, task, input_names, frozenset(untrained), parameters, trust_remote_code, shape, source.revision
    )


def sample_inputs(
    base: BaseModel, *, batch: int, sequence: int, seed: int, padding: bool = True
) -> dict[str, NDArray[Any]]:
    """Random inputs of the model's own sizes: ids (batch, sequence) int64, pixels (batch, channels, H, W) float32, or
    sound (batch, samples) float32 of which a model makes `sequence` frames.

    With `padding`, every row but the first is right-padded to its own random length, as a tokenizer does. `sequence`
    is cut to what the model's position embeddings hold.
    """
    rng = np.random.default_rng(seed)
    config = base.model.config
    if base.row_shape:
        return {base.main_input: rng.standard_normal((batch, *base.row_shape), dtype=np.float32)}
    if base.main_input == "input_values":
        return _sample_waves(base, batch, sequence, rng, padding)
    sequence = min(sequence, max_sequence(config) or sequence)
    pad = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    ids = rng.integers(0, config.vocab_size, (batch, sequence))
    # RoBERTa counts positions by ids that aren't padding: a padding id inside a sentence never comes from a tokenizer.
    ids = np.where(ids == pad, (pad + 1) % config.vocab_size, ids)
    lengths = np.full(batch, sequence)
    if padding and sequence > 1:
        lengths = rng.integers(1, sequence, batch)
        lengths[0] = sequence
    mask = (np.arange(sequence) < lengths[:, None]).astype(np.int64)
    if base.task == "text-classification" and config.is_encoder_decoder:
        # BART's kind reads its answer where <eos> is, and wants as many in each row: one, where a tokenizer puts it.
        ids = np.where(ids == config.eos_token_id, (config.eos_token_id + 1) % config.vocab_size, ids)
        ids[np.arange(batch), lengths - 1] = config.eos_token_id
    ids = np.where(mask == 1, ids, pad)
    values = {"input_ids": ids, "attention_mask": mask}
    if base.task == ANSWERS:
        made = rng.integers(0, config.vocab_size, (batch, sequence // 2 + 1))
        made[:, 0] = start_token(base)
        return {name: values[name] for name in base.input_names} | {DECODER_INPUT: made}
    if "token_type_ids" in base.input_names:
        types = max(int(getattr(config, "type_vocab_size", 1) or 1), 1)
        values["token_type_ids"] = np.sort(rng.integers(0, types, ids.shape), axis=1)
    return {name: values[name] for name in base.input_names}


def _sample_waves(
    base: BaseModel, batch: int, frames: int, rng: np.random.Generator, padding: bool
) -> dict[str, NDArray[Any]]:
    config = base.model.config
    # Not the fewest for so many frames: lengths of waves are odd.
    longest = wave_length(config, frames) + int(rng.integers(config.conv_stride[0]))
    waves = rng.standard_normal((batch, longest), dtype=np.float32)
    lengths = np.full(batch, longest)
    if padding and frames > 1:
        lengths = rng.integers(wave_length(config, 1), longest, batch)
        lengths[0] = longest
    mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    values: Inputs = {"input_values": waves * mask.astype(np.float32), "attention_mask": mask}
    return {name: values[name] for name in base.input_names}


def start_token(base: BaseModel) -> int:
    """The token that a decoder's answer begins behind."""
    own = base.model.generation_config
    return next((token for token in (own.decoder_start_token_id, own.bos_token_id) if isinstance(token, int)), 0)


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
    if adapter.task_type in TASKS:
        return _of_its_kind(TASKS[adapter.task_type], config)
    known = ", ".join(TASKS)
    if adapter.task_type is not None:
        raise UserError(
            f"The adapter's task_type is {adapter.task_type}, which this version can't export. Supported: {known}, and "
            "classification of images and audio."
        )
    trained_on = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    for name in [trained_on] if trained_on else config.architectures or []:
        for suffix, task in _TASK_OF_CLASS.items():
            if isinstance(name, str) and name.endswith(suffix):
                return _of_its_kind(task, config)
    if trained_on:
        raise UserError(
            f"The adapter {adapter.path} was trained on a {trained_on}, which this version can't export. Supported: "
            f"{known}, and classification of images and audio. To set another task_type doesn't help: its weights are "
            "of that model."
        )
    classes = some(list(map(str, config.architectures or ["none"])))
    raise UserError(
        f"The adapter {adapter.path} has no task_type, doesn't say on which class it was trained, and its base's "
        f"({classes}) tells no task that can be exported. If it was trained for one of {known}, set that as task_type "
        "in its adapter_config.json."
    )


def _of_its_kind(task: str, config: PreTrainedConfig) -> str:
    """`task`; classification of images or audio where the model can't take texts: PEFT says SEQ_CLS for all of them."""
    from transformers.models.auto import modeling_auto

    texts = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if task == "text-classification" and config.model_type not in texts:
        if config.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            return "image-classification"
        if config.model_type in modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES:
            return "audio-classification"
    return task


def _num_labels(adapter: Adapter) -> int | None:
    """The number of labels of the classification head that the adapter brings, None where it brings none."""
    for path, tensors in adapter.modules_to_save.items():
        if path.rsplit(".", 1)[-1] in ("classifier", "score", "qa_outputs", "classification_head"):
            for name in ("out_proj.weight", "weight", "1.weight"):
                if name in tensors:
                    return int(tensors[name].shape[0])
    return None


def _load(
    adapter: Adapter, source: Source, config: PreTrainedConfig, task: str, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the parameters that its checkpoint doesn't hold."""
    from optimum.exporters.tasks import TasksManager

    auto_class = TasksManager.get_model_class_for_task(task, framework="pt")

    def load(**options: Any) -> tuple[PreTrainedModel, set[str]]:
        model, info = auto_class.from_pretrained(
            source.name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **source.options,
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
        raise UserError(source.not_loaded(config, task, error)) from error
    if missing := sorted(key for key in random if not key.startswith(brought)):
        raise UserError(
            f"The base model {source} has no weights for {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''} "
            f"(needed for {task}), or weights of another shape, and the adapter {adapter.path} doesn't bring them in "
            "modules_to_save: they would be random. Pass the base that the adapter was trained on (--base-model), or "
            "train the adapter with these modules in modules_to_save."
            + (OWN_MODEL if getattr(config, "auto_map", None) and not trust_remote_code else "")
        )
    return model, random


def _conv1d(model: torch.nn.Module) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _input_names(model: PreTrainedModel, source: Source, trust_remote_code: bool) -> tuple[str, ...]:
    """The inputs that the tokenizer gives and the model takes, in the tokenizer's order; others by name."""
    takes = inspect.signature(model.forward).parameters
    if (main := main_input(model, source.name)) != "input_ids":
        masked = main == "input_values" and "attention_mask" in takes and takes_mask(model.config, source)
        return (main, "attention_mask") if masked else (main,)
    names = ["input_ids", "attention_mask"]
    if tokenizer := load_tokenizer(source.name, trust_remote_code=trust_remote_code, revision=source.revision):
        names = [entry for entry in tokenizer.model_input_names if entry in takes]
    elif (getattr(model.config, "type_vocab_size", 0) or 0) > 1 and "token_type_ids" in takes:
        names.append("token_type_ids")
    return tuple(names)


def tokenizer_of(adapter: Adapter, base: BaseModel) -> tuple[Any | None, Path]:
    """The adapter's own tokenizer where its folder has one, else that of `base`; and where it was found."""
    own = (adapter.path / "tokenizer_config.json").is_file()
    source, revision = (adapter.path, None) if own else (Path(base.path), base.revision)
    return load_tokenizer(source, trust_remote_code=base.trust_remote_code, revision=revision), source


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any | None:
    """The tokenizer of the folder or hub name `path`, None where there is none.

    Runs no Python of its own but with `trust_remote_code`. Raises UserError for one that is there and can't be loaded,
    or whose files are links out of the folder.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if os.path.isdir(path):
        check_entries(Path(path))
        with readable(path):
            if not any(_TOKENIZER_FILE.match(name) for name in os.listdir(path)):
                return None
    try:
        settings = get_tokenizer_config(str(path), revision=revision)
        if settings.get("init_inputs") or not all(map(stays_inside, settings.get("fast_tokenizer_files") or [])):
            raise ValueError("its tokenizer_config.json has init_inputs, or names files that are not in the folder.")
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, revision=revision)
        if not all(isinstance(name, str) for name in tokenizer.model_input_names):
            raise ValueError(f"its model_input_names are {tokenizer.model_input_names!r}, expected names.")
    except Exception as error:  # files that are damaged, packages that are not here, code of its own
        if not os.path.isdir(path) and not hub_has(str(path), _HUB_TOKENIZER_FILES, revision):
            return None
        raise UserError(
            needs_trust(f"tokenizer in {path}", error)
            or f"The tokenizer in {path} can't be loaded: {error} Save it there again, "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder), or remove its files if the export is to have "
            "none."
        ) from error
    return tokenizer


_TOKENIZER_FILE = re.compile(
    r"tokenizer|vocab|merges\.txt|spiece|sentencepiece|tekken|(source|target|bpe)\.|.*\.(tiktoken|spm|bpe)$"
)
"""What marks a folder that has a tokenizer: vocabularies go by many names."""
_HUB_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
