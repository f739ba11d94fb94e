"""Exports in other versions of ONNX Runtime than the one that is installed.

LORATRF_PEERS="onnxruntime-1.21=PYTHON onnxruntime-1.28=PYTHON ..." names Pythons, of any version, that have these and
what the package depends on; "optimum=PYTHON" one with optimum-onnx, in which our package needs not be installed.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from loratrf_deploy import read_adapter
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.pytorch.base import sample_inputs
from loratrf_deploy.pytorch.oracle import load_reference, run_torch
from shared import PEERS, error

ROOT = Path(__file__).parent.parent
VERSIONS = sorted(name for name in PEERS if name.startswith("onnxruntime-"))

RUN = """
import sys
import numpy as np
import loratrf_deploy as ld

folder, outputs = sys.argv[1:]
inputs = dict(np.load(folder + "/in.npz"))
found = {}
for library in (True, False):
    for name in ("merged", "separate", "int8"):
        session = ld.create_session(f"{folder}/{name}/model.onnx", library=library)
        found[f"{name} {library}"] = session.run(["logits"], inputs)[0]
    for name in ("base", "required"):
        session = ld.AdapterSession(f"{folder}/{name}/model.onnx", library=library)
        session.load("it", f"{folder}/{name}/loratrf.onnx_adapter")
        found[f"{name} {library}"] = session.run(inputs, adapter="it")["logits"]
    session = ld.AdapterSession(f"{folder}/rows/model.onnx", library=library)
    for name in "ab":
        session.load(name, f"{folder}/rows/{name}.onnx_adapter")
    found[f"rows {library}"] = session.run(inputs, adapters=["b", "a", "b"])["logits"]
np.savez(outputs, **found)
"""


@pytest.fixture(scope="module")
def exports(
    make_export: Callable, make_tiny: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of exports and inputs; PyTorch's logits by export."""
    folder = tmp_path_factory.mktemp("versions")
    ways: dict[str, dict[str, Any]] = {
        **{mode: {"mode": mode} for mode in ("merged", "separate")},
        **{default: {"swappable": default} for default in ("base", "required")},
    }
    made = {name: make_export(**options) for name, options in ways.items()}
    for name, export in made.items():
        (folder / name).symlink_to(export.model.parent)
    base, adapter = made["merged"].base, made["merged"].adapter
    int8 = ExportOptions(base_model=base, quantize="int8", check=False)
    export_adapter(adapter, folder / "int8" / "model.onnx", int8)
    _, other = make_tiny(kind="lora", seed=11, r=2)
    export_grouped(
        {"a": adapter, "b": other}, folder / "rows" / "model.onnx", ExportOptions(base_model=base, check=False)
    )
    inputs = sample_inputs(load_reference(read_adapter(adapter), base), batch=3, sequence=7, seed=5)
    one, two = (run_torch(load_reference(read_adapter(path), base), inputs)["logits"] for path in (adapter, other))
    np.savez(folder / "in.npz", **inputs)
    right = dict.fromkeys(("merged", "separate", "base", "required"), one) | {
        "rows": np.stack([two[0], one[1], two[2]])
    }
    return folder, right


@pytest.mark.skipif(not VERSIONS, reason="LORATRF_PEERS names no other version of onnxruntime")
@pytest.mark.consumer("onnxruntime, Python, 1.21 and later", "merged, separate", "swapped", "by row", "int8")
@pytest.mark.parametrize("version", VERSIONS)
def test_every_way_computes_what_pytorch_does(
    version: str, exports: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder, right = exports
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PEERS[version], "-c", RUN, str(folder), str(tmp_path / "out.npz")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT)}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "out.npz"))
    for name, logits in right.items():
        for library in (True, False):
            assert error(found[f"{name} {library}"], logits) < 1e-5, (name, library)
    assert error(found["int8 True"], found["int8 False"]) < 1e-5
    assert error(found["int8 True"], right["merged"]) < 0.1


OPTIMUM = """
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, pipeline

folder, texts = sys.argv[1:]
model = ORTModelForSequenceClassification.from_pretrained(folder)
classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder), top_k=None)
print(json.dumps(classify(json.loads(texts))))
"""


@pytest.mark.skipif("optimum" not in PEERS, reason="LORATRF_PEERS names no Python of optimum-onnx")
@pytest.mark.consumer("optimum", "merged, separate")
@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_optimum_loads_the_folder_as_it_is(make_export: Callable, mode: str) -> None:
    exported, texts = make_export(mode=mode), ["a b c", "d e a b f"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PEERS["optimum"], "-c", OPTIMUM, str(exported.model.parent), json.dumps(texts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    encoded = AutoTokenizer.from_pretrained(exported.base)(texts, padding=True, return_tensors="np")
    logits = run_torch(load_reference(read_adapter(exported.adapter), exported.base), {**encoded})["logits"]
    right = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(-1, keepdims=True)
    for row, labels in zip(right, json.loads(done.stdout.splitlines()[-1]), strict=True):
        scores = {label["label"]: label["score"] for label in labels}
        assert error([scores[f"LABEL_{i}"] for i in range(len(row))], row) < 1e-5
