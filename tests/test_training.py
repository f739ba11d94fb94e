"""examples/train_glue.py on a tiny model, and the tables of benchmarks/bench_method.py."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import bench_method
import bench_method_lm
import glue
import numpy as np
import pytest
import torch
import train_glue

import tiny
import tiny_llm
from loratrf_deploy import UserError

# Raised by PEFT and by the renaming of gradient checkpointing in this transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
)
HIDDEN, LAYERS = 32, 2
WORDS = ["rain", "boats", "home", "letters", "library", "old", "town", "evening", "film"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--base and --data: a tiny BERT, and sentences whose label is whether they are about a film."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("training")
    base = tiny.make_base(folder / "base", num_labels=2)
    # The trained tokenizer of make_base isn't the same in every process; whole words are.
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(base)
    draw = random.Random(0)
    for split, count in (("train", 160), ("dev", 31)):
        rows = []
        for number in range(count):
            chosen = [*draw.choices(WORDS[:-1], k=draw.randint(3, 9)), *["film"] * (number % 2)]
            draw.shuffle(chosen)
            rows.append({"sentence": " ".join(chosen), "label": number % 2})
        file = folder / "sst2" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))
    return ["--base", str(base), "--data", str(folder), "--base-name", str(base)]


def train(files: list[str], out: Path, *arguments: str) -> dict[str, Any]:
    defaults = ["--batch", "8", "--epochs", "3", "--learning-rate", "1e-2", "--out", str(out)]
    return train_glue.train(train_glue.arguments([*files, *defaults, *arguments]))


SIZES = {
    # R (K + N) for each target; a filter has 1 + 2F vectors of N; DoRA a magnitude for each output.
    "loratrf": LAYERS * (3 * (2 * HIDDEN) + 5 * HIDDEN),
    "lora": LAYERS * 3 * (2 * HIDDEN),
    "dora": LAYERS * (3 * (2 * HIDDEN) + HIDDEN),
    "head": 0,
}


@pytest.mark.parametrize("method", train_glue.METHODS)
def test_what_is_saved_scores_what_was_reported(method: str, files: list[str], tmp_path: Path) -> None:
    options = ["--method", method, "--targets", "query", "--rank", "3", "--filter-rank", "2", "--dropout", "0.1"]
    results = train(files, tmp_path, *options)
    assert results["trained_parameters"] == {"adapter": SIZES[method], "head": 2 * HIDDEN + 2}
    assert results["rows"] == {"training": 144, "held_out": 16}
    assert results["chosen_epoch"] == 1 + int(np.argmax(results["held_out_by_epoch"]))
    losses = results["loss_by_epoch"]
    assert len(losses["training"]) == len(losses["held_out"]) == len(results["held_out_by_epoch"])
    if method == "head":
        assert not any(tmp_path.iterdir())
        return
    assert results["dev"]["accuracy"] == pytest.approx(accuracy(files, tmp_path, "dev"), abs=1e-4)


def accuracy(files: list[str], adapter: Path, split: str, rows: Any = slice(None)) -> float:
    """Of a saved adapter, row by row: nothing that padding or batching could hide."""
    import transformers
    from peft import PeftModel

    tokenizer = transformers.AutoTokenizer.from_pretrained(files[1])
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(files[1], num_labels=2)
    model = PeftModel.from_pretrained(model, adapter).eval()
    chosen = np.array(glue.read(Path(files[3]), "sst2", split))[rows]
    with torch.no_grad():
        guesses = [int(model(**tokenizer(row["sentence"], return_tensors="pt")).logits.argmax()) for row in chosen]
    return float(np.mean([guess == row["label"] for guess, row in zip(guesses, chosen, strict=True)]))


def test_the_best_epoch_is_kept(files: list[str], tmp_path: Path) -> None:
    # Labels that mean nothing: the held-out score goes up and down.
    draw = random.Random(1)
    (tmp_path / "sst2").mkdir()
    for split in ("train", "dev"):
        rows = [row | {"label": draw.randint(0, 1)} for row in glue.read(Path(files[3]), "sst2", split)]
        (tmp_path / "sst2" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [*files[:3], str(tmp_path), *files[4:]]
    results = train(files, tmp_path / "out", "--epochs", "8", "--patience", "8")
    scores = results["held_out_by_epoch"]
    assert scores[-1] < max(scores), f"the last epoch is the best: {scores}; take another seed"
    held_out = np.random.default_rng(0).permutation(160)[:16]
    assert accuracy(files, tmp_path / "out", "train", held_out) == pytest.approx(max(scores), abs=1e-4)


def test_training_learns_and_the_seed_decides(files: list[str], tmp_path: Path) -> None:
    options = ["--filter-targets", "output.dense", "--epochs", "8", "--patience", "8"]
    first, again, other = (train(files, tmp_path / seed, *options, "--seed", seed[0]) for seed in ("0a", "0b", "1"))
    assert first["dev"]["accuracy"] > 0.75  # majority: 0.52
    same = ("dev", "held_out_by_epoch")
    assert [first[name] for name in same] == [again[name] for name in same]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("0a", "0b", "1")]
    assert weights[0] == weights[1] != weights[2]
    assert other["settings"]["seed"] == 1
    config = json.loads((tmp_path / "0a" / "adapter_config.json").read_text())
    assert config["filter_target_modules"] == ["output.dense"]


def test_training_stops_where_the_held_out_score_does(files: list[str], tmp_path: Path) -> None:
    results = train(files, tmp_path, "--learning-rate", "0", "--epochs", "9", "--patience", "2")
    assert len(results["held_out_by_epoch"]) == 3  # one that sets the mark, two that don't pass it
    assert results["chosen_epoch"] == 1


@pytest.mark.parametrize(
    ("option", "words"),
    [("--targets", "--targets querry: .*target"), ("--filter-targets", r"^filter_target_modules is \['querry'\]")],
)
def test_targets_that_match_nothing_are_named(option: str, words: str, files: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        train(files, tmp_path, option, "querry")


def test_tables_of_the_method_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    config = "--method lora"
    names = bench_method.REFERENCE, bench_method.BEST, bench_method.HALF, "unfinished"
    monkeypatch.setattr(bench_method, "COMPARED", dict.fromkeys(names, config))
    rows = [
        {"config": name, "task": task, "seed": seed, "parameters": count, "dev": start + step * seed + 0.1 * place}
        for name, count, start, step in zip(
            names, (200, 100, 80, 50), (0.5, 0.6, 0.5, 0.9), (0.01, 0.02, 0.01, 0.01), strict=True
        )
        for seed in (0, 1, 2)
        for place, task in enumerate(("rte", "mrpc", "cola", "sst2"))
        if (name, seed, task) != ("unfinished", 2, "cola")
        if (name, task) != ("LoRA R=4", "rte")
    ]
    lines = bench_method.compared(rows).splitlines()
    assert lines[2:] == [
        "| LoRA R=8 | 200 | 100.0% | 51.0 ± 1.0 | 61.0 ± 1.0 | 71.0 ± 1.0 | 81.0 ± 1.0 | 66.0 ± 1.0 | 71.0 ± 1.0 |",
        "| LoRATRF | 100 | 50.0% | 62.0 ± 2.0 | 72.0 ± 2.0 | 82.0 ± 2.0 | 92.0 ± 2.0 | 77.0 ± 2.0 | 82.0 ± 2.0 |",
        "| LoRA R=4 | 80 | 40.0% | not trained | 61.0 ± 1.0 | 71.0 ± 1.0 | 81.0 ± 1.0 | not trained | 71.0 ± 1.0 |",
        "",
        # 10, 11, 12 points over the seeds: 1 / √3
        "- LoRATRF - LoRA R=8, mean of rte, mrpc, cola, sst2: +11.00 ± 0.58 (standard error)",
        "- LoRATRF - LoRA R=8, mean of mrpc, cola, sst2: +11.00 ± 0.58 (standard error)",
        "- LoRA R=4 - LoRA R=8, mean of mrpc, cola, sst2: +0.00 ± 0.00 (standard error)",
        "- LoRATRF - LoRA R=4, mean of mrpc, cola, sst2: +11.00 ± 0.58 (standard error)",
    ]


# R (K + N) of the seven linear layers of a tiny LLaMA's two; a filter has 1 + 2F vectors of N.
LLAMA_RANK = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
LLAMA_FILTERS = 2 * 2 * 64


def test_training_of_the_language_model_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_method_lm, "BASE", tiny_llm.make_base(tmp_path / "base"))
    monkeypatch.setattr(bench_method_lm, "STEPS", 3)
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 200, (length,), generator=draw) for length in (64 * 128, 300, 300)]
    monkeypatch.setattr(bench_method_lm, "corpus", lambda: (None, None, *parts))
    threads = torch.get_num_threads()
    try:
        rows = {name: bench_method_lm.train((name, 0)) for name in bench_method_lm.COMPARED}
        again = bench_method_lm.train((bench_method_lm.BEST, 0))
    finally:
        torch.set_num_threads(threads)
    assert again == rows[bench_method_lm.BEST]
    assert [rows[name]["parameters"] for name in ("LoRA R=2", bench_method_lm.BEST, "s = 1")] == [
        2 * LLAMA_RANK,
        4 * LLAMA_RANK + 11 * LLAMA_FILTERS,
        4 * LLAMA_RANK + 10 * LLAMA_FILTERS,
    ]
    # Every configuration is a training of its own.
    assert len({row["test"] for row in rows.values()}) == len(rows)


def test_loss_of_the_language_model_benchmark(tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llm.make_base(tmp_path / "base"))
    tokens = torch.randint(0, 200, (70 * 128 + 5,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logs = model(tokens[: 70 * 128].view(70, 128)).logits.double().log_softmax(-1)
    targets = tokens[: 70 * 128].view(70, 128)[:, 1:, None]
    expected = -float(logs[:, :-1].gather(-1, targets).mean())
    assert bench_method_lm.loss(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_tables_of_the_language_model_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    names = bench_method_lm.REFERENCE, bench_method_lm.SAME_SIZE, bench_method_lm.BEST, "unfinished"
    monkeypatch.setattr(bench_method_lm, "COMPARED", {key: {} for key in names})
    found = {
        (name, seed): {"parameters": count, "test": start + step * seed}
        for name, count, start, step in zip(
            names, (200, 120, 100, 50), (3.0, 3.5, 3.2, 9), (0.1, 0.1, 0.2, 0), strict=True
        )
        for seed in (0, 1, 2)
        if (name, seed) != ("unfinished", 1)
    }
    assert bench_method_lm.compared(found).splitlines()[2:] == [
        "| LoRA R=8 | 200 | 100.0% | 3.1000 |  | -0.5000 ± 0.0000 | -0.3000 ± 0.0577 |",
        "| LoRA R=5 | 120 | 60.0% | 3.6000 | +0.5000 ± 0.0000 |  | +0.2000 ± 0.0577 |",
        # 0.2, 0.3, 0.4 over the seeds: 0.1 / √3
        "| LoRATRF | 100 | 50.0% | 3.4000 | +0.3000 ± 0.0577 | -0.2000 ± 0.0577 |  |",
    ]
