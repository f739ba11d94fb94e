"""Models that generate and that onnxruntime-genai's builder doesn't make: in stages, on ONNX Runtime alone."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny_stages
import torch

from loratrf_deploy import UserError, read_adapter
from loratrf_deploy.cli.generate import main as generate_main
from loratrf_deploy.cli.inspect import main as inspect_main
from loratrf_deploy.formats.manifest import MANIFEST, read_manifest
from loratrf_deploy.ops.schemas import DOMAIN
from loratrf_deploy.parity import check_parity
from loratrf_deploy.pytorch.base import load_base, load_tokenizer
from loratrf_deploy.pytorch.oracle import load_reference
from loratrf_deploy.runtime.chat import render
from loratrf_deploy.runtime.scores import Rules, choose
from loratrf_deploy.runtime.staged_session import Running, StagedSession
from shared import FRAMEWORKS, edit_json, run_python

PROMPT = "where is the library ?"
OPERATORS = {
    "lora": {"merged": None, "separate": "LowRank"},
    "loratrf": {"merged": "TaskFilter", "separate": "LoraTrf"},
}


FAMILIES = [
    *(("gpt2", "lora", "separate"), ("gpt2", "loratrf", "merged")),
    *(("t5", "loratrf", "separate"), ("bart", "lora", "merged")),
]
MORE = [
    *((family, kind, mode) for family in ("marian", *tiny_stages.CAUSAL[1:]) for kind, mode in [("lora", "separate")]),
    *((family, "loratrf", "merged") for family in ("t5", "falcon", "mixtral")),
]


@pytest.mark.parametrize(
    ("family", "kind", "mode"), [*FAMILIES, *(pytest.param(*which, marks=pytest.mark.slow) for which in MORE)]
)
def test_every_family(family: str, kind: str, mode: str, staged) -> None:
    made = staged(family, kind, mode)
    parity = read_manifest(made.folder / MANIFEST).parity
    assert parity is not None
    assert {check["status"] for check in parity.checks} == {"passed"}
    outputs = ["logits", "logits, token by token", "64 greedy tokens"]
    for library in ("with library", "without library"):
        assert [check["output"] for check in parity.checks if check["variant"] == library] == outputs
    for check in parity.checks:
        if str(check["output"]).startswith("logits") and check["variant"] != "base-off":
            assert float(check["relative"] or 0) < 1e-5, check
    op, counts = OPERATORS[kind][mode], dict[str, int]()
    for path in made.folder.glob("*.onnx"):
        for node in onnx.load(path, load_external_data=False).graph.node:
            if node.domain == DOMAIN:
                counts[node.op_type] = counts.get(node.op_type, 0) + 1
    layers = len(read_adapter(made.adapter).layers)
    assert counts == ({op: layers} if op else {})
    # PEFT's own generate() once more, and the text ends where its does.
    reference = load_reference(read_adapter(made.adapter), made.base).model
    session = StagedSession(made.folder)
    for seed in (1, 2):
        prompt = np.random.default_rng(seed).integers(3, 280, 5 + seed).tolist()
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            right = reference.generate(input_ids=ids, attention_mask=mask, max_new_tokens=64, do_sample=False)[0]
        given = prompt if session.continues else [reference.generation_config.decoder_start_token_id]
        tokens = list(session.generate_tokens(prompt, max_new_tokens=64))
        assert [*given, *tokens] == right.tolist()
        # It ends early where an end is likeliest, and isn't one word over and over.
        assert len(set(tokens)) > min(len(tokens), 64) / 8


def test_several_adapters_and_options_that_stages_do_not_have(refused, make_staged, tmp_path: Path) -> None:
    for family, word in (("gpt2", "GPT2LMHeadModel"), ("t5", "T5ForConditionalGeneration")):
        base, adapter = make_staged(family)
        command = ["--adapter", adapter, "--base-model", base]
        out = tmp_path / "out" / "model.onnx"
        options = [["--quantize", "int8"], ["--swappable", "base"], ["--device", "cuda"], ["--bundle-library"]]
        for option in options:
            message = refused(out, *command, *option)
            assert f"{option[0]} isn't for a {word}" in message
            assert f"Leave {option[0]} out" in message
        message = refused(out, "--adapters", f"a={adapter}", "--base-model", base)
        assert f"--adapters is not for a {word}" in message
    assert "the name that the encoder's file gets" in refused(tmp_path / "out" / "encoder.onnx", *command)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_without_a_task_type_the_class_says_it(family: str, make_staged) -> None:
    base, adapter = make_staged(family, "lora", task_type=None)
    loaded = load_base(read_adapter(adapter), base)
    assert loaded.task == "text2text-generation"
    assert type(loaded.model).__name__.endswith("ForConditionalGeneration")


_EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": ["q_proj"]}


def test_adapters_on_experts_are_not_kept_separate(refused, make_staged, tmp_path: Path) -> None:
    base, adapter = make_staged("mixtral", "lora", **_EXPERTS)
    command = ["--adapter", adapter, "--base-model", base, "--mode", "separate"]
    message = refused(tmp_path / "out" / "model.onnx", *command)
    assert "can't be kept separate: target_parameters" in message
    assert "Export it merged: --mode merged" in message


@pytest.mark.slow
def test_adapters_on_experts_merge(staged) -> None:
    made = staged("mixtral", "lora", "merged", **_EXPERTS)
    parity = read_manifest(made.folder / MANIFEST).parity
    assert parity is not None
    assert {check["status"] for check in parity.checks} == {"passed"}
    merged = [row.module for row in read_manifest(made.folder / MANIFEST).layers]
    assert len([name for name in merged if "experts" in name]) == 4


def test_a_weight_of_both_graphs_is_stored_once(staged) -> None:
    made = staged("t5", "loratrf")
    encoder = onnx.load(made.folder / "encoder.onnx", load_external_data=False)
    where = {entry.name: entry.external_data[0].value for entry in encoder.graph.initializer if entry.external_data}
    rows = 32 * (tiny_stages.VOCABULARY + 13) * 4
    assert [name for name, file in where.items() if file == "model.onnx.data"] == ["lm_head.weight"]
    assert (made.folder / "encoder.onnx.data").stat().st_size > 32 * 32 * 4
    both = sum((made.folder / f"{name}.onnx.data").stat().st_size for name in ("model", "encoder"))
    whole = sum(value.numel() for value in load_reference(read_adapter(made.adapter), made.base).model.parameters()) * 4
    assert both < whole + rows / 2


def test_keys_and_values_of_the_input_are_made_once(staged) -> None:
    """By the encoder's graph: the decoder's has no layer that makes them, and doesn't take what they are made of."""
    graph = ir.load(staged("t5", "loratrf").model).graph
    modules = {node.metadata_props.get("module", "") for node in graph}
    assert any(".EncDecAttention.q" in module for module in modules)
    assert not [module for module in modules if re.search(r"EncDecAttention\.[kv]\b", module)]
    names = [value.name for value in graph.inputs if not value.name.startswith(("past_key", "cross_key"))]
    assert sorted(names) == ["attention_mask", "decoder_input_ids"]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_transformers_own_runner_loads_the_folder(family: str, staged) -> None:
    from transformers import DynamicCache
    from transformers.exporters import ExportedModel

    made = staged(family, *(("loratrf",) if family == "t5" else ()))
    runners = ExportedModel.from_pretrained(made.folder).runners
    ids = torch.arange(3, 17).reshape(2, 7)
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    own = ids[:, :3]
    wanted = dict(feeds)
    if family == "t5":
        wanted["decoder_input_ids"] = own
        feeds = {**runners["encoder"](**feeds), "attention_mask": feeds["attention_mask"], "decoder_input_ids": own}
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(2, 4, 0, 8), torch.zeros(2, 4, 0, 8), layer)
    got = runners["decode"](**feeds, past_key_values=cache)["logits"]
    reference = load_reference(read_adapter(made.adapter), made.base).model
    with torch.no_grad():
        right = reference(**wanted).logits
    assert (got - right).abs().max() < 1e-5 * right.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_rows_of_a_batch_are_those_of_peft(family: str, staged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several lengths, as PEFT's own generate() has them padded: on the left, of an encoder on the right."""
    made = staged(family, *(("loratrf",) if family == "t5" else ()))
    reference, session = load_reference(read_adapter(made.adapter), made.base).model, StagedSession(made.folder)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 280, length).tolist() for length in (7, 3, 12, 3, 7)]
    ids, mask = np.full((5, 12), 2), np.zeros((5, 12), np.int64)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if family == "t5" else slice(12 - len(prompt), 12)
        ids[row, where], mask[row, where] = prompt, 1
    # A token that comes somewhere in the first row ends the others too, where they come to it.
    stops = (1, list(session.generate_tokens(prompts[0], max_new_tokens=9))[-1])
    session._rules = dataclasses.replace(session._rules, stops=stops)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        made_by_peft = reference.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=list(stops))
    right = made_by_peft[:, 1 if family == "t5" else 12 :].tolist()
    batches = list[int]()
    begin = StagedSession.begin

    def counted(self: StagedSession, inputs: Any) -> Running:
        batches.append(len(inputs["input_ids"]))
        return begin(self, inputs)

    monkeypatch.setattr(StagedSession, "begin", counted)
    got = session.generate_rows(prompts, max_new_tokens=40)
    assert batches == ([5] if family == "t5" else [2, 2, 1])
    for own, wanted in zip(got, right, strict=True):
        assert own == wanted[: len(own)]
        assert set(wanted[len(own) :]) <= {2}  # padding
    assert len({len(own) for own in got}) > 1  # some ended before others
    drawn = session.generate_rows(prompts, max_new_tokens=9, do_sample=True, random_seed=3)
    alone = [list(session.generate_tokens(row, max_new_tokens=9, do_sample=True, random_seed=3)) for row in prompts]
    assert drawn == alone
    assert session.generate_rows([]) == session.generate([]) == []


def test_it_runs_without_torch(staged) -> None:
    made = staged("t5", "loratrf")
    code = "import sys; from loratrf_deploy.cli.generate import main; sys.exit(main(sys.argv[1:]))"
    command = ["--model", made.folder, "--prompt", PROMPT, "--max-new-tokens", 9]
    result = run_python(code, *command, without=(*FRAMEWORKS, "onnxruntime_genai"))
    assert result.returncode == 0, result.stderr
    # Random weights make bytes that are no text: the stream decides how those look.
    assert result.stdout == StagedSession(made.folder).generate([PROMPT], max_new_tokens=9)[0] + "\n"
    assert StagedSession(made.folder).encode(PROMPT) == load_tokenizer(made.base)(PROMPT)["input_ids"]


RULES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "n-grams": {"no_repeat_ngram_size": 2},
    "words": {"bad_words_ids": [[7], [9, 11], [20, 21, 22]]},
    "lengths": {"min_length": 8},
    "ends": {"forced_bos_token_id": 5, "forced_eos_token_id": 1},
    "suppressed": {"suppress_tokens": [4, 40], "begin_suppress_tokens": [6, 1]},
}


@pytest.mark.parametrize("what", RULES)
def test_rules_are_those_of_generate(what: str) -> None:
    """Of random scores, where each rule matters, as transformers' own processors have them."""
    from transformers import GenerationConfig

    rng, config = np.random.default_rng(3), GenerationConfig(eos_token_id=[1, 2], **RULES[what])
    model = tiny_stages.in_memory()
    for begin in (1, 4):
        config.max_length = begin + 12
        config._eos_token_tensor = torch.tensor([1, 2])
        processors = model._get_logits_processor(config, input_ids_seq_length=begin, device="cpu")
        before = rng.integers(3, 30, begin).tolist()
        for made in range(12):
            scores = rng.standard_normal(50).astype(np.float32)
            right = processors(torch.tensor([before]), torch.tensor(scores[None]))[0].numpy()
            got = Rules.of(config.to_dict()).apply(scores, before, begin, last=made == 11)
            np.testing.assert_allclose(got, right, rtol=1e-6)
            before.append(int(rng.integers(3, 30)))


def test_drawn_tokens_are_of_the_likeliest() -> None:
    from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

    scores = np.random.default_rng(0).standard_normal(12).astype(np.float32)
    warped = TopPLogitsWarper(0.7)(None, TemperatureLogitsWarper(0.8)(None, torch.tensor(scores[None])))
    right = torch.softmax(warped, -1)[0].numpy()
    rng = np.random.default_rng(1)
    drawn = np.bincount([choose(scores, rng, 0.8, 0.7) for _ in range(20000)], minlength=12) / 20000
    np.testing.assert_allclose(drawn, right, atol=0.015)
    assert not drawn[right == 0].any()
    assert choose(scores, None) == scores.argmax()


def test_parity_notices_a_cache_that_is_lost(staged, monkeypatch: pytest.MonkeyPatch) -> None:
    made, step = staged("t5", "loratrf"), Running.step

    def forgets(self: Running, ids: Any) -> Any:
        kept = dict(self._kept)
        logits = step(self, ids)
        self._kept = kept
        return logits

    monkeypatch.setattr(Running, "step", forgets)
    report = check_parity(made.model, made.adapter, made.base)
    failed = {check.output for check in report.checks if check.status == "failed"}
    assert failed == {"logits, token by token", "64 greedy tokens"}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "export.json").write_text("{}"), "is not what loratrf-export writes"),
        (
            lambda folder: edit_json(folder / "export.json", components={"decode": {"file": "../model.onnx"}}),
            "expected one in its own folder",
        ),
        (lambda folder: (folder / "encoder.onnx.data").unlink(), "encoder.onnx.data is missing"),
        (lambda folder: (folder / "encoder.onnx").write_bytes(b"no model"), "is not the file that loratrf.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "Give and take tokens: StagedSession.generate_tokens"),
        (lambda folder: (folder / "generation_config.json").write_text("["), "is damaged"),
    ],
)
def test_a_damaged_folder(damage, expected, capsys, staged, tmp_path: Path) -> None:
    folder = shutil.copytree(staged("t5", "loratrf").folder, tmp_path / "copy")
    damage(folder)
    capsys.readouterr()  # what fixtures printed
    assert generate_main(["--model", str(folder), "--prompt", PROMPT]) == 2
    assert expected in capsys.readouterr().err


def test_prompts_that_cannot_be(capsys, staged) -> None:
    folder = staged().folder
    session = StagedSession(folder)
    for prompt, count, expected in (
        ([], 4, "is empty"),
        ([999], 4, "has token 999"),
        ([5] * 100, 61, "positions for 160"),
    ):
        with pytest.raises(UserError, match=expected):
            list(session.generate_tokens(prompt, max_new_tokens=count))
    for option, expected in (("--rows", "--rows is for folders of ONNX"), ("--chat", "has no chat template")):
        assert generate_main(["--model", str(folder), "--prompt", PROMPT, option]) == 2
        assert expected in capsys.readouterr().err


_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
  {%- if message['role'] not in ['user', 'assistant'] %}
    {{- raise_exception('no ' + message['role'] + ' here') }}
  {%- endif %}
    [{{ message['role'] | upper }}] {{ message['content'] | trim }} {{ {'ü': loop.index} | tojson }}
  {% if loop.last %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}"""


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "several"])
def test_a_chat_goes_through_the_template_as_in_transformers(where: str, capsys, staged, tmp_path: Path) -> None:
    folder = shutil.copytree(staged().folder, tmp_path / "copy")
    if where == "chat_template.jinja":
        (folder / where).write_text(_TEMPLATE)
    else:
        several = [{"name": "tools", "template": "no"}, {"name": "default", "template": _TEMPLATE}]
        edit_json(folder / "tokenizer_config.json", chat_template=several if where == "several" else _TEMPLATE)
    session, tokenizer = StagedSession(folder), load_tokenizer(folder)
    chat = [{"role": role, "content": f" {text} "} for role, text in (("user", PROMPT), ("assistant", "ä"))]
    for messages in (chat[:1], chat):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert render(folder, messages) == text
        right = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert session.encode(messages) == right
    capsys.readouterr()
    assert generate_main(["--model", str(folder), "--prompt", PROMPT, "--chat", "--max-new-tokens", "5"]) == 0
    answer = capsys.readouterr().out
    assert answer == session.generate([[{"role": "user", "content": PROMPT}]], max_new_tokens=5)[0] + "\n"
    for bad, expected in (([{"role": "king", "content": ""}], "no king here"), ([{}], "has no attribute 'role'")):
        with pytest.raises(UserError, match=expected):
            session.encode(bad)


def test_a_template_of_a_stranger(staged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(staged().folder, tmp_path / "copy")
    for template in (
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(1000000) %}{% endfor %}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=r"unsafe|[Rr]ange too big"):
            render(folder, [{"role": "user", "content": ""}])
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is no file of a tokenizer"):
        render(folder, [])
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("../secret.txt")
    with pytest.raises(UserError, match=r"secret\.txt"):
        render(folder, [])
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").write_text("")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match="pip install jinja2"):
        render(folder, [])


def test_inspect_verifies_the_encoder_too(capsys, staged, tmp_path: Path) -> None:
    folder = shutil.copytree(staged("t5", "loratrf").folder, tmp_path / "copy")
    capsys.readouterr()
    assert inspect_main([str(folder), "--verify"]) == 0
    assert "text2text-generation" in capsys.readouterr().out
    raw = bytearray((folder / "encoder.onnx").read_bytes())
    raw[-1] ^= 1
    (folder / "encoder.onnx").write_bytes(raw)
    assert inspect_main([str(folder), "--verify"]) == 2
    assert "encoder.onnx is not the file" in capsys.readouterr().err
