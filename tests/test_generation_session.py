"""GenerationSession on a real onnxruntime-genai: tokens against PEFT's, GenAI's traps by name, threads, bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from loratrf_deploy import GenerationSession, UserError, read_adapter
from loratrf_deploy.export import ExportOptions, convert_adapter, export_adapter, export_grouped
from loratrf_deploy.formats.adapter_file import read_adapter_file, write_adapter_file
from loratrf_deploy.pytorch.oracle import layers_off, load_reference
from shared import edit_json

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [20, 21], list(range(30, 60))]
COUNT = 12


class Zoo(NamedTuple):
    """A swappable tiny LLaMA, its adapter "ours" and a LoRA "plain" of another rank, which covers fewer layers."""

    base: Path
    folder: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module")
def zoo(make_llm: Callable, exported: Callable, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    base, ours = make_llm("llama", "loratrf")
    _, plain = make_llm("llama", "lora", r=9, seed=7, target_modules=["q_proj", "down_proj"])
    folder = exported("loratrf", swappable="base").parent
    files = tmp_path_factory.mktemp("files")
    for name, adapter in (("ours", ours), ("plain", plain)):
        convert_adapter(adapter, folder / "model.onnx", files / f"{name}.onnx_adapter", base_model=base)
    return Zoo(base, folder, {name: files / f"{name}.onnx_adapter" for name in ("ours", "plain")})


@pytest.fixture(scope="module")
def expected(zoo: Zoo, make_llm: Callable) -> dict[str | None, list[list[int]]]:
    """PyTorch's greedy tokens of every prompt, by adapter."""
    adapters = {"ours": make_llm("llama", "loratrf")[1]}
    adapters["plain"] = make_llm("llama", "lora", r=9, seed=7, target_modules=["q_proj", "down_proj"])[1]
    models = {name: load_reference(read_adapter(path), zoo.base).model for name, path in adapters.items()}
    found: dict[str | None, list[list[int]]] = {
        name: [greedy(model, row) for row in PROMPTS] for name, model in models.items()
    }
    with layers_off(models["ours"]):
        found[None] = [greedy(models["ours"], row) for row in PROMPTS]
    assert len({json.dumps(rows) for rows in found.values()}) == 3
    return found


def greedy(model: torch.nn.Module, row: list[int], base_first: int = 0, stop: int = 1) -> list[int]:
    """The likeliest tokens after `row`, whose first `base_first` tokens run without the adapter; `stop` ends it."""
    tokens: list[int] = []
    parts, cache = [row[:base_first], row[base_first:]], None
    with torch.no_grad():
        for number, part in enumerate(filter(None, parts)):
            with layers_off(model) if base_first and number == 0 else contextlib.nullcontext():
                out = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        while len(tokens) < COUNT and (token := int(out.logits[0, -1].argmax())) != stop:
            tokens.append(token)
            out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    return tokens


@pytest.fixture
def session(zoo: Zoo) -> GenerationSession:
    session = GenerationSession(zoo.folder)
    for name, path in zoo.adapters.items():
        session.load(name, path)
    return session


def tokens(session: GenerationSession, rows: list[list[int]], **how: Any) -> list[list[int]]:
    return session.generate_tokens(rows, max_new_tokens=COUNT, **how)


@pytest.mark.parametrize("adapter", [None, "ours", "plain"])
@pytest.mark.consumer("onnxruntime-genai", "swapped")
def test_tokens_are_pefts_alone_and_in_a_batch_of_any_lengths(session, expected, adapter) -> None:
    assert [tokens(session, [row], adapter=adapter)[0] for row in PROMPTS] == expected[adapter]
    assert tokens(session, PROMPTS, adapter=adapter) == expected[adapter]
    assert tokens(session, [], adapter=adapter) == []


def test_the_file_that_the_export_wrote_loads_and_adapters_change_between_calls(zoo, session, expected) -> None:
    session.load("exported", next(zoo.folder.glob("*.onnx_adapter")))
    for name in ("exported", "plain", None, "exported"):
        right = expected["ours" if name == "exported" else name]
        assert tokens(session, PROMPTS, adapter=name) == right
    assert session.default == "base"
    assert list(session.adapters) == ["ours", "plain", "exported"]


def test_trap_genai_takes_padding_on_the_right(zoo: Zoo) -> None:
    """What GenerationSession relies on: the mask is made from pad tokens at a row's end, and there alone."""
    model = og.Model(str(zoo.folder))
    pad = json.loads((zoo.folder / "genai_config.json").read_text())["model"]["pad_token_id"]
    masks = {}
    for side, row in (("right", [5, 6, 7, pad, pad]), ("left", [pad, pad, 5, 6, 7])):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=10, batch_size=2)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([row, [9, 10, 11, 12, 13]], np.int32))
        masks[side] = generator.get_input("attention_mask")[0].tolist()
    assert masks == {"right": [1, 1, 1, 0, 0], "left": [1, 1, 1, 1, 1]}


def test_trap_a_prompt_that_ends_in_the_pad_token(session: GenerationSession) -> None:
    pad = session._pad
    rows = [[5, 6, 7, pad], PROMPTS[1], [8, pad, pad], [pad]]
    alone = [tokens(session, [row], adapter="ours")[0] for row in rows]
    assert tokens(session, rows, adapter="ours") == alone
    assert alone[0] != tokens(session, [[5, 6, 7]], adapter="ours")[0]


def test_trap_a_second_append_of_several_rows(zoo: Zoo) -> None:
    """Why activate_after is for one prompt."""
    model = og.Model(str(zoo.folder))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=20, batch_size=2)
    generator = og.Generator(model, params)
    rows = np.array([[5, 6], [7, 8]], np.int32)
    generator.append_tokens(rows)
    with pytest.raises(Exception, match="batch"):
        generator.append_tokens(rows)


def test_trap_a_second_active_adapter_takes_the_place_of_the_first(zoo, expected) -> None:
    model = og.Model(str(zoo.folder))
    adapters = og.Adapters(model)
    for name, path in zoo.adapters.items():
        adapters.load(str(path), name)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(PROMPTS[0]) + COUNT, batch_size=1, do_sample=False)
    generator = og.Generator(model, params)
    generator.set_active_adapter(adapters, "ours")
    generator.set_active_adapter(adapters, "plain")
    generator.append_tokens(np.array(PROMPTS[0], np.int32))
    made = []
    while not generator.is_done():
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    assert made == expected["plain"][0]


def test_rows_that_end_early_leave_the_others_as_they_are(zoo: Zoo, expected: dict, tmp_path: Path) -> None:
    stop = expected["ours"][0][3]
    for file in zoo.folder.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    config = json.loads((zoo.folder / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = [1, stop]
    (tmp_path / "genai_config.json").unlink()
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    session = GenerationSession(tmp_path)
    session.load("ours", zoo.adapters["ours"])
    right = [row[: row.index(stop)] if stop in row else row for row in expected["ours"]]
    assert sorted(map(len, right))[0] <= 3 < COUNT == max(map(len, right))
    assert tokens(session, PROMPTS, adapter="ours") == right
    assert [tokens(session, [row], adapter="ours")[0] for row in PROMPTS] == right


def streamed(session: GenerationSession, made: list[int]) -> str:
    """`made` decoded token by token: half a letter's bytes come with the token that has the other half."""
    stream = session._tokenizer.create_stream()
    return "".join(stream.decode(token) for token in made)


def test_texts_and_a_stream_of_text(session: GenerationSession) -> None:
    text = "she wrote 3 letters"
    made = tokens(session, [session.encode(text)], adapter="plain")[0]
    right = session._tokenizer.decode(made)
    assert session.generate([text], adapter="plain", max_new_tokens=COUNT) == [right]
    assert "".join(session.stream(text, adapter="plain", max_new_tokens=COUNT)) == streamed(session, made)
    sampled = {"do_sample": True, "top_k": 40, "temperature": 5.0, "random_seed": 3}
    assert tokens(session, [session.encode(text)], adapter="plain", **sampled) != [made]


def test_a_chat_goes_through_the_tokenizers_template(zoo: Zoo, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "where is the library ?"}]
    with pytest.raises(UserError, match="saved with a chat template"):
        GenerationSession(zoo.folder).generate([chat], adapter=None)
    for file in zoo.folder.iterdir():
        (tmp_path / file.name).hardlink_to(file)
    config = json.loads((zoo.folder / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}so:"
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    session = GenerationSession(tmp_path)
    said = "user: where is the library ? so:"
    answers = [session.generate([one], adapter=None, max_new_tokens=4) for one in (chat, said)]
    assert answers[0] == answers[1]


def test_activate_after_keeps_the_cache_of_what_the_base_read(zoo: Zoo, session, make_llm) -> None:
    first, then = "rain fell on the harbour", " while the boats"
    prefix, row = session.encode(first), session.encode(then)
    model = load_reference(read_adapter(make_llm("llama", "loratrf")[1]), zoo.base).model
    late = "".join(session.stream(then, activate_after=first, adapter="ours", max_new_tokens=COUNT))
    right, other = greedy(model, [*prefix, *row], base_first=len(prefix)), greedy(model, [*prefix, *row])
    assert late == streamed(session, right)
    assert right != other


def test_what_has_begun_keeps_its_adapter(zoo: Zoo, session: GenerationSession, expected: dict) -> None:
    text = "she wrote 3 letters"
    right = {name: "".join(session.stream(text, adapter=name, max_new_tokens=COUNT)) for name in ("ours", "plain")}
    begun = [session.stream(text, adapter="ours", max_new_tokens=COUNT) for _ in range(3)]
    pieces = [next(stream) for stream in begun]
    session.load("ours", zoo.adapters["plain"], replace=True)
    pieces[0] += "".join(begun[0])
    session.unload("ours")
    pieces[1] += "".join(begun[1])
    assert pieces[:2] == [right["ours"]] * 2
    begun[2].close()  # one that is given up frees what it held
    with pytest.raises(UserError, match=r"No adapter 'ours' is loaded\. Loaded: 'plain'"):
        next(session.stream(text, adapter="ours"))


def test_adapters_over_max_bytes_are_put_aside_and_read_again(zoo: Zoo, expected: dict) -> None:
    one = max(path.stat().st_size for path in zoo.adapters.values())
    session = GenerationSession(zoo.folder, max_bytes=one)
    for name, path in zoo.adapters.items():
        session.load(name, path)
    for name in ("ours", "plain", "ours"):
        assert tokens(session, PROMPTS[:2], adapter=name) == expected[name][:2]
        assert [info.resident for info in session.adapters.values()] == [False, True]


def test_threads_while_adapters_come_and_go(zoo: Zoo, session: GenerationSession, expected: dict) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in range(8):
            name = (None, "ours", "plain")[int(rng.integers(3))]
            rows = [int(at) for at in rng.choice(len(PROMPTS), int(rng.integers(1, 4)), replace=False)]
            got = tokens(session, [PROMPTS[at] for at in rows], adapter=name)
            if got != [expected[name][at] for at in rows]:
                wrong.append((seed, number, name, rows, got))

    def churn() -> None:
        for number in range(20):
            session.load("ours", zoo.adapters["ours"], replace=True)
            session.load(f"guest {number}", zoo.adapters["plain"])
            session.unload(f"guest {number}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)] + [threading.Thread(target=churn)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert list(session.adapters) == sorted(session.adapters, key=list(session.adapters).index)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.generate(["x"], adapter="es"), r"No adapter 'es' is loaded\. Loaded: 'ours', 'plain'"),
        (lambda s: s.generate(["x", ""], adapter="ours"), "Prompt 1 is empty"),
        (lambda s: s.generate(["x"], adapter="ours", max_new_tokens=256), "context holds 256 tokens"),
        (lambda s: s.generate(["x"], adapter="ours", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda s: s.generate_tokens([[5] * 250], adapter="ours"), "longest prompt has 250 tokens"),
        (lambda s: s.generate_tokens([[5], [99999]], adapter="ours"), "token 99999"),
        (lambda s: s.generate(["x"], adapters=["ours"]), "one adapter per call"),
        (lambda s: s.generate(["x"], adapter=None, scale=0.5), "nothing to scale"),
        (lambda s: s.generate(["x"], adapter="ours", scale=float("nan")), "expected a finite number"),
        (lambda s: s.generate(["x"], adapter="ours", nonsense=1), "onnxruntime-genai refuses"),
        (lambda s: s.generate([[{"who": "me"}]], adapter="ours"), "template"),
        (lambda s: s.load("ours", "nowhere.onnx_adapter"), "Can't read nowhere.onnx_adapter"),
        (lambda s: s.unload("es"), "No adapter 'es'"),
    ],
)
def test_bad_input_is_one_paragraph(session: GenerationSession, call: Callable, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(session)
    assert "\n" not in str(caught.value)


def test_an_adapter_must_be_named_in_so_many_words(session: GenerationSession) -> None:
    with pytest.raises(TypeError, match="takes adapters"):
        session.generate(["x"])
    with pytest.raises(TypeError, match="list of prompts"):
        session.generate("x", adapter=None)


def test_a_folder_with_a_fixed_adapter_takes_no_other(exported: Callable, zoo: Zoo, expected: dict) -> None:
    session = GenerationSession(exported("loratrf", mode="separate"))
    assert tokens(session, PROMPTS) == expected["ours"]
    assert (session.default, session.adapters) == ("adapter", {})
    for call in (lambda: session.load("ours", zoo.adapters["ours"]), lambda: session.generate(["x"], adapter="ours")):
        with pytest.raises(UserError, match="takes no others"):
            call()


def test_folders_that_are_no_language_model(tmp_path: Path, make_export: Callable) -> None:
    with pytest.raises(UserError, match=r"no genai_config\.json"):
        GenerationSession(tmp_path)
    with pytest.raises(UserError, match=r"no genai_config\.json"):
        GenerationSession(make_export().model.parent)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: edit_json(folder / "genai_config.json", model={"pad_token_id": "x"}),
    ],
)
def test_a_damaged_folder_is_one_paragraph(zoo: Zoo, tmp_path: Path, damage: Callable) -> None:
    folder = Path(shutil.copytree(zoo.folder, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(UserError, match=r"can't load|generation can use|is damaged"):
        GenerationSession(folder)


def test_a_genai_without_adapters_is_told_by_its_version(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(og, "Adapters")
    with pytest.raises(UserError, match=r"onnxruntime-genai 0\.\d+.* knows no adapters\. Install one that does"):
        GenerationSession(zoo.folder)


def test_it_needs_neither_torch_nor_transformers(zoo: Zoo, expected: dict) -> None:
    from shared import FRAMEWORKS, run_python

    code = (
        "import sys; from loratrf_deploy import GenerationSession; session = GenerationSession(sys.argv[1]);"
        "session.load('ours', sys.argv[2]);"
        f"print(session.generate_tokens({PROMPTS[:1]}, adapter='ours', max_new_tokens={COUNT}))"
    )
    done = run_python(code, zoo.folder, zoo.adapters["ours"], without=FRAMEWORKS)
    assert json.loads(done.stdout) == expected["ours"][:1], done.stderr


def test_swappable_exports_with_the_adapter_for_default(make_llm: Callable, tmp_path: Path, zoo, expected) -> None:
    base, adapter = make_llm("llama", "loratrf")
    out = tmp_path / "model.onnx"
    export_adapter(adapter, out, ExportOptions(base_model=base, swappable="adapter", check=False))
    session = GenerationSession(out)
    assert session.default == "adapter"
    assert tokens(session, PROMPTS, adapter=None) == expected["ours"]


def test_a_blend_is_pefts_weighted_sum(zoo: Zoo, make_llm: Callable, tmp_path: Path) -> None:
    import peft
    import transformers

    paths = {
        "fr": make_llm("llama", "lora", r=9, seed=7, target_modules=["q_proj", "down_proj"])[1],
        "legal": make_llm("llama", "lora", r=3, seed=11)[1],
    }
    session = GenerationSession(zoo.folder)
    for name, path in paths.items():
        convert_adapter(path, zoo.folder / "model.onnx", tmp_path / f"{name}.onnx_adapter", base_model=zoo.base)
        session.load(name, tmp_path / f"{name}.onnx_adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(zoo.base)
    model = peft.PeftModel.from_pretrained(base, str(paths["fr"]), adapter_name="fr")
    model.load_adapter(str(paths["legal"]), adapter_name="legal")
    model.add_weighted_adapter(["fr", "legal"], [0.7, 0.5], "blend", combination_type="cat")
    model.set_adapter("blend")
    right = [greedy(model.eval(), row) for row in PROMPTS]
    for scale in (1.0, 0.5):
        weights = {"fr": 0.7 / scale, "legal": 0.5 / scale}
        assert tokens(session, PROMPTS, adapter=weights, scale=scale) == right
    assert right != tokens(session, PROMPTS, adapter="fr")
    with pytest.raises(UserError, match=r"No adapter 'es' is loaded\. Loaded: 'legal', 'fr'|Loaded: 'fr', 'legal'"):
        tokens(session, PROMPTS, adapter={"fr": 1, "es": 1})
    session.load("ours", zoo.adapters["ours"])
    with pytest.raises(UserError, match="Filters don't add"):
        tokens(session, PROMPTS, adapter={"fr": 0.5, "ours": 0.5})


def test_scale_is_that_of_alpha_and_gamma(zoo: Zoo, session: GenerationSession, make_llm, tmp_path) -> None:
    _, half = make_llm("llama", "loratrf", lora_alpha=4, filter_gamma=0.5)
    convert_adapter(half, zoo.folder / "model.onnx", tmp_path / "half.onnx_adapter", base_model=zoo.base)
    session.load("half", tmp_path / "half.onnx_adapter")
    right = tokens(session, PROMPTS, adapter="half")
    assert tokens(session, PROMPTS, adapter="ours", scale=0.5) == right != tokens(session, PROMPTS, adapter="ours")


@pytest.fixture(scope="module")
def mixed(make_llm: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one model in which each row names "ours", "plain" or none."""
    base, ours = make_llm("llama", "loratrf")
    _, plain = make_llm("llama", "lora", r=9, seed=7, target_modules=["q_proj", "down_proj"])
    out = tmp_path_factory.mktemp("mixed") / "model.onnx"
    export_grouped({"ours": ours, "plain": plain}, out, ExportOptions(base_model=base, check=False))
    return out.parent


@pytest.fixture
def team(mixed: Path) -> GenerationSession:
    session = GenerationSession(mixed)
    for name in ("ours", "plain"):
        session.load(name, mixed / f"{name}.onnx_adapter")
    return session


@pytest.mark.consumer("onnxruntime-genai", "by row")
def test_each_row_names_its_adapter(team: GenerationSession, expected: dict) -> None:
    for names in (["ours", "plain", None, "plain"], [None] * 4, ["plain", "ours", "ours", None]):
        assert tokens(team, PROMPTS, adapters=names) == [expected[name][at] for at, name in enumerate(names)]
    assert tokens(team, PROMPTS, adapter="plain") == expected["plain"]
    assert tokens(team, PROMPTS, adapter=None) == expected[None]
    # Rows that end in the pad token run by themselves, under their own adapter.
    rows = [[5, 6, 7, team._pad], PROMPTS[1]]
    alone = [tokens(team, [row], adapter=name)[0] for row, name in zip(rows, ("ours", "plain"), strict=True)]
    assert tokens(team, rows, adapters=["ours", "plain"]) == alone
    assert team.default == "base"


def test_trap_adapter_ids_can_not_be_forgotten(mixed: Path) -> None:
    """A default would be dropped in silence, and every row would pass for the base's."""
    params = og.GeneratorParams(model := og.Model(str(mixed)))
    params.set_search_options(max_length=10, batch_size=1)
    with pytest.raises(Exception, match="adapter_ids"):
        og.Generator(model, params).append_tokens(np.array([5, 6], np.int32))


def test_slots_grow_and_are_used_again(team: GenerationSession, mixed: Path, expected: dict) -> None:
    for number in range(10):
        team.load(f"guest {number}", mixed / f"{('ours', 'plain')[number % 2]}.onnx_adapter")
    names = ["guest 9", "guest 0", None, "guest 5"]
    right = [expected[name][at] for at, name in enumerate(("plain", "ours", None, "plain"))]
    assert tokens(team, PROMPTS, adapters=names) == right
    for number in range(10):
        team.unload(f"guest {number}")
    count = team._slots._count
    team.load("late", mixed / "plain.onnx_adapter")
    assert team._slots._count == count == 16
    assert tokens(team, PROMPTS[:2], adapters=["late", "ours"]) == [expected["plain"][0], expected["ours"][1]]


def test_a_blend_in_a_row(team: GenerationSession, expected: dict) -> None:
    half = tokens(team, PROMPTS[:1], adapter={"plain": 0.5})
    assert tokens(team, PROMPTS[:3], adapters=["ours", {"plain": 0.5}, None])[0] == expected["ours"][0]
    assert tokens(team, [PROMPTS[0]] * 2, adapters=[{"plain": 0.5}, "plain"]) == [half[0], expected["plain"][0]]


def test_what_is_not_one_adapter_per_row(team: GenerationSession) -> None:
    with pytest.raises(UserError, match="names 1 adapters for 2 prompts"):
        team.generate(["a", "b"], adapters=["ours"])
    with pytest.raises(UserError, match=r"No adapter 'es' is loaded\. Loaded: "):
        team.generate(["a", "b"], adapters=["ours", "es"])
    with pytest.raises(UserError, match="activate_after is for a model of --swappable"):
        next(team.stream("a", activate_after="b", adapter="ours"))


def test_threads_whose_rows_mix_adapters_that_come_and_go(team: GenerationSession, mixed: Path, expected) -> None:
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(6):
            rows = [int(at) for at in rng.choice(len(PROMPTS), int(rng.integers(1, 5)), replace=False)]
            names = [(None, "ours", "plain")[int(rng.integers(3))] for _ in rows]
            got = tokens(team, [PROMPTS[at] for at in rows], adapters=names)
            if got != [expected[name][at] for at, name in zip(rows, names, strict=True)]:
                wrong.append((seed, rows, names, got))

    def churn() -> None:
        for number in range(12):
            team.load("plain", mixed / "plain.onnx_adapter", replace=True)
            team.load(f"guest {number}", mixed / "ours.onnx_adapter")
            team.unload(f"guest {number}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)] + [threading.Thread(target=churn)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


INVOCATION = [40, 41]


def test_an_alora_begins_at_its_invocation_as_in_peft(zoo: Zoo, session, expected, make_llm, tmp_path) -> None:
    import peft
    import transformers

    _, adapter = make_llm("llama", "lora", r=5, seed=13, alora_invocation_tokens=INVOCATION)
    read = read_adapter(adapter)
    assert (read.invocation_tokens, read.not_separable) == (tuple(INVOCATION), None)
    file = tmp_path / "late.onnx_adapter"
    convert_adapter(adapter, zoo.folder / "model.onnx", file, base_model=zoo.base)
    session.load("late", file)
    base = transformers.AutoModelForCausalLM.from_pretrained(zoo.base)
    model = peft.PeftModel.from_pretrained(base, str(adapter)).eval()
    rows = [
        [5, 6, *INVOCATION, 7, 8],
        [*INVOCATION, 5, 6, *INVOCATION],  # the last one counts
        [*INVOCATION, 9],
        [40, 40, 41, 12],
        PROMPTS[1],  # none: not active
    ]

    def pefts(row: list[int]) -> list[int]:
        made = model.generate(input_ids=torch.tensor([row]), max_new_tokens=COUNT, do_sample=False)[
            0, len(row) :
        ].tolist()
        return made[: made.index(1)] if 1 in made else made

    right = [pefts(row) for row in rows]
    assert right[4] == expected[None][1]
    assert right[0] != tokens(session, rows[:1], adapter=None)[0]
    assert tokens(session, rows, adapter="late") == right
    assert [tokens(session, [row], adapter="late")[0] for row in rows] == right
    with pytest.raises(UserError, match="it can't be blended"):
        tokens(session, rows, adapter={"late": 0.5, "plain": 0.5})
    with pytest.raises(UserError, match="activate_after is not for an aLoRA"):
        next(session.stream("x", activate_after="y", adapter="late"))


def test_an_alora_in_a_mixed_model_is_not_active_throughout(
    team: GenerationSession, mixed: Path, tmp_path: Path
) -> None:
    """--onto refuses it; a file from elsewhere may say so all the same."""
    file = read_adapter_file(mixed / "plain.onnx_adapter")
    origin = dataclasses.replace(file.origin, invocation_tokens=tuple(INVOCATION))
    write_adapter_file(tmp_path / "late.onnx_adapter", file.values, origin)
    team.load("late", tmp_path / "late.onnx_adapter")
    with pytest.raises(UserError, match=r"late is an aLoRA.*a model of --swappable"):
        tokens(team, PROMPTS[:2], adapters=["late", "plain"])
    with pytest.raises(UserError, match="late is an aLoRA"):
        next(team.stream("x", adapter="late"))


def test_an_alora_is_exported_swappable_and_proven_or_refused(make_llm: Callable, tmp_path: Path, refused, zoo) -> None:
    base, adapter = make_llm("llama", "lora", r=5, seed=13, alora_invocation_tokens=INVOCATION)
    result = export_adapter(adapter, tmp_path / "out" / "model.onnx", ExportOptions(base_model=base, swappable="base"))
    assert result.parity is not None
    assert result.parity.passed
    for options in (
        ["--adapter", adapter],
        ["--adapter", adapter, "--mode", "separate"],
        ["--adapters", f"a={adapter}"],
    ):
        text = refused(tmp_path / "no" / "model.onnx", *options, "--base-model", base)
        assert "active only after its invocation tokens" in text
        assert "--swappable base" in text
