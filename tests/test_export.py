"""The exported model against PyTorch, for every family and task; and what the exported folder looks like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import tiny
from loratrf_deploy import create_session, library_path, read_adapter
from loratrf_deploy.pytorch.base import sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference
from shared import edit_json, edit_tensors

LIMIT = {"float32": 1e-5, "float16": 2e-3}
SHAPES = [(1, 1), (1, 7), (3, 2), (2, 19), (4, 64)]
CLASSIFICATION = dict.fromkeys(tiny.FAMILIES, "text-classification") | {"vit": "image-classification"}
TEXT_TASKS = [task for task in tiny.TASKS if task != "image-classification"]
FAMILY_TASKS = [
    (family, task)
    for family in tiny.FAMILIES
    for task in (TEXT_TASKS if family != "vit" else ["image-classification", "feature-extraction"])
]
FIRST = ("bert", "deberta-v2", "vit")
"""Families that are tried with every task and kind; of others, what repeats these is slow."""


def assert_parity(exported, dtype: str = "float32") -> None:
    """Both sessions, with the library and without, against PEFT's own forward, on shapes that were not traced."""
    manifest = json.loads((exported.model.parent / "loratrf.json").read_text())
    reference = load_reference(
        read_adapter(exported.adapter), exported.base, dtype=dtype, merge=manifest["mode"] == "merged"
    )
    assert library_path().is_file()
    for library in (True, False):
        session = create_session(exported.model, library=library)
        names = [output.name for output in session.get_outputs()]
        for seed, (batch, sequence) in enumerate(SHAPES):
            inputs = sample_inputs(reference, batch=batch, sequence=sequence, seed=seed)
            with torch.no_grad():
                # Not PeftModel's own forward: for question answering it drops token_type_ids.
                model = reference.model.get_base_model()
                expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
            feeds = {name: value.astype(dtype) if value.dtype.kind == "f" else value for name, value in inputs.items()}
            for name, actual in zip(names, session.run(None, feeds), strict=True):
                wanted = expected[name].numpy()
                assert actual.dtype == dtype
                assert actual.shape == wanted.shape
                error = np.abs(actual.astype(np.float64) - wanted).max() / np.abs(wanted).max()
                assert error <= LIMIT[dtype], f"{name} {batch}x{sequence} library={library}: {error:.2e}"
                if "logits" in name and wanted.shape[-1] > 1:
                    clear = np.ptp(np.partition(wanted, -2, -1)[..., -2:], -1) > 2 * error * np.abs(wanted).max()
                    assert (actual.argmax(-1) == wanted.argmax(-1))[clear].all()


@pytest.mark.parametrize(
    ("family", "task"),
    [
        pytest.param(*which, marks=[pytest.mark.slow] if which[0] not in FIRST and which[1] != TEXT_TASKS[0] else [])
        for which in FAMILY_TASKS
    ],
)
@pytest.mark.consumer("onnxruntime, Python", "merged, separate")
@pytest.mark.consumer("onnxruntime with our library", "merged, separate")
def test_separate_loratrf(make_export: Callable, family: str, task: str) -> None:
    assert_parity(make_export(family, task, "loratrf", mode="separate"))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=[pytest.mark.slow] if family not in FIRST and kind == "lora" else [])
        for family in tiny.FAMILIES
        for kind in ("lora", "loratrf")
    ],
)
@pytest.mark.consumer("onnxruntime, Python", "merged, separate")
@pytest.mark.consumer("onnxruntime with our library", "merged, separate")
def test_merged(make_export: Callable, family: str, kind: str) -> None:
    exported = make_export(family, CLASSIFICATION[family], kind, mode="merged")
    assert_parity(exported)
    domains = {entry.domain for entry in onnx.load(exported.model, load_external_data=False).opset_import}
    assert ("com.loratrf" in domains) == (kind == "loratrf")


@pytest.mark.parametrize("mode", ["separate", "merged"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_float16(make_export: Callable, family: str, mode: str) -> None:
    assert_parity(make_export(family, CLASSIFICATION[family], mode=mode, dtype="float16"), "float16")


@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_filter_on_the_unadapted_output(make_export: Callable, mode: str) -> None:
    exported = make_export(mode=mode, filter_input="base")
    assert_parity(exported)
    nodes = onnx.load(exported.model, load_external_data=False).graph.node
    assert {node.op_type for node in nodes if node.domain == "com.loratrf"} == {"LoraTrf"}


def test_filters_where_there_is_no_low_rank_half_and_the_other_way_round(make_export: Callable) -> None:
    exported = make_export(target_modules=["query"], filter_target_modules=["value", "intermediate.dense"])
    assert_parity(exported)
    nodes = onnx.load(exported.model, load_external_data=False).graph.node
    ops = {node.metadata_props[0].value: node.op_type for node in nodes if node.domain == "com.loratrf"}
    layer = "bert.encoder.layer.0"
    assert ops[f"{layer}.attention.self.query"] == "LowRank"
    assert ops[f"{layer}.attention.self.value"] == "TaskFilter"
    assert ops[f"{layer}.intermediate.dense"] == "TaskFilter"


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "rank_pattern": {"layer.1.attention.self.query": 7}, "alpha_pattern": {"value": 5}},
        {"bias": "all"},
        {"use_dora": True, "use_rslora": True},
        {"use_dora": True, "bias": "all", "target_modules": ["query"]},
        {"bias": "lora_only", "lora_bias": True},
        {"layers_to_transform": [1], "layers_pattern": "layer"},
        {"target_modules": r".*layer\.0\..*(query|dense)"},
        {"target_modules": "all-linear", "exclude_modules": ["pooler.dense"]},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("mode", ["separate", "merged"])
def test_every_flavour_of_plain_lora(make_export: Callable, options: dict, mode: str) -> None:
    assert_parity(make_export(kind="lora", mode=mode, **options))


def test_a_kind_that_only_merges(make_export: Callable) -> None:
    assert_parity(make_export(kind="lora", mode="merged", **TOKENS))


TOKENS = {"trainable_token_indices": {"word_embeddings": [1, 2]}}
VALUE = "bert.encoder.layer.1.attention.self.value"
DAMAGE = {
    "less in the file": ({}, VALUE, f"wants base_model.model.{VALUE}.lora_A.weight, which the file doesn't"),
    "less in the config": (
        {"target_modules": ["query"]},
        "",
        f"holds base_model.model.{VALUE}.lora_A.weight, which the",
    ),
    "other layers": ({"layers_to_transform": [0]}, "", f"holds base_model.model.{VALUE}.lora_A.weight, which the"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", [TOKENS, {}], ids=["tokens", "LoRA"])
def test_an_unchecked_export_holds_the_config_against_the_file(
    make_tiny: Callable, refused: Callable[..., str], tmp_path: Path, damage: str, kind: dict
) -> None:
    """Kinds that PEFT merges too: it takes what fits, and says nothing of the rest."""
    config, dropped, words = DAMAGE[damage]
    base, original = make_tiny(kind="lora", **kind)
    adapter = Path(shutil.copytree(original, tmp_path / "adapter"))
    edit_json(adapter / "adapter_config.json", **config)
    if dropped:
        weights = adapter / "adapter_model.safetensors"
        edit_tensors(weights, lambda all: {key: value for key, value in all.items() if dropped not in key})
    command = ["--adapter", adapter, "--base-model", base, "--no-check"]
    message = refused(tmp_path / "out" / "model.onnx", *command)
    assert (words if kind else VALUE) in message


@pytest.mark.parametrize("opset", [18, 23])
def test_opset(make_tiny: Callable, tmp_path: Path, opset: int) -> None:
    from conftest import Exported
    from loratrf_deploy.export import ExportOptions, export_adapter

    base, adapter = make_tiny()
    export_adapter(
        adapter, tmp_path / "model.onnx", ExportOptions(base_model=base, mode="separate", opset=opset, check=False)
    )
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == opset
    assert_parity(Exported(base, adapter, tmp_path / "model.onnx"))


def test_the_folder_and_the_graph_are_clean(make_export: Callable) -> None:
    exported = make_export()
    folder = exported.model.parent
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "config.json", "loratrf.json", "tokenizer.json"}
    onnx.checker.check_model(str(exported.model))
    model = onnx.load(exported.model, load_external_data=False)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    ids = ["batch", "sequence"]
    assert shapes == {"input_ids": ids, "token_type_ids": ids, "attention_mask": ids, "logits": ["batch", 3]}
    initializers = {value.name for value in model.graph.initializer}
    value = "bert.encoder.layer.1.attention.self.value"
    weights = ("lora_A.weight", "lora_B.weight", "trf_tau", "trf_C.weight", "trf_D.weight", "base_layer.bias")
    assert {f"{value}.{name}" for name in weights} <= initializers
    assert "bert.encoder.layer.1.attention.self.query_key_value.MatMul.weight" in initializers
    assert [(function.domain, function.name) for function in model.functions] == [("com.loratrf", "LoraTrf")]
    # ORT fusions are kept beside our operators, and nothing of the exporting machine's paths travels.
    kinds = {node.op_type for node in model.graph.node}
    assert {"SkipLayerNormalization", "BiasGelu", "LoraTrf"} <= kinds
    assert b"site-packages" not in exported.model.read_bytes()


def test_a_merged_lora_leaves_operators_of_onnx_and_onnx_runtime_alone(make_export: Callable) -> None:
    """No custom-op library is needed; but "pure standard ONNX" it is not."""
    model = onnx.load(make_export("bert", "text-classification", "lora", mode="merged").model, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}
    assert {node.op_type for node in model.graph.node} >= {"SkipLayerNormalization", "BiasGelu"}
    assert not model.functions


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shapes_that_are_said_are_those_that_are_inferred(make_export: Callable, family: str) -> None:
    """ONNX Runtime's quantisers and other converters begin with this, and stop where it does."""
    exported = make_export(family, CLASSIFICATION[family], "loratrf")
    onnx.shape_inference.infer_shapes(onnx.load(exported.model), check_type=True, strict_mode=True, data_prop=True)


def test_the_saved_tokenizer_feeds_the_graph(make_export: Callable) -> None:
    from transformers import AutoTokenizer

    for family in ("bert", "roberta", "deberta-v2"):
        exported = make_export(family)
        tokenizer = AutoTokenizer.from_pretrained(exported.model.parent)
        settings = json.loads((exported.model.parent / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows too
        session = create_session(exported.model)
        feeds = tokenizer(["rain fell on the harbour", "short"], padding=True, return_tensors="np")
        (logits,) = session.run(None, {name: np.asarray(value) for name, value in feeds.items()})
        assert logits.shape == (2, 3)
