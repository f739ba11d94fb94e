"""loratrf-generate and loratrf-perplexity as users meet them."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from loratrf_deploy import GenerationSession, UserError, read_adapter
from loratrf_deploy.cli.generate import main
from loratrf_deploy.cli.perplexity import main as perplexity_main
from loratrf_deploy.export import convert_adapter
from loratrf_deploy.genai.generate import CONFIG_FILE, generate_tokens, load_model
from loratrf_deploy.parity.perplexity import perplexities
from loratrf_deploy.pytorch.base import load_tokenizer
from loratrf_deploy.pytorch.oracle import load_reference
from tiny import SENTENCES

PROMPT = "where is the library ?"


def test_it_prints_what_pytorch_would_write(capsys, exported: Callable[..., Path], make_llm) -> None:
    base, adapter = make_llm("llama", "loratrf")
    folder = exported(mode="separate", bundle_library=True).parent
    assert main(["--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "20"]) == 0
    captured = capsys.readouterr()
    tokenizer = load_tokenizer(base)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    reference = load_reference(read_adapter(adapter), base).model
    with torch.no_grad():
        expected = reference.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0]
    # Random weights make bytes that are no text: GenAI's decoder decides how those look.
    stream = og.Tokenizer(load_model(folder)).create_stream()
    assert captured.out == PROMPT + "".join(stream.decode(int(token)) for token in expected[ids.shape[1] :]) + "\n"
    assert "tokens/s" in captured.err
    capsys.readouterr()  # what loading printed
    assert main(["--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "20", "--json"]) == 0
    again = capsys.readouterr()
    (facts,) = json.loads(again.out)["answers"]
    assert (facts["text"] + "\n", facts["adapter"], again.err) == (captured.out, None, "")
    assert 1 <= facts["tokens"] <= 20
    assert 0 < facts["first_token_seconds"] <= facts["seconds"]


@pytest.fixture(scope="module")
def swappable(exported: Callable[..., Path], make_llm, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder whose adapters swap, and the options that load two of them."""
    model = exported("loratrf", swappable="base")
    base, plain = make_llm("llama", "lora", r=9, seed=7)
    file = tmp_path_factory.mktemp("adapter") / "plain.onnx_adapter"
    convert_adapter(plain, model, file, base_model=base)
    ours = next(model.parent.glob("*.onnx_adapter"))
    return model.parent, ["--adapter", f"ours={ours}", "--adapter", f"plain={file}"]


def test_every_adapter_answers(capsys, swappable, monkeypatch) -> None:
    folder, adapters = swappable
    command = ["--model", str(folder), "--max-new-tokens", "6"]
    assert main([*command, *adapters, "--prompt", PROMPT, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    session = GenerationSession(folder)
    for option in adapters[1::2]:
        session.load(*option.split("=", 1))
    for answer, name in zip(answers, ("ours", "plain"), strict=True):
        text = "".join(session.stream(PROMPT, adapter=name, max_new_tokens=6))
        assert (answer["adapter"], answer["text"]) == (name, PROMPT + text)
    assert answers[0]["text"] != answers[1]["text"]
    # From a pipe, and labelled.
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main([*command, *adapters]) == 0
    shown = capsys.readouterr().out
    assert all(f"[{name}] {PROMPT}" in shown for name in ("ours", "plain"))


def test_a_chat_in_which_adapters_change(capsys, swappable, monkeypatch) -> None:
    folder, adapters = swappable
    lines = [
        "she wrote",
        "/adapter plain 1",
        "she wrote",
        "/adapter es",
        "/adapter plain loud",
        "/base",
        " ",
        "she wrote",
    ]
    asked = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        if len(asked) > len(lines):
            raise EOFError
        return lines[len(asked) - 1]

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["--model", str(folder), *adapters, "--max-new-tokens", "6"]) == 0
    shown = capsys.readouterr().out
    session = GenerationSession(folder)
    for option in adapters[1::2]:
        session.load(*option.split("=", 1))
    for name in ("ours", "plain", None):
        assert "".join(session.stream("she wrote", adapter=name, max_new_tokens=6)) + "\n" in shown
    assert asked == ["ours> ", "ours> ", "plain> ", "plain> ", "plain> ", "plain> ", "base> ", "base> ", "base> "]
    assert "a loaded adapter (ours, plain)" in shown
    assert "'loud' is no scale" in shown


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--adapter", "ours"], "--adapter has 'ours', expected NAME=PATH"),
        (["--adapter", "ours=nowhere.onnx_adapter"], "Can't read nowhere.onnx_adapter"),
        (["--rows"], "one adapter per call"),
        (["--chat"], "saved with a chat template"),
    ],
)
def test_adapters_that_cannot_be(capsys, swappable, options, expected) -> None:
    folder, adapters = swappable
    more = adapters if options == ["--rows"] else []
    assert main(["--model", str(folder), "--prompt", PROMPT, *more, *options]) == 2
    assert expected in capsys.readouterr().err


def test_sampling_follows_its_seed(exported: Callable[..., Path]) -> None:
    model = load_model(exported(mode="separate").parent)

    def sampled(seed: int) -> list[int]:
        search = {"do_sample": True, "temperature": 1.5, "random_seed": seed}
        return list(generate_tokens(model, [5, 6, 7], 24, stop=False, **search))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_greedy_is_greedy_whatever_the_folder_says(exported: Callable[..., Path], tmp_path: Path) -> None:
    original = exported(mode="separate").parent
    folder = shutil.copytree(original, tmp_path / "copy")
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["search"] |= {"do_sample": True, "temperature": 2.0, "repetition_penalty": 1.7, "top_k": 0}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    tokens = [list(generate_tokens(load_model(path), [9, 10, 11], 24, stop=False)) for path in (original, folder)]
    assert tokens[0] == tokens[1]


def test_generating_needs_no_torch(exported: Callable[..., Path]) -> None:
    code = """
import sys
for name in ("torch", "transformers", "peft", "onnx", "onnx_ir"):
    sys.modules[name] = None
from loratrf_deploy.cli.generate import main
sys.exit(main(["--model", sys.argv[1], "--prompt", "rain", "--max-new-tokens", "3"]))
"""
    model = exported(mode="separate", bundle_library=True)
    result = subprocess.run([sys.executable, "-c", code, model], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("rain")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / CONFIG_FILE).unlink(), "has no genai_config.json"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "is damaged"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"no model"), "can't load"),
    ],
)
def test_a_damaged_folder(damage, expected, capsys, exported, tmp_path) -> None:
    folder = shutil.copytree(exported(mode="separate", bundle_library=True).parent, tmp_path / "copy")
    damage(folder)
    capsys.readouterr()  # what fixtures printed
    assert main(["--model", str(folder), "--prompt", PROMPT]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error


def test_more_tokens_than_the_context_holds(exported: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="400 more"):
        list(generate_tokens(load_model(exported(mode="separate").parent), [5, 6, 7], 400))


def test_an_empty_prompt(capsys, exported: Callable[..., Path]) -> None:
    assert main(["--model", str(exported(mode="separate").parent), "--prompt", ""]) == 2
    assert "--prompt is empty" in capsys.readouterr().err


def test_perplexity_is_transformers_own_loss(exported: Callable[..., Path], make_llm, tmp_path: Path) -> None:
    base, adapter = make_llm("llama", "loratrf")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES))
    models = [exported(mode="separate"), exported(mode="merged"), exported(mode="merged", quantize="int4")]
    rows = perplexities(text, adapter, models, base, window=50)
    # transformers computes its loss by itself: the mean over each window's tokens but the first.
    tokens = load_tokenizer(base)(text.read_text(), return_tensors="pt")["input_ids"][0]
    reference = load_reference(read_adapter(adapter), base).model
    total, count = 0.0, 0
    for part in tokens.split(50):
        with torch.no_grad():
            total += reference(input_ids=part[None], labels=part[None]).loss.item() * (len(part) - 1)
        count += len(part) - 1
    assert len(tokens) % 50 > 1
    assert rows[0].name == "PyTorch"
    np.testing.assert_allclose(np.log(rows[0].perplexity), total / count, rtol=1e-5)
    losses = {row.name: row.loss for row in rows}
    assert losses["PyTorch"] == 0
    assert abs(losses["PyTorch without the adapter"]) > 0.05
    assert abs(losses[f"{models[0]} (separate)"]) < 1e-5
    assert abs(losses[f"{models[1]} (merged)"]) < 1e-5
    assert 1e-3 < abs(losses[f"{models[2]} (merged, int4)"]) < 0.5


def test_perplexity_on_the_command_line(capsys, exported: Callable[..., Path], make_llm, make_tiny, tmp_path) -> None:
    base, adapter = make_llm("llama", "loratrf")
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES[0])
    model = str(exported(mode="separate"))
    options = ["--text", str(text), "--adapter", str(adapter), "--base-model", str(base), "--model", model]
    assert perplexity_main(options) == 0
    shown = capsys.readouterr().out
    assert f"{model} (separate)" in shown
    assert perplexity_main([*options, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["deployments"]
    assert [row["name"] for row in rows] == ["PyTorch", "PyTorch without the adapter", f"{model} (separate)"]
    assert all(f"{row['perplexity']:.4f}" in shown and f"{row['loss']:+.6f}" in shown for row in rows)
    assert perplexity_main([*options, "--window", "0"]) == 2
    slip = "argument --window: '0' is not a whole number over zero (see loratrf-perplexity --help)"
    assert capsys.readouterr().err == f"error: {slip}\n"
    text.write_bytes(b"\xff\xfe")
    assert perplexity_main(options) == 2
    assert "can't be read" in capsys.readouterr().err
    text.write_text("")
    assert perplexity_main(options) == 2
    assert "0 tokens" in capsys.readouterr().err
    text.write_text(SENTENCES[0])
    other_base, other = make_tiny("bert", "text-classification", "loratrf")
    capsys.readouterr()
    assert perplexity_main([*options[:2], "--adapter", str(other), "--base-model", str(other_base), *options[6:]]) == 2
    assert "text-classification" in capsys.readouterr().err
