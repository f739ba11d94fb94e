"""loratrf-serve on an encoder: PEFT's answers through OpenAI's client, every bad request, adapters that come and go."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import openai
import peft
import pytest
import torch
import transformers

from browser import CHROMIUM, browse
from loratrf_deploy.cli.serve import main
from serving import Served, check_described, fault, serving
from shared import ask_while

TEXTS = [
    "where is the library ?",
    "rain fell on the harbour while the boats came home",
    "a gripping film",
    "she wrote 3 letters , sent 2 and kept 1 . what a wonderful evening , and how short it was ! the plot is thin",
]
MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "spam": ("text-classification", {"labels": 2, "modules_to_save": ["classifier", "pooler"]}),
    "topic": ("text-classification", {"labels": 5, "modules_to_save": ["classifier", "pooler"], "r": 7}),
    "similar": ("feature-extraction", {}),
    "ner": ("token-classification", {"labels": 4, "modules_to_save": ["classifier"]}),
}


class Team(NamedTuple):
    """A model of several adapters and tasks, and PEFT's answers to TEXTS by adapter."""

    folder: Path
    expected: dict[str, np.ndarray]


def export_team(folder: Path, base: Path, adapters: dict[str, Path]) -> None:
    from loratrf_deploy.export import ExportOptions, export_grouped

    export_grouped(adapters, folder / "model.onnx", ExportOptions(base_model=base, pooling="mean", check=False))


def peft_answers(base: Path, adapter: Path, task: str, labels: int | None) -> np.ndarray:
    """Probabilities, or the tokens' mean, of each text by itself: transformers and PEFT alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    classes = transformers.AutoModelForSequenceClassification if labels else transformers.AutoModel
    sizes = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}
    model = peft.PeftModel.from_pretrained(classes.from_pretrained(base, **sizes), str(adapter)).eval()
    with torch.no_grad():
        outs = [model(**tokenizer(text, return_tensors="pt")) for text in TEXTS]
    rows = [out.logits.softmax(-1)[0] if labels else out.last_hidden_state[0].mean(0) for out in outs]
    return torch.stack(rows).numpy()


@pytest.fixture(scope="module")
def team(make_tiny: Callable, made_once: Callable) -> Team:
    made = {
        name: make_tiny("bert", "feature-extraction", "lora", for_task=task, seed=seed, **options)
        for seed, (name, (task, options)) in enumerate(MEMBERS.items(), 1)
    }
    base = made["spam"][0]
    folder = made_once(export_team, base, {name: adapter for name, (_, adapter) in made.items()})
    expected = {
        name: peft_answers(base, made[name][1], task, options.get("labels"))
        for name, (task, options) in MEMBERS.items()
        if name != "ner"
    }
    return Team(folder, expected)


@pytest.fixture(scope="module")
def served(team: Team) -> Iterator[Served]:
    with serving(team.folder, "--adapters-dir", team.folder, "--name", "tiny") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def probabilities(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([item["probs"] for item in response.json()["data"]])


def test_openais_client_gets_pefts_embeddings(client: openai.OpenAI, team: Team) -> None:
    for form in (openai.omit, "float", "base64"):  # unasked, the client asks for base64 and decodes it
        answer = client.embeddings.create(model="similar", input=TEXTS, encoding_format=form)
        found = [item.embedding for item in answer.data]
        if form == "base64":
            assert all(isinstance(item, str) for item in found)
            continue
        np.testing.assert_allclose(found, team.expected["similar"], atol=2e-6)
        assert [item.index for item in answer.data] == [0, 1, 2, 3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(team.folder)
    rows = tokenizer(TEXTS)["input_ids"]
    assert answer.usage.prompt_tokens == sum(map(len, rows))
    of_tokens = client.embeddings.create(model="similar", input=rows[1], dimensions=7)
    np.testing.assert_allclose(
        [item.embedding for item in of_tokens.data], team.expected["similar"][1:2, :7], atol=2e-6
    )


def test_the_base_answers_too_and_without_an_adapter(client: openai.OpenAI, team: Team) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(team.folder)
    base = client.embeddings.create(model="tiny", input=TEXTS[0]).data[0].embedding
    assert len(base) == 32
    assert np.abs(np.array(base) - team.expected["similar"][0]).max() > 0.01
    assert tokenizer(TEXTS[0])["input_ids"]


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI, served: Served) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert [*listed] == ["tiny", "ner", "similar", "spam", "topic"]
    assert served.adapters == ["ner", "similar", "spam", "topic"]
    assert listed["spam"].parent == "tiny"
    assert client.models.retrieve("spam").id == "spam"
    with pytest.raises(openai.NotFoundError, match=r"There is no model 'ham' here\. There are: tiny, ner, similar"):
        client.models.retrieve("ham")


def test_requests_for_many_adapters_at_once_get_pefts_answers(served: Served, team: Team) -> None:
    before = served.metric("loratrf_batch_rows_sum"), served.metric("loratrf_batch_rows_count")

    def ask(number: int) -> None:
        name, at = ("spam", "topic", "similar")[number % 3], number % len(TEXTS)
        if name == "similar":
            found = served.post("/v1/embeddings", model=name, input=TEXTS[at]).json()["data"][0]["embedding"]
            np.testing.assert_allclose(found, team.expected[name][at], atol=2e-6)
        else:
            found = probabilities(served.post("/classify", model=name, input=TEXTS[at]))
            np.testing.assert_allclose(found, team.expected[name][at : at + 1], atol=2e-6)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(96)))
    rows = served.metric("loratrf_batch_rows_sum") - before[0]
    assert rows == 96
    assert served.metric("loratrf_batch_rows_count") - before[1] < rows
    assert served.metric("loratrf_adapters_resident") == 3
    assert served.metric("loratrf_requests_total") >= 96


def test_an_answer_waits_for_no_acknowledgement(served: Served) -> None:
    """A second write that Nagle's algorithm holds back would cost each of them 40 ms."""
    times = []
    with httpx.Client() as client:
        for _ in range(20):
            begin = time.perf_counter()
            assert client.post(f"{served.url}/classify", json={"model": "spam", "input": "x"}).status_code == 200
            times.append(time.perf_counter() - begin)
    assert sorted(times)[5] < 0.03


def test_classes_have_the_adapters_labels(served: Served, team: Team) -> None:
    answer = served.post("/classify", model="topic", input=TEXTS).json()
    for item, wanted in zip(answer["data"], team.expected["topic"], strict=True):
        assert item["labels"] == [f"LABEL_{at}" for at in range(5)]
        assert item["label"] == f"LABEL_{wanted.argmax()}"
        assert item["num_classes"] == 5


EMBED = "/v1/embeddings"
BAD = {
    "unknown": ("/classify", {"model": "ham", "input": "x"}, 404, "There are: tiny, ner, similar, spam, topic."),
    "a path": ("/classify", {"model": "../spam", "input": "x"}, 404, "no model '../spam' here"),
    "a NUL": ("/classify", {"model": "spam\0", "input": "x"}, 404, "There are: tiny"),
    "a long name": ("/classify", {"model": "x" * 100_000, "input": "x"}, 404, "[...]"),
    "long": (EMBED, {"model": "similar", "input": "rain " * 99}, 400, "101 tokens, and the model reads 1 to 64"),
    "no tokens": (EMBED, {"model": "similar", "input": []}, 400, "input"),
    "a token": (EMBED, {"model": "similar", "input": [5, 160]}, 400, "has token 160, the model knows 0 to 1"),
    "many": (EMBED, {"model": "similar", "input": ["x"] * 2048}, 400, "has 2048 inputs, and at most 1024"),
    "wide": (EMBED, {"model": "similar", "input": "x", "dimensions": 33}, 400, "is 33, and the model's embeddings"),
    "no text": (EMBED, {"model": "similar", "input": 7}, 400, "input"),
    "no model": (EMBED, {"input": "x"}, 400, "model: Field required"),
    "another task": ("/classify", {"model": "similar", "input": "x"}, 400, "'similar' is for feature-extraction."),
    "tokens' task": (EMBED, {"model": "ner", "input": "x"}, 400, "'ner' is for token-classification."),
    "no such path": ("/v1/completions", {"model": "spam", "prompt": "x"}, 404, "There is no /v1/completions here"),
    "loading": ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "spam.onnx_adapter"}, 404, "There is no"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_a_paragraph(served: Served, name: str) -> None:
    path, body, status, words = BAD[name]
    assert words in fault(served.post(path, **body), status)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"no json", 400),
        (b'{"model": "spam"', 400),
        (b"[1, 2]", 400),
        (b"", 400),
        (b"\xff\xfe", 400),
        (b'{"model": "\\ud800", "input": "x"}', 404),
        (b'{"model": "spam", "input": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b'{"model": "similar", "input": "x", "dimensions": ' + b"9" * 5000 + b"}", 400),
        (b'{"model": "similar", "input": "x", "dimensions": NaN}', 400),
    ],
)
def test_bodies_that_are_no_request(served: Served, raw: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    fault(httpx.post(f"{served.url}/v1/embeddings", content=raw, headers=headers), status)


def test_json_that_doesnt_say_so_is_told(served: Served) -> None:
    raw = b'{"model": "similar", "input": "x"}'
    response = httpx.post(f"{served.url}/v1/embeddings", content=raw, headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in fault(response, 400)
    assert "is not for GET" in fault(httpx.get(f"{served.url}/classify"), 405)


def test_what_is_too_large_is_refused_and_others_dont_notice(served: Served, team: Team) -> None:
    mega = b"x" * (1 << 20)

    def chunks() -> Iterator[bytes]:
        yield from [mega] * 100

    length = {"Content-Length": str(100 << 20)}
    for headers in (length, {}):  # declared, and found out
        message = fault(httpx.post(f"{served.url}/classify", content=chunks(), headers=headers, timeout=60), 413)
        assert "and at most 4194304 are read" in message
    headers = {f"x-{number}": "y" for number in range(10_000)}
    assert "at most 100" in fault(httpx.post(f"{served.url}/classify", json={}, headers=headers), 431)
    np.testing.assert_allclose(
        probabilities(served.post("/classify", model="spam", input=TEXTS)), team.expected["spam"], atol=2e-6
    )


def test_the_description_holds_under_schemathesis(served: Served) -> None:
    check_described(served)


def test_adapters_come_and_go_and_every_answer_is_right(team: Team, tmp_path: Path) -> None:
    """Room for one adapter of three, one that is loaded and unloaded all the time, one that is damaged."""
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name in ("spam", "topic", "similar"):
        shutil.copy(team.folder / f"{name}.onnx_adapter", folder)
    (folder / "sub").mkdir()
    shutil.copy(team.folder / "spam.onnx_adapter", folder / "sub" / "also.onnx_adapter")
    damaged = bytearray((folder / "topic.onnx_adapter").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "damaged.onnx_adapter").write_bytes(damaged)
    (folder / "out.onnx_adapter").symlink_to(team.folder / "ner.onnx_adapter")
    largest = max(path.stat().st_size for path in folder.glob("*.onnx_adapter"))
    options = ["--adapters-dir", folder, "--allow-loading", "--max-bytes", largest + 1000]
    with serving(team.folder, *options) as server:
        assert server.adapters == ["damaged", "similar", "spam", "topic"]  # what a link brings in is none

        def load(name: str, path: str, **more: Any) -> httpx.Response:
            return server.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, **more)

        def churn(turn: int) -> None:
            assert load("new", "sub/also.onnx_adapter").status_code == 200
            assert server.post("/v1/unload_lora_adapter", lora_name="new").status_code == 200

        def ask(number: int) -> None:
            for turn in range(6):
                at = (number + turn) % len(TEXTS)
                for name in ("spam", "topic"):
                    found = probabilities(server.post("/classify", model=name, input=TEXTS[at]))
                    np.testing.assert_allclose(found, team.expected[name][at : at + 1], atol=2e-6)
                response = server.post("/classify", model="new", input=TEXTS[at])
                if response.status_code != 404:
                    np.testing.assert_allclose(probabilities(response), team.expected["spam"][at : at + 1], atol=2e-6)
                assert "its checksum is wrong" in fault(server.post("/classify", model="damaged", input="x"), 500)

        ask_while(churn, ask, threads=6)
        assert server.metric("loratrf_adapter_evictions_total") > 2
        assert server.metric("loratrf_adapters_resident") <= 1
        assert server.metric("loratrf_requests_running") == 1  # the one that asks

        for path in ("../x.onnx_adapter", "/etc/passwd", "sub", "out.onnx_adapter", "sub/\0.onnx_adapter"):
            assert "within --adapters-dir" in fault(load("x", path), 400)
        for name in ("", ".x", "a/b", "a\\b", "x" * 201, team.folder.name):
            assert "lora_name" in fault(load(name, "spam.onnx_adapter"), 400)
        assert "no such file" in fault(load("x", "gone.onnx_adapter"), 400)
        assert "checksum" in fault(load("x", "damaged.onnx_adapter"), 400)
        assert '"load_inplace": true' in fault(load("spam", "topic.onnx_adapter"), 400)
        assert load("spam", "topic.onnx_adapter", load_inplace=True).status_code == 200
        found = probabilities(server.post("/classify", model="spam", input=TEXTS))
        np.testing.assert_allclose(found, team.expected["topic"], atol=2e-6)
        assert server.post("/v1/unload_lora_adapter", lora_name="spam").status_code == 200
        fault(server.post("/classify", model="spam", input="x"), 404)
        fault(server.post("/v1/unload_lora_adapter", lora_name="spam"), 404)
        (folder / "similar.onnx_adapter").rename(folder / "later.onnx_adapter")
        assert server.post("/v1/embeddings", model="later", input="x").status_code == 200


def test_a_server_that_is_stopped_answers_first(team: Team) -> None:
    texts = [TEXTS[1]] * 500
    given = f"similar={team.folder / 'similar.onnx_adapter'}"
    with serving(team.folder, "--adapter", given) as server, ThreadPoolExecutor(2) as pool:
        body = {"model": "similar", "input": texts}
        running = pool.submit(httpx.post, f"{server.url}/v1/embeddings", json=body, timeout=60)
        while server.metric("loratrf_batch_rows_sum") < 1:
            time.sleep(0.002)
        assert server.stop() == 0
        assert not running.exception()
        found = [item["embedding"] for item in running.result().json()["data"]]
        np.testing.assert_allclose(found, [team.expected["similar"][1]] * 500, atol=2e-6)


def test_a_swappable_model_has_one_adapter_a_batch(make_export: Callable) -> None:
    """Three adapters of one model whose runs have one each, in requests that come at once."""
    exported = make_export("bert", "text-classification", "loratrf", swappable="base")
    (file,) = exported.folder.glob("*.onnx_adapter")
    names = [option for name in ("a", "b") for option in ("--adapter", f"{name}={file}")]
    with serving(exported.folder, *names, "--name", "base") as server, ThreadPoolExecutor(8) as pool:
        asked = [(name, text) for name in ("a", "b", "base") for text in TEXTS] * 3
        answers = list(pool.map(lambda one: probabilities(server.post("/classify", model=one[0], input=one[1])), asked))
        by_one = {}
        for one, answer in zip(asked, answers, strict=True):
            np.testing.assert_allclose(answer, by_one.setdefault(one, answer), atol=2e-6)
        for text in TEXTS:
            np.testing.assert_allclose(by_one["a", text], by_one["b", text], atol=2e-6)
            assert np.abs(by_one["a", text] - by_one["base", text]).max() > 1e-3
        assert "exported with --pooling" in fault(server.post("/v1/embeddings", model="a", input="x"), 400)
    wanted = peft_swapped(exported)
    np.testing.assert_allclose(np.concatenate([by_one["a", text] for text in TEXTS]), wanted, atol=2e-6)


def peft_swapped(exported: Any) -> np.ndarray:
    import loratrf_deploy.peft  # noqa: F401  # registers LORATRF

    return peft_answers(exported.base, exported.adapter, "text-classification", 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--allow-loading"], "--allow-loading takes files of --adapters-dir alone"),
        (["--adapters-dir", "nowhere"], "--adapters-dir nowhere is no folder"),
        (["--adapter", "x=nowhere.onnx_adapter"], "nowhere.onnx_adapter"),
        (["--adapter", "x"], "--adapter has 'x', expected NAME=PATH"),
        (["--name", "x", "--adapter", "x={file}"], "names 'x', which is what the base is called"),
        (["--port", "{port}"], "Can't listen at 127.0.0.1, port {port}: Address already in use"),
        (["--port", "70000"], "--port: '70000' is no port, expected 0 to 65535"),
        (["--host", "256.1.1.1"], "Can't listen at 256.1.1.1"),
        (["--max-batch", "0"], "--max-batch: '0' is not a whole number over zero"),
    ],
)
def test_a_start_that_cant_be(team: Team, capsys: pytest.CaptureFixture, options: list[str], words: str) -> None:
    capsys.readouterr()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        known = {"port": taken.getsockname()[1], "file": team.folder / "spam.onnx_adapter"}
        assert main(["--model", str(team.folder), *(option.format(**known) for option in options)]) == 2
    said = capsys.readouterr().err
    assert words.format(**known) in said
    assert said.count("\n") == 1


def test_a_model_without_adapters_is_refused(make_export: Callable, capsys: pytest.CaptureFixture) -> None:
    model = make_export("bert", "text-classification", "loratrf", mode="separate").model
    capsys.readouterr()
    assert main(["--model", str(model)]) == 2
    assert "takes no adapters at run time (separate, float32" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_shows_answers_side_by_side(served: Served, tmp_path: Path) -> None:
    """The page itself, in Chromium, driven by a script that is put into it on its way."""
    shown = shown_for(served, tmp_path, TEXTS[0])
    assert [answer["name"] for answer in shown] == ["tiny", "ner", "similar", "spam"]
    by_name = {answer["name"]: answer["text"] for answer in shown}
    wanted = served.post("/classify", model="spam", input=TEXTS[0]).json()["data"][0]
    assert f"{100 * max(wanted['probs']):.1f} %" in by_name["spam"]
    assert wanted["label"] in by_name["spam"]
    assert "32 dimensions" in by_name["similar"]
    assert "is for token-classification" in by_name["ner"]
    assert all(answer["ms"].endswith(" ms") for answer in shown)


def shown_for(served: Served, root: Path, text: str) -> list[dict[str, str]]:
    """What the page shows of `text`: a proxy stands before the server, adds a script, and takes what that finds."""
    import queue
    from http.server import BaseHTTPRequestHandler

    found: queue.Queue[list[dict[str, str]]] = queue.Queue()
    script = """<script type="module">
      const later = (ms) => new Promise((done) => setTimeout(done, ms));
      while (document.querySelectorAll("#models input").length < 5) await later(20);
      document.querySelector("textarea").value = TEXT;
      document.querySelector("button").click();
      const answers = document.querySelector("#answers");
      while (!answers.dataset.done) await later(20);
      const shown = [...answers.children].map((box) => ({ name: box.querySelector("h2").firstChild.textContent,
        ms: box.querySelector("small").textContent, text: box.innerText }));
      await fetch("/found", { method: "POST", body: JSON.stringify(shown) });
    </script>""".replace("TEXT", json.dumps(text))

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(httpx.get(served.url + self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/found":
                found.put(json.loads(body))
                self.send_response(204)
                self.end_headers()
                return
            self.answer(httpx.post(served.url + self.path, content=body, headers={"Content-Type": "application/json"}))

        def answer(self, response: httpx.Response) -> None:
            content = response.content + (script.encode() if self.path == "/" else b"")
            self.send_response(response.status_code)
            self.send_header("Content-Type", response.headers["content-type"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return browse(Proxy, found, root)
