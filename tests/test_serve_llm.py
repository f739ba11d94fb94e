"""loratrf-serve on a language model: PEFT's tokens through OpenAI's client, streams, chats, and who goes away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import peft
import pytest
import torch
import transformers

from loratrf_deploy.serving.generator import until
from serving import Served, check_described, fault, serving
from shared import edit_json

PROMPTS = ["the plot is", "rain fell on", "she wrote 3 letters"]
COUNT = 12
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Team(NamedTuple):
    """A language model of two adapters, and what PEFT makes of PROMPTS by adapter; the base is "base"."""

    folder: Path
    base: Path
    expected: dict[str, list[str]]


def export_team(folder: Path, base: Path, adapters: dict[str, Path]) -> None:
    from loratrf_deploy.export import ExportOptions, export_grouped

    export_grouped(adapters, folder / "model.onnx", ExportOptions(base_model=base, check=False))
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)


def greedy(model: Any, row: list[int], count: int = COUNT) -> list[int]:
    with torch.no_grad():
        made = model.generate(torch.tensor([row]), max_new_tokens=count, do_sample=False)
    return made[0, len(row) :].tolist()


@pytest.fixture(scope="module")
def team(make_llm: Callable, made_once: Callable) -> Team:
    made = {name: make_llm("llama", "lora", seed=seed) for seed, name in enumerate(("fr", "de"), 1)}
    base = made["fr"][0]
    folder = made_once(export_team, base, {name: adapter for name, (_, adapter) in made.items()})
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    expected = {}
    for name in ("fr", "de", "base"):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
        if name != "base":
            model = peft.PeftModel.from_pretrained(model, str(made[name][1])).eval()
        rows = [greedy(model, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
        expected[name] = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert len({json.dumps(texts) for texts in expected.values()}) == 3
    return Team(folder, base, expected)


@pytest.fixture(scope="module")
def served(team: Team) -> Iterator[Served]:
    with serving(team.folder, "--adapters-dir", team.folder, "--name", "base", "--queue", "6") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_openais_client_gets_pefts_tokens_of_every_adapter(client: openai.OpenAI, team: Team) -> None:
    def ask(name: str) -> list[str]:
        answer = client.completions.create(model=name, prompt=PROMPTS, max_tokens=COUNT)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    with ThreadPoolExecutor(3) as pool:  # at once
        names = ["fr", "de"]
        assert dict(zip(names, pool.map(ask, names), strict=True)) == {name: team.expected[name] for name in names}
    assert ask("base") == team.expected["base"]


def test_a_stream_is_the_same_text_with_its_usage(client: openai.OpenAI, team: Team) -> None:
    how: dict[str, Any] = {"model": "fr", "prompt": PROMPTS[0], "max_tokens": COUNT, "stream": True, "echo": True}
    chunks = list(client.completions.create(**how, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text == PROMPTS[0] + team.expected["fr"][0]
    assert len(chunks) > 3
    assert chunks[-2].choices[0].finish_reason in ("length", "stop")
    usage = chunks[-1].usage
    tokenizer = transformers.AutoTokenizer.from_pretrained(team.base)
    assert usage is not None
    assert usage.prompt_tokens == len(tokenizer(PROMPTS[0])["input_ids"])
    assert 0 < usage.completion_tokens <= COUNT


def test_tokens_stops_and_seeds(client: openai.OpenAI, team: Team) -> None:
    row = transformers.AutoTokenizer.from_pretrained(team.base)(PROMPTS[0])["input_ids"]
    right = team.expected["fr"][0]
    whole = client.completions.create(model="fr", prompt=row, max_tokens=COUNT).choices[0]
    assert whole.text == right
    stop = right[2:4]
    cut = client.completions.create(model="fr", prompt=row, max_tokens=COUNT, stop=[stop, "never"]).choices[0]
    assert (cut.text, cut.finish_reason) == (right[: right.find(stop)], "stop")
    how: dict[str, Any] = {"model": "fr", "prompt": row, "max_tokens": 20, "temperature": 1.5}
    drawn = [client.completions.create(**how, seed=seed).choices[0].text for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_chats_go_through_the_template(client: openai.OpenAI, team: Team, served: Served) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(team.base)
    tokenizer.chat_template = TEMPLATE
    messages: Any = [{"role": "user", "content": "rain ?"}, {"role": "assistant", "content": "where"}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "town"}]})
    plain = [*messages[:2], {"role": "user", "content": "the town"}]
    text = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    how: dict[str, Any] = {"model": "de", "messages": messages}
    answer = client.chat.completions.create(**how, max_completion_tokens=COUNT)
    as_text = client.completions.create(model="de", prompt=text, max_tokens=COUNT)
    assert answer.choices[0].message.content == as_text.choices[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer(text)["input_ids"])
    streamed = list(client.chat.completions.create(**how, max_tokens=COUNT, stream=True))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert said == answer.choices[0].message.content
    assert streamed[0].choices[0].delta.role == "assistant"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    fault(served.post("/v1/chat/completions", model="de", messages=image), 400)


BAD = {
    "unknown": ({"model": "en", "prompt": "x"}, 404, "There are: base, de, fr."),
    "long": ({"model": "fr", "prompt": [5] * 256}, 400, "The prompt has 256 tokens, and the model's context holds 256"),
    "more": (
        {"model": "fr", "prompt": [5] * 6, "max_tokens": 251},
        400,
        "max_tokens is 251; the model's context holds",
    ),
    "empty": ({"model": "fr", "prompt": ""}, 400, "The prompt is empty"),
    "no token": ({"model": "fr", "prompt": [5, 9999]}, 400, "token 9999, the model knows 0 to 300"),
    "hot": ({"model": "fr", "prompt": "x", "temperature": 3}, 400, "temperature"),
    "two": ({"model": "fr", "prompt": "x", "n": 2}, 400, "n: Input should be 1"),
    "streams": ({"model": "fr", "prompt": ["x", "y"], "stream": True}, 400, "stream is of one prompt, and 2 are given"),
    "half": ({"model": "fr", "prompt": "\ud800"}, 400, "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_a_paragraph(served: Served, name: str) -> None:
    body, status, words = BAD[name]
    assert words in fault(served.post("/v1/completions", **body), status)
    if body.get("prompt") != ["x", "y"]:  # a status of its own, not a stream that ends early
        assert words in fault(served.post("/v1/completions", **body | {"stream": True}), status)


def test_who_goes_away_frees_the_place(served: Served) -> None:
    body = {"model": "fr", "prompt": "x", "max_tokens": 250, "temperature": 2.0, "stream": True}
    for _ in range(6):
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            next(response.iter_lines())
    end = time.monotonic() + 20
    while served.metric("loratrf_requests_running") > 1 or served.metric("loratrf_rows_waiting"):
        assert time.monotonic() < end
        time.sleep(0.02)
    made = served.metric("loratrf_generated_tokens_total")
    time.sleep(0.2)
    assert served.metric("loratrf_generated_tokens_total") == made


def test_more_than_may_wait_are_told_when_to_come_back(served: Served) -> None:
    long = {"model": "fr", "prompt": ["the plot is"] * 4, "max_tokens": 240}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: served.post("/v1/completions", **long), range(8)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 8
    for answer in refused:
        assert "of at most 6 wait already" in fault(answer, 429, "queue_full")
        assert answer.headers["retry-after"] == "1"
    texts = {choice["text"] for answer in answers if answer not in refused for choice in answer.json()["choices"]}
    assert len(texts) == 1


def test_the_description_holds_under_schemathesis(served: Served) -> None:
    check_described(served, 8)


def test_nothing_of_a_stop_is_shown() -> None:
    assert until("abc", []) == ("abc", "", False)
    assert until("abcST", ["STOP"]) == ("abc", "ST", False)
    assert until("abcSTOPx", ["STOP"]) == ("abc", "", True)
    assert until("abcSTO", ["STOP", "bc"]) == ("a", "", True)
    assert until("S", ["STOP", "XS"]) == ("", "S", False)
    assert until("é", ["é!"]) == ("", "é", False)
