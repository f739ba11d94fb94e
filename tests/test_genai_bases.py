"""Bases that onnxruntime-genai's builder reads otherwise than transformers: held against PEFT all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_llm
from loratrf_deploy import GenerationSession, read_adapter
from loratrf_deploy.cli.generate import main
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped, genai
from loratrf_deploy.genai.generate import CONFIG_FILE
from loratrf_deploy.parity import check_parity
from loratrf_deploy.pytorch.oracle import load_reference
from shared import edit_json, read_json

Make = Callable[..., tuple[Path, Path]]

TOKENS = 64
ROWS = [list(range(20, 60)), [5, 6, 7, 8, 9], list(range(100, 120))]
"""Prompts of several lengths: one far beyond a window of 16, one well within it."""


def torch_rows(base: Path, adapter: Path) -> list[list[int]]:
    """What transformers' own generate() makes of ROWS, each by itself, through PEFT's model."""
    model = load_reference(read_adapter(adapter), base).model
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return [model.generate(input_ids=torch.tensor([row]), **options)[0, len(row) :].tolist() for row in ROWS]


def session_rows(folder: Path) -> list[list[int]]:
    """The same through a GenerationSession, all rows in one call."""
    return GenerationSession(folder).generate_tokens(ROWS, max_new_tokens=TOKENS)


def prove(base: Path, adapter: Path, out: Path, limit: float = 1e-5, **options: Any) -> None:
    """Exports with the parity check; every comparison must pass, logits within `limit` of PEFT's."""
    report = export_adapter(adapter, out, ExportOptions(base_model=base, **options)).parity
    assert report is not None
    assert {check.status for check in report.checks} == {"passed"}
    for check in report.checks:
        if check.output == "logits" and check.variant in ("with library", "without library"):
            assert check.figures is not None
            assert check.figures.relative < limit, check


# Sliding windows.


@pytest.mark.parametrize("family", tiny_llm.WINDOW)
def test_a_sliding_window_far_beyond_it(family: str, make_llm: Make, tmp_path: Path) -> None:
    base, adapter = make_llm(family, "loratrf", {"sliding_window": 16} | tiny_llm.WINDOW[family])
    prove(base, adapter, tmp_path / "model.onnx", mode="separate")
    assert session_rows(tmp_path) == torch_rows(base, adapter)


def test_a_folder_whose_cache_is_as_wide_as_its_window(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the builder makes it by itself: it takes rows of one length alone, and no shorter cache."""
    real = genai._builder_options
    monkeypatch.setattr(
        genai, "_builder_options", lambda *given, **more: real(*given, **more) | {"windowed_kv_cache": "true"}
    )
    base, adapter = make_llm("mistral", "lora", {"sliding_window": 100})
    export_adapter(adapter, tmp_path / "model.onnx", ExportOptions(base_model=base, mode="separate", check=False))
    assert read_json(tmp_path / CONFIG_FILE)["model"]["decoder"]["sliding_window"]["window_size"] == 100
    expected = torch_rows(base, adapter)
    assert session_rows(tmp_path) == expected
    assert GenerationSession(tmp_path).generate_tokens(ROWS[1:2], max_new_tokens=4) == [expected[1][:4]]


ROTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "YaRN": ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    "LongRoPE": (
        "phi3",
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": 64,
            "short_factor": [1 + 0.05 * place for place in range(8)],
            "long_factor": [1 + 0.5 * place for place in range(8)],
        },
    ),
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "LLaMA 3": (
        "qwen3",
        {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("how", ROTATIONS)
def test_positions_rotated_for_long_contexts(how: str, make_llm: Make, tmp_path: Path) -> None:
    """Up to twice the original length: LongRoPE changes its table between a prompt and what follows."""
    family, rope = ROTATIONS[how]
    sizes: dict[str, Any] = {"rope_parameters": {"rope_theta": 10000.0} | rope}
    if "original_max_position_embeddings" in rope:
        sizes["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    base, adapter = make_llm(family, "lora", sizes)
    prove(base, adapter, tmp_path / "model.onnx", mode="merged")


def test_rows_of_a_mixed_model_with_a_window(make_llm: Make, tmp_path: Path) -> None:
    base, adapter = make_llm("mistral", "loratrf", {"sliding_window": 16})
    other = make_llm("mistral", "lora", {"sliding_window": 16}, seed=7)[1]
    report = export_grouped({"a": adapter, "b": other}, tmp_path / "model.onnx", ExportOptions(base_model=base)).parity
    assert report is not None
    assert {check.status for check in report.checks} == {"passed"}


CACHES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "hunyuan_v1_dense": {},
}


@pytest.mark.parametrize("family", CACHES)
def test_caches_of_convolutions_and_positions_as_an_input(family: str, make_llm: Make, tmp_path: Path) -> None:
    base, adapter = make_llm(family, "loratrf", CACHES[family])
    prove(base, adapter, tmp_path / "one" / "model.onnx", mode="separate")
    assert session_rows(tmp_path / "one") == torch_rows(base, adapter)
    other = make_llm(family, "lora", CACHES[family], seed=7)[1]
    out = tmp_path / "mixed" / "model.onnx"
    report = export_grouped({"a": adapter, "b": other}, out, ExportOptions(base_model=base)).parity
    assert report is not None
    assert {check.status for check in report.checks} == {"passed"}


def test_a_model_that_fails_on_the_way_is_a_paragraph_and_no_proof(
    make_llm: Make, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """onnxruntime-genai, told of a window and of no layers, makes the cache too short for what comes after it."""
    base, adapter = make_llm("mistral", "lora", {"sliding_window": 16})
    model = tmp_path / "model.onnx"
    export_adapter(adapter, model, ExportOptions(base_model=base, mode="separate", check=False))
    config = read_json(tmp_path / CONFIG_FILE)
    window = {"window_size": 16, "slide_key_value_cache": False, "slide_inputs": False, "layers": [], "cache_slack": 0}
    config["model"]["decoder"]["sliding_window"] = window
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    greedy = [check for check in check_parity(model, adapter, base).checks if "greedy" in check.output]
    assert [check.status for check in greedy] == ["failed", "failed"]
    (tmp_path / "loratrf.json").unlink()  # which knows another genai_config.json
    capfd.readouterr()
    assert main(["--model", str(tmp_path), "--prompt", "Tom has", "--max-new-tokens", "64"]) == 2
    message = capfd.readouterr().err
    assert "onnxruntime-genai fails after" in message
    assert "Traceback" not in message


# What the builder computes otherwise.

MENDED: dict[str, dict[str, Any]] = {
    "phi": {},  # the epsilon of LayerNorm: 1e-5, not 1e-6
    "nemotron": {},
    "gemma": {"hidden_size": 72},  # its root is no number of two decimals
    "gemma2": {"hidden_size": 72} | tiny_llm.WINDOW["gemma2"],
    "olmo": {"clip_qkv": 0.5},  # with a mean, and clipped
}


@pytest.mark.parametrize("family", MENDED)
@pytest.mark.parametrize(("mode", "quantize"), [("separate", "none"), ("merged", "int4")])
def test_what_the_builder_computes_otherwise(
    family: str, mode: str, quantize: str, make_llm: Make, tmp_path: Path
) -> None:
    base, adapter = make_llm(family, "loratrf" if mode == "separate" else "lora", MENDED[family])
    prove(base, adapter, tmp_path / "model.onnx", mode=mode, quantize=quantize)


def test_a_base_that_the_builder_stumbles_over(make_llm: Make, refused: Callable[..., str], tmp_path: Path) -> None:
    """The builder's own words are a name of its own, and no more."""
    original, adapter = make_llm("gpt_oss", "lora", {"sliding_window": 16} | tiny_llm.WINDOW["gpt_oss"])
    base = Path(shutil.copytree(original, tmp_path / "base"))
    rope = {"rope_type": "default", "rope_theta": 10000.0}  # YaRN in every GPT-OSS, the builder thinks
    edit_json(base / "config.json", rope_parameters=rope)
    out = tmp_path / "out" / "model.onnx"
    message = refused(out, "--adapter", adapter, "--base-model", base)
    assert "KeyError: 'rescale_inv_freq'" in message
    assert "another release of onnxruntime-genai" in message


# Biases that only the adapter has.


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.parametrize(
    ("family", "mode", "quantize", "modules"),
    [
        ("llama", "separate", "none", ["q_proj", "down_proj", "lm_head"]),
        ("llama", "merged", "none", ["q_proj", "down_proj", "lm_head"]),
        ("llama", "merged", "int4", ["v_proj", "up_proj"]),
        ("phi3", "merged", "none", ["qkv_proj", "gate_up_proj"]),
        ("qwen2", "separate", "int8", ["q_proj", "o_proj"]),  # of which q_proj has a bias of its own
    ],
)
def test_lora_bias_where_the_base_has_none(
    family: str, mode: str, quantize: str, modules: list[str], make_llm: Make, tmp_path: Path
) -> None:
    base, adapter = make_llm(family, "lora", lora_bias=True, target_modules=modules)
    prove(base, adapter, tmp_path / "model.onnx", mode=mode, quantize=quantize)
