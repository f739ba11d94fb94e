"""Causal language models: every family against PyTorch, what stays out of the graph, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

import tiny_llm
from loratrf_deploy import UserError, read_adapter
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.export.behind import insert
from loratrf_deploy.export.genai import check_precision
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.formats.manifest import Manifest
from loratrf_deploy.genai.generate import CONFIG_FILE, generate_tokens, load_model
from loratrf_deploy.ops.schemas import DOMAIN
from loratrf_deploy.parity import check_parity
from loratrf_deploy.pytorch.oracle import load_reference
from shared import edit_json, read_json

Make = Callable[..., tuple[Path, Path]]


def operators(model: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in ir.load(model).graph:
        if node.domain == DOMAIN:
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def prove(adapter: Path, base: Path, out: Path, **options: Any) -> Manifest:
    """Exports with the parity check, which must hold in every comparison; returns the manifest."""
    result = export_adapter(adapter, out, ExportOptions(base_model=base, **options))
    assert result.parity is not None
    assert {check.status for check in result.parity.checks} == {"passed"}
    greedy = [check for check in result.parity.checks if check.output == "64 greedy tokens"]
    without = ["no adapter"] if "swappable" in options else []
    assert [check.variant for check in greedy] == ["with library", "without library", *without]
    for check in result.parity.checks:
        if check.output == "logits" and check.variant != "base-off":
            assert check.figures is not None
            assert check.figures.relative < 1e-5, check
    return result.manifest


WAYS = [("separate", "none"), ("separate", "int4"), ("merged", "int8"), ("swappable", "none"), ("swappable", "int4")]


@pytest.mark.parametrize(("mode", "quantize"), WAYS)
@pytest.mark.parametrize("kind", ["lora", "loratrf"])
@pytest.mark.parametrize("family", tiny_llm.FAMILIES)
@pytest.mark.consumer("onnxruntime, Python", "generates")
@pytest.mark.consumer("onnxruntime with our library", "generates")
def test_every_family(family: str, kind: str, mode: str, quantize: str, make_llm: Make, tmp_path: Path) -> None:
    base, adapter = make_llm(family, kind)
    how = {"swappable": "base"} if mode == "swappable" else {"mode": mode}
    manifest = prove(adapter, base, tmp_path / "model.onnx", quantize=quantize, **how)
    layers = 2 * len(tiny_llm.targets(family))
    assert len(manifest.layers) == layers
    op = {"lora": "LowRank", "loratrf": "LoraTrf"}[kind] if mode != "merged" else "TaskFilter"
    assert operators(tmp_path / "model.onnx") == ({} if (kind, mode) == ("lora", "merged") else {op: layers})
    assert (manifest.task, manifest.quantize, manifest.device) == ("text-generation", quantize, "cpu")


@pytest.mark.parametrize(("mode", "quantize"), [("merged", "none"), ("separate", "int8"), ("merged", "int4")])
def test_the_other_ways_to_export(mode: str, quantize: str, make_llm: Make, tmp_path: Path) -> None:
    base, adapter = make_llm()
    prove(adapter, base, tmp_path / "model.onnx", mode=mode, quantize=quantize)


SWAPPED = {"swappable": "base"}
TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("sizes", "options", "mode", "quantize"),
    [
        (TIED, {"modules_to_save": ["lm_head"]}, "separate", "none"),
        (TIED, {"modules_to_save": ["embed_tokens"]}, "merged", "int4"),
        (TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}, "separate", "int8"),
        (TIED, {"target_modules": ["q_proj", "lm_head"]}, "separate", "int4"),
        (TIED, {"target_modules": ["q_proj", "lm_head"]}, "merged", "int8"),
        (TIED, {}, "separate", "int4"),
        ({}, {"filter_input": "base"}, "merged", "int4"),
        ({}, {"target_modules": ["v_proj", "down_proj"], "filter_target_modules": ["v_proj"]}, "merged", "int4"),
        (
            {},
            {"target_modules": ["up_proj"], "rank_pattern": {r".*layers\.1\..*": 7}, "use_rslora": True},
            "separate",
            "none",
        ),
        ({"attention_bias": True, "mlp_bias": True}, {"bias": "lora_only"}, "separate", "none"),
        ({"attention_bias": True, "mlp_bias": True}, {"bias": "all"}, "merged", "int8"),
    ],
)
def test_what_adapters_bring(
    sizes: dict, options: dict, mode: str, quantize: str, make_llm: Make, tmp_path: Path
) -> None:
    base, adapter = make_llm("llama", "loratrf", sizes, **options)
    prove(adapter, base, tmp_path / "model.onnx", mode=mode, quantize=quantize)


@pytest.mark.parametrize(
    ("how", "quantize"),
    [({"mode": "merged"}, "int4"), ({"mode": "separate"}, "int8"), ({"mode": "separate"}, "none"), (SWAPPED, "int4")],
)
def test_dora(how: dict, quantize: str, make_llm: Make, tmp_path: Path) -> None:
    """Layers with a bias and without; the gains are those of the base's own weights, also where these are quantised."""
    base, adapter = make_llm("llama", "lora", {"attention_bias": True}, use_dora=True)
    prove(adapter, base, tmp_path / "model.onnx", quantize=quantize, **how)
    if how == SWAPPED:
        other = make_llm("llama", "lora", {"attention_bias": True}, use_dora=True, r=2, seed=4)[1]
        file = tmp_path / "other.onnx_adapter"
        report = convert_adapter(other, tmp_path / "model.onnx", file, base_model=base, check=True).parity
        assert report is not None
        assert report.passed


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_dora_of_a_head_leaves_alone_the_embedding_that_is_tied_to_it(make_llm: Make, tmp_path: Path) -> None:
    base, adapter = make_llm("llama", "lora", TIED, target_modules=["q_proj", "lm_head"], use_dora=True)
    prove(adapter, base, tmp_path / "model.onnx", mode="merged", quantize="int4")


ONLY_MERGED = {
    "DoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "PiSSA on the head": {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"},
    "embedding and head, tied": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 2, 7]}},
}
TALK = pytest.mark.filterwarnings("ignore:(PiSSA|Setting `save_embedding|You have requested)")


@TALK
@pytest.mark.parametrize("quantize", ["none", "int4"])
@pytest.mark.parametrize("what", ONLY_MERGED)
def test_a_merge_through_peft_leaves_alone_what_is_tied(
    what: str, quantize: str, make_llm: Make, tmp_path: Path
) -> None:
    base, adapter = make_llm("llama", "lora", TIED, **ONLY_MERGED[what])
    assert read_adapter(adapter).not_separable is not None
    prove(adapter, base, tmp_path / "model.onnx", quantize=quantize)
    if what == "tokens":  # the same ones in embedding and head, which stay one weight
        plain = make_llm("llama", "lora", TIED, target_modules=["q_proj"])[1]
        prove(plain, base, tmp_path / "plain" / "model.onnx", quantize=quantize)
        sizes = [(tmp_path / folder / "model.onnx.data").stat().st_size for folder in ("", "plain")]
        assert sizes[0] == sizes[1]


@TALK
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("family", "targets", "quantize", "how"),
    [
        ("llama", ["q_proj", "embed_tokens"], "int4", {"mode": "merged"}),
        ("llama", ["embed_tokens", "lm_head"], "int4", {"mode": "separate"}),
        ("llama", ["q_proj", "embed_tokens"], "none", SWAPPED),
        # Its rows are multiplied by the root of the width, behind the operator.
        pytest.param("gemma2", ["q_proj", "embed_tokens"], "int4", SWAPPED, marks=pytest.mark.slow),
    ],
)
def test_an_adapted_table_leaves_alone_the_head_that_is_tied_to_it(
    family: str, targets: list[str], quantize: str, how: dict, make_llm: Make, tmp_path: Path
) -> None:
    """The base stays one weight for both where nothing is merged, whatever copies PEFT saved beside the adapter."""
    base, adapter = make_llm(family, "lora", TIED, target_modules=targets)
    prove(adapter, base, tmp_path / "model.onnx", quantize=quantize, **how)
    names = ir.load(tmp_path / "model.onnx").graph.initializers
    assert ("model.embed_tokens.lora_embedding_A" in names) == (how != {"mode": "merged"})
    if how == SWAPPED:
        other = make_llm(family, "lora", TIED, target_modules=targets, r=2, seed=4)[1]
        file = tmp_path / "other.onnx_adapter"
        converted = convert_adapter(other, tmp_path / "model.onnx", file, base_model=base, check=True)
        options = ExportOptions(base_model=base, quantize=quantize)
        rows = export_grouped({"a": adapter, "b": other}, tmp_path / "rows" / "model.onnx", options)
        for report in (converted.parity, rows.parity):
            assert report is not None
            assert report.passed


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_parity_notices_an_adapted_head_in_the_quantised_embedding(
    make_llm: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GenAI's builder keeps one quantised weight for both where they are tied."""
    from loratrf_deploy.export import single

    base, adapter = make_llm("llama", "lora", TIED, **ONLY_MERGED["PiSSA on the head"])
    monkeypatch.setattr(single, "untie_adapted", lambda model: None)
    export_adapter(adapter, tmp_path / "model.onnx", ExportOptions(base_model=base, quantize="int4", check=False))
    report = check_parity(tmp_path / "model.onnx", adapter, base)
    (failed,) = [check for check in report.checks if check.status == "failed"]
    assert failed.variant == "quantised"
    assert "the embedding" in failed.reason


def test_a_bfloat16_base_with_a_rope_of_its_own(make_llm: Make, tmp_path: Path) -> None:
    """LLaMA-3's scaled rotation, and a checkpoint in half precision: merged in float32, not rounded again."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    original, adapter = make_llm("llama", "loratrf", {"rope_parameters": rope})
    base = tmp_path / "base"
    shutil.copytree(original, base)
    transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).save_pretrained(base)
    prove(adapter, base, tmp_path / "model.onnx")


def test_adapters_stay_in_full_precision(make_llm: Make, exported: Callable[..., Path]) -> None:
    _, adapter = make_llm()
    layers = read_adapter(adapter).layers
    weights = ir.load(exported(mode="separate", quantize="int4")).graph.initializers
    for path, layer in layers.items():
        assert layer.tau is not None
        np.testing.assert_array_equal(weights[f"{path}.lora_B.weight"].const_value.numpy(), layer.scaled_B())
        np.testing.assert_array_equal(weights[f"{path}.trf_tau"].const_value.numpy(), layer.tau)
    assert weights["model.layers.0.mlp.up_proj.MatMul.weight_Q4"].const_value.dtype == ir.DataType.UINT8


@pytest.mark.parametrize("bundled", [True, False])
@pytest.mark.consumer("onnxruntime-genai", "merged, separate", "generates")
def test_the_folder_generates_what_pytorch_generates(
    bundled: bool, make_llm: Make, exported: Callable[..., Path]
) -> None:
    """Held against transformers' own generate(), not against the parity check."""
    base, adapter = make_llm()
    folder = exported(mode="separate", bundle_library=bundled).parent
    options = read_json(folder / CONFIG_FILE)["model"]["decoder"]["session_options"]
    assert options.get("custom_ops_library") == ("libloratrf_ort.so" if bundled else None)
    prompt = list(range(5, 17))
    tokens = list(generate_tokens(load_model(folder), prompt, 40, stop=False))
    reference = load_reference(read_adapter(adapter), base).model
    expected = reference.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=40, min_new_tokens=40, do_sample=False
    )
    assert tokens == expected[0, len(prompt) :].tolist()


def test_the_graph_is_a_valid_model(exported: Callable[..., Path]) -> None:
    model = onnx.load(exported(mode="separate"), load_external_data=False)
    assert {function.name for function in model.functions} == {"LoraTrf"}
    assert {entry.domain: entry.version for entry in model.opset_import}[DOMAIN] == 1
    named = {entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == "module"}
    assert "model.layers.1.mlp.down_proj" in named
    assert "lm_head" in named


# What the parity check must notice.


def broken(model: Path, folder: Path, change: Callable[[ir.Model], None]) -> Path:
    """A copy of the export with a change in its graph."""
    shutil.copytree(model.parent, folder)
    graph = ir.load(folder / model.name)
    change(graph)
    ir.save(graph, folder / model.name)
    return folder / model.name


def scale(name: str, factor: float) -> Callable[[ir.Model], None]:
    def change(graph: ir.Model) -> None:
        value = graph.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name=name)

    return change


def test_parity_names_the_layer_that_drifts(make_llm: Make, exported: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = make_llm()
    damage = scale("model.layers.1.self_attn.v_proj.lora_B.weight", 1.01)
    report = check_parity(broken(exported(mode="separate", quantize="int4"), tmp_path / "b", damage), adapter, base)
    assert not report.passed
    assert report.first_drift is not None
    assert report.first_drift.module == "model.layers.1.self_attn.v_proj"


def test_parity_notices_other_tokens(make_llm: Make, exported: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = make_llm()
    damage = scale("lm_head.MatMul.weight", -1.0)
    report = check_parity(broken(exported(mode="separate"), tmp_path / "b", damage), adapter, base)
    greedy = [check for check in report.checks if "greedy" in check.output]
    assert [check.status for check in greedy] == ["failed", "failed"]
    assert "PyTorch takes" in greedy[0].reason


def test_parity_notices_quantised_weights_without_the_adapter(make_llm: Make, tmp_path: Path) -> None:
    """A merged adapter of a 100th of a rounding step: only all weights together tell that it is missing."""
    base, full = make_llm("llama", "lora")
    adapter = tmp_path / "small"
    shutil.copytree(full, adapter)
    edit_json(adapter / "adapter_config.json", lora_alpha=8 / 100)
    good = export_adapter(
        adapter, tmp_path / "good" / "model.onnx", ExportOptions(base_model=base, quantize="int4")
    ).parity
    assert good is not None
    assert good.passed
    # The same folder with the bare base's weights in it.
    nothing = tmp_path / "nothing"
    shutil.copytree(adapter, nothing)
    edit_json(nothing / "adapter_config.json", lora_alpha=1e-6)
    export_adapter(
        nothing, tmp_path / "bare" / "model.onnx", ExportOptions(base_model=base, quantize="int4", check=False)
    )
    report = check_parity(tmp_path / "bare" / "model.onnx", adapter, base)
    failed = [check for check in report.checks if check.status == "failed"]
    assert [check.variant for check in failed] == ["quantised"]
    size = re.search(r"merged adapter is in them at (\S+)", failed[0].reason)
    assert size is not None
    assert abs(float(size[1])) < 0.4
    assert "expected 1" not in failed[0].reason


# What is refused.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dtype", "float16"), "--quantize int4 --dtype float32"),
        (("--device", "cuda", "--quantize", "int8"), "--quantize int8 --dtype float16"),
        (("--opset", "20"), "Leave it out"),
        (("--dtype", "bfloat16", "--device", "cuda"), "--no-check"),
        # Without GroupQueryAttention, which CUDA has in half precision alone, q, k and v go into the attention node.
        (("--device", "cuda", "--mode", "separate"), "model.layers.0.self_attn.q_proj"),
    ],
)
def test_options_that_do_not_go_together(options, expected, refused, make_llm, tmp_path) -> None:
    base, adapter = make_llm()
    assert expected in refused(tmp_path / "model.onnx", "--adapter", adapter, "--base-model", base, *options)


@pytest.mark.parametrize(
    "options",
    [("--quantize", "int4"), ("--bundle-library",)],
)
def test_options_of_language_models_on_an_encoder(options, refused, make_tiny, tmp_path) -> None:
    base, adapter = make_tiny()
    assert "causal language models" in refused(
        tmp_path / "model.onnx", "--adapter", adapter, "--base-model", base, *options
    )


def test_an_adapter_of_another_vocabulary(refused, make_llm, tmp_path) -> None:
    _, adapter = make_llm("llama", "lora", {"vocab_size": 320}, modules_to_save=["lm_head"])
    base, _ = make_llm("llama", "lora")
    message = refused(tmp_path / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert "brings 320 rows of embeddings, where the base model has 301, but not those of model.embed_tokens" in message


def test_a_tokenizer_of_another_vocabulary(refused, make_llm, tmp_path) -> None:
    base, original = make_llm("llama", "lora")
    adapter = tmp_path / "adapter"
    shutil.copytree(original, adapter)
    tokenizer = tiny_llm.make_tokenizer()
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(40)])
    tokenizer.save_pretrained(adapter)
    message = refused(tmp_path / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert "328 tokens" in message
    assert "301" in message


def test_no_tokenizer(refused, make_llm, tmp_path) -> None:
    original, adapter = make_llm("llama", "lora")
    base = tmp_path / "base"
    shutil.copytree(original, base, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer" in refused(tmp_path / "model.onnx", "--adapter", adapter, "--base-model", base)


def test_a_module_that_the_builder_fused_away_is_named_and_nothing_changed(exported) -> None:
    model = ir.load(exported("lora", mode="merged"))
    nodes = len(list(model.graph))
    weights = {"A": np.ones((2, 64), np.float32), "B": np.ones((64, 2), np.float32)}
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj"):  # q, k and v are packed here
        insert(model, {"model.layers.1.self_attn.q_proj": weights}, "adapted", "float32")
    wrong = {"A": np.ones((2, 64), np.float32), "B": np.ones((63, 2), np.float32)}
    with pytest.raises(UserError, match="o_proj"):
        insert(
            model,
            {"model.layers.0.mlp.down_proj": {"A": np.ones((2, 96), np.float32), "B": np.ones((64, 2), np.float32)}}
            | {"model.layers.0.self_attn.o_proj": wrong},
            "adapted",
            "float32",
        )
    assert len(list(model.graph)) == nodes


def test_every_offered_precision_is_one_that_the_builder_takes() -> None:
    assert check_precision("cuda", "int4", "bfloat16") == "int4"
    with pytest.raises(UserError, match="--device tpu"):
        check_precision("tpu", "none", "float32")
