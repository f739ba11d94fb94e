"""Sentence embeddings: pooling, cutting and normalising against sentence-transformers' formulas, and where they go."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import tiny
import tiny_llm
from loratrf_deploy import AdapterSession, UserError, create_session, read_adapter
from loratrf_deploy.cli.export import main as export_main
from loratrf_deploy.cli.inspect import main as inspect_main
from loratrf_deploy.cli.parity import main as parity_main
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.export.pool import pool
from loratrf_deploy.formats.embedding import POOLINGS, Embedding, read_modules
from loratrf_deploy.formats.manifest import read_manifest
from loratrf_deploy.parity.inputs import default_inputs
from loratrf_deploy.pytorch.base import load_base, sample_inputs
from loratrf_deploy.pytorch.embedding import declared
from loratrf_deploy.pytorch.oracle import load_reference
from shared import edit_json, read_json

OUTPUT = "sentence_embedding"
EMBEDS = ("bert", "feature-extraction", "lora")


def expected(hidden: np.ndarray, mask: np.ndarray, embedding: Embedding) -> np.ndarray:
    """As sentence-transformers has it, in float64: clamped mean, the mask's first or last token; cut, then normalised.

    What padded tokens hold is cleared first, where theirs are multiplied by 0.
    """
    h = torch.from_numpy(hidden).double()
    m = torch.from_numpy(mask)
    h = torch.where(m[..., None] == 1, h, 0.0)
    rows = torch.arange(len(h))
    if embedding.pooling == "mean":
        e = h.sum(1) / m.sum(1, keepdim=True).clamp(min=1e-9)
    elif embedding.pooling == "cls":
        e = h[rows, m.argmax(1)]
    else:
        e = h[rows, m.shape[1] - 1 - m.flip(1).argmax(1)]
    e = e[:, : embedding.dimensions]
    return (torch.nn.functional.normalize(e, dim=-1) if embedding.normalize else e).numpy()


def padded_on_either_side(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`inputs`, right-padded, with every other row turned round: padded on the left."""
    return {
        name: np.stack([row[::-1] if number % 2 else row for number, row in enumerate(value)])
        for name, value in inputs.items()
    }


# One small graph.


def small_model(width: int, embedding: Embedding, dtype: str) -> onnx.ModelProto:
    """h -> its tokens."""
    kind = {"float32": "float", "float16": "float16"}[dtype]
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 18]>
    small ({kind}[batch,sequence,{width}] h, int64[batch,sequence] attention_mask)
        => ({kind}[batch,sequence,{width}] last_hidden_state)
    {{
        last_hidden_state = Identity(h)
    }}""")
    pool(model, embedding)
    return ir.to_proto(model)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("normalize", "dimensions"), [(False, None), (True, None), (True, 1), (False, 3), (True, 5)])
def test_the_formula_whatever_padding_holds(pooling: Any, normalize: bool, dimensions: int | None, dtype: str) -> None:
    embedding = Embedding(pooling, normalize, dimensions)
    for width in (5, 19):
        proto = small_model(width, embedding, dtype)
        onnx.checker.check_model(proto, full_check=True)
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        assert [value.name for value in session.get_outputs()] == [OUTPUT, "last_hidden_state"]
        assert session.get_outputs()[0].shape == ["batch", dimensions or width]
        for rows, columns in ((1, 1), (1, 7), (5, 3), (4, 66)):
            rng = np.random.default_rng(rows * columns)
            h = rng.normal(size=(rows, columns, width)).astype(dtype)
            mask = (np.arange(columns) < rng.integers(1, columns + 1, rows)[:, None]).astype(np.int64)
            mask[1::2] = mask[1::2, ::-1]
            if rows == 4:
                mask[2] = 0
                mask[3, 5] = 0  # a hole: only its ends tell first and last
            h[mask == 0] = np.nan
            wanted = expected(h, mask, embedding)
            for run in (session.run, ReferenceEvaluator(proto).run):
                actual = run([OUTPUT], {"h": h, "attention_mask": mask})[0]
                assert actual.dtype == np.float32
                assert np.abs(actual - wanted).max() <= 1e-6 * max(np.abs(wanted).max(), 1)
            if rows == 4:
                assert not actual[2].any()
            if normalize:
                assert np.allclose(np.linalg.norm(actual, axis=1)[mask.any(1)], 1)


# Models.


def make_pair(folder: Path, family: str, **config: Any) -> tuple[Path, Path]:
    """(base, adapter) for feature extraction; of a decoder, or EuroBERT, which is built as one."""
    if family in tiny.FAMILIES:
        base = tiny.make_base(folder / "base", family, "feature-extraction")
        return base, tiny.make_adapter(base, folder / "adapter", **config)
    import transformers

    if family == "eurobert":
        tokenizer = tiny_llm.make_tokenizer()
        sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        own = transformers.EuroBertConfig(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=66, **sizes
        )
        model = transformers.AutoModel.from_config(own)
        tiny.randomise(model, 0)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
    else:
        tiny_llm.make_base(folder / "base", family)
    model = transformers.AutoModel.from_pretrained(folder / "base")
    values = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "FEATURE_EXTRACTION"} | config
    return folder / "base", tiny.save_adapter(model, folder / "adapter", "lora", 1, 3, values)


def assert_embeds(
    model: Path, base: Path, adapter: Path, embedding: Embedding, limit: float = 1e-5, dtype: Any = "float32"
) -> None:
    """With the library and without, against PEFT's tokens; a row of nothing but padding disturbs no other."""
    reference = load_reference(read_adapter(adapter), base, dtype=dtype)
    for library in (True, False):
        session = create_session(model, library=library)
        for seed, (batch, sequence) in enumerate([(1, 1), (3, 7), (4, 19), (2, 64)]):
            inputs = padded_on_either_side(sample_inputs(reference, batch=batch, sequence=sequence, seed=seed))
            if batch == 4:
                inputs["attention_mask"][2] = 0
            with torch.no_grad():
                torch_inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
                hidden = reference.model.get_base_model()(**torch_inputs).last_hidden_state.numpy()
            wanted = expected(hidden, inputs["attention_mask"], embedding)
            actual = session.run([OUTPUT], inputs)[0]
            assert actual.dtype == np.float32
            assert actual.shape == wanted.shape
            error = np.abs(actual - wanted).max() / np.abs(wanted).max()
            assert error <= limit, f"{batch}x{sequence} library={library}: {error:.2e}"


CASES = [
    ("bert", Embedding("mean", True, 7), "merged", "float32"),
    ("bert", Embedding("mean", True), "merged", "float16"),
    ("modernbert", Embedding("cls", False), "separate", "float32"),
    ("qwen3", Embedding("last", True), "separate", "float32"),
    ("llama", Embedding("last", False, 19), "merged", "float32"),
    ("eurobert", Embedding("mean", True), "separate", "float32"),
]


@pytest.mark.parametrize(("family", "embedding", "mode", "dtype"), CASES, ids=lambda value: str(value)[:30])
def test_families(tmp_path: Path, family: str, embedding: Embedding, mode: Any, dtype: Any) -> None:
    base, adapter = make_pair(tmp_path, family)
    how = {"pooling": embedding.pooling, "normalize": embedding.normalize, "dimensions": embedding.dimensions}
    out = tmp_path / "out" / "model.onnx"
    result = export_adapter(adapter, out, ExportOptions(base_model=base, mode=mode, dtype=dtype, **how))
    assert result.manifest.embedding == embedding
    checked = {check.variant for check in result.parity.checks if check.output == OUTPUT and check.status == "passed"}
    assert {"with library", "without library", "base-off"} <= checked
    outputs = [value.name for value in onnx.load(out, load_external_data=False).graph.output]
    assert outputs[:2] == [OUTPUT, "last_hidden_state"]
    assert not [name for name in outputs if "key" in name]
    assert_embeds(out, base, adapter, embedding, 1e-5 if dtype == "float32" else 2e-3, dtype)


def test_an_adapter_without_a_task_embeds(tmp_path: Path) -> None:
    """Of a base whose config names a language model, whose adapter would pass for one's."""
    base, adapter = make_pair(tmp_path, "qwen3", task_type=None)
    assert read_json(base / "config.json")["architectures"] == ["Qwen3ForCausalLM"]
    edit_json(adapter / "adapter_config.json", auto_mapping=None)
    out = tmp_path / "out" / "model.onnx"
    options = ["--base-model", str(base), "--pooling", "last", "--no-check"]
    assert export_main(["--adapter", str(adapter), "--out", str(out), *options]) == 0
    assert read_manifest(out.with_name("loratrf.json")).task == "feature-extraction"
    assert parity_main(["--model", str(out), "--adapter", str(adapter), "--base-model", str(base)]) == 0


def write_modules(folder: Path, pooling: str = "mean", normalize: bool = True) -> Path:
    """sentence-transformers' files as version 5 writes them."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    rows = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens", "lasttoken"), False)
    names = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "max": "max_tokens"}
    flags[names[pooling]] = True
    settings = {"word_embedding_dimension": 32} | {f"pooling_mode_{name}": on for name, on in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def embedder(make_tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base with modules.json, adapter, model) that the command line exported, proven."""
    folder = tmp_path_factory.mktemp("embedder")
    made, adapter = make_tiny(*EMBEDS)
    base = write_modules(Path(shutil.copytree(made, folder / "base")))
    out = folder / "out" / "model.onnx"
    command = ["--adapter", adapter, "--base-model", base, "--out", out, "--pooling", "auto", "--dimensions", 16]
    assert export_main([str(word) for word in command]) == 0
    return base, adapter, out


def test_auto_is_what_modules_json_says(embedder: tuple[Path, Path, Path], capsys: pytest.CaptureFixture) -> None:
    base, adapter, out = embedder
    assert read_json(out.with_name("loratrf.json"))["embedding"] == {
        "pooling": "mean",
        "normalize": True,
        "dimensions": 16,
    }
    assert_embeds(out, base, adapter, Embedding("mean", True, 16))
    capsys.readouterr()
    assert inspect_main([str(out)]) == 0
    assert "feature-extraction, mean pooling, 16 dimensions, normalised" in capsys.readouterr().out


def test_the_readmes_lines_embed(embedder: tuple[Path, Path, Path], tmp_path: Path, monkeypatch) -> None:
    """onnxruntime and tokenizers alone: each text is embedded as it is alone."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if OUTPUT in block]
    base, adapter, out = embedder
    (tmp_path / "out").symlink_to(out.parent)
    monkeypatch.chdir(tmp_path)
    texts = [" ".join(tiny.SENTENCES[:2]), "rain", tiny.SENTENCES[2]]
    scope: dict[str, Any] = {"texts": texts}
    exec(code, scope)
    reference = load_reference(read_adapter(adapter), base)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for text, row in zip(texts, scope["embeddings"], strict=True):
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt")
            hidden = reference.model.get_base_model()(**inputs).last_hidden_state.numpy()
        wanted = expected(hidden, inputs["attention_mask"].numpy(), Embedding("mean", True, 16))[0]
        assert np.abs(row - wanted).max() <= 1e-5


@pytest.mark.parametrize("change", [{"pooling": "cls"}, {"normalize": False}])
def test_parity_holds_the_embedding_against_what_is_said_of_it(
    embedder: tuple[Path, Path, Path], tmp_path: Path, change: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    base, adapter, out = embedder
    folder = Path(shutil.copytree(out.parent, tmp_path / "out"))
    said = read_json(folder / "loratrf.json")["embedding"]
    command = ["--model", folder / "model.onnx", "--adapter", adapter, "--base-model", base, "--json"]
    edit_json(folder / "loratrf.json", embedding=said | change)
    capsys.readouterr()
    assert parity_main([str(word) for word in command]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert {check["output"] for check in checks if check["status"] == "failed"} == {OUTPUT}


def test_a_model_without_its_manifest_is_not_guessed_at(
    embedder: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, adapter, out = embedder
    folder = Path(shutil.copytree(out.parent, tmp_path / "out"))
    (folder / "loratrf.json").unlink()
    capsys.readouterr()
    command = ["--model", folder / "model.onnx", "--adapter", adapter, "--base-model", base]
    assert parity_main([str(word) for word in command]) == 2
    assert "no loratrf.json beside it says how that is pooled" in capsys.readouterr().err


def test_a_manifest_from_before_there_were_embeddings_opens(embedder: tuple[Path, Path, Path], tmp_path: Path) -> None:
    content = read_json(embedder[2].with_name("loratrf.json"))
    del content["embedding"]
    (tmp_path / "loratrf.json").write_text(json.dumps(content))
    assert read_manifest(tmp_path / "loratrf.json").embedding is None


def test_parity_feeds_embeddings_padding_on_either_side(make_tiny: Callable) -> None:
    base, adapter = make_tiny(*EMBEDS)
    reference = load_reference(read_adapter(adapter), base)
    masks = [batch["attention_mask"] for batch in default_inputs(replace(reference, embedding=Embedding("last")))]
    assert any((mask[:, 0] < mask[:, -1]).any() for mask in masks)
    assert any((mask[:, 0] > mask[:, -1]).any() for mask in masks)


def test_adapters_swap_under_one_embedding(make_tiny: Callable, tmp_path: Path) -> None:
    base, adapter = make_tiny(*EMBEDS)
    other = make_tiny(*EMBEDS, r=2, seed=5)[1]
    out = tmp_path / "out" / "model.onnx"
    options = ExportOptions(base_model=base, swappable="base", pooling="last", normalize=True, dimensions=9)
    report = export_adapter(adapter, out, options).parity
    assert ("no adapter", OUTPUT, "passed") in {(check.variant, check.output, check.status) for check in report.checks}
    file = tmp_path / "other.onnx_adapter"
    assert convert_adapter(other, out, file, base_model=base, check=True).parity.passed
    session = AdapterSession(out)
    session.load("other", file)
    reference = load_reference(read_adapter(other), base)
    inputs = padded_on_either_side(sample_inputs(reference, batch=3, sequence=13, seed=1))
    with torch.no_grad():
        values = {name: torch.from_numpy(value) for name, value in inputs.items()}
        hidden = reference.model.get_base_model()(**values).last_hidden_state.numpy()
    wanted = expected(hidden, inputs["attention_mask"], Embedding("last", True, 9))
    assert np.abs(session.run(inputs, adapter="other")[OUTPUT] - wanted).max() <= 1e-5


def test_a_row_for_each_task_in_int8(make_tiny: Callable, tmp_path: Path) -> None:
    """Jina's style: retrieval and matching side by side, each with the same modules.json."""
    base, adapters = None, {}
    for seed, name in enumerate(("retrieval", "matching")):
        base, made = make_tiny(*EMBEDS, r=3 + seed, seed=7 + seed)
        adapters[name] = write_modules(Path(shutil.copytree(made, tmp_path / name)), "cls", normalize=False)
    out = tmp_path / "out" / "model.onnx"
    options = ExportOptions(base_model=base, pooling="auto", normalize=True, quantize="int8")
    result = export_grouped(adapters, out, options)
    assert result.manifest.embedding == Embedding("cls", True)
    passed = {(check.variant, check.output) for check in result.parity.checks if check.status == "passed"}
    for variant in ("with library", "without library"):
        for rows in ("retrieval", "matching", "id -1", "mixed rows"):
            assert (variant, f"{OUTPUT} ({rows})") in passed
    assert ("quantised", f"{OUTPUT} (mixed rows)") in passed
    # The file itself, its products in int8 and its rows mixed, is close to PyTorch, and nearest to the row's own.
    session, hidden = create_session(out), {}
    for name, path in adapters.items():
        reference = load_reference(read_adapter(path), base)
        inputs = padded_on_either_side(sample_inputs(reference, batch=4, sequence=11, seed=2))
        with torch.no_grad():
            values = {key: torch.from_numpy(value) for key, value in inputs.items()}
            hidden[name] = reference.model.get_base_model()(**values).last_hidden_state.numpy()
    wanted = {name: expected(h, inputs["attention_mask"], Embedding("cls", True)) for name, h in hidden.items()}
    got = session.run([OUTPUT], inputs | {"adapter_ids": np.array([0, 1, 0, 1])})[0]
    for row, (own, other) in enumerate([("retrieval", "matching"), ("matching", "retrieval")] * 2):
        assert got[row] @ wanted[own][row] > max(0.999, got[row] @ wanted[other][row])


# modules.json.


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["lasttoken"], "include_prompt": True}, "last"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"word_embedding_dimension": 5}, "mean"),
    ],
)
def test_what_is_read_of_a_pooling(tmp_path: Path, config: dict[str, Any], pooling: str) -> None:
    """Of version 6, of older ones, and one that says nothing, which sentence-transformers takes for the mean."""
    write_modules(tmp_path, normalize=False)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert read_modules(tmp_path) == Embedding(pooling)  # type: ignore[arg-type]


def test_version_6_moved_its_modules(tmp_path: Path) -> None:
    write_modules(tmp_path)
    own = "sentence_transformers.base.modules"
    kinds = [f"{own}.transformer.Transformer", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"]
    rows = read_json(tmp_path / "modules.json")
    for row, kind in zip(rows, [*kinds, f"{own}.normalize.Normalize"], strict=True):
        row["type"] = kind
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    (tmp_path / "2_Normalize").mkdir()
    (tmp_path / "2_Normalize" / "config.json").write_text('{"module_input_name": "sentence_embedding"}')
    assert read_modules(tmp_path) == Embedding("mean", True)


def test_a_base_on_the_hub_says_it_too(make_tiny: Callable, hub: Callable, tmp_path: Path) -> None:
    """At the adapter's revision; the adapter's own goes before it."""
    base, adapter = make_tiny(*EMBEDS)
    for revision, pooling in (("main", "mean"), ("v2", "last")):
        hub(write_modules(Path(shutil.copytree(base, tmp_path / revision)), pooling), "someone/embedder", revision)
    loaded = load_base(read_adapter(adapter), "someone/embedder")
    assert declared(read_adapter(adapter), loaded) == Embedding("mean", True)
    assert declared(read_adapter(adapter), replace(loaded, revision="v2")) == Embedding("last", True)
    own = write_modules(Path(shutil.copytree(adapter, tmp_path / "own")), "cls", normalize=False)
    assert declared(read_adapter(own), loaded) == Embedding("cls")
    hub(base, "someone/other")
    assert declared(read_adapter(adapter), load_base(read_adapter(adapter), "someone/other")) is None


MODULE = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
FAULTS: dict[str, tuple[str, Any, str]] = {
    "no JSON": ("modules.json", "[{", "not valid JSON"),
    "no list": ("modules.json", {}, "it is {}, expected a list of modules"),
    "a key twice": ("modules.json", '[{"type": "a", "type": "b"}]', "it has 'type' twice"),
    "nested": ("modules.json", "[" * 9999 + "]" * 9999, "nested more than 100 deep"),
    "too long": ("modules.json", " " * (1 << 20) + "[]", "more than 1048576 bytes"),
    "a module of numbers": ("modules.json", [{"type": 1, "path": 2}], "each with a type and a path"),
    "nothing pooled": ("modules.json", [MODULE], 'its modules are ["models.Transformer"]'),
    "a stranger's": ("modules.json", [MODULE | {"type": "custom_st.Transformer"}, POOLING], "custom_st.Transformer"),
    "pooling elsewhere": ("modules.json", "../1_Pooling", 'a module at "../1_Pooling"'),
    "a dense layer": ("modules.json", "Dense", "expected Transformer, Pooling and perhaps Normalize"),
    "pooling of numbers": ("1_Pooling/config.json", [1], "it holds [1], expected an object"),
    "the largest": ("1_Pooling/config.json", {"pooling_mode": "max"}, 'it pools by "max", expected one of mean, cls'),
    "two poolings": ("1_Pooling/config.json", {"pooling_mode": ["mean", "cls"]}, 'it pools by ["mean", "cls"]'),
    "a flag of text": ("1_Pooling/config.json", {"pooling_mode_cls_token": "yes"}, 'is "yes", expected true or false'),
    "no prompts": ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
    "tokens normalised": ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is"),
    "gone": ("1_Pooling/config.json", None, "1_Pooling/config.json"),
    "a link away": ("1_Pooling/config.json", Path, "outside of its folder"),
    "a FIFO": ("1_Pooling/config.json", os, "a FIFO"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_modules_that_are_not_followed(what: str, make_tiny: Callable, refused: Callable, tmp_path: Path) -> None:
    """Each in the adapter's own folder, which goes before the base's."""
    name, content, words = FAULTS[what]
    base, made = make_tiny(*EMBEDS)
    adapter = write_modules(Path(shutil.copytree(made, tmp_path / "adapter")))
    path = adapter / name
    if content in ("../1_Pooling", "Dense"):
        rows = read_json(path)
        rows[1] |= {"path": content} if "/" in content else {"type": "sentence_transformers.models.Dense"}
        content = rows
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is Path:
        (tmp_path / "elsewhere.json").write_text('{"pooling_mode": "mean"}')
        path.symlink_to(tmp_path / "elsewhere.json")
    elif content is os:
        os.mkfifo(path)
    elif content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    command = ["--adapter", adapter, "--base-model", base, "--pooling", "auto"]
    assert words in refused(tmp_path / "out" / "model.onnx", *command)


def test_what_can_not_be_pooled(make_tiny: Callable, refused: Callable, tmp_path: Path) -> None:
    base, adapter = make_tiny(*EMBEDS)
    out = tmp_path / "out" / "model.onnx"

    def embed(*options: Any, pair: tuple[Path, Path] = (base, adapter)) -> str:
        return refused(out, "--adapter", pair[1], "--base-model", pair[0], *options)

    assert "--normalize is of the sentence's embedding" in embed("--normalize")
    assert "--dimensions is of the sentence's embedding" in embed("--dimensions", 8)
    assert "--dimensions is 33, and the base's embeddings have 32" in embed("--pooling", "mean", "--dimensions", 33)
    assert "'0' is not a whole number over zero" in embed("--pooling", "mean", "--dimensions", 0)
    text = embed("--pooling", "auto")
    assert str(adapter) in text
    assert f"nor the base {base} has one" in text
    classifier = make_tiny("bert", "text-classification", "lora")
    assert "this adapter's task is text-classification" in embed("--pooling", "cls", pair=classifier)
    images = make_tiny("vit", "feature-extraction", "lora")
    assert "this model takes pixel_values alone" in embed("--pooling", "mean", pair=images)
    text = refused(tmp_path / "a.onnx_adapter", "--adapter", adapter, "--onto", out, "--pooling", "mean")
    assert "--pooling says how a model is made" in text
    with pytest.raises(UserError, match="--pooling is 'max', expected one of: mean, cls, last, auto"):
        ExportOptions(pooling="max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--dimensions is 0, expected at least 1"):
        ExportOptions(pooling="mean", dimensions=0)


def test_adapters_that_pool_differently_are_not_one_model(
    make_tiny: Callable, refused: Callable, tmp_path: Path
) -> None:
    base, made = make_tiny(*EMBEDS)
    first, other = (Path(shutil.copytree(made, tmp_path / name)) for name in ("first", "other"))
    write_modules(first, "mean")
    command = ["--adapters", f"first={first}", f"other={other}", "--base-model", base, "--pooling", "auto"]
    text = refused(tmp_path / "out" / "model.onnx", *command)
    assert f"{first}: mean pooling, normalised; {other}: nothing" in text
    write_modules(other, "last")
    assert f"{other}: last pooling, normalised" in refused(tmp_path / "out" / "model.onnx", *command)


def test_a_language_models_adapter_embeds_nothing(make_llm: Callable, refused: Callable, tmp_path: Path) -> None:
    base, adapter = make_llm("llama", "lora")
    command = ["--adapter", adapter, "--base-model", base, "--pooling", "last"]
    assert "this adapter's task is text-generation" in refused(tmp_path / "out" / "model.onnx", *command)
