"""Blends: several plain LoRA adapters as one, against PEFT's add_weighted_adapter; what can't be added; caches."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from loratrf_deploy import AdapterSession, UserError
from loratrf_deploy.export import ExportOptions, export_grouped
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.formats.adapter_file import read_adapter_file
from loratrf_deploy.formats.blend import Blend, blend
from loratrf_deploy.formats.manifest import read_swappable
from loratrf_deploy.formats.swappable import LAYER_PARTS, RuntimeWeight
from loratrf_deploy.ops.schemas import MAX_CUDA_RANK, MAX_RANK
from loratrf_deploy.runtime import residents
from shared import IDS, ask_while
from tolerances import assert_close, assert_rounded_once

ADAPTERS = {
    "fr": {"r": 4, "lora_alpha": 8},
    "legal": {"r": 2, "lora_alpha": 9, "seed": 4, "use_rslora": True},
    "short": {"r": 3, "lora_alpha": 5, "seed": 6, "layers_to_transform": [0]},  # one of two layers
}
BLENDS = ({"fr": 0.7, "legal": 0.3}, {"fr": 1.5, "legal": -0.5, "short": 1}, {"fr": 0, "short": 0.25})
"""Sums of 1 and others, a negative weight, none at all."""


class Choir(NamedTuple):
    """The model for one adapter per run, that for one per row, their adapter files, and PEFT's answer to a blend."""

    one: Path
    rows: Path
    files: dict[str, Path]
    row_files: dict[str, Path]
    peft: Callable[[Mapping[str, float]], np.ndarray]


@pytest.fixture(scope="module")
def choir(make_tiny: Callable, make_export: Callable, tmp_path_factory: pytest.TempPathFactory) -> Choir:
    import peft
    import torch
    from transformers import AutoModel

    base = ("bert", "feature-extraction")
    folders = {name: make_tiny(*base, "lora", **fields)[1] for name, fields in ADAPTERS.items()}
    exported, folder = make_export(*base, "lora", swappable="base", **ADAPTERS["fr"]), tmp_path_factory.mktemp("choir")
    files = {name: folder / f"{name}.onnx_adapter" for name in folders}
    for name, adapter in folders.items():
        convert_adapter(adapter, exported.model, files[name])
    rows = tmp_path_factory.mktemp("rows") / "model.onnx"
    export_grouped(folders, rows, ExportOptions(base_model=exported.base, check=False))
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(exported.base), folders["fr"], adapter_name="fr")
    for name in ("legal", "short"):
        model.load_adapter(folders[name], name)
    model.eval()

    def answer(weights: Mapping[str, float]) -> np.ndarray:
        name = str(weights).replace(".", " ")  # of a module of torch's
        if name not in model.peft_config:
            model.base_model.add_weighted_adapter([*weights], [*weights.values()], name, combination_type="cat")
        model.set_adapter(name)
        with torch.no_grad():
            return model(**{name: torch.from_numpy(value) for name, value in IDS.items()}).last_hidden_state.numpy()

    return Choir(exported.model, rows, files, {name: rows.with_name(file.name) for name, file in files.items()}, answer)


def opened(choir: Choir, rows: bool = False, **options) -> AdapterSession:
    session = AdapterSession(choir.rows if rows else choir.one, **options)
    for name, file in (choir.row_files if rows else choir.files).items():
        session.load(name, file)
    return session


def hidden(session: AdapterSession, adapter: str | Mapping[str, float] | None, **options) -> np.ndarray:
    return session.run(IDS, adapter=adapter, **options)["last_hidden_state"]


def assert_peft(session: AdapterSession, choir: Choir, weights: Mapping[str, float]) -> None:
    assert_close(hidden(session, weights), choir.peft(weights), "float32", str(weights))


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("library", [True, False])
def test_a_blend_is_pefts_weighted_adapter(choir: Choir, rows: bool, library: bool) -> None:
    session = opened(choir, rows, library=library)
    alone = [hidden(session, name) for name in (*ADAPTERS, None)]
    for weights in BLENDS:
        assert_peft(session, choir, weights)
        assert min(np.abs(choir.peft(weights) - other).max() for other in alone) > 1e-2
    for name, expected in zip((*ADAPTERS, None), alone, strict=True):
        np.testing.assert_array_equal(hidden(session, name), expected)
    assert list(session.adapters) == list(ADAPTERS)


def test_rows_of_one_batch_are_blended_each(choir: Choir) -> None:
    session = opened(choir, rows=True)
    first, second, _ = BLENDS
    for adapters in ([first, None], [second, first], ["short", second], [first, first]):
        got = session.run(IDS, adapters=adapters)["last_hidden_state"]
        for row, adapter in enumerate(adapters):
            wanted = choir.peft(adapter) if isinstance(adapter, dict) else hidden(session, adapter)
            assert_close(got[row], wanted[row], "float32", str(adapter))


def test_plain_lora_adapters_of_a_model_with_filters(choir: Choir, make_export: Callable, make_tiny: Callable) -> None:
    base = ("bert", "feature-extraction")
    exported = make_export(*base, swappable="base")
    session = AdapterSession(exported.model)
    session.load("trf", exported.model.with_name(f"{exported.adapter.name}.onnx_adapter"))
    for name, fields in ADAPTERS.items():
        file = exported.model.with_name(f"{name}.onnx_adapter")
        convert_adapter(make_tiny(*base, "lora", **fields)[1], exported.model, file)
        session.load(name, file)
    for weights in BLENDS:
        assert_peft(session, choir, weights)
    with pytest.raises(UserError, match=r"{'fr': 1, 'trf': 0\.5} can't be made: 'trf' brings filters"):
        hidden(session, {"fr": 1, "trf": 0.5})


def test_a_blend_of_one_is_its_scale(choir: Choir) -> None:
    session = opened(choir)
    np.testing.assert_array_equal(hidden(session, {"legal": 0.3}), hidden(session, "legal", scale=0.3))
    np.testing.assert_array_equal(hidden(session, {"legal": 1}), hidden(session, "legal"))
    np.testing.assert_array_equal(hidden(session, {"legal": 0}), hidden(session, None))
    half = hidden(session, {"fr": 0.7, "legal": 0.3}, scale=0.5)
    assert_close(half, choir.peft({"fr": 0.35, "legal": 0.15}), "float32")


def layer(module: str, dtype: str = "float16", parts: str = "A B tau C D") -> list[RuntimeWeight]:
    """The weights of a layer from 5 features to 7."""
    shapes = {"A": (f"{module}.R", 5), "B": (7, f"{module}.R"), "tau": (7,), "C": (f"{module}.F", 7)}
    shapes["D"] = (7, f"{module}.F")
    return [RuntimeWeight(f"{module}.{LAYER_PARTS[part]}", module, part, shapes[part], dtype) for part in parts.split()]


def values_of(weights: list[RuntimeWeight], seed: int, rank: int = 3, filters: bool = False) -> dict[str, np.ndarray]:
    """What a file holds for them: random values, filters of zeros if not `filters`."""
    random = np.random.default_rng(seed)
    values = {
        weight.name: random.normal(size=[rank if isinstance(dim, str) else dim for dim in weight.shape])
        * (filters or weight.part in "AB" or not weight.in_layer)
        for weight in weights
    }
    return {weight.name: values[weight.name].astype(weight.dtype) for weight in weights}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_ranks_stand_side_by_side_and_types_stay(dtype: str) -> None:
    weights = [*layer("one", dtype, "D C tau B A"), *layer("two", dtype, "A B")]
    A, B = "one.lora_A.weight", "one.lora_B.weight"
    parts = {"a": values_of(weights, 1, 3), "b": values_of(weights, 2, 4), "c": values_of(weights, 3, 2)}
    parts["b"] |= {"two.lora_A.weight": np.zeros((1, 5), dtype), "two.lora_B.weight": np.zeros((7, 1), dtype)}
    parts["c"][A][1], parts["c"][B][:, 1] = 0, 0  # padding
    shares = {"a": 0.7, "b": -1.3, "c": 100}
    made = blend(Blend.of(shares), parts, weights)
    assert {name: value.shape for name, value in made.items()} == {
        A: (8, 5),
        B: (7, 8),
        "one.trf_tau": (7,),
        "one.trf_C.weight": (1, 7),
        "one.trf_D.weight": (7, 1),
        "two.lora_A.weight": (5, 5),
        "two.lora_B.weight": (7, 5),
    }
    assert {str(value.dtype) for value in made.values()} == {dtype}
    assert all(value.flags.c_contiguous for value in made.values())
    np.testing.assert_array_equal(made[A][:7], np.concatenate([parts["a"][A], parts["b"][A]]))
    wide = np.concatenate([parts[name][B].astype(float) * share for name, share in shares.items()], axis=1)[:, :8]
    if dtype == "float16":
        assert_rounded_once(made[B], wide, dtype)
    for name in ("one", "two"):
        sums = [
            (values[f"{name}.lora_B.weight"].astype(float) * shares[part]) @ values[f"{name}.lora_A.weight"]
            for part, values in parts.items()
        ]
        got = made[f"{name}.lora_B.weight"].astype(float) @ made[f"{name}.lora_A.weight"]
        assert_close(got, np.sum(sums, axis=0), dtype)
    made[A][...] = 9  # its own memory
    assert (parts["a"][A] != 9).all()


def test_where_no_part_adds_anything_are_zeros_of_rank_1() -> None:
    weights = layer("one")
    made = blend(Blend.of({"a": 0}), {"a": values_of(weights, 1)}, weights)
    assert all(not value.any() for value in made.values())
    assert made["one.lora_A.weight"].shape == (1, 5)


def test_gains_of_a_dora_do_not_add() -> None:
    weights = [
        *layer("one"),
        *(RuntimeWeight(f"one.{part}", "one", part, (7,), "float16") for part in ("gain", "offset")),
    ]
    plain, dora = (
        values_of(weights, seed) | {"one.gain": np.full(7, gain, "float16")} for seed, gain in ((1, 1), (2, 3))
    )
    parts = {"plain": plain, "dora": dora | {"one.offset": np.arange(7, dtype="float16")}}
    made = blend(Blend.of({"dora": 1}), parts, weights)
    assert all(
        np.array_equal(made[weight.name], parts["dora"][weight.name]) for weight in weights if weight.part != "tau"
    )
    assert (blend(Blend.of({"plain": 0.5}), parts, weights)["one.gain"] == 1).all()
    for shares in ({"dora": 0.5}, {"dora": 1, "plain": 1}):
        with pytest.raises(UserError, match=r"'dora' is a DoRA.*Blend plain LoRA"):
            blend(Blend.of(shares), parts, weights)


def test_filters_do_not_add() -> None:
    weights = layer("one")
    parts = {"a": values_of(weights, 1), "trf": values_of(weights, 2, filters=True)}
    with pytest.raises(UserError, match=r"'trf' brings filters.*depends on the layer's whole output.*Blend plain LoRA"):
        blend(Blend.of({"a": 1, "trf": 0.1}), parts, weights)
    alone = blend(Blend.of({"trf": 0.5}), parts, weights)  # what nothing is added to is scaled
    for name, factor in (("trf_tau", 1), ("trf_C.weight", 1), ("trf_D.weight", 0.5), ("lora_B.weight", 0.5)):
        np.testing.assert_array_equal(alone[f"one.{name}"], parts["trf"][f"one.{name}"] * np.float32(factor))
    parts["trf"]["one.trf_D.weight"][...] = 0  # a filter that does nothing
    assert not blend(Blend.of({"a": 1, "trf": 0.1}), parts, weights)["one.trf_tau"].any()


def test_heads_are_shared_or_refused() -> None:
    head = [RuntimeWeight(f"classifier.{part}", "classifier", part, (3,), "float16") for part in ("weight", "bias")]
    weights = [*head, *layer("one", parts="A B")]
    parts = {"a": values_of(weights, 1), "b": values_of(weights, 2)}
    with pytest.raises(UserError, match=r"different values for classifier\.weight, classifier\.bias\. A head is saved"):
        blend(Blend.of({"a": 1, "b": 1}), parts, weights)
    for weight in head:
        parts["b"][weight.name] = parts["a"][weight.name].copy()
    made = blend(Blend.of({"a": 0.5, "b": 2}), parts, weights)
    for weight in head:
        np.testing.assert_array_equal(made[weight.name], parts["a"][weight.name])
        assert not np.shares_memory(made[weight.name], parts["a"][weight.name])  # the file's block is not kept
    parts["b"]["classifier.bias"][2] += 1
    with pytest.raises(UserError, match=r"different values for classifier\.bias\. A head"):
        blend(Blend.of({"a": 1, "b": 1}), parts, weights)


@pytest.mark.parametrize(("device", "most"), [("cpu", MAX_RANK), ("cuda", MAX_CUDA_RANK)])
def test_the_combined_rank_is_the_operators(device: str, most: int) -> None:
    weights = layer("one")
    parts = {"a": values_of(weights, 1, most - 2), "b": values_of(weights, 2, 2), "c": values_of(weights, 2, 1)}
    assert blend(Blend.of({"a": 1, "b": 1}), parts, weights, device)["one.lora_A.weight"].shape == (most, 5)
    with pytest.raises(UserError, match=rf"rank {most + 1} at one, more than {most}.* on {device}"):
        blend(Blend.of({"a": 1, "b": 1, "c": 1}), parts, weights, device)


@pytest.mark.parametrize(("dtype", "share"), [("float16", 1e5), ("float32", 1e39), ("float32", 1e300)])
def test_values_that_overflow_are_named(dtype: str, share: float) -> None:
    weights = layer("one", dtype)
    with pytest.raises(UserError, match=rf"exceeds {dtype}.*at one\.lora_B\.weight\. Take smaller weights"):
        blend(Blend.of({"a": share, "b": 1}), {"a": values_of(weights, 1), "b": values_of(weights, 2)}, weights)


def test_a_filter_that_overflows_is_named() -> None:
    """One adapter alone keeps its filters: this is what a language model's scale comes to."""
    weights = layer("one")
    values = values_of(weights, 1, filters=True) | {"one.lora_B.weight": np.zeros((7, 3), np.float16)}
    with pytest.raises(UserError, match=r"exceeds float16.*at one\.trf_D\.weight\. Take smaller weights"):
        blend(Blend.of({"a": 1e5}), {"a": values}, weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "The blend has no adapters"),
        ({"fr": float("nan")}, "'fr': nan.*finite numbers"),
        ({"fr": float("-inf"), "legal": 1}, "has 'fr': -inf. Expected"),
        ({"fr": 10**400}, "'fr': 1000"),
        ({"fr": "0.5"}, "has 'fr': '0.5'"),
        ({"fr": None}, "has 'fr': None"),
        ({"fr": True}, "has 'fr': True"),
        ({"fr": np.ones((30, 30))}, "has 'fr': array"),
        ({"fr": 1j}, "has 'fr': 1j"),
        ({3: 0.5}, "has 3: 0.5"),
        ({"fr": 0.5, "de": 0.5}, r"No adapter 'de' is loaded\. Loaded: 'fr', 'legal', 'short'\. Load it"),
        ({"fr": 1e39}, "exceeds float32"),
    ],
)
@pytest.mark.parametrize("rows", [False, True])
def test_what_is_no_blend_is_one_paragraph(choir: Choir, rows: bool, weights: dict, message: str) -> None:
    session = opened(choir, rows)
    for _ in range(2):  # a failure leaves nothing behind
        with pytest.raises(UserError, match=message) as error:
            hidden(session, weights)
        assert "\n" not in str(error.value)
        if rows:
            with pytest.raises(UserError, match=message):
                session.run(IDS, adapters=[None, weights])
    assert len(session._residents._entries) == len(ADAPTERS)


def test_equal_dictionaries_are_one_blend() -> None:
    same = Blend.of({"legal": np.float32(0.5), "fr": 1})
    assert {same: 1}[Blend.of({"fr": 1.0, "legal": 0.5})] == 1
    assert same != Blend.of({"fr": 0.5, "legal": 1})
    assert str(same) == "{'fr': 1, 'legal': 0.5}"


@pytest.fixture
def blended(monkeypatch: pytest.MonkeyPatch) -> list[Blend]:
    """The blends that AdapterSession made, in order."""
    made = []

    def counted(wanted: Blend, *rest):
        made.append(wanted)
        return blend(wanted, *rest)

    monkeypatch.setattr(residents, "blend", counted)
    return made


@pytest.mark.parametrize("rows", [False, True])
def test_a_blend_is_made_once_until_a_part_goes(choir: Choir, blended: list, rows: bool) -> None:
    session, files = opened(choir, rows), choir.row_files if rows else choir.files
    first, second, _ = BLENDS
    for _ in range(3):
        assert_peft(session, choir, first)
        hidden(session, dict(reversed(first.items())))
    assert len(blended) == 1
    assert_peft(session, choir, second)
    session.load("short", files["short"], replace=True)  # in the second one only
    assert_peft(session, choir, first)
    assert len(blended) == 2
    assert_peft(session, choir, second)
    assert len(blended) == 3
    session.load("fr", files["legal"], replace=True)
    assert_close(hidden(session, first), hidden(session, "legal"), "float32")  # 0.7 + 0.3 of the same
    session.unload("legal")
    with pytest.raises(UserError, match="No adapter 'legal' is loaded"):
        hidden(session, first)
    assert len(session._residents._entries) == 2


def test_a_part_that_is_replaced_while_the_blend_is_made(choir: Choir, monkeypatch: pytest.MonkeyPatch) -> None:
    session, weights = opened(choir), BLENDS[0]

    def interrupted(*arguments):
        made = blend(*arguments)
        monkeypatch.undo()
        session.load("fr", choir.files["legal"], replace=True)
        return made

    monkeypatch.setattr(residents, "blend", interrupted)
    assert_peft(session, choir, weights)  # a run that had begun
    assert_close(hidden(session, weights), hidden(session, "legal"), "float32")


def size_of(weights: Mapping[str, float], choir: Choir) -> int:
    parts = {name: read_adapter_file(choir.files[name]).values for name in weights}
    made = blend(Blend.of(weights), parts, read_swappable(choir.one)[1].weights)
    return sum(value.nbytes for value in made.values())


def test_blends_count_in_max_bytes_and_are_put_aside(choir: Choir, blended: list, tmp_path: Path) -> None:
    weights, files = BLENDS[0], {name: Path(shutil.copy(file, tmp_path)) for name, file in choir.files.items()}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    assert sizes["short"] < sizes["fr"]
    room = size_of(weights, choir) + sizes["short"]
    session = AdapterSession(choir.one, max_bytes=room)
    for name, file in files.items():
        session.load(name, file)

    def resident() -> set[str]:
        return {name for name, info in session.adapters.items() if info.resident}

    hidden(session, "short")
    for _ in range(2):
        assert_peft(session, choir, weights)
        assert resident() == {"short"}  # of the parts, which were used before it, none
        hidden(session, "short")
    assert len(blended) == 1
    hidden(session, "fr")
    assert_peft(session, choir, weights)
    assert len(blended) == 2  # fr and the blend don't fit together
    assert "fr" not in resident()
    hidden(session, "fr")
    assert len(session._residents._entries) == len(files)  # nothing of the blend is left
    shutil.copy(files["fr"], files["legal"])
    with pytest.raises(UserError, match=r"'legal' was put aside.*has changed"):
        hidden(session, weights)
    session.load("again", files["fr"])
    session.load("more", files["fr"])
    with pytest.raises(UserError, match=rf"The blend {{'again': 1, 'fr': 1, 'more': 1}} takes \d+ bytes.*is {room}"):
        hidden(session, {"fr": 1, "more": 1, "again": 1})
    assert not [name for name in session._residents._entries if isinstance(name, Blend)]


@pytest.mark.parametrize("rows", [False, True])
def test_on_a_device_a_blend_is_copied_once(choir: Choir, pretended_device: list, rows: bool) -> None:
    session, files, weights = opened(choir, rows), choir.row_files if rows else choir.files, BLENDS[0]
    hidden(session, "short")
    pretended_device.clear()
    assert_peft(session, choir, weights)
    assert len(pretended_device) == len(read_adapter_file(files["fr"]).values)
    pretended_device.clear()
    assert_peft(session, choir, weights)
    assert pretended_device == []
    for number in range(MAX_CUDA_RANK // 4 + 1):
        session.load(str(number), files["fr"])
    with pytest.raises(UserError, match=rf"rank {MAX_CUDA_RANK + 4} at .* more than {MAX_CUDA_RANK}.* on cuda"):
        hidden(session, dict.fromkeys(map(str, range(MAX_CUDA_RANK // 4 + 1)), 1))


@pytest.mark.parametrize("rows", [False, True])
def test_threads_never_get_another_blend_while_parts_come_and_go(choir: Choir, rows: bool) -> None:
    files = choir.row_files if rows else choir.files
    room = sum(file.stat().st_size for file in files.values())  # blends are put aside all the time
    session = opened(choir, rows, max_bytes=room)
    expected = {str(weights): choir.peft(weights) for weights in BLENDS}

    def churn(turn: int) -> None:
        session.load("passing", files["legal"], replace=True)
        session.load("fr", files["fr"], replace=True)
        session.unload("passing")

    def ask(number: int) -> None:
        for turn in range(15):
            weights = BLENDS[(number + turn) % 3]
            assert_close(hidden(session, weights), expected[str(weights)], "float32")

    ask_while(churn, ask)
    session.load("fr", files["short"], replace=True)
    assert_close(hidden(session, {"fr": 0.5, "short": 0.5}), hidden(session, "short"), "float32")
