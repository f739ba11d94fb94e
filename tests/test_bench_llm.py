"""benchmarks/bench_llm.py on a tiny model, and what it compares with: peers.py answers, peer_models.py writes.

LORATRF_PEERS="llama.cpp=PYTHON openvino=PYTHON" runs the engines themselves; peers.py says how these are installed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_llm
import numpy as np
import peer_models
import peers
import pytest
import torch

import tiny_llm
from shared import PEERS, edit_tensors

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


class Sums:
    """An engine whose token is the prompt's sum times 10, plus the adapter; 1 s a row of prefill, 0.1 s of decode."""

    version, mixes = "sums 1", False

    def __init__(self, mixes: bool = False, ignores: bool = False) -> None:
        self.mixes, self.ignores, self.calls = mixes, ignores, list[list[int]]()

    def run(self, prompt: Any, tokens: int, adapters: list[int]) -> peers.Run:
        self.calls.append(adapters)
        if -1 in adapters and len({*adapters}) > 1:
            raise RuntimeError("a row\n without adapter")
        own = [adapters[0]] * len(adapters) if self.ignores else adapters
        made = [[10 * int(row.sum()) + adapter] * (tokens + 1) for row, adapter in zip(prompt, own, strict=True)]
        return peers.Run(1.0 * len(prompt), 0.1 * len(prompt), made, 0.01)


def test_rows_of_an_engine_that_cannot_mix_run_one_adapter_after_another() -> None:
    engine = Sums()
    request = {"prompt": [[1], [2], [3], [4]], "tokens": 1, "adapters": [7, 5, 7, -1]}
    answer = peers.answer(engine, request)
    assert engine.calls == [[-1], [5], [7, 7]]
    assert answer["tokens"] == [[17, 17], [25, 25], [37, 37], [39, 39]]  # each row's own, in the rows' order
    assert (answer["prefill"], answer["decode"]) == (4.0, pytest.approx(0.4))


@pytest.mark.parametrize(
    ("mixes", "adapters", "more"),
    [(True, [7, 5], {}), (False, [7, 7], {}), (False, [7, 5], {"together": True})],
    ids=["it can mix", "one adapter", "insisted on"],
)
def test_rows_run_together(mixes: bool, adapters: list[int], more: dict[str, Any]) -> None:
    engine = Sums(mixes)
    assert peers.answer(engine, {"prompt": [[1], [2]], "tokens": 1, "adapters": adapters, **more})["swap"] == 0.01
    assert engine.calls == [adapters]


def test_an_engines_error_is_an_answer() -> None:
    answer = peers.answer(Sums(), {"prompt": [[1], [2]], "tokens": 1, "adapters": [0, -1], "together": True})
    assert answer == {"error": "a row without adapter"}


@pytest.mark.parametrize(
    ("engine", "pair", "words"),
    [
        (Sums(), (0, 1), "each row has its own (first 17 of 17 tokens)"),
        (Sums(ignores=True), (0, 1), "no error, and both rows have the first row's"),
        (Sums(), (0, -1), "refused: a row without adapter"),
        (Sums(), (2, 2), "can't be told: both give the same tokens"),
    ],
)
def test_mixed_rows_are_tried(engine: Sums, pair: tuple[int, int], words: str) -> None:
    assert peers.mixed_rows(asked(engine), PROMPT, pair) == words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [[3] * 17, [3] * 17], "no error, and both rows have what neither has alone"),
        (lambda rows: [rows[0][:9] + [3] * 8, rows[1]], r"each row has its own (first 9 of 17 tokens)"),
        (lambda rows: rows[::-1], "no error, and rows that are not their own"),
        (lambda rows: [rows[0], [3] * 17], "no error, and rows that are not their own"),
    ],
    ids=["added up", "rounding decides at last", "swapped", "one is lost"],
)
def test_mixed_rows_are_held_against_what_each_has_alone(change: Callable[[Any], Any], words: str) -> None:
    ask = asked(Sums())

    def changed(prompt: Any, tokens: int, adapters: list[int], *, together: bool) -> dict[str, Any]:
        answer = ask(prompt, tokens, adapters, together=together)
        return answer if len({*adapters}) == 1 else answer | {"tokens": change(answer["tokens"])}

    assert peers.mixed_rows(changed, PROMPT, (1, 2)) == words


def asked(engine: Sums) -> Callable[..., dict[str, Any]]:
    def ask(prompt: Any, tokens: int, adapters: list[int], *, together: bool) -> dict[str, Any]:
        answer = peers.answer(engine, {"prompt": prompt, "tokens": tokens, "adapters": adapters, "together": together})
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    return ask


def test_a_process_that_ends_is_told_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)peers.py genai .*ended:.*genai_config.json"):
        peers.Process(sys.executable, ["genai", tmp_path])


def test_adapters_of_a_batch_change_from_round_to_round() -> None:
    assert [bench_llm.Contestant("x", 4, 1).adapters(3, round_) for round_ in (0, 1, 5)] == [[0] * 3, [1] * 3, [1] * 3]
    assert bench_llm.Contestant("x", 4, 2).adapters(5, 3) == [3, 0, 3, 0, 3]
    assert bench_llm.Contestant("x", 2, 2).adapters(1, 1) == [1]
    assert bench_llm.Contestant("x").adapters(2, 1) == [-1, -1]


def test_neighbours_turn_as_halves_did() -> None:
    """Rotary embeddings, with a query in either order, give the same products with a key."""
    draw = np.random.default_rng(0)
    heads, width, angle = 3, 8, draw.uniform(0, 6, 4)
    states = draw.standard_normal((2, 16)).astype(np.float32)
    query, key = (draw.standard_normal((heads * width, 16)).astype(np.float32) for _ in range(2))

    def halves(value: Any, at: int) -> Any:
        first, second = value.reshape(heads, 2, 4).swapaxes(0, 1)
        return np.concatenate(turned(first, second, at), -1)

    def neighbours(value: Any, at: int) -> Any:
        pairs = value.reshape(heads, 4, 2)
        return np.stack(turned(pairs[..., 0], pairs[..., 1], at), -1).reshape(heads, width)

    def turned(first: Any, second: Any, at: int) -> tuple[Any, Any]:
        cosine, sine = np.cos(at * angle), np.sin(at * angle)
        return first * cosine - second * sine, second * cosine + first * sine

    expected = (halves(query @ states[0], 5) * halves(key @ states[1], 2)).sum(-1)
    moved = (peer_models.neighbouring(weight, heads) for weight in (query, key))
    made = (neighbours(next(moved) @ states[0], 5) * neighbours(next(moved) @ states[1], 2)).sum(-1)
    np.testing.assert_allclose(made, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_are_read_without_torch(dtype: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    value = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    save_file({"w": value}, tmp_path / "model.safetensors")
    read = peer_models.read_tensors(tmp_path)["w"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, value.float().numpy())


def test_a_base_that_gguf_would_misread_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_parameters": rope}))
    with pytest.raises(
        RuntimeError, match=r"is a llama with .*llama3.*, expected a llama with plain rotary embeddings"
    ):
        peer_models.read_llama(tmp_path)


@pytest.mark.parametrize("engine", peers.PEERS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_peers_compute_what_pytorch_does(engine: str, tied: bool, tmp_path: Path) -> None:
    """In float32: greedy tokens of the base and of two adapters, alone and one adapter a row."""
    if engine not in PEERS:
        pytest.skip(f"LORATRF_PEERS names no Python of {engine}")
    import peft
    import transformers

    base = tiny_llm.make_base(tmp_path / "base", tie_word_embeddings=tied, rope_theta=700.0)
    if tied:  # else a head this large repeats the last token, whatever the layers say
        edit_tensors(
            base / "model.safetensors",
            lambda all_: {name: value / 20 if "embed" in name else value for name, value in all_.items()},
        )
    adapters = [tiny_llm.make_adapter(base, tmp_path / f"a{rank}", r=rank, lora_alpha=12, seed=rank) for rank in (3, 4)]
    expected = []
    for adapter in (*adapters, None):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
        made = model.generate(
            input_ids=torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        expected.append(made[0, len(PROMPT) :].tolist())
    assert len({*map(tuple, expected)}) == 3
    process = peers.Process(
        PEERS[engine], [engine, base, *adapters, "--folder", tmp_path / "made", "--weights", "float32"]
    )
    try:
        for number, own in enumerate(expected):
            answer = process.ask([PROMPT], 11, [(0, 1, -1)[number]])
            assert answer["tokens"] == [own]
            assert answer["prefill"] > 0
            assert answer["decode"] > 0
        assert process.ask([PROMPT] * 4, 11, [1, -1, 0, 1])["tokens"] == [expected[at] for at in (1, 2, 0, 1)]
    finally:
        process.close()


def test_the_whole_benchmark(
    make_llm: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    base, _ = make_llm("llama", "lora")
    out = tmp_path / "bench.json"
    command = ["bench_llm.py", "--base", base, "--ranks", "2", "--batches", "1", "2", "--runs", "1", "--rounds", "2"]
    command += ["--threads", "1", "--clock", "cpu", "--keep", tmp_path / "kept", "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).resolve().parent.parent)]))
    bench_llm.main()
    shown = capsys.readouterr().out
    (result,) = json.loads(out.read_text())
    kinds = ["merged LoRA", "separate LoRA", "swappable LoRA", "separate LoRATRF", "swappable LoRATRF"]
    mixed = ["mixed LoRA, 1 adapter", "mixed LoRA, 2 adapters", bench_llm.OWN, "mixed LoRA, no row adapted"]
    assert [*result["times"]] == [bench_llm.REFERENCE, *kinds, *mixed]
    for name, parts in result["times"].items():
        rows = [f"{part} {rows}" for rows in (1, 2) for part in ("prefill", "decode", "swap")]
        assert {*parts} == {part for part in rows if "swap" not in part or "swappable" in name}
        assert all(len(seconds) == 2 and min(seconds) >= 0 for seconds in parts.values())
        assert f"| {name}" in shown
    assert result["rows"]["mixed LoRA, 2 adapters, two adapters"].startswith("each row has its own")
    assert result["errors"]["separate LoRA"]["exact"] < 1e-5 < result["errors"][bench_llm.OWN]["exact"]
    assert "| swappable LoRA / separate LoRA |" in shown
    assert "R = F = 2 on all linear layers" in shown


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--peers", f"vllm={sys.executable}"], "expected NAME=PYTHON, NAME one of llama.cpp, openvino"),
        (["--peers", "openvino"], "--peers has openvino=, expected NAME=PYTHON"),
        (["--base", "nowhere"], "--base nowhere has no config.json"),
    ],
)
def test_options_that_cannot_be(
    option: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_llm.py", *option])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        bench_llm.arguments()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
