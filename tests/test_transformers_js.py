"""--layout transformers.js: its pipelines load the folder as it is, in Node and in a browser.

LORATRF_PEERS="transformers.js=FOLDER" names a folder of `npm install --ignore-scripts @huggingface/transformers`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from browser import CHROMIUM, JS, ask_browser
from loratrf_deploy import UserError, create_session, read_adapter
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.formats.manifest import check_files, read_manifest
from loratrf_deploy.pytorch.oracle import load_reference, run_torch
from shared import PEERS, read_json

TEXTS = ["a b c", "d e a b f"]

CLASSIFY = """
import { env, pipeline } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const classify = await pipeline("text-classification", "web");
console.log(JSON.stringify(await classify(JSON.parse(process.argv[3]), { top_k: null })));
"""


@pytest.fixture(scope="module")
def exported(make_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, adapter, folder): `folder` holds onnx/model.onnx; parity was proven."""
    base, adapter = make_tiny("bert", "text-classification", "loratrf")
    folder = tmp_path_factory.mktemp("layout") / "web"
    options = ExportOptions(base_model=base, layout="transformers.js")
    export_adapter(adapter, folder / "onnx" / "model.onnx", options)
    return base, adapter, folder


def probabilities(base: Path, adapter: Path) -> np.ndarray:
    encoded = AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="np")
    logits = run_torch(load_reference(read_adapter(adapter), base), {**encoded})["logits"].astype(np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def assert_answers(answers: list[list[dict[str, Any]]], right: np.ndarray) -> None:
    for row, answer in zip(right, answers, strict=True):
        assert {label["label"] for label in answer} == {f"LABEL_{i}" for i in range(len(row))}
        got = [next(label["score"] for label in answer if label["label"] == f"LABEL_{i}") for i in range(len(row))]
        assert np.abs(got - row).max() < 1e-5


def peer() -> Path:
    if "transformers.js" not in PEERS:
        pytest.skip("LORATRF_PEERS names no folder of transformers.js")
    return Path(PEERS["transformers.js"])


def test_the_folder_is_as_its_pipelines_look_for_it(exported: tuple[Path, Path, Path], refused: Callable) -> None:
    base, adapter, folder = exported
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} >= {
        *("config.json", "tokenizer.json", "tokenizer_config.json"),
        *("onnx/model.onnx", "onnx/model.onnx_data", "onnx/loratrf.json"),
    }
    assert read_json(folder / "config.json")["transformers.js_config"] == {
        "dtype": "fp32",
        "use_external_data_format": {"model.onnx": 1},
    }
    manifest = read_manifest(folder / "onnx" / "loratrf.json")
    assert set(manifest.model.files) == {"model.onnx_data"}
    assert set(manifest.companions or {}) >= {"config.json", "tokenizer.json"}
    check_files(folder / "onnx", manifest, whole=True)
    create_session(folder / "onnx" / "model.onnx")
    arguments = ("--adapter", adapter, "--base-model", base, "--layout", "transformers.js")
    message = refused(folder.parent / "flat" / "model.onnx", *arguments)
    assert f"Take --out {folder.parent / 'flat' / 'onnx' / 'model.onnx'}" in message


def test_what_an_export_wrote_is_replaced_and_what_it_did_not_is_kept(
    exported: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, folder = exported
    shutil.copytree(folder, tmp_path / "web")
    out = tmp_path / "web" / "onnx" / "model.onnx"
    options = ExportOptions(base_model=base, layout="transformers.js", check=False)
    export_adapter(adapter, out, options)
    (tmp_path / "web" / "config.json").write_text("mine")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"config\.json, which no export wrote"):
        export_adapter(adapter, out, options)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "web" / "config.json").read_text() == "mine"


def test_language_models_have_no_such_layout(
    make_llm: Callable, make_staged: Callable, refused: Callable, tmp_path
) -> None:
    for base, adapter in (make_llm("llama"), make_staged("gpt2")):
        arguments = ("--adapter", adapter, "--base-model", base, "--layout", "transformers.js")
        assert "--layout" in refused(tmp_path / "onnx" / "model.onnx", *arguments)


@pytest.mark.consumer("transformers.js", "merged, separate")
def test_its_pipeline_answers_as_pytorch(exported: tuple[Path, Path, Path]) -> None:
    base, adapter, folder = exported
    script = peer() / "classify.mjs"
    script.write_text(CLASSIFY)
    done = subprocess.run(
        ["node", script, f"{folder.parent}/", json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=peer(),
    )
    assert done.returncode == 0, done.stderr
    assert_answers(json.loads(done.stdout), probabilities(base, adapter))


@pytest.mark.slow
def test_its_pipeline_answers_in_a_browser(exported: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, folder = exported
    packages = peer() / "node_modules"
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    answers = ask_browser(
        {"texts": TEXTS},
        folder,
        tmp_path,
        JS / "test" / "pipeline.html",
        transformers=packages / "@huggingface" / "transformers",
        ort=packages / "onnxruntime-web" / "dist",
    )
    assert "error" not in answers, answers["error"]
    assert_answers(answers["wasm"], probabilities(base, adapter))
