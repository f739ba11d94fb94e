"""Encoders' other tasks: masked words, letters of speech, choices, segments, boxes, and texts beside images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
import transformers

import tiny
from loratrf_deploy import AdapterSession, UserError, create_session, read_adapter
from loratrf_deploy.bench.rows import random_rows
from loratrf_deploy.cli.parity import main as parity_main
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.parity.inputs import complete
from loratrf_deploy.pytorch.base import load_base, sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference, run_torch
from loratrf_deploy.pytorch.processors import processor_files
from shared import read_json

# Of torch's attention, which WavLM calls with masks of two types.
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

SIZES, WAVES = tiny.SIZES, tiny.WAVES | {"feat_extract_norm": "layer", "vocab_size": 7, "pad_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "is_gated_act": True}
VISION = SIZES | {"image_size": 16, "patch_size": 4}
SEGFORMER = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "decoder_hidden_size": 16,
    "num_labels": 5,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 6,
    "num_labels": 5,
}
ATTENTION = ["q_proj", "v_proj"]
TEXT = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
TYPES = {"token_type_ids": ["batch", "sequence"]}
SOUND = {"input_values": ["batch", "samples"], "attention_mask": ["batch", "samples"]}
WORDS = {"logits": ["batch", "sequence", 181]}
LETTERS = {"logits": ["batch", "frames", 7]}
TOWERS = {
    "input_ids": ["text_batch", "sequence"],
    "attention_mask": ["text_batch", "sequence"],
    "pixel_values": ["image_batch", 3, 16, 16],
}
FOUR = {
    "logits_per_image": ["image_batch", "text_batch"],
    "logits_per_text": ["text_batch", "image_batch"],
    "text_embeds": ["text_batch", 16],
    "image_embeds": ["image_batch", 16],
}


class Kind(NamedTuple):
    """A class, the fields of its configuration, those of the adapter, and what the graph takes and gives."""

    model: str
    config: dict[str, Any]
    adapter: dict[str, Any]
    inputs: dict[str, list]
    outputs: dict[str, list]


KINDS = {
    "bert, masked words": Kind(
        "BertForMaskedLM",
        SIZES | {"num_hidden_layers": 2},
        {"target_modules": ["query", "value"]},
        TEXT | TYPES,
        {"logits": ["batch", "sequence", 160]},
    ),
    "roberta, masked words": Kind("RobertaForMaskedLM", SIZES, {"target_modules": ["query", "value"]}, TEXT, WORDS),
    "modernbert, masked words": Kind("ModernBertForMaskedLM", SIZES, {"target_modules": ["Wqkv", "Wo"]}, TEXT, WORDS),
    "t5, its encoder": Kind(
        "T5EncoderModel",
        T5,
        {"target_modules": ["q", "v", "wo"], "task_type": "FEATURE_EXTRACTION"},
        TEXT,
        {"last_hidden_state": ["batch", "sequence", 32]},
    ),
    "wav2vec2, letters": Kind(
        "Wav2Vec2ForCTC", WAVES, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, SOUND, LETTERS
    ),
    # Its attention reads the weights of q_proj, k_proj and v_proj, and passes over the layers: PEFT is idle there.
    "wavlm, letters": Kind("WavLMForCTC", WAVES, {"target_modules": ["intermediate_dense"]}, SOUND, LETTERS),
    "clip, both towers": Kind(
        "CLIPModel",
        {"projection_dim": 16},
        {"target_modules": [*ATTENTION, "text_projection", "visual_projection"]},
        TOWERS,
        FOUR,
    ),
    "clip, its texts": Kind(
        "CLIPTextModelWithProjection",
        SIZES | {"projection_dim": 16},
        {"target_modules": ATTENTION},
        TEXT,
        {"text_embeds": ["batch", 16], "last_hidden_state": ["batch", "sequence", 32]},
    ),
    "clip, its images": Kind(
        "CLIPVisionModelWithProjection",
        VISION | {"projection_dim": 16},
        {"target_modules": ATTENTION},
        {"pixel_values": ["batch", 3, 16, 16]},
        {"image_embeds": ["batch", 16], "last_hidden_state": ["batch", 17, 32]},
    ),
    "siglip, both towers": Kind(
        "SiglipModel", {}, {"target_modules": [*ATTENTION, "fc1"], "task_type": "FEATURE_EXTRACTION"}, TOWERS, FOUR
    ),
    "segformer, segments": Kind(
        "SegformerForSemanticSegmentation",
        SEGFORMER,
        {"target_modules": ATTENTION, "modules_to_save": ["decode_head"]},
        {"pixel_values": ["batch", 3, "height", "width"]},
        {"logits": ["batch", 5, "map_height", "map_width"]},
    ),
    "detr, boxes": Kind(
        "DetrForObjectDetection",
        DETR,
        {"target_modules": ATTENTION, "modules_to_save": ["class_labels_classifier", "bbox_predictor"]},
        {"pixel_values": ["batch", 3, "height", "width"], "pixel_mask": ["batch", "height", "width"]},
        {"logits": ["batch", 6, 6], "pred_boxes": ["batch", 6, 4]},
    ),
    "bert, choices": Kind(
        "BertForMultipleChoice",
        SIZES,
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        {name: ["batch", "choices", "sequence"] for name in TEXT | TYPES},
        {"logits": ["batch", "choices"]},
    ),
}


FIRST = ("bert, masked words", "wav2vec2, letters", "clip, both towers")
"""The others show what these don't, but seldom break alone."""
NAMES = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in KINDS]


def make_base(folder: Path, kind: Kind) -> Path:
    """A random model of `kind`, with its tokenizer, and what makes its inputs of images and sound."""
    model_class, values = getattr(transformers, kind.model), dict(kind.config)
    if "input_ids" in kind.inputs:
        values |= text_values(kind, folder)
    if "input_values" in kind.inputs:
        speech_processor(folder)
    if "pixel_values" in kind.inputs:
        size = {"height": 64, "width": 64} if "height" in str(kind.inputs) else {"height": 16, "width": 16}
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "size": size,
            "auto_map": {"AutoImageProcessor": "x.X"},
        }
        folder.mkdir(exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if kind.model.startswith("Detr"):
        values["backbone_config"] = transformers.ResNetConfig(**RESNET)
    model = model_class(model_class.config_class(**values))
    tiny.randomise(model, 0)
    model.save_pretrained(folder)
    return folder


def text_values(kind: Kind, folder: Path) -> dict[str, Any]:
    """Saves a tokenizer in `folder`; returns what the configuration has to know of it."""
    family = "bert" if kind.model.startswith("Bert") else "modernbert" if kind.model.startswith("Mod") else "roberta"
    tokenizer = tiny.make_tokenizer(family)
    tokenizer.save_pretrained(folder)
    text = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    if family == "modernbert":
        return text | ends | {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    if "pixel_values" not in kind.inputs:
        return text | (ends if "CLIP" in kind.model else {})
    positions = {"projection_size": 16, "max_position_embeddings": 40}
    wide = {"hidden_size": 16} if kind.model == "SiglipModel" else {}
    return {"text_config": SIZES | text | ends | positions, "vision_config": VISION | wide}


def speech_processor(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (vocabulary := folder / "vocab.json").write_text(
        json.dumps({letter: number for number, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", "a", "b"])})
    )
    letters = transformers.Wav2Vec2CTCTokenizer(str(vocabulary))
    sounds = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True, sampling_rate=8000)
    transformers.Wav2Vec2Processor(sounds, letters).save_pretrained(folder)


def make_kind(folder: Path, name: str, flavour: str = "loratrf", **fields: Any) -> None:
    """base and adapter of a kind, in `folder`."""
    kind = KINDS[name]
    base = make_base(folder / "base", kind)
    config = {"r": 4, "lora_alpha": 8} | kind.adapter | fields
    tiny.save_adapter(
        getattr(transformers, kind.model).from_pretrained(base), folder / "adapter", flavour, 1, 3, config
    )


def export_kind(folder: Path, made: Path, **options: Any) -> None:
    """A proven export of what `make_kind` made."""
    result = export_adapter(made / "adapter", folder / "model.onnx", ExportOptions(base_model=made / "base", **options))
    assert result.parity is not None
    exact = [check for check in result.parity.checks if check.variant in ("with library", "without library")]
    assert [check.status for check in exact] == ["passed"] * len(exact)
    assert max(check.figures.relative for check in exact if check.figures) < 1e-5


@pytest.fixture(scope="session")
def kinds(made_once: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """kinds(name, flavour, options) -> (folder of base and adapter, folder of the proven export)."""

    def make(name: str, flavour: str = "loratrf", **options: Any) -> tuple[Path, Path]:
        made = made_once(make_kind, name, flavour)
        return made, made_once(export_kind, made, **options)

    return make


def axes(values: Any) -> dict[str, list]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def assert_computes(made: Path, out: Path, name: str, merge: bool = False) -> None:
    """Both sessions against PEFT's own forward, on sizes that were neither traced nor in the proof."""
    kind = KINDS[name]
    base = load_reference(read_adapter(made / "adapter"), made / "base", merge=merge)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert axes(graph.input) == kind.inputs
    assert axes(graph.output) == kind.outputs
    for library in (True, False):
        session = create_session(out / "model.onnx", library=library)
        for seed, (batch, sequence) in enumerate([(1, 5), (3, 11)], 30):
            inputs = sample_inputs(base, batch=batch, sequence=sequence, seed=seed)
            with torch.no_grad():
                tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
                expected = base.model.get_base_model()(**tensors)
            for key, actual in zip(kind.outputs, session.run(list(kind.outputs), inputs), strict=True):
                wanted = expected[key].numpy()
                assert actual.shape == wanted.shape
                assert np.abs(actual - wanted).max() <= 1e-5 * np.abs(wanted).max(), key


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_peft_does(kinds: Callable, name: str) -> None:
    made, out = kinds(name, mode="separate")
    assert_computes(made, out, name)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_timed_without_pytorch(kinds: Callable, name: str) -> None:
    """The random rows of loratrf-bench are what the graph takes."""
    _, out = kinds(name, mode="separate")
    session = create_session(out / "model.onnx")
    rows = random_rows(out, session.get_inputs(), 2, 6, np.random.default_rng(0))
    assert all(np.isfinite(value).all() for value in session.run(None, rows))
    assert all(len(value) == 2 for value in rows.values())


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in KINDS])
def test_merged_it_does_too(kinds: Callable, name: str) -> None:
    made, out = kinds(name, "lora", mode="merged")
    assert_computes(made, out, name, merge=True)
    assert not onnx.load(out / "model.onnx", load_external_data=False).functions


def test_texts_and_images_are_counted_apart(kinds: Callable) -> None:
    _, out = kinds("clip, both towers", mode="separate")
    session = create_session(out / "model.onnx")
    ids = np.full((3, 4), 7)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": np.ones((5, 3, 16, 16), np.float32)}
    per_image, per_text, texts, images = session.run(list(FOUR), feeds)
    assert (per_image.shape, per_text.shape, len(texts), len(images)) == ((5, 3), (3, 5), 3, 5)


def test_a_processor_goes_with_the_model(kinds: Callable) -> None:
    """Loaded from the exported folder alone, it makes what the graph takes, and reads what it gives."""
    made, out = kinds("wav2vec2, letters", mode="separate")
    processor: Any = transformers.AutoProcessor.from_pretrained(out)
    sounds = [np.sin(np.arange(length) / 3) for length in (200, 150)]
    feeds = processor(sounds, sampling_rate=8000, padding=True, return_tensors="np")
    session = create_session(out / "model.onnx")
    assert set(feeds) == {value.name for value in session.get_inputs()}
    feeds = {"input_values": feeds["input_values"], "attention_mask": feeds["attention_mask"].astype(np.int64)}
    (logits,) = session.run(None, feeds)
    base = load_reference(read_adapter(made / "adapter"), made / "base")
    expected = run_torch(base, feeds)["logits"]
    assert processor.batch_decode(logits.argmax(-1)) == processor.batch_decode(expected.argmax(-1))


def test_an_image_processor_goes_with_the_model_without_its_code(kinds: Callable) -> None:
    made, out = kinds("clip, both towers", mode="separate")
    written = read_json(out / "preprocessor_config.json")
    assert written == {
        key: value for key, value in read_json(made / "base" / "preprocessor_config.json").items() if key != "auto_map"
    }
    assert transformers.AutoTokenizer.from_pretrained(out).model_input_names == ["input_ids", "attention_mask"]


def test_int8_swaps_too(kinds: Callable) -> None:
    """One export for several things: projections in two towers, layers that the graph doesn't name, no adapter."""
    made, out = kinds("clip, both towers", swappable="base", quantize="int8")
    session = AdapterSession(out / "model.onnx")
    session.load("own", out / "adapter.onnx_adapter")
    base = load_reference(read_adapter(made / "adapter"), made / "base")
    inputs = sample_inputs(base, batch=2, sequence=7, seed=3)
    on, off = run_torch(base, inputs), run_torch(base, inputs, adapter_on=False)
    for adapter, near, far in (("own", on, off), (None, off, on)):
        images = session.run(inputs, adapter=adapter)["image_embeds"]
        error, other = (np.abs(images - wanted["image_embeds"]).max() for wanted in (near, far))
        assert error < 0.05 < other
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 10


def test_a_tied_decoder_that_is_adapted(tmp_path: Path) -> None:
    """Merged, the adapter of the decoder must not reach the embeddings, which have the same weight."""
    make_kind(tmp_path, "bert, masked words", "lora", target_modules=["decoder"])
    export_kind(tmp_path / "out", tmp_path, mode="merged")
    assert_computes(tmp_path, tmp_path / "out", "bert, masked words", merge=False)


def test_letters_of_another_alphabet(kinds: Callable, tmp_path: Path) -> None:
    """The adapter brings the head of its own language; the base has another one."""
    made = kinds("wav2vec2, letters", mode="separate")[0]
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    wide = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**WAVES | {"vocab_size": 5}))
    tiny.randomise(wide, 0)
    wide.save_pretrained(base)
    loaded = load_base(read_adapter(made / "adapter"), base)
    assert loaded.model.config.vocab_size == 7


def test_labels_of_segments_and_boxes() -> None:
    from loratrf_deploy.pytorch.classes import fit_head

    class Brings:
        def __init__(self, **heads: dict[str, np.ndarray]):
            self.modules_to_save = heads

    boxes = {"class_labels_classifier": {"weight": np.ones((9, 4))}}
    for task, kind, heads, labels in (
        ("semantic-segmentation", "segformer", {"decode_head": {"classifier.weight": np.ones((9, 4, 1, 1))}}, 9),
        ("object-detection", "detr", boxes, 8),
        ("object-detection", "conditional_detr", boxes, 9),
        ("multiple-choice", "bert", {"classifier": {"weight": np.ones((1, 4))}}, 2),
    ):
        config = transformers.CONFIG_MAPPING[kind](num_labels=2)
        fit_head(Brings(**heads), config, task)  # type: ignore[arg-type]
        assert config.num_labels == labels


def test_the_decoder_of_an_encoder_decoder(refused: Callable[..., str], tmp_path: Path) -> None:
    make_base(tmp_path / "base", KINDS["t5, its encoder"])
    whole = transformers.T5Model(transformers.T5Config.from_pretrained(tmp_path / "base"))
    adapter = {"target_modules": ["q"], "task_type": "FEATURE_EXTRACTION"}
    tiny.save_adapter(whole, tmp_path / "adapter", "lora", 1, 3, {"r": 4, "lora_alpha": 8} | adapter)
    command = ["--adapter", tmp_path / "adapter", "--base-model", tmp_path / "base"]
    message = refused(tmp_path / "out" / "model.onnx", *command)
    assert "has layers in the decoder (decoder.block.0." in message
    assert "T5EncoderModel" in message


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("clip, both towers", {"input_ids": np.ones((1, 4), int)}, "pixel_values is missing"),
        ("clip, both towers", {}, "input_ids and pixel_values are missing"),
        (
            "clip, both towers",
            {"input_ids": np.ones((1, 41), int), "pixel_values": np.ones((1, 3, 16, 16))},
            "41 tokens, the model takes at most 40",
        ),
        ("bert, choices", {"input_ids": np.ones(4, int)}, r"input_ids has shape \(4,\).*for each choice a list"),
        ("detr, boxes", {"pixel_values": np.ones((3, 31, 40))}, "at least 32 rows and columns"),
        ("detr, boxes", {"pixel_values": np.ones((1, 40, 40))}, r"expected \(3, height, width\)"),
        (
            "detr, boxes",
            {"pixel_values": np.ones((3, 40, 40)), "pixel_mask": np.ones((40, 39), int)},
            r"pixel_mask has shape \(1, 40, 39\)",
        ),
    ],
)
def test_inputs_of_a_users_own_at_fault(made_once: Callable[..., Path], name: str, wrong: dict, words: str) -> None:
    made = made_once(make_kind, name, "loratrf")
    base = load_base(read_adapter(made / "adapter"), made / "base")
    with pytest.raises(UserError, match=words):
        complete(wrong, base)
    right = sample_inputs(base, batch=2, sequence=5, seed=1)
    for key, value in complete(right, base).items():
        assert np.array_equal(value, right[key])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "can't be read"),
        ("[]", "doesn't say how large its images are"),
        ('{"size": {"height": 0, "width": 16}}', "has images of size (0, 16)"),
        ('{"size": 100000}', "up to 16384"),
    ],
)
def test_a_processor_at_fault(
    made_once: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, settings: str, words: str
) -> None:
    made = made_once(make_kind, "segformer, segments", "loratrf")
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    (base / "preprocessor_config.json").write_text(settings)
    command = ["--adapter", made / "adapter", "--base-model", base]
    assert words in refused(tmp_path / "out" / "model.onnx", *command)


def test_what_these_models_have_no_use_for(
    made_once: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    made = made_once(make_kind, "clip, both towers", "loratrf")
    base, out = ["--base-model", made / "base"], tmp_path / "out" / "model.onnx"
    both = [f"one={made / 'adapter'}", f"two={made / 'adapter'}"]
    assert "texts and images are counted apart" in refused(out, "--adapters", *both, *base)
    one = ["--adapter", made / "adapter", *base]
    assert "task is zero-shot-image-classification" in refused(out, *one, "--quantize", "int4")
    assert "towers pool by themselves" in refused(out, *one, "--pooling", "mean")


def test_answers_are_counted_where_there_are_some(kinds: Callable, tmp_path: Path, capsys: Any) -> None:
    """loratrf-parity on a model that gives no class for a row; and on rows of a user's own."""
    made, out = kinds("bert, masked words", mode="separate")
    (rows := tmp_path / "rows.jsonl").write_text(json.dumps({"text": "rain fell on the [MASK]", "label": 0}))
    command = ["--model", out / "model.onnx", "--adapter", made / "adapter", "--base-model", made / "base"]
    capsys.readouterr()
    assert parity_main([*map(str, command), "--evaluate", str(rows)]) == 2
    assert "this one's task is fill-mask" in capsys.readouterr().err
    assert parity_main([*map(str, command), "--inputs", str(rows)]) == 0


def test_whose_processor_it_is(made_once: Callable[..., Path], hub: Callable[..., Path], tmp_path: Path) -> None:
    """A hub's, where the base is one; the adapter's own before it; none that a link brings from elsewhere."""
    made = made_once(make_kind, "clip, both towers", "loratrf")
    hub(made / "base", "org/clip")
    base = load_base(read_adapter(made / "adapter"), "org/clip")
    assert '"height": 16' in processor_files(read_adapter(made / "adapter"), base)["preprocessor_config.json"]
    own = Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))
    (own / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert list(processor_files(read_adapter(own), base)) == ["processor_config.json"]
    (tmp_path / "elsewhere.json").write_text('{"password": "x"}')
    (own / "processor_config.json").unlink()
    (own / "processor_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="outside of its folder"):
        processor_files(read_adapter(own), base)
