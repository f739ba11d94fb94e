"""Which class of transformers' is the model of a task: the one that an adapter was trained on, or the task's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter
from ..errors import UserError, some
from ..formats.tasks import HEADS, label_count

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["as_trained", "class_of", "config_of", "fit_head", "trained_on"]

_OWN = ("EncoderModel", "TextModel", "VisionModel", "ModelWithProjection")
"""Endings of classes that are one half of what their configuration says: T5's encoder, one tower of CLIP's."""


def trained_on(adapter: Adapter) -> str | None:
    """The class that `adapter` was trained on, where PEFT wrote it down: it does for adapters without a task_type."""
    name = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    return name if isinstance(name, str) and name else None


def as_trained(adapter: Adapter, config: PreTrainedConfig) -> Any | None:
    """The class of one half of a model that `adapter`, else its base, names; None where it names another kind."""
    import transformers

    for name in [own] if (own := trained_on(adapter)) else config.architectures or []:
        found = getattr(transformers, name, None) if str(name).endswith(_OWN) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


def class_of(adapter: Adapter, config: PreTrainedConfig, task: str) -> Any:
    """The class, or transformers' Auto class, of the model of `task`. UserError for a half that isn't exported."""
    import transformers
    from optimum.exporters.tasks import TasksManager
    from transformers.models.auto import modeling_auto

    if task == "automatic-speech-recognition":
        # Some, such as Moonshine, are in one table, Wav2Vec2 in the other.
        ctc = config.model_type in modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES
        return transformers.AutoModelForCTC if ctc else transformers.AutoModelForSpeechSeq2Seq
    if task == "text-generation" and _sees(adapter, config):
        return transformers.AutoModelForImageTextToText
    if task == "feature-extraction":
        if (own := as_trained(adapter, config)) is not None and _fitting(own, config) is None:
            own = None
        texts = modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type)
        if own is None and config.is_encoder_decoder and texts is not None:
            own = transformers.AutoModelForTextEncoding
        if own is not None:
            _check_encoder(adapter)
            return own
    return TasksManager.get_model_class_for_task(task, framework="pt")


def _sees(adapter: Adapter, config: PreTrainedConfig) -> bool:
    """Whether `adapter` was trained on the whole of a vision-language model, of which some have a class for texts."""
    from transformers.models.auto import modeling_auto

    whole = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if whole is None or config.is_encoder_decoder or not hasattr(config, "text_config"):
        return False
    texts = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, whole)
    return texts == whole or any("language_model." in name for name in adapter.layers)


def config_of(model_class: Any, config: PreTrainedConfig) -> PreTrainedConfig:
    """`config`, or the part of it that is `model_class`'s: of one tower."""
    return _fitting(model_class, config) or config


def _fitting(model_class: Any, config: PreTrainedConfig) -> PreTrainedConfig | None:
    wanted = getattr(model_class, "config_class", None)
    parts = [config, *vars(config).values()]
    return next((part for part in parts if wanted is not None and isinstance(part, wanted)), None)


def _check_encoder(adapter: Adapter) -> None:
    if wrong := [name for name in adapter.layers if name.startswith("decoder.")]:
        raise UserError(
            f"The adapter {adapter.path} has layers in the decoder ({some(wrong)}), and features of an encoder-decoder "
            "are extracted from its encoder alone. Train it on the encoder (T5EncoderModel and its kin)."
        )


def fit_head(adapter: Adapter, config: PreTrainedConfig, task: str) -> None:
    """Gives `config` as many labels, or letters of CTC, as the head has that the adapter brings, in place."""
    if (rows := label_count(adapter, _HEADS.get(task, (*HEADS, "decode_head")))) is None:
        return
    if task == "automatic-speech-recognition" and not config.is_encoder_decoder:
        config.vocab_size = rows
        return
    labels = rows - 1 if config.model_type in _NO_OBJECT and task == "object-detection" else rows
    if labels != config.num_labels:
        config.num_labels = labels


_NO_OBJECT = ("detr", "table-transformer", "yolos")
"""Detectors whose head has one more row, for "no object"."""
_HEADS: dict[str, tuple[str, ...]] = {
    "automatic-speech-recognition": ("lm_head",),
    "object-detection": ("class_labels_classifier",),
    # Its head has one output, a score; labels are the choices.
    "multiple-choice": (),
}
