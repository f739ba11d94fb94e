"""From a validated adapter and its base to torch models: the bare base, PEFT's own model, and sample inputs."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection
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
from .classes import as_trained, class_of, config_of, fit_head, trained_on
from .samples import images, max_sequence, tokens, waves
from .shapes import MAIN_INPUTS, any_size, main_inputs, row_shape, takes_mask, text_config
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
    "TOWERS",
    "TRANSCRIPTION",
    "BaseModel",
    "Inputs",
    "Outputs",
    "load_base",
    "load_tokenizer",
    "max_sequence",
    "sample_inputs",
    "start_token",
    "tables_of",
    "tokenizer_of",
]

Inputs = dict[str, NDArray[Any]]
"""A batch by input name: ids (batch, sequence) int64, float32 pixels (batch, channels, H, W) or sound."""
Outputs = dict[str, NDArray[Any]]
"""What a model gives for a batch, by output name."""

GENERATION = "text-generation"
ANSWERS = "text2text-generation"
"""What an encoder reads and a decoder answers: translation, summaries."""
TRANSCRIPTION = "automatic-speech-recognition"
"""Texts of sound: CTC's letters, frame by frame, or what Whisper's decoder answers."""
TASKS = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
    "CAUSAL_LM": GENERATION,
    "SEQ_2_SEQ_LM": ANSWERS,
}
"""PEFT's task type -> the task's name on the hub. An adapter without one takes its task from the class it was trained
on: PEFT has no task type for most tasks."""

TOWERS = "zero-shot-image-classification"
"""Texts and images in one model, each embedded by a tower of its own: CLIP and SigLIP."""
DECODER_INPUT = "decoder_input_ids"
"""The tokens of an answer, which go into the decoder; the model's other inputs are the encoder's."""

_OUTPUTS = {
    "question-answering": ("start_logits", "end_logits"),
    "feature-extraction": ("text_embeds", "image_embeds", "last_hidden_state", "pooler_output"),
    "object-detection": ("logits", "pred_boxes"),
    TOWERS: ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
}
"""What a model of a task is exported for, where it isn't ("logits",): not its caches, nor what its config adds."""

_TASK_OF_CLASS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForMaskedLM": "fill-mask",
    "ForMultipleChoice": "multiple-choice",
    "ForCTC": TRANSCRIPTION,
    "ForSemanticSegmentation": "semantic-segmentation",
    "ForObjectDetection": "object-detection",
    "ForCausalLM": GENERATION,
    "LMHeadModel": GENERATION,
    "ModelWithProjection": "feature-extraction",
    "MTModel": ANSWERS,
    "ForConditionalGeneration": ANSWERS,
    "Model": "feature-extraction",
}
_OTHERS = (
    "and, by the class that it was trained on, classification of images and audio, masked language models, multiple "
    "choice, CTC, semantic segmentation, object detection, and text beside images (CLIP, SigLIP)"
)


@dataclass(frozen=True)
class BaseModel:
    """A torch model in eval mode with what the export needs to know of it.

    `untrained` are parameters that the checkpoint has no values for: random, until the adapter brings them.
    `parameters` are the bare base's, by name, with their shapes. `trust_remote_code` says whether Python that came with
    it, or with its tokenizer, may run. `row_shape` is that of an image or a spectrogram, () where rows differ in
    length; with `any_size`, images have any height and width, and it is but an example. `revision` is that of the hub
    which the adapter names. `embedding` is what `run_torch` makes of the tokens, where it is to. `chosen` are the
    outputs that it is exported for where its task doesn't say.
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
    any_size: bool = False
    chosen: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it is exported for; a model may lack one, as the pooled output."""
        return self.chosen or _OUTPUTS.get(self.task, ("logits",))

    @property
    def answers(self) -> bool:
        """Whether a decoder answers what an encoder reads."""
        return self.task == ANSWERS or "input_features" in self.input_names

    @property
    def main_input(self) -> str:
        """input_ids, pixel_values, input_values or input_features; of two towers that of the texts."""
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
    fit_head(adapter, config, task)
    model, untrained = _load(adapter, source, config, task, dtype, trust_remote_code)
    untrained |= resize_vocabulary(model, adapter)
    parameters = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check_fits(adapter, parameters, conv1d=_conv1d(model), tables=tables_of(model))
    mains = main_inputs(model, name)
    return BaseModel(
        model,
        name,
        task,
        _input_names(model, source, mains, trust_remote_code),
        frozenset(untrained),
        parameters,
        trust_remote_code,
        row_shape(model.config, source, mains),
        source.revision,
        any_size=any_size(model.config, task),
    )


def sample_inputs(
    base: BaseModel, *, batch: int, sequence: int, seed: int, padding: bool = True
) -> dict[str, NDArray[Any]]:
    """Random inputs of the model's own sizes: ids (batch, sequence) int64, of multiple choice (batch, choices,
    sequence); pixels (batch, channels, H, W) float32, of `any_size` in that of their processor for `seed` 0 alone; or
    sound (batch, samples) float32 of which a model makes `sequence` frames. Beside what an encoder reads are
    decoder_input_ids.

    With `padding`, every row but the first is right-padded to its own random length, as a tokenizer does. `sequence`
    is cut to what the model's position embeddings hold. Beside texts, images are of another number.
    """
    rng, names = np.random.default_rng(seed), base.input_names
    rows: Inputs = {}
    if "input_ids" in names:
        config = text_config(base.model.config)
        choices = int(rng.integers(2, 5)) if base.task == "multiple-choice" else 1
        # BART's kind reads its answer where <eos> is, and wants as many in each row: one, where a tokenizer puts it.
        # CLIP's text tower reads it there too.
        ends = base.task == "text-classification" if config.is_encoder_decoder else "_text_model" in config.model_type
        rows |= tokens(config, rng, batch * choices, sequence, padding=padding, ends=ends)
        if base.task == "multiple-choice":
            rows = {name: value.reshape(batch, choices, -1) for name, value in rows.items()}
    if "pixel_values" in names:
        # Not as many as texts: two towers count them apart.
        count = batch % 3 + 1 if "input_ids" in names else batch
        rows |= images(rng, count, base.row_shape, any_size=base.any_size, padding=padding, first=not seed)
    elif base.row_shape:
        rows[base.main_input] = rng.standard_normal((batch, *base.row_shape), dtype=np.float32)
    elif "input_values" in names:
        rows |= waves(base.model.config, rng, batch, sequence, padding=padding)
    if base.answers:
        config = base.model.config
        made = rng.integers(0, config.vocab_size, (batch, min(sequence, max_sequence(config) or sequence) // 2 + 1))
        made[:, 0] = start_token(base)
        rows[DECODER_INPUT] = made
        names = (*names, DECODER_INPUT)
    return {name: rows[name] for name in names}


def start_token(base: BaseModel) -> int:
    """The token that a decoder's answer begins behind."""
    own = base.model.generation_config
    return next((token for token in (own.decoder_start_token_id, own.bos_token_id) if isinstance(token, int)), 0)


def _task(adapter: Adapter, config: PreTrainedConfig) -> str:
    """The adapter's task: from its task type, else from the class it was trained on, else from the base's class."""
    if adapter.task_type in TASKS:
        return _of_its_kind(TASKS[adapter.task_type], adapter, config)
    known = ", ".join(TASKS)
    if adapter.task_type is not None:
        raise UserError(
            f"The adapter's task_type is {adapter.task_type}, which this version can't export. Supported: {known}, "
            f"{_OTHERS}."
        )
    trained = trained_on(adapter)
    for name in [trained] if trained else config.architectures or []:
        for suffix, task in _TASK_OF_CLASS.items():
            # Of images and texts too there are classes ForConditionalGeneration.
            if isinstance(name, str) and name.endswith(suffix) and (task != ANSWERS or config.is_encoder_decoder):
                return _of_its_kind(task, adapter, config)
    if trained:
        raise UserError(
            f"The adapter {adapter.path} was trained on a {trained}, which this version can't export. Supported: "
            f"{known}, {_OTHERS}. To set another task_type doesn't help: its weights are of that model."
        )
    classes = some(list(map(str, config.architectures or ["none"])))
    raise UserError(
        f"The adapter {adapter.path} has no task_type, doesn't say on which class it was trained, and its base's "
        f"({classes}) tells no task that can be exported. If it was trained for one of {known}, set that as task_type "
        "in its adapter_config.json."
    )


def _of_its_kind(task: str, adapter: Adapter, config: PreTrainedConfig) -> str:
    """`task`, or what it is where the model can't take texts, or takes them beside images.

    PEFT says SEQ_CLS for all classification, FEATURE_EXTRACTION for all models without a head, and SEQ_2_SEQ_LM for
    Whisper too.
    """
    from transformers.models.auto import modeling_auto

    texts = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if task == "text-classification" and config.model_type not in texts:
        if config.model_type in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            return "image-classification"
        if config.model_type in modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES:
            return "audio-classification"
    if task == ANSWERS and config.model_type in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return TRANSCRIPTION
    towers = modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if task == "feature-extraction" and config.model_type in towers and as_trained(adapter, config) is None:
        return TOWERS
    return task


def _load(
    adapter: Adapter, source: Source, config: PreTrainedConfig, task: str, dtype: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the parameters that its checkpoint doesn't hold."""
    model_class = class_of(adapter, config, task)
    config = config_of(model_class, config)

    def load(**options: Any) -> tuple[PreTrainedModel, set[str]]:
        model, info = model_class.from_pretrained(
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


def tables_of(model: torch.nn.Module) -> set[str]:
    """Paths of the embedding tables of `model`."""
    import torch

    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}


def _conv1d(model: torch.nn.Module) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _input_names(
    model: PreTrainedModel, source: Source, mains: Collection[str], trust_remote_code: bool
) -> tuple[str, ...]:
    """The inputs that the tokenizer gives and the model takes, in the tokenizer's order; others by name."""
    takes = inspect.signature(model.forward).parameters
    names = []
    if "input_ids" in mains:
        names = ["input_ids", "attention_mask"]
        if tokenizer := load_tokenizer(source.name, trust_remote_code=trust_remote_code, revision=source.revision):
            names = [entry for entry in tokenizer.model_input_names if entry in takes]
            if text_config(model.config) is not model.config and model.can_generate():
                # Gemma 3's say which tokens are an image's.
                names = [entry for entry in names if entry != "token_type_ids"]
        elif (getattr(model.config, "type_vocab_size", 0) or 0) > 1 and "token_type_ids" in takes:
            names.append("token_type_ids")
    if "pixel_values" in mains:
        names += [name for name in ("pixel_values", "pixel_mask") if name in takes]
    if "input_features" in mains:
        names.append("input_features")
    if "input_values" in mains:
        names.append("input_values")
        if "attention_mask" in takes and takes_mask(model.config, source):
            names.append("attention_mask")
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
