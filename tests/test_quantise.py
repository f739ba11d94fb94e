"""Encoders in int8: the arithmetic against numpy's and a fake-quantised PyTorch model, what stays float, the proof."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession

import tiny
from loratrf_deploy import UserError, create_session, read_adapter
from loratrf_deploy.cli.export import main as export_main
from loratrf_deploy.cli.parity import main as parity_main
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.export.quantise import quantise
from loratrf_deploy.parity import check_parity
from loratrf_deploy.parity.quantised import WEIGHTS_OF
from loratrf_deploy.parity.result import QUANTISED
from loratrf_deploy.pytorch.base import sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference, plain_name

# One small graph.

K, N, V = 37, 19, 23


def small_model(seed: int = 0) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """ids -> embedding (V,K) -> MatMul (K,N) and, of the same input, Gemm (N,K) with a bias -> sum; and its weights."""
    rng = np.random.default_rng(seed)
    weights = {
        "table": rng.normal(size=(V, K)) * np.geomspace(1e-3, 1e3, V)[:, None],
        "first": rng.normal(size=(K, N)) * np.geomspace(1e-2, 1e2, N),
        "second": rng.normal(size=(N, K)),
        "bias": rng.normal(size=N),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    weights["table"][3] = weights["first"][:, 5] = weights["second"][7] = 0
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    small (int64[batch,sequence] ids,
           float[{V},{K}] table, float[{K},{N}] first, float[{N},{K}] second, float[{N}] bias)
        => (float[rows,{N}] y)
    {{
        x3 = Gather(table, ids)
        shape = Constant<value_ints = [-1, {K}]>()
        x = Reshape(x3, shape)
        a = MatMul(x, first)
        b = Gemm<transB = 1>(x, second, bias)
        y = Add(a, b)
    }}"""
    model = ir.from_onnx_text(text)
    for value in model.graph.inputs[1:]:
        value.const_value = ir.Tensor(weights[str(value.name)], name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    for node, module in zip([node for node in model.graph if node.op_type in MODULES], MODULES.values(), strict=True):
        node.name, node.metadata_props["module"] = f"{module}/{node.op_type}", module
    return model, weights


MODULES = {"Gather": "embedding", "MatMul": "first", "Gemm": "second"}


def expected(weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The formula, in float32 where the graph rounds and in float64 where it sums."""

    def quantised(value: np.ndarray, axis: int, largest: int) -> tuple[np.ndarray, np.ndarray]:
        scale = np.abs(value).max(axis, keepdims=True) / np.float32(largest)
        return np.round(value / np.where(scale == 0, 1, scale)), scale

    q, scale = quantised(weights["table"], 1, 127)
    x = (q * scale)[ids.ravel()].astype(np.float32)
    s = np.abs(x).max(1, keepdims=True) * np.float32(1 / 127)
    tokens = np.round(x / np.where(s == 0, 1, s)).astype(np.float64)
    y = weights["bias"].astype(np.float64)
    for w in (weights["first"], weights["second"].T):
        q, scale = quantised(w, 0, 64)
        y = y + tokens @ q * s * scale
    return y


def test_the_formula_on_awkward_sizes() -> None:
    model, weights = small_model()
    quantise(model)
    proto = ir.to_proto(model)
    for rows, columns in ((1, 1), (1, 7), (3, 5), (2, 64)):
        ids = np.random.default_rng(rows).integers(0, V, (rows, columns))
        ids.flat[0] = 3  # a token of nothing but zeros
        wanted = expected(weights, ids)
        for run in (ReferenceEvaluator(proto).run, InferenceSession(proto.SerializeToString()).run):
            actual = run(None, {"ids": ids})[0]
            assert np.abs(actual - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_what_two_layers_read_is_quantised_once_and_every_byte_of_a_weight_is_one() -> None:
    model, _ = small_model()
    quantise(model)
    types = [node.op_type for node in model.graph]
    assert types.count("QuantizeLinear") == 1
    assert types.count("MatMulInteger") == 2
    assert not {"MatMul", "Gemm"} & set(types)
    stored = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    assert not {"table", "first", "second"} & set(stored)
    assert {name for name, value in stored.items() if value.dtype == np.int8} == {
        "table.int8",
        "first.int8",
        "second.int8",
    }
    assert np.abs(stored["first.int8"]).max() == 64  # two products of them and of tokens fit 16 bits


@pytest.mark.parametrize("what", ["input", "saved", "pattern", "narrow", "other layer's head"])
def test_what_stays_float(what: str) -> None:
    model, _ = small_model()
    kept, patterns = [], []
    if what == "input":
        model.graph.inputs.append(model.graph.initializers["second"])
    elif what == "saved":
        kept = ["second"]
    elif what == "pattern":
        patterns = ["*con*"]
    elif what == "narrow":
        narrow = np.ones((N, 15), np.float32)
        model.graph.initializers["second"].const_value = ir.Tensor(narrow, name="second")
    else:
        kept = ["sec"]  # a module's whole name, not the beginning of one
    quantise(model, kept, patterns)
    left = "Gemm" in [node.op_type for node in model.graph]
    assert left == (what != "other layer's head")
    assert ("second" in model.graph.initializers) == left


def test_nothing_to_quantise() -> None:
    model, _ = small_model()
    with pytest.raises(UserError, match=r"finds nothing to quantise.*16 x 16"):
        quantise(model, list(MODULES.values()))


def test_a_pattern_that_matches_nothing() -> None:
    model, _ = small_model()
    found = r"--keep-float \*\.third matches no layer.*The layers: embedding, first, second"
    with pytest.raises(UserError, match=found):
        quantise(model, [], ["*.third"])


# Whole exports.


def int8(make_tiny: Callable, folder: Path, *which: str, check: bool = False, **how: object):
    options = {name: how.pop(name) for name in ("mode", "swappable") if name in how}
    base, adapter = make_tiny(*which, **how)
    out = folder / "model.onnx"
    result = export_adapter(adapter, out, ExportOptions(base_model=base, quantize="int8", check=check, **options))
    return base, adapter, out, result


def fake_quantised(model: torch.nn.Module, graph: ir.Model) -> None:
    """Linear layers and embeddings of `model` compute as the formula says, where the graph's metadata says so."""
    chosen = {name for node in graph.graph for name in node.metadata_props.get(WEIGHTS_OF, "").split(",")}
    for name, module in model.named_modules():
        path = plain_name(name).removesuffix(".base_layer")
        if path not in chosen or not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        largest = 64 if isinstance(module, torch.nn.Linear) else 127
        scale = module.weight.detach().abs().amax(1, keepdim=True) / largest
        module.weight.data = torch.round(module.weight.detach() / scale) * scale
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0]),))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    s = x.abs().amax(-1, keepdim=True).clamp(min=1e-37) / 127
    return torch.round(x / s) * s


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.consumer("onnxruntime, Python", "int8")
@pytest.mark.consumer("onnxruntime with our library", "int8")
def test_families_compute_what_the_formula_says(family: str, make_tiny: Callable, tmp_path: Path) -> None:
    """Through a PyTorch model that rounds as the graph does, and by the export's own proof."""
    task = "image-classification" if family == "vit" else "text-classification"
    mode, kind = ("merged", "lora") if family in ("roberta", "vit", "modernbert") else ("separate", "loratrf")
    base, adapter, out, result = int8(make_tiny, tmp_path, family, task, kind, mode=mode, check=True)
    assert result.parity is not None
    assert {check.output for check in result.parity.checks if check.variant == QUANTISED} == {
        "weights",
        "products",
        "logits",
    }
    reference = load_reference(read_adapter(adapter), base, dtype="float32", merge=mode == "merged")
    model = reference.model.get_base_model()
    if mode == "merged":
        reference.model.merge_adapter()
    fake_quantised(model, ir.load(out))
    for library in (True, False):
        session = create_session(out, library=library)
        for seed, (batch, sequence) in enumerate([(1, 1), (3, 7), (2, 33)]):
            inputs = sample_inputs(reference, batch=batch, sequence=sequence, seed=seed)
            with torch.no_grad():
                wanted = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()
            actual = session.run(["logits"], inputs)[0]
            # A value between two steps may go to either, as float32 rounds; a step is 1/127 of a token.
            assert np.abs(actual - wanted).max() <= 4e-3 * np.abs(wanted).max()


def test_a_row_is_what_it_is_alone(make_tiny: Callable, tmp_path: Path) -> None:
    base, adapter, out, _ = int8(make_tiny, tmp_path, "bert")
    reference = load_reference(read_adapter(adapter), base, dtype="float32")
    inputs = sample_inputs(reference, batch=5, sequence=9, seed=0)
    session = create_session(out)
    together = session.run(None, inputs)[0]
    for row in range(5):
        alone = session.run(None, {name: value[row : row + 1] for name, value in inputs.items()})[0]
        assert np.abs(alone[0] - together[row]).max() <= 1e-6 * np.abs(together).max()


def test_weights_that_come_at_run_time_stay_inputs_in_full_precision(make_tiny: Callable, tmp_path: Path) -> None:
    *_, out, result = int8(make_tiny, tmp_path, "bert", swappable="base", check=True)
    manifest = result.manifest
    assert manifest.quantize == "int8"
    assert manifest.swappable is not None
    graph = ir.load(out).graph
    inputs = {value.name: value.dtype for value in graph.inputs}
    assert {weight.name for weight in manifest.swappable.weights} <= set(inputs)
    assert {dtype for name, dtype in inputs.items() if "." in name} == {ir.DataType.FLOAT}
    assert "classifier.weight" in inputs
    assert "bert.embeddings.word_embeddings.weight.int8" in graph.initializers


def test_what_onnx_runtime_s_own_quantiser_does_to_a_swappable_head(make_export: Callable, tmp_path: Path) -> None:
    """Why it isn't used: it makes a constant of it, though told to leave the layer alone."""
    from onnxruntime.quantization import quantize_dynamic

    model = make_export("bert", swappable="base").model
    (head,) = [node.name for node in ir.load(model).graph if "classifier.weight" in [v and v.name for v in node.inputs]]
    out = tmp_path / "model.onnx"
    quantize_dynamic(model, out, op_types_to_quantize=["MatMul"], nodes_to_exclude=[head])
    assert "classifier.weight" in [value.name for value in ir.load(model).graph.inputs]
    assert "classifier.weight" not in [value.name for value in ir.load(out).graph.inputs]


def test_rows_with_adapters_of_their_own(make_tiny: Callable, tmp_path: Path) -> None:
    base, first = make_tiny("bert")
    _, second = make_tiny("bert", kind="lora", seed=5)
    options = ExportOptions(base_model=base, quantize="int8")
    result = export_grouped({"a": first, "b": second}, tmp_path / "model.onnx", options)
    assert result.parity is not None
    rounded = [check for check in result.parity.checks if check.variant == QUANTISED and "mixed rows" in check.output]
    assert [check.status for check in rounded] == ["passed"]
    assert rounded[0].figures is not None
    assert 0 < rounded[0].figures.relative < 0.3


# The proof finds what is wrong.


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("weights", r"quantised weights are within [\d.]+ steps of their own values, expected 1 \(worst: bert\.enc"),
        ("zero point", r"int8 products are within .* of their formula, expected 1e-05 \(worst: bert"),
        ("adapter", r"relative error"),
    ],
)
def test_the_proof_finds_what_is_wrong(what: str, found: str, make_tiny: Callable, tmp_path: Path) -> None:
    base, adapter, out, _ = int8(make_tiny, tmp_path, "bert", mode="separate")
    model = ir.load(out)
    ir.external_data.load_to_model(model)
    initializers = model.graph.initializers

    def change(name: str, value: np.ndarray) -> None:
        initializers[name].const_value = ir.Tensor(value, name=name)

    if what == "weights":
        name = next(name for name in initializers if name.endswith(".int8") and "intermediate" in name)
        value = initializers[name].const_value.numpy().copy()
        value[3, 4] += 5 if value[3, 4] < 0 else -5
        change(name, value)
    elif what == "zero point":
        change("int8.middle", np.array(30, np.uint8))
    else:
        name = next(name for name in initializers if name.endswith("lora_B.weight"))
        change(name, initializers[name].const_value.numpy() * np.float32(1.5))
    damaged = tmp_path / "damaged" / "model.onnx"
    damaged.parent.mkdir()
    ir.save(model, damaged)
    report = check_parity(damaged, adapter, base)
    assert not report.passed
    failed = [check.reason for check in report.checks if check.status == "failed"]
    assert any(re.search(found, reason) for reason in failed), failed


def test_a_manifest_is_enough_for_loratrf_parity(make_tiny: Callable, tmp_path: Path, capsys) -> None:
    base, adapter, out, _ = int8(make_tiny, tmp_path, "bert")
    assert parity_main(["--model", str(out), "--adapter", str(adapter), "--base-model", str(base)]) == 0
    assert "rounding tokens to int8 changes it by" in capsys.readouterr().out


# What is asked for in vain.


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"quantize": "int4"}, r"--quantize is int4.*text-classification.*Take --quantize int8"),
        ({"quantize": "int8", "dtype": "float16"}, r"with --dtype float32, got cpu and float16"),
        ({"quantize": "int8", "device": "cuda", "check": False}, r"with --dtype float32, got cuda and float32"),
        ({"keep_float": ("*",)}, r"--keep-float \* says .* beside --quantize int8, got --quantize none"),
        ({"quantize": "int8", "keep_float": ("x",)}, r"--keep-float x matches no layer.*bert\.embeddings\.word_emb"),
    ],
)
def test_what_encoders_are_not_exported_with(options: dict, found: str, make_tiny: Callable, tmp_path: Path) -> None:
    base, adapter = make_tiny("bert")
    out = tmp_path / "out" / "model.onnx"
    with pytest.raises(UserError, match=found):
        export_adapter(adapter, out, ExportOptions(base_model=base, **options))
    assert not any(tmp_path.iterdir())


def test_the_command_says_what_it_made_and_which_layers_lose_most(make_tiny: Callable, tmp_path: Path, capsys) -> None:
    base, adapter = make_tiny("bert")
    capsys.readouterr()
    arguments = ["--adapter", str(adapter), "--base-model", str(base), "--quantize", "int8"]
    assert export_main([*arguments, "--out", str(tmp_path / "model.onnx")]) == 0
    said = capsys.readouterr().out
    assert "merged, int8 weights, float32" in said
    most = re.search(r"rounding their tokens costs most in (\S+) \(", said)
    assert most is not None
    assert export_main([*arguments, "--keep-float", most[1], "*.layer.1.*", "--out", str(tmp_path / "b.onnx")]) == 0
    names = set(ir.load(tmp_path / "b.onnx").graph.initializers)
    assert not [name for name in names if name.endswith(".int8") and (".layer.1." in name or most[1] in name)]
    assert [name for name in names if name.endswith(".int8")]


def test_language_models_keep_none(make_llm: Callable, tmp_path: Path) -> None:
    base, adapter = make_llm("llama", "lora")
    options = ExportOptions(base_model=base, quantize="int8", keep_float=("*",))
    with pytest.raises(UserError, match="--keep-float is for encoders"):
        export_adapter(adapter, tmp_path / "model.onnx", options)


def test_options_are_one_value(make_tiny: Callable) -> None:
    assert dataclasses.replace(ExportOptions(), quantize="int8").given(["quantize"]) == "--quantize"
