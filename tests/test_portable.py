"""--portable: ONNX's own operators alone, held against ONNX's reference evaluator and, where it is at hand, OpenVINO.

LORATRF_PEERS="openvino=PYTHON" names a Python with openvino and onnxruntime-openvino.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from loratrf_deploy import AdapterSession, read_adapter
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.export.grouped import export_grouped
from loratrf_deploy.formats.adapter_file import read_adapter_file
from loratrf_deploy.formats.inspection import inspect_path
from loratrf_deploy.ops.schemas import ADAPTER_IDS
from loratrf_deploy.pytorch.base import Inputs, sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference, run_torch
from shared import PEERS, error

OPENVINO = """
import sys
import numpy as np
import onnxruntime
import openvino

model, inputs, outputs = sys.argv[1:]
feeds = dict(np.load(inputs))
core = openvino.Core()
# Where the CPU has it, OpenVINO computes float32 in bfloat16 unless it is told.
native = core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feeds)[0]
session = onnxruntime.InferenceSession(model, providers=["OpenVINOExecutionProvider"])
session.disable_fallback()
assert session.get_providers()[0] == "OpenVINOExecutionProvider"
np.savez(outputs, native=native, provider=session.run(None, feeds)[0])
"""


PROVIDER = OPENVINO.replace(OPENVINO[OPENVINO.index("core =") : OPENVINO.index("session =")], "native = 0\n")
WAYS: list[dict[str, str]] = [{"mode": "separate"}, {"mode": "merged"}, {"swappable": "required"}]


def in_openvino(model: Path, feeds: Inputs, folder: Path, code: str = OPENVINO) -> dict[str, np.ndarray]:
    """The logits of OpenVINO itself ("native"), and of ONNX Runtime's OpenVINO provider; skips without either."""
    if "openvino" not in PEERS:
        pytest.skip("LORATRF_PEERS names no Python of openvino")
    np.savez(folder / "in.npz", **feeds)
    command = [PEERS["openvino"], "-c", code, str(model), str(folder / "in.npz"), str(folder / "out.npz")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "out.npz"))


def plain(model: Path) -> onnx.ModelProto:
    """The model, of ONNX's own operators in the main graph, all of whose last outputs are read."""
    proto = onnx.load(model, load_external_data=False)
    assert not proto.functions
    assert [entry.domain for entry in proto.opset_import] == [""], proto.opset_import
    assert {node.domain for node in proto.graph.node} == {""}
    read = {name for node in proto.graph.node for name in node.input} | {value.name for value in proto.graph.output}
    assert all(node.output[-1] in read for node in proto.graph.node)
    return proto


@pytest.fixture(scope="session")
def made(make_tiny: Callable, made_once: Callable[..., Path]) -> Callable[..., tuple[Path, Path, Path]]:
    """made(family, kind, **options) -> base, adapter and the proven portable model."""

    def make(family: str = "bert", kind: str = "loratrf", **options: Any) -> tuple[Path, Path, Path]:
        task = "image-classification" if family == "vit" else "text-classification"
        base, adapter = make_tiny(family, task, kind)
        return base, adapter, made_once(export_portable, adapter, base, **options) / "model.onnx"

    return make


def export_portable(folder: Path, adapter: Path, base: Path, **options: Any) -> None:
    result = export_adapter(adapter, folder / "model.onnx", ExportOptions(base_model=base, portable=True, **options))
    assert result.parity is not None
    assert len(result.parity.layers) > 5
    names = {layer.module for layer in result.manifest.layers if layer.op != "merged"}
    assert names <= {layer.module for layer in result.parity.layers}


def expected(base: Path, adapter: Path, batch: int = 3, sequence: int = 7) -> tuple[Inputs, np.ndarray]:
    reference = load_reference(read_adapter(adapter), base)
    inputs = sample_inputs(reference, batch=batch, sequence=sequence, seed=5)
    return inputs, run_torch(reference, inputs)["logits"]


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.consumer("onnx's ReferenceEvaluator", "merged, separate")
def test_onnx_itself_computes_it(made: Callable, family: str) -> None:
    base, adapter, model = made(family, mode="separate")
    plain(model)
    inputs, logits = expected(base, adapter)
    assert error(ReferenceEvaluator(str(model)).run(["logits"], inputs)[0], logits) < 1e-5
    facts = inspect_path(model)
    assert "separate, portable, float32" in facts["export"]
    assert facts["custom_operators"] == []


@pytest.mark.consumer("onnx's ReferenceEvaluator", "int8")
def test_int8_is_portable(made: Callable) -> None:
    base, adapter, model = made(quantize="int8")
    plain(model)
    inputs, logits = expected(base, adapter)
    (got,) = ReferenceEvaluator(str(model)).run(["logits"], inputs)
    assert error(got, onnxruntime.InferenceSession(model).run(["logits"], inputs)[0]) < 1e-5
    assert error(got, logits) < 0.1


@pytest.mark.consumer("onnx's ReferenceEvaluator", "swapped")
def test_adapters_swap_without_our_operators(made: Callable) -> None:
    base, adapter, model = made(swappable="base")
    plain(model)
    inputs, logits = expected(base, adapter)
    file = next(model.parent.glob("*.onnx_adapter"))
    session = AdapterSession(model, library=False)
    session.load("own", file)
    assert error(session.run(inputs, adapter="own")["logits"], logits) < 1e-5
    weights = read_adapter_file(file).values
    assert error(ReferenceEvaluator(str(model)).run(["logits"], {**inputs, **weights})[0], logits) < 1e-5
    assert error(session.run(inputs, adapter=None)["logits"], logits) > 1e-3


def test_each_row_has_its_adapter_without_our_operators(make_tiny: Callable, tmp_path: Path) -> None:
    base, first = make_tiny(kind="lora")
    _, second = make_tiny(kind="lora", seed=11, r=2)
    model = tmp_path / "model.onnx"
    result = export_grouped({"a": first, "b": second}, model, ExportOptions(base_model=base, portable=True))
    assert result.parity is not None
    plain(model)
    (inputs, one), (_, two) = expected(base, first), expected(base, second)
    session = onnxruntime.InferenceSession(model)
    (got,) = session.run(["logits"], {**inputs, ADAPTER_IDS: np.array([1, 0, 1])})
    right = np.stack([two[0], one[1], two[2]])
    assert error(got, right) < 1e-5


@pytest.mark.parametrize("options", WAYS, ids=["separate", "merged", "swappable"])
@pytest.mark.consumer("OpenVINO", "merged, separate", "swapped")
@pytest.mark.consumer("OpenVINO's provider", "merged, separate", "swapped")
def test_openvino_computes_it(made: Callable, tmp_path: Path, options: dict[str, str]) -> None:
    base, adapter, model = made(**options)
    inputs, logits = expected(base, adapter)
    weights = read_adapter_file(next(model.parent.glob("*.onnx_adapter"))).values if "swappable" in options else {}
    got = in_openvino(model, {**inputs, **weights}, tmp_path)
    assert error(got["native"], logits) < 1e-5
    assert error(got["provider"], logits) < 1e-5


def test_openvinos_provider_takes_what_is_not_portable(make_export: Callable, tmp_path: Path) -> None:
    """It refused SkipLayerNormalization's outputs of training; our functions it gets inlined by ONNX Runtime."""
    exported = make_export("bert", "text-classification", "loratrf", mode="separate")
    proto = onnx.load(exported.model, load_external_data=False)
    skips = [node for node in proto.graph.node if node.op_type == "SkipLayerNormalization"]
    assert skips
    assert all(len(node.output) == 1 for node in skips)
    inputs, logits = expected(exported.base, exported.adapter)
    assert error(in_openvino(exported.model, inputs, tmp_path, PROVIDER)["provider"], logits) < 1e-5


def test_language_models_are_not(refused: Callable, make_llm: Callable, make_staged: Callable, tmp_path: Path) -> None:
    for (base, adapter), words in (
        (make_llm("llama", "lora"), "--portable is for ONNX's own operators alone, and onnxruntime-genai's builder"),
        (make_staged("gpt2", "lora"), "--portable isn't for a GPT2LMHeadModel"),
    ):
        out = tmp_path / "model.onnx"
        assert words in refused(out, "--adapter", adapter, "--base-model", base, "--portable")
