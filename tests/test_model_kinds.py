"""Models that are no encoder of texts: images without a size, sound, encoder-decoders and decoders that classify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import transformers

import tiny
from loratrf_deploy import create_session, read_adapter
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.parity.inputs import complete, read_inputs
from loratrf_deploy.pytorch.base import load_base, sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference
from loratrf_deploy.pytorch.shapes import wave_length
from shared import edit_json

SIZES, WAVES = tiny.SIZES, tiny.WAVES | {"classifier_proj_size": 16}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 66}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
AST = SIZES | {"max_length": 40, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
IMAGES = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}}
UNMASKED = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "return_attention_mask": False}

TEXTS, SOUND = "AutoModelForSequenceClassification", "AutoModelForAudioClassification"
TEXT = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
# name: model type, class, its configuration, its preprocessor, fields of the adapter, kind and mode, the graph's inputs
KINDS: dict[str, tuple[str, str, dict, dict, dict, str, str, dict]] = {
    "bart": (
        *("bart", TEXTS, BART, {}),
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classification_head"], "task_type": "SEQ_CLS"},
        *("loratrf", "separate", TEXT),
    ),
    "resnet": (
        *("resnet", "AutoModelForImageClassification", RESNET, IMAGES),
        {"target_modules": ["convolution"]},
        *("lora", "merged", {"pixel_values": ["batch", 3, 32, 32]}),
    ),
    "wav2vec2": (
        *("wav2vec2", SOUND, WAVES | {"feat_extract_norm": "layer"}, {}),
        {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"},
        *("loratrf", "merged", {"input_values": ["batch", "samples"], "attention_mask": ["batch", "samples"]}),
    ),
    # Its attention reads the weights of q_proj and passes over the layer: there the adapter changes nothing.
    "wavlm": (
        *("wavlm", SOUND, WAVES | {"feat_extract_norm": "layer"}, UNMASKED),
        {"target_modules": ["q_proj", "intermediate_dense"]},
        *("lora", "separate", {"input_values": ["batch", "samples"]}),
    ),
    "spectrograms": (
        *("audio-spectrogram-transformer", SOUND, AST, {}),
        {"target_modules": ["q_proj", "v_proj"]},
        *("loratrf", "separate", {"input_values": ["batch", 40, 16]}),
    ),
}


def make(
    folder: Path,
    kind: str,
    auto: str,
    sizes: dict[str, Any],
    processor: dict[str, Any],
    adapter: dict[str, Any],
    flavour: str,
) -> tuple[Path, Path]:
    """(base, adapter) in `folder`: a random model of the class `auto`, and a random adapter with a head of its own."""
    base, values = folder / "base", {"num_labels": 3} | sizes
    if auto not in (SOUND, "AutoModelForImageClassification"):
        tokenizer = tiny.make_tokenizer("roberta")
        tokenizer.save_pretrained(base)
        end = tokenizer.sep_token_id
        values |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        values |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": end, "decoder_start_token_id": end}
    model = getattr(transformers, auto).from_config(transformers.CONFIG_MAPPING[kind](**values))
    tiny.randomise(model, 0)
    model.save_pretrained(base)
    if processor:
        (base / "preprocessor_config.json").write_text(json.dumps(processor))
    config = {"r": 4, "lora_alpha": 8, "modules_to_save": ["classifier"]} | adapter
    return base, tiny.save_adapter(
        getattr(transformers, auto).from_pretrained(base), folder / "adapter", flavour, 1, 3, config
    )


def leave_untrained(adapter: Path, layer: str) -> None:
    """Zeros for each B of `layer`, as PEFT starts it."""
    path = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, value in tensors.items():
        if f".{layer}.lora_B." in name:
            value[:] = 0
    safetensors.numpy.save_file(tensors, path)


def axes(values: Any) -> dict[str, list]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.mark.parametrize("name", KINDS)
def test_it_computes_what_peft_does(tmp_path: Path, name: str) -> None:
    *kind, mode, inputs = KINDS[name]
    base, adapter = make(tmp_path, *kind)
    result = export_adapter(adapter, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base, mode=mode))
    assert result.parity is not None
    assert max(check.figures.relative for check in result.parity.checks if check.variant != "base-off") < 1e-5
    graph = onnx.load(result.model, load_external_data=False).graph
    assert axes(graph.input) == inputs
    assert axes(graph.output) == {"logits": ["batch", 3]}
    if kind[3]:
        assert json.loads((result.model.parent / "preprocessor_config.json").read_text()) == kind[3]


def test_a_layer_that_training_never_reaches(tmp_path: Path) -> None:
    """WavLM's q_proj gets no gradient, so its B stays zero: nothing for the model to take at run time, and no error."""
    *kind, _, _ = KINDS["wavlm"]
    base, adapter = make(tmp_path, *kind)
    leave_untrained(adapter, "q_proj")
    options = ExportOptions(base_model=base, swappable="base")
    result = export_adapter(adapter, tmp_path / "out" / "model.onnx", options)
    assert result.parity is not None
    assert max(check.figures.relative for check in result.parity.checks if check.variant != "base-off") < 1e-5
    assert not any("q_proj" in value.name for value in onnx.load(result.model, load_external_data=False).graph.input)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("resnet"), *KINDS["resnet"][:-2])


def test_images_of_no_size(resnet: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path) -> None:
    base, adapter = resnet
    kept = (base / "preprocessor_config.json").read_text()
    (base / "preprocessor_config.json").unlink()
    try:
        message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
        assert "doesn't say how large its images are" in message
        # The advice works.
        edit_json(base / "config.json", image_size=24)
        pixels = sample_inputs(load_base(read_adapter(adapter), base), batch=2, sequence=1, seed=0)["pixel_values"]
        assert pixels.shape == (2, 3, 24, 24)
    finally:
        (base / "preprocessor_config.json").write_text(kept)
        edit_json(base / "config.json", image_size=None)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("sound"), *KINDS["wav2vec2"][:-2])


def test_waves_of_a_users_own(sound: tuple[Path, Path], tmp_path: Path) -> None:
    base = load_reference(read_adapter(sound[1]), sound[0])
    (rows := tmp_path / "rows.jsonl").write_text(json.dumps({"input_values": [0.5, -0.25] * 20, "label": 1}))
    (batch,) = read_inputs(rows, base, tmp_path)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "input_values": ((1, 40), np.dtype(np.float32)),
        "attention_mask": ((1, 40), np.dtype(np.int64)),
    }
    shortest = wave_length(base.model.config, 1)
    assert complete({"input_values": np.ones(shortest)}, base)["input_values"].shape == (1, shortest)
    for wrong, words in (
        ({"input_values": np.ones(shortest - 1)}, f"at least {shortest} samples"),
        ({"input_values": np.ones((2, 40)), "attention_mask": np.ones((2, 39), int)}, "of the shape of input_values"),
        ({"input_values": np.ones((2, 40)), "attention_mask": np.full((2, 40), 2)}, "expected 0 and 1"),
        ({"attention_mask": np.ones((2, 40))}, "input_values is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            complete(wrong, base)


def test_the_shortest_wave_is_one_frame(sound: tuple[Path, Path]) -> None:
    model = load_base(read_adapter(sound[1]), sound[0]).model
    for frames in (1, 2, 7):
        length = wave_length(model.config, frames)
        assert model._get_feat_extract_output_lengths(length) == frames
        assert model._get_feat_extract_output_lengths(length - 1) == frames - 1


def test_sound_in_a_form_that_is_not_exported(tmp_path: Path, refused: Callable[..., str]) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
    sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 20}
    sizes |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    base, adapter = make(tmp_path, "whisper", SOUND, sizes, {}, {"target_modules": ["q_proj"]}, "lora")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert "(WhisperForAudioClassification) takes 'input_features'" in message


def test_texts_and_images_in_patches(tmp_path: Path, refused: Callable[..., str]) -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 20} | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    vision = SIZES | {"hidden_size": 16, "num_patches": 16, "patch_size": 4}
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "base")
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "FEATURE_EXTRACTION"}
    adapter = tiny.save_adapter(model, tmp_path / "adapter", "lora", 1, 3, config)
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", tmp_path / "base")
    assert "(Siglip2Model) takes several kinds of input together" in message


def test_layers_that_are_replicated(make_tiny: Callable, refused: Callable[..., str], tmp_path: Path) -> None:
    base, original = make_tiny(kind="lora")
    adapter = Path(shutil.copytree(original, tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 2]])
    for mode in ("merged", "separate"):
        command = ["--adapter", adapter, "--base-model", base, "--mode", mode]
        message = refused(tmp_path / "out" / "model.onnx", *command)
        assert "layer_replication" in message
        assert "--mode" not in message


@pytest.mark.parametrize(
    ("auto", "task", "outputs"),
    [
        (TEXTS, "SEQ_CLS", {"logits": ["batch", 3]}),
        ("AutoModel", "FEATURE_EXTRACTION", {"last_hidden_state": ["batch", "sequence", 32]}),
    ],
    ids=["SEQ_CLS", "FEATURE_EXTRACTION"],
)
def test_a_decoder_gives_what_its_task_is(tmp_path: Path, auto: str, task: str, outputs: dict) -> None:
    """Neither its cache nor what its config adds."""
    sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 66, "output_hidden_states": True}
    head = {"modules_to_save": ["score"] if task == "SEQ_CLS" else None, "task_type": task}
    base, adapter = make(tmp_path, "llama", auto, sizes, {}, {"target_modules": ["q_proj", "v_proj"]} | head, "loratrf")
    result = export_adapter(adapter, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base, mode="separate"))
    graph = onnx.load(result.model, load_external_data=False).graph
    assert axes(graph.output) == outputs
    ids = np.full((2, 5), 7)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (answer,) = create_session(result.model).run(None, feeds)
    assert np.isfinite(answer).all()
