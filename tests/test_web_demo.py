"""examples/web in Chromium: what the page answers while adapters are switched, against PyTorch. MiniLM: it is slow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from browser import CHROMIUM, JS, ask_browser
from loratrf_deploy import UserError, read_adapter
from loratrf_deploy.pytorch.oracle import load_reference, run_torch
from minilm import base_path
from shared import error

WEB = Path(__file__).parents[1] / "examples" / "web"
TEXTS = ["a gripping film", "dull , and two hours too long", ""]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
    pytest.mark.skipif(not (JS / "node_modules" / "onnxruntime-web").is_dir(), reason="npm ci was not run in js/"),
]


@pytest.mark.consumer("onnxruntime-web, WebAssembly", "swapped")
@pytest.mark.consumer("onnxruntime-web, WebGPU", "swapped")
def test_the_page_answers_as_pytorch_while_adapters_are_switched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    try:
        base = base_path()
    except UserError as absent:
        pytest.skip(str(absent))
    monkeypatch.syspath_prepend(str(WEB))
    import serve_demo

    assert serve_demo.make(tmp_path / "out") == 0
    capfd.readouterr()
    job = {"texts": TEXTS, "adapters": serve_demo.ADAPTERS}
    answers = ask_browser(job, tmp_path / "out", tmp_path, JS / "test" / "demo.html", web=WEB)
    assert "error" not in answers, answers["error"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name in serve_demo.ADAPTERS:
        reference = load_reference(read_adapter(WEB.parent / "adapters" / name), base)
        for text in TEXTS:
            right = run_torch(reference, {**tokenizer([text], return_tensors="np")})["logits"]
            for provider in ("wasm", "webgpu"):
                if provider in answers:
                    got = np.array(answers[provider][f"{name} {text}"])[None]
                    assert error(got, right) < 1e-5, (provider, name, text)
    assert "wasm" in answers
    assert "MB" in answers["facts"]
    assert "run after a switch" in answers["facts"]
