"""Vision-language models: the language part with its adapter, what sees images left out or refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_vlm
import torch

from loratrf_deploy import GenerationSession, UserError, read_adapter
from loratrf_deploy.cli.export import main
from loratrf_deploy.cli.generate import main as generate
from loratrf_deploy.cli.inspect import main as inspect
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.genai.names import genai_name
from loratrf_deploy.parity import check_parity
from loratrf_deploy.parity.images import image_prompt
from loratrf_deploy.parity.perplexity import perplexities
from loratrf_deploy.pytorch.oracle import load_reference
from shared import edit_tensors

Make = Callable[..., tuple[Path, Path]]
SEEING = ["q_proj", "v_proj", "fc1"]
"""Names that Gemma 3's language part and its vision tower both have, as people put them in target_modules."""


def prove(adapter: Path, base: Path, out: Path, **how: Any) -> tuple[str, ...]:
    """Exports with the parity check, which must hold in every comparison; returns the warnings."""
    result = export_adapter(adapter, out, ExportOptions(base_model=base, **how))
    assert result.parity is not None
    assert {check.status for check in result.parity.checks} == {"passed"}
    assert sum("64 greedy tokens" in check.output for check in result.parity.checks) >= 2
    for check in result.parity.checks:
        if check.output == "logits" and check.variant != "base-off":
            assert check.figures is not None
            assert check.figures.relative < 3e-5, check
    return result.warnings


SLOW = pytest.mark.slow
WAYS = {
    "merged": {"mode": "merged"},
    "separate": {"mode": "separate"},
    "swappable": {"swappable": "base"},
    "int4": {"mode": "separate", "quantize": "int4"},
    "swappable int4": {"swappable": "base", "quantize": "int4"},
}
CASES = [
    ("qwen2_5_vl", "loratrf", "swappable"),
    ("qwen3_vl", "loratrf", "merged"),
    pytest.param("mistral3", "lora", "swappable", marks=SLOW),
    *(
        pytest.param(family, kind, way, marks=SLOW)
        for family in ("gemma3", "qwen2_5_vl", "qwen3_vl", "mistral3")
        for kind in ("lora", "loratrf")
        for way in WAYS
    ),
    pytest.param("llava", "lora", "merged", marks=SLOW),
    *(
        pytest.param(family, "loratrf", "separate", marks=SLOW)
        for family in ("llava", "lfm2_vl", "qwen3_5", "qwen2_vl", "smolvlm")
    ),
    pytest.param("qwen3_5", "loratrf", "swappable int4", marks=SLOW),
    pytest.param("lfm2_vl", "lora", "swappable int4", marks=SLOW),
]


@pytest.mark.parametrize(("family", "kind", "way"), CASES)
def test_texts(family: str, kind: str, way: str, make_vlm: Make, tmp_path: Path) -> None:
    base, adapter = make_vlm(family, kind)
    assert prove(adapter, base, tmp_path / "model.onnx", **WAYS[way]) == ()


@pytest.fixture(scope="module")
def swappable(make_vlm: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3's folder, exported from an adapter of which a part is in the vision tower."""
    base, adapter = make_vlm("gemma3", "lora", target_modules=SEEING)
    folder = tmp_path_factory.mktemp("gemma3")
    (warning,) = prove(adapter, base, folder / "model.onnx", swappable="base")
    assert warning.startswith("this adapter changes what sees images (model.vision_tower.")
    return folder


def test_rows_of_several_lengths_of_a_model_with_positions_along_three_axes(make_vlm: Make, tmp_path: Path) -> None:
    """onnxruntime-genai counts a shorter row's positions on behind its padding: such rows don't share a batch."""
    base, adapter = make_vlm("qwen2_5_vl", "lora")
    options = ExportOptions(base_model=base, mode="merged", check=False)
    export_adapter(adapter, tmp_path / "out" / "model.onnx", options)
    reference = load_reference(read_adapter(adapter), base).model
    prompts = [list(range(5, 17)), [9, 40, 3], [7, 7, 8]]
    rows = GenerationSession(tmp_path / "out").generate_tokens(prompts, max_new_tokens=24)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt])
        made = reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        assert row == made[0, len(prompt) :].tolist()[: len(row)]
        assert len(row) > 4


def test_what_sees_images_is_left_out_and_the_tokens_are_those_of_peft(make_vlm: Make, swappable: Path) -> None:
    """Held against generate() of the whole adapter, not against the parity check."""
    base, adapter = make_vlm("gemma3", "lora", target_modules=SEEING)
    session = GenerationSession(swappable)
    session.load("own", swappable / "lora.onnx_adapter")
    reference = load_reference(read_adapter(adapter), base).model
    prompts = [list(range(5, 17)), [9, 40, 3]]
    rows = session.generate_tokens(prompts, adapter="own", max_new_tokens=40)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt])
        made = reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )
        made = made[0, len(prompt) :].tolist()
        length = min(len(made), len(row))
        assert row[:length] == made[:length]
        assert length > 8


def test_a_further_adapter_that_sees_images(make_vlm: Make, swappable: Path, tmp_path: Path) -> None:
    base, adapter = make_vlm("gemma3", "lora", target_modules=SEEING, r=2, seed=5)
    converted = convert_adapter(
        adapter, swappable / "model.onnx", tmp_path / "b.onnx_adapter", base_model=base, check=True
    )
    assert converted.parity is not None
    assert converted.parity.passed
    assert (converted.layers, converted.model_layers) == (4, 4)
    assert "changes what sees images" in converted.warnings[0]


def test_parity_and_generation_by_their_commands(
    make_vlm: Make, swappable: Path, capsys: pytest.CaptureFixture
) -> None:
    base, adapter = make_vlm("gemma3", "lora", target_modules=SEEING)
    assert check_parity(swappable / "model.onnx", adapter, base).passed
    capsys.readouterr()
    command = ["--model", str(swappable), "--adapter", f"own={swappable / 'lora.onnx_adapter'}", "--prompt", "a film"]
    assert generate([*command, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out


def test_mixed_rows_of_a_model_with_positions_along_three_axes(make_vlm: Make, tmp_path: Path) -> None:
    base, adapter = make_vlm("qwen2_5_vl", "lora")
    other = make_vlm("qwen2_5_vl", "loratrf")[1]
    result = export_grouped({"a": adapter, "b": other}, tmp_path / "model.onnx", ExportOptions(base_model=base))
    assert result.parity is not None
    assert result.parity.passed


def test_rows_of_adapters_that_see_images(make_vlm: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, adapter = make_vlm("gemma3", "lora", target_modules=SEEING)
    other = make_vlm("gemma3", "lora", seed=3)[1]
    arguments = ["--adapters", f"a={adapter}", f"b={other}", "--base-model", str(base)]
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "out" / "model.onnx")]) == 0
    assert "warning: a: this adapter changes what sees images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "old"), [("gemma3", "language_model.model."), ("qwen2_5_vl", "model.")], ids=["gemma3", "qwen2_5_vl"]
)
def test_names_of_before_transformers_4_52(
    refused: Callable, make_vlm: Make, tmp_path: Path, family: str, old: str
) -> None:
    """The command in the paragraph gives the file the names that it would have today."""
    base, adapter = make_vlm(family, "lora")
    copy = Path(shutil.copytree(adapter, tmp_path / "old"))
    edit_tensors(
        copy / "adapter_model.safetensors",
        lambda all_: {name.replace("model.model.language_model.", f"model.{old}"): v for name, v in all_.items()},
    )
    assert read_adapter(copy).layers.keys() != read_adapter(adapter).layers.keys()
    error = refused(tmp_path / "out" / "model.onnx", "--adapter", copy, "--base-model", base)
    assert "names layers as transformers did before 4.52" in error
    command = error.split("`")[1].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=copy)
    mended, now = read_adapter(copy).layers, read_adapter(adapter).layers
    assert mended.keys() == now.keys()
    assert all(np.array_equal(mended[name].B, layer.B) for name, layer in now.items())


def test_a_model_that_reads_prompts_both_ways(refused: Callable, make_vlm: Make, tmp_path: Path) -> None:
    base, adapter = make_vlm("paligemma", "lora")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert "(PaliGemmaForConditionalGeneration) reads a prompt in both directions" in message


def test_an_adapter_of_nothing_but_the_vision_tower(refused: Callable, make_vlm: Make, tmp_path: Path) -> None:
    base, adapter = make_vlm("gemma3", "lora", target_modules=r".*vision_tower.*fc1")
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert "changes only what sees images in the Gemma3ForConditionalGeneration" in message
    assert "model.vision_tower.head.mlp.fc1" in message


# With images.

SEES = {"target_modules": r".*(language_model|vision_tower|projector).*\.(q_proj|v_proj|down_proj|linear_1)"}


@pytest.fixture(scope="module")
def seeing(make_vlm: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral 3's folder: the adapter is beside the language part, and in the weights of what sees images."""
    base, adapter = make_vlm("mistral3", "lora", **SEES)
    folder = tmp_path_factory.mktemp("mistral3")
    result = export_adapter(adapter, folder / "model.onnx", ExportOptions(base_model=base, mode="separate"))
    assert result.parity is not None
    assert {check.status for check in result.parity.checks} == {"passed"}
    assert [check.variant for check in result.parity.checks if check.output == "64 greedy tokens, images"] == [
        "with library",
        "without library",
    ]
    folded = [layer.module for layer in result.manifest.layers if layer.op == "merged"]
    assert len(folded) == 4
    assert not any("language_model" in name for name in folded)
    assert result.warnings == ()
    return folder


def test_images_are_answered_as_peft_does(make_vlm: Make, seeing: Path) -> None:
    """Held against generate(), with images of several sizes; prompts without images too, several in one batch."""
    base, adapter = make_vlm("mistral3", "lora", **SEES)
    reference = load_reference(read_adapter(adapter), base).model
    session = GenerationSession(seeing)
    options = {"max_new_tokens": 24, "do_sample": False}
    for sizes in ([(2, 3)], [(4, 4), (1, 2), (3, 1)]):
        prompt = image_prompt(reference.config, sizes, seed=7)
        images = {name: prompt[name] for name in ("pixel_values", "image_sizes")}
        (row,) = session.generate_tokens(prompt["input_ids"].tolist(), images=images, max_new_tokens=24)
        inputs = {name: torch.from_numpy(value) for name, value in prompt.items()}
        made = reference.generate(**inputs, **options)[0, prompt["input_ids"].shape[1] :].tolist()
        assert row == made[: len(row)]
        assert len(row) > 8
        images["pixel_values"] = images["pixel_values"][:, ::-1]
        assert session.generate_tokens(prompt["input_ids"].tolist(), images=images, max_new_tokens=24) != [row]
    prompts = [list(range(5, 17)), [9, 40, 3]]
    for prompt, row in zip(prompts, session.generate_tokens(prompts, max_new_tokens=24), strict=True):
        ids = torch.tensor([prompt])
        made = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert row == made[0, len(prompt) :].tolist()[: len(row)]


def test_images_that_do_not_go_with_the_prompt(seeing: Path, swappable: Path) -> None:
    session = GenerationSession(seeing)
    pixels = np.zeros((1, 3, 28, 56), np.float32)
    prompt = [5, tiny_vlm.IMAGE, 6]
    for prompts, images, words in (
        ([prompt], {"pixel_values": pixels}, "has 1 tokens of images (token 287), and the images have 2"),
        ([prompt, prompt], {"pixel_values": pixels}, "of one prompt, and 2 are given"),
        ([prompt], {"pixel_values": pixels[:, :, :20]}, "multiples of 28"),
        ([prompt], {"pixel_values": pixels, "image_sizes": [[28, 84]]}, "multiples of 28"),
        ([prompt], {"pixel_values": pixels[0]}, "multiples of 28"),
        ([prompt], {"image_sizes": [[28, 84]]}, "can't be read ('pixel_values')"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            session.generate_tokens(prompts, images=images)
    with pytest.raises(UserError, match="reads texts alone"):
        GenerationSession(swappable).generate_tokens([prompt], adapter=None, images={"pixel_values": pixels})


def test_the_proof_and_the_hashes_cover_what_sees_images(
    make_vlm: Make, seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, adapter = make_vlm("mistral3", "lora", **SEES)
    folder = Path(shutil.copytree(seeing, tmp_path / "broken"))
    graph = ir.load(folder / "vision.onnx")
    weight = next(value for name, value in graph.graph.initializers.items() if "q_proj" in name)
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.01, name=weight.name)
    ir.save(graph, folder / "vision.onnx")
    assert inspect(["--verify", str(folder)]) != 0
    assert "vision.onnx" in capsys.readouterr().err
    (folder / "loratrf.json").unlink()
    report = check_parity(folder / "model.onnx", adapter, base)
    assert [check.output for check in report.checks if check.status == "failed" and check.figures][:1] == ["logits"]


def test_the_perplexity_of_a_model_that_sees(make_vlm: Make, seeing: Path, tmp_path: Path) -> None:
    base, adapter = make_vlm("mistral3", "lora", **SEES)
    (tmp_path / "text.txt").write_text("a film that is worth the time of nobody, and yet we saw it twice. " * 8)
    exact, _, exported = perplexities(tmp_path / "text.txt", adapter, [seeing / "model.onnx"], base)
    assert exported.perplexity == pytest.approx(exact.perplexity, rel=1e-4)


def test_filters_in_the_vision_tower(refused: Callable, make_vlm: Make, tmp_path: Path) -> None:
    base, adapter = make_vlm("mistral3", "loratrf", **SEES)
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", base)
    assert "task-aware filters on what sees images (model.multi_modal_projector.linear_1" in message
    command = ["--adapter", str(adapter), "--base-model", str(base), "--swappable", "base"]
    assert main([*command, "--no-check", "--out", str(tmp_path / "out" / "model.onnx")]) == 0  # texts alone


@SLOW
@pytest.mark.parametrize("how", [{"mode": "merged"}, {"mode": "separate", "quantize": "int4"}])
def test_other_ways_with_images(how: dict[str, Any], make_vlm: Make, tmp_path: Path) -> None:
    base, adapter = make_vlm("mistral3", "lora", **SEES)
    assert prove(adapter, base, tmp_path / "model.onnx", **how) == ()


def test_a_vision_tower_has_no_names_in_the_builders_graph() -> None:
    assert genai_name("model.language_model.layers.1.self_attn.q_proj") == "/model/layers.1/attn/q_proj"
    assert genai_name("model.vision_tower.encoder.layers.1.self_attn.q_proj") is None
    assert genai_name("model.visual.layers.1.mlp.up_proj") is None
