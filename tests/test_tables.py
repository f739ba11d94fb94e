"""LoRA on embedding tables, y = E[ids] + s·(A[:, ids])ᵀBᵀ: kept separate, swapped, by row, merged, in encoders."""

from __future__ import annotations

import json
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
from onnx.reference import ReferenceEvaluator

import tiny
from loratrf_deploy import AdapterSession, UserError, create_session, read_adapter
from loratrf_deploy.cli.inspect import main as inspect_main
from loratrf_deploy.export import ExportOptions, convert_adapter, export_adapter, export_grouped
from loratrf_deploy.formats.adapter_file import read_adapter_file
from loratrf_deploy.ops import schemas
from loratrf_deploy.parity import check_parity
from loratrf_deploy.parity.result import ParityReport
from loratrf_deploy.pytorch.base import load_base, sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference
from operators import OPSET, session_of
from shared import edit_json, edit_tensors, read_json
from tolerances import assert_close

TABLE = "embeddings.word_embeddings"
QUERY = "encoder.layer.0.attention.self.query"
LAYERS = {"target_modules": ["query", "word_embeddings"]}
EMBEDS = ("bert", "feature-extraction", "lora")


def function(op: str, dtype: str) -> bytes:
    """A model of one node of `op`, every input of any shape."""
    kinds = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
    inputs = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64 if "ids" in name else kinds[dtype]))
        for name in schemas.FUNCTIONS[op].inputs
    ]
    node = ir.node(op, inputs, domain=schemas.DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(kinds[dtype])
    imports = {"": OPSET, schemas.DOMAIN: schemas.VERSION}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=imports, name="test")
    model = ir.Model(graph, ir_version=10, functions=[schemas.function_body(op, OPSET)])
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (4, 0), (0, 3), (3, 2, 5)])
def test_the_functions_look_up_what_they_say(shape: tuple[int, ...], dtype: str) -> None:
    rng, V, N, R, S = np.random.default_rng(0), 19, 11, 3, 4
    base, A, B = (rng.normal(size=size).astype(dtype) for size in ((*shape, N), (S, R, V), (S, N, R)))
    ids = rng.integers(0, V, shape)
    slots = np.resize([2, -1, 0, 3, 2], shape[0]).astype(np.int64)
    wide = base.astype(np.float64)
    plain = wide + np.einsum("r...,nr->...n", A[1].astype(np.float64)[:, ids], B[1].astype(np.float64))
    grouped = wide.copy()
    for row, slot in enumerate(slots):
        if slot >= 0:
            grouped[row] += np.einsum("r...,nr->...n", A[slot].astype(np.float64)[:, ids[row]], B[slot].astype(float))
    for op, expected, feeds in (
        ("LowRankEmbedding", plain, {"A": A[1], "B": B[1]}),
        ("GroupedLowRankEmbedding", grouped, {"A": A, "B": B, "adapter_ids": slots}),
    ):
        model, feeds = function(op, dtype), {"base": base, "ids": ids, **feeds}
        runs = [session_of(model, library).run(None, feeds) for library in (True, False)]
        if 0 not in shape:  # the evaluator reshapes nothing by -1
            runs.append(ReferenceEvaluator(onnx.load_from_string(model)).run(None, feeds))
        for (actual,) in runs:
            assert_close(actual, expected, dtype, op)


def test_a_slot_that_is_not_there_is_an_error() -> None:
    sizes = {"base": (2, 3, 5), "A": (4, 2, 9), "B": (4, 5, 2)}
    feeds = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    feeds["ids"] = np.zeros((2, 3), np.int64)
    session = session_of(function("GroupedLowRankEmbedding", "float32"))
    for wrong in (4, -2, 2**40):
        with pytest.raises(Exception, match="out of data bounds"):
            session.run(None, feeds | {"adapter_ids": np.array([0, wrong])})


def torch_output(adapter: Path, base: Path, inputs: dict[str, Any], dtype: str = "float32") -> np.ndarray:
    """PEFT's first output."""
    model = load_reference(read_adapter(adapter), base, dtype=dtype).model.get_base_model()
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in inputs.items()})[0].numpy()


def bare(adapter: Path, base: Path, inputs: dict[str, Any], dtype: str = "float32") -> np.ndarray:
    """The same of the base that is the adapter's."""
    model = load_base(read_adapter(adapter), base, dtype="float32").model.to(getattr(torch, dtype)).float()
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in inputs.items()})[0].numpy()


def assert_equal(actual: np.ndarray, expected: np.ndarray, limit: float = 1e-5) -> None:
    error = np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max()
    assert error <= limit, f"{error:.2e}"


@pytest.fixture
def swappable(make_export: Callable[..., Any]) -> Any:
    return make_export(*EMBEDS, swappable="base", **LAYERS)


def test_a_required_table_alone_is_proven(make_export: Callable[..., Any]) -> None:
    base, adapter, model = make_export(*EMBEDS, swappable="required", target_modules=["word_embeddings"])
    taken = {value.name for value in create_session(model).get_inputs()}
    assert taken > {f"{TABLE}.lora_embedding_A", f"{TABLE}.lora_embedding_B"}
    report = check_parity(model, adapter, base)
    assert report.passed, report
    assert {check.variant for check in report.checks} == {"with library", "without library", "base-off"}


def test_swapped_scaled_and_blended(swappable: Any, make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    base, first, model = swappable
    second = make_tiny(*EMBEDS, seed=5, r=7, lora_alpha=3, target_modules=["word_embeddings"])[1]
    files = {"first": model.with_name("lora.onnx_adapter"), "second": tmp_path / "second.onnx_adapter"}
    converted = convert_adapter(second, model, files["second"], base_model=base, check=True)
    assert converted.parity is not None
    assert converted.parity.passed
    assert {f"{TABLE}.lora_embedding_A", f"{TABLE}.lora_embedding_B"} < read_adapter_file(files["second"]).values.keys()
    inputs = sample_inputs(load_base(read_adapter(first), base), batch=3, sequence=13, seed=0)
    for library in (True, False):
        session = AdapterSession(model, library=library)
        for name, file in files.items():
            session.load(name, file)
        for name, folder in (("first", first), ("second", second)):
            hidden = session.run(inputs, adapter=name)["last_hidden_state"]
            assert_equal(hidden, torch_output(folder, base, inputs))
        assert_equal(session.run(inputs, adapter=None)["last_hidden_state"], bare(first, base, inputs))
        peft = load_reference(read_adapter(first), base).model
        peft.load_adapter(str(second), "second")
        parts = {"default": 0.7, "second": -0.4}
        peft.add_weighted_adapter(list(parts), [*parts.values()], "blend", combination_type="cat")
        peft.set_adapter("blend")
        blended = session.run(inputs, adapter={"first": 0.7, "second": -0.4})["last_hidden_state"]
        with torch.no_grad():
            expected = peft.get_base_model()(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        assert_equal(blended, expected.last_hidden_state.numpy())


def test_what_the_files_say_of_it(swappable: Any, capsys: pytest.CaptureFixture) -> None:
    _, adapter, model = swappable
    graph = onnx.load(model, load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
    }
    assert shapes[f"{TABLE}.lora_embedding_A"] == [f"{TABLE}.R", 160]
    assert shapes[f"{TABLE}.lora_embedding_B"] == [32, f"{TABLE}.R"]
    rows = {row["module"]: row for row in read_json(model.parent / "loratrf.json")["layers"]}
    assert rows[TABLE] | {"filter_rank": 0} == {
        **{"module": TABLE, "op": "LowRankEmbedding", "rank": 4, "filter_rank": 0},
        **{"in_features": 160, "out_features": 32},
    }
    for path, words in ((adapter, "160 -> 32"), (model, "LowRankEmbedding"), (model.parent / "lora.onnx_adapter", "4")):
        capsys.readouterr()
        assert inspect_main([str(path)]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if TABLE in line]
        assert words in line


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_the_head_that_is_tied_to_the_table_stays_the_bases(mode: str, tmp_path: Path) -> None:
    """BERT's masked language model: PEFT's forward adapts the table alone; its own merge would reach the head too."""
    tokenizer = tiny.make_tokenizer("bert")
    sizes = tiny.SIZES | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    tiny.randomise(model, 0)
    base = tmp_path / "base"
    for part in (model, tokenizer):
        part.save_pretrained(base)
    adapter = tiny.save_adapter(model, tmp_path / "adapter", "lora", 1, 3, {"r": 4} | LAYERS)
    result = export_adapter(adapter, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base, mode=mode))
    assert result.parity is not None
    assert result.parity.passed
    inputs = sample_inputs(load_base(read_adapter(adapter), base), batch=2, sequence=9, seed=0)
    assert_equal(create_session(result.model).run(["logits"], inputs)[0], torch_output(adapter, base, inputs))


def test_each_row_has_its_own_in_float16(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Beside a LoRATRF adapter that leaves the table alone."""
    base, table = make_tiny("distilbert", kind="lora", target_modules=["q_lin", "word_embeddings"])
    adapters = {
        "table": table,
        "alone": make_tiny("distilbert", kind="lora", seed=6, r=9, target_modules=["word_embeddings"])[1],
        "none": make_tiny("distilbert", kind="loratrf", seed=7)[1],
    }
    options = ExportOptions(base_model=base, dtype="float16", check=False)
    model = export_grouped(adapters, tmp_path / "model.onnx", options).model
    rows = ["alone", None, "table", "none", "table", "alone"]
    inputs = sample_inputs(load_base(read_adapter(table), base), batch=len(rows), sequence=11, seed=0)
    wanted = {name: torch_output(folder, base, inputs, "float16") for name, folder in adapters.items()}
    wanted |= {None: bare(table, base, inputs, "float16")}
    ids = np.array([-1 if name is None else list(adapters).index(name) for name in rows])
    for library in (True, False):
        (logits,) = create_session(model, library=library).run(None, inputs | {"adapter_ids": ids})
        for row, name in enumerate(rows):
            assert_equal(logits[row], wanted[name][row], 2e-3)


DECODERS = {
    "eurobert": ("EuroBert", {"bos_token_id": 2, "eos_token_id": 3, "mask_token_id": 4}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, "use_bidirectional_attention": True}),  # multiplies its rows by √width
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    "family", ["eurobert", *(pytest.param(family, marks=pytest.mark.slow) for family in ("qwen3", "gemma3"))]
)
def test_the_copy_that_peft_saves_of_embed_tokens_is_the_bases(family: str, tmp_path: Path) -> None:
    """Task adapters of an embedding model: with `embed_tokens` targeted, PEFT saves the frozen table beside them."""
    name, more = DECODERS[family]
    tokenizer = tiny.make_tokenizer("bert")
    sizes = tiny.SIZES | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 66} | more
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    tiny.randomise(model, 0)
    base = tmp_path / "base"
    for part in (model, tokenizer):
        part.save_pretrained(base)
    adapters = {}
    for seed, task in enumerate(("retrieval", "matching"), start=1):
        config = {"r": 2 + seed, "target_modules": ["q_proj", "embed_tokens"], "task_type": "FEATURE_EXTRACTION"}
        config["base_model_name_or_path"] = str(base)
        fresh = type(model).from_pretrained(base)
        adapters[task] = tiny.save_adapter(fresh, tmp_path / task, "lora", seed, 3, config)
    assert read_adapter(adapters["matching"]).copies == ["embed_tokens"]
    options = ExportOptions(base_model=base, pooling="mean")
    reports: list[ParityReport | None] = [export_grouped(adapters, tmp_path / "by row" / "model.onnx", options).parity]
    swaps = ExportOptions(base_model=base, pooling="mean", swappable="base")
    swapped = export_adapter(adapters["retrieval"], tmp_path / "swaps" / "model.onnx", swaps)
    onto = tmp_path / "matching.onnx_adapter"
    reports += [swapped.parity, convert_adapter(adapters["matching"], swapped.model, onto, check=True).parity]
    for report in reports:
        assert report is not None
        assert report.passed
    assert not any("embed_tokens.base_layer" in name for name in read_adapter_file(onto).values)

    # A table that was trained along is no copy: the model has no place for it.
    def trained(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: value * (1.01 if "base_layer" in name else 1) for name, value in tensors.items()}

    edit_tensors(adapters["matching"] / "adapter_model.safetensors", trained)
    with pytest.raises(UserError, match=r"the model takes no embed_tokens\.weight"):
        convert_adapter(adapters["matching"], swapped.model, tmp_path / "other.onnx_adapter")


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any], str]] = {
    "rows beyond the vocabulary": (
        lambda tensors: {
            name: np.concatenate([value, value[:, :1]], 1) if name.endswith("embedding_A") else value
            for name, value in tensors.items()
        },
        {},
        f"{TABLE} maps 160 -> 32 features in the base model, 161 -> 32 in the adapter",
    ),
    "a linear layer as a table": (
        lambda tensors: {
            name.replace("query.lora_", "query.lora_embedding_").removesuffix(".weight")
            if "query.lora_" in name
            else name: value
            for name, value in tensors.items()
        },
        {},
        f"{QUERY} is no embedding table in the base model, an embedding table in the adapter",
    ),
    "a table as a linear layer": (
        lambda tensors: {
            f"base_model.model.{TABLE}.lora_{name[-1]}.weight" if "lora_embedding" in name else name: value
            for name, value in tensors.items()
        },
        {},
        f"{TABLE} is an embedding table in the base model, none in the adapter",
    ),
    "both": (
        lambda tensors: tensors | {f"base_model.model.{TABLE}.lora_A.weight": np.ones((4, 32), np.float32)},
        {},
        f"layer {TABLE}: it has weights of an embedding table and of a linear layer",
    ),
    "half": (
        lambda tensors: {name: value for name, value in tensors.items() if not name.endswith("embedding_B")},
        {},
        f"layer {TABLE}: its low-rank half is incomplete: B missing",
    ),
    "LoRATRF": (
        lambda tensors: tensors,
        {"peft_type": "LORATRF", "filter_rank": 2, "filter_gamma": 1.0, "filter_input": "adapted"},
        f"layer {TABLE}: an embedding table has lora_embedding_A and lora_embedding_B alone",
    ),
    "other layers": (lambda tensors: tensors, {"target_modules": ["query"]}, "which target_modules leaves out"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_strangers_file_is_refused_by_name(
    damage: str, make_tiny: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    base, original = make_tiny(*EMBEDS, **LAYERS)
    edit, config, words = DAMAGE[damage]
    adapter = Path(shutil.copytree(original, tmp_path / "adapter"))
    edit_tensors(adapter / "adapter_model.safetensors", edit)
    edit_json(adapter / "adapter_config.json", **config)
    for more in (["--adapter", adapter], ["--adapters", f"good={original}", f"bad={adapter}"]):
        command = [*more, "--base-model", base, "--no-check"]
        command += ["--mode", "separate"] if "--adapter" in more else []
        assert words in refused(tmp_path / "out" / "model.onnx", *command)


def test_onto_holds_tables_against_tables(
    swappable: Any, make_tiny: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    base, original, model = swappable
    adapter = Path(shutil.copytree(original, tmp_path / "adapter"))
    edit_tensors(adapter / "adapter_model.safetensors", DAMAGE["a table as a linear layer"][0])
    command = ["--adapter", adapter, "--onto", model, "--base-model", base]
    message = refused(tmp_path / "out" / "x.onnx_adapter", *command)
    assert f"{TABLE} is an embedding table in the model, a linear layer in the adapter" in message
    plain = make_tiny(*EMBEDS, target_modules=["query", "value", "word_embeddings"])[1]
    message = refused(tmp_path / "out" / "x.onnx_adapter", "--adapter", plain, *command[2:])
    assert "the model takes no low-rank half at encoder.layer.0.attention.self.value" in message


def test_dora_of_a_table_only_merges(
    make_tiny: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    base, adapter = make_tiny(*EMBEDS, use_dora=True, **LAYERS)
    command = ["--adapter", adapter, "--base-model", base]
    message = refused(tmp_path / "out" / "model.onnx", *command, "--mode", "separate")
    assert "can't be kept separate: DoRA of an embedding table" in message
    assert "Export it merged: --mode merged." in message
    result = export_adapter(adapter, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base))
    assert result.parity is not None
    assert result.parity.passed
    assert json.loads((tmp_path / "out" / "loratrf.json").read_text())["mode"] == "merged"
