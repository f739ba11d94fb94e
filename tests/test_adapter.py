"""Reading adapters: every field, every kind that PEFT makes, and every way a file can be wrong or hostile."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from loratrf_deploy.adapters import config as _adapter_config
from loratrf_deploy.adapters.adapter import Adapter, matches_target, read_adapter
from loratrf_deploy.adapters.fits import check_fits, contradictions
from loratrf_deploy.errors import UserError
from shared import FRAMEWORKS, run_python

K, N, R, F = 6, 5, 2, 3
LAYER = "encoder.layer.0.query"
KEY = f"base_model.model.{LAYER}"
CONFIG = {
    "peft_type": "LORATRF",
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "some/base",
    "r": R,
    "lora_alpha": 6,
    "target_modules": ["query"],
    "modules_to_save": ["classifier"],
    "bias": "none",
    "filter_rank": F,
    "filter_gamma": 0.5,
    "filter_input": "base",
}
BASE = {f"{LAYER}.weight": (N, K), f"{LAYER}.bias": (N,), "classifier.weight": (2, N), "classifier.bias": (2,)}


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        f"{KEY}.lora_A.weight": (R, K),
        f"{KEY}.lora_B.weight": (N, R),
        f"{KEY}.trf_tau": (N,),
        f"{KEY}.trf_C.weight": (F, N),
        f"{KEY}.trf_D.weight": (N, F),
        "base_model.model.classifier.weight": (2, N),
        "base_model.model.classifier.bias": (2,),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """An adapter folder: the sample's tensors and config, or what is given instead."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(some_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def test_reads_every_field(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path))
    tensors = some_tensors()
    layer = adapter.layers[LAYER]
    assert list(adapter.layers) == [layer.name] == [LAYER]
    for part, name in (("A", "lora_A.weight"), ("B", "lora_B.weight"), ("tau", "trf_tau"), ("D", "trf_D.weight")):
        np.testing.assert_array_equal(getattr(layer, part), tensors[f"{KEY}.{name}"])
    assert (layer.rank, layer.filter_rank, layer.in_features, layer.out_features) == (R, F, K, N)
    assert (layer.scale, layer.gamma, layer.parameters) == (3.0, 0.5, R * K + N * R + N + 2 * F * N)
    np.testing.assert_allclose(layer.scaled_B(), 3.0 * tensors[f"{KEY}.lora_B.weight"], rtol=1e-6)
    np.testing.assert_allclose(layer.scaled_D(), 0.5 * tensors[f"{KEY}.trf_D.weight"], rtol=1e-6)
    assert layer.A is not None
    assert layer.A.dtype == np.float32
    assert layer.A.flags.c_contiguous
    assert (adapter.peft_type, adapter.task_type, adapter.filter_input) == ("LORATRF", "SEQ_CLS", "base")
    assert (adapter.not_separable, adapter.base_model, adapter.dtype) == (None, "some/base", "float32")
    assert adapter.modules_to_save["classifier"].keys() == {"weight", "bias"}
    assert adapter.sha256 == hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()
    check_fits(adapter, BASE)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda dtype: np.dtype(dtype).name)
def test_stored_types_widen_to_float32(tmp_path: Path, dtype: Any) -> None:
    stored = {name: value.astype(dtype) for name, value in some_tensors().items()}
    write(tmp_path, stored)
    named = np.dtype(dtype).name
    adapter = read_adapter(tmp_path)
    assert adapter.dtype == named
    A = adapter.layers[LAYER].A
    assert A is not None
    assert A.dtype == np.float32
    np.testing.assert_array_equal(A, stored[f"{KEY}.lora_A.weight"].astype(np.float32))


@pytest.mark.parametrize("half", ["lora", "trf"])
def test_either_half_may_be_absent(tmp_path: Path, half: str) -> None:
    kept = {name: value for name, value in some_tensors().items() if half in name or "classifier" in name}
    targets = {"filter_target_modules": []} if half == "lora" else {"target_modules": [], "filter_target_modules": None}
    if half == "trf":
        targets["filter_target_modules"] = ["query"]
    adapter = read_adapter(write(tmp_path, kept, **targets))
    layer = adapter.layers[LAYER]
    assert (layer.rank, layer.filter_rank) == ((R, 0) if half == "lora" else (0, F))
    assert layer.in_features == (K if half == "lora" else None)
    assert layer.out_features == N
    check_fits(adapter, BASE)
    with pytest.raises(ValueError, match="has no"):
        layer.scaled_D() if half == "lora" else layer.scaled_B()


def test_patterns_set_rank_and_scale(tmp_path: Path) -> None:
    config = {"r": 9, "rank_pattern": {r"layer\.\d+\.query": R}, "alpha_pattern": {"key": 1, "query": 4}}
    layer = read_adapter(write(tmp_path, **config, use_rslora=True)).layers[LAYER]
    assert layer.scale == pytest.approx(4 / R**0.5)


# Each case: what is done to a good adapter folder, and words that the error must hold.
Spoil = Callable[[Path], Any]


def config_is(**fields: Any) -> Spoil:
    return lambda folder: write(folder, **fields)


def tensors_are(change: Callable[[dict[str, np.ndarray]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = some_tensors()
        change(tensors)
        write(folder, tensors)

    return spoil


def text_is(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def weights_only_in_pickle(folder: Path) -> None:
    # Opening this file as a pickle would raise ZeroDivisionError.
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cbuiltins\neval\n(V1/0\ntR.")


def header_says(**entry: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        header = json.dumps(
            {f"{KEY}.lora_A.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | entry}
        )
        raw = len(header).to_bytes(8, "little") + header.encode() + bytes(16)
        (folder / "adapter_model.safetensors").write_bytes(raw)

    return spoil


def bytes_are(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def set_one(name: str, value: float) -> Spoil:
    return tensors_are(lambda tensors: tensors[name].__setitem__((0, 0), value))


def tensor_is(name: str, value: Any) -> Spoil:
    return tensors_are(lambda tensors: tensors.update({name: value}))


def resized(part: str, shape: tuple[int, ...]) -> Spoil:
    return tensor_is(f"{KEY}.{part}", np.ones(shape, np.float32))


def without(part: str) -> Spoil:
    return tensors_are(lambda tensors: tensors.pop(f"{KEY}.{part}"))


WEIGHTS, JSON = "adapter_model.safetensors", "adapter_config.json"
FAULTS: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda folder: (folder / JSON).unlink(), "has no adapter_config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "pickle": (weights_only_in_pickle, "pickle file.*refused.*weights_only=True"),
    "config not JSON": (text_is(JSON, "{"), "not valid JSON"),
    "config not UTF-8": (text_is(JSON, b"\xff\xfe{"), "not valid JSON"),
    "config nested without end": (text_is(JSON, "[" * 100_000), "not valid JSON"),
    "config with an endless number": (text_is(JSON, '{"r": ' + "9" * 10_000 + "}"), "not valid JSON"),
    "config a list": (text_is(JSON, "[]"), "JSON list"),
    "kind missing": (text_is(JSON, "{}"), "peft_type is missing"),
    "kind unknown": (config_is(peft_type="LORAX"), 'peft_type is "LORAX"'),
    "kind not text": (config_is(peft_type=["LORA"]), "peft_type is"),
    "task unknown": (config_is(task_type="DANCE"), 'task_type is "DANCE"'),
    "rank zero": (config_is(r=0), "r is 0"),
    "rank negative": (config_is(r=-3), "r is -3"),
    "rank text": (config_is(r="8"), 'r is "8"'),
    "rank a boolean": (config_is(r=True), "r is true"),
    "rank missing": (config_is(r=None), "r is null"),
    "rank fractional": (config_is(r=2.0), r"r is 2\.0"),
    "alpha text": (config_is(lora_alpha="16"), "lora_alpha is"),
    "alpha NaN": (config_is(lora_alpha=float("nan")), "lora_alpha is NaN"),
    "alpha beyond floats": (config_is(lora_alpha=10**400), "lora_alpha is 1000"),
    "alpha a boolean": (config_is(lora_alpha=True), "lora_alpha is true"),
    "rslora a number": (config_is(use_rslora=1), "use_rslora is 1"),
    "bias unknown": (config_is(bias="some"), 'bias is "some"'),
    "targets a number": (config_is(target_modules=3), "target_modules is 3"),
    "targets of numbers": (config_is(target_modules=[1]), "target_modules is"),
    "targets an empty name": (config_is(target_modules=[""]), "target_modules is"),
    "targets not a pattern": (config_is(target_modules="(query"), "target_modules is.*regular expression"),
    "saved modules text": (config_is(modules_to_save="classifier"), "modules_to_save is"),
    "saved modules not a pattern": (config_is(modules_to_save=["("]), "modules_to_save is"),
    "layers text": (config_is(layers_to_transform="0"), "layers_to_transform is"),
    "layers negative": (config_is(layers_to_transform=[-1]), "layers_to_transform is"),
    "rank pattern a list": (config_is(rank_pattern=[1]), "rank_pattern is"),
    "rank pattern zero": (config_is(rank_pattern={"q": 0}), r'rank_pattern\["q"\] is 0'),
    "rank pattern broken": (config_is(rank_pattern={"(": 1}), "rank_pattern is.*regular expression"),
    "alpha pattern text": (config_is(alpha_pattern={"q": "1"}), r"alpha_pattern\["),
    "base a number": (config_is(base_model_name_or_path=7), "base_model_name_or_path is 7"),
    "revision a number": (config_is(revision=1), "revision is 1"),
    "mapping a list": (config_is(auto_mapping=[1]), "auto_mapping is"),
    "mapping of objects": (config_is(auto_mapping={"base_model_class": {}}), "auto_mapping is"),
    "initialisation a list": (config_is(init_lora_weights=[]), "init_lora_weights is"),
    "filter input unknown": (config_is(filter_input="both"), 'filter_input is "both"'),
    "filter input missing": (config_is(filter_input=None), "filter_input is null"),
    "filter rank zero": (config_is(filter_rank=0), "filter_rank is 0"),
    "filter gamma text": (config_is(filter_gamma="1"), "filter_gamma is"),
    "filter targets a number": (config_is(filter_target_modules=1), "filter_target_modules is 1"),
    "weights empty": (text_is(WEIGHTS, b""), "not a valid safetensors file"),
    "weights not safetensors": (text_is(WEIGHTS, b"PK\x03\x04" * 9), "not a valid safetensors file"),
    "weights truncated": (bytes_are(lambda raw: raw[:-4]), "not a valid safetensors file"),
    "weights with a tail": (bytes_are(lambda raw: raw + b"tail"), "not a valid safetensors file"),
    "header offsets beyond the file": (header_says(data_offsets=[0, 1 << 40]), "not a valid safetensors file"),
    "header shape too large": (header_says(shape=[1 << 31, 1 << 31]), "not a valid safetensors file"),
    "header shape overflowing": (header_says(shape=[1 << 62, 1 << 62]), "not a valid safetensors file"),
    "header shape negative": (header_says(shape=[-2, -2]), "not a valid safetensors file"),
    "header type unknown": (header_says(dtype="F7"), "is stored as F7, expected float32"),
    "header length a lie": (text_is(WEIGHTS, b"\xff" * 64), "not a valid safetensors file"),
    "weights integers": (
        tensor_is(f"{KEY}.lora_A.weight", np.ones((R, K), np.int32)),
        "lora_A.weight is stored as I32",
    ),
    "weights eight-bit floats": (header_says(dtype="F8_E4M3", shape=[4, 4]), "is stored as F8_E4M3"),
    "NaN": (set_one(f"{KEY}.lora_A.weight", float("nan")), "NaN or infinite.*lora_A.weight"),
    "infinity in the head": (set_one("base_model.model.classifier.weight", float("inf")), "NaN or inf.*classifier"),
    "beyond float32": (tensor_is(f"{KEY}.trf_D.weight", np.full((N, F), 1e300)), "beyond float32.*trf_D"),
    "A without B": (without("lora_B.weight"), "low-rank half is incomplete: B missing"),
    "B without A": (without("lora_A.weight"), "low-rank half is incomplete: A missing"),
    "a bias of B that the config hasn't": (
        tensor_is(f"{KEY}.lora_B.bias", np.ones(N, np.float32)),
        "lora_bias is null, but the file holds lora_B.bias",
    ),
    "a bias of B that the file hasn't": (config_is(lora_bias=True), "lora_bias is true, but the file holds no lora_B"),
    "filter without tau": (without("trf_tau"), "filter is incomplete: tau missing"),
    "filter without C": (without("trf_C.weight"), "filter is incomplete: C missing"),
    "filter without D": (without("trf_D.weight"), "filter is incomplete: D missing"),
    "filter in plain LoRA": (config_is(peft_type="LORA"), 'has a filter, but peft_type is "LORA"'),
    "rank not the config's": (config_is(r=R + 1), r"A has shape \(2, 6\), expected \(R, K\) with R = 3"),
    "filter rank not the config's": (config_is(filter_rank=F + 1), r"C has shape \(3, 5\).*F = 4"),
    "B transposed": (resized("lora_B.weight", (R, N)), r"has shape \(2, 5\)"),
    "A flat": (resized("lora_A.weight", (R,)), r"A has shape \(2,\)"),
    "A a number": (resized("lora_A.weight", ()), r"A has shape \(\)"),
    "A empty": (resized("lora_A.weight", (R, 0)), r"A has shape \(2, 0\)"),
    "B a cube": (resized("lora_B.weight", (N, R, 1)), r"B has shape \(5, 2, 1\)"),
    "tau too long": (resized("trf_tau", (N + 1,)), r"tau has shape \(6,\)"),
    "tau a matrix": (resized("trf_tau", (N, 1)), r"tau has shape \(5, 1\)"),
    "C too wide": (resized("trf_C.weight", (F, N + 1)), r"C has shape \(3, 6\)"),
    "D too long": (resized("trf_D.weight", (N + 1, F)), r"D has shape \(6, 3\)"),
    "tensor without a rule": (
        tensor_is("base_model.model.mystery", np.ones(2, np.float32)),
        "no rule uses: base_model.model.mystery",
    ),
    "tensor without PEFT's prefix": (
        tensor_is(f"{LAYER}.lora_A.weight", np.ones((R, K), np.float32)),
        f"no rule uses: {LAYER}",
    ),
    "bias that bias=none excludes": (tensor_is(f"{KEY}.base_layer.bias", np.ones(N, np.float32)), "no rule uses"),
    "no adapter weights": (
        tensors_are(lambda tensors: [tensors.pop(name) for name in list(tensors) if "classifier" not in name]),
        "holds no adapter weights",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(tmp_path: Path, fault: str) -> None:
    spoil, words = FAULTS[fault]
    spoil(write(tmp_path))
    with pytest.raises(UserError, match=words) as caught:
        read_adapter(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    assert str(tmp_path) in message


def test_wrong_paths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No folder at.*ORG/NAME@REVISION"):
        read_adapter("someone/adapter-on-a-hub")
    write(tmp_path / "inner")
    with pytest.raises(UserError, match=r"is a file.*Pass .*inner"):
        read_adapter(tmp_path / "inner" / WEIGHTS)
    with pytest.raises(UserError, match=r"Did you mean .*inner"):
        read_adapter(tmp_path)


def test_scale_beyond_float32_is_named(tmp_path: Path) -> None:
    layer = read_adapter(write(tmp_path, lora_alpha=1e39)).layers[LAYER]
    with pytest.raises(UserError, match=r"B times its scale 5e\+38 exceeds float32"):
        layer.scaled_B()


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "layer missing": ({f"{LAYER}.weight": None}, f"no layer {LAYER}"),
    "in-features": ({f"{LAYER}.weight": (N, K + 1)}, "maps 7 -> 5 features in the base model, 6 -> 5 in the adapter"),
    "out-features": ({f"{LAYER}.weight": (N + 1, K)}, "maps 6 -> 6 features"),
    "weight a vector": ({f"{LAYER}.weight": (N,)}, "maps 0 -> 5 features"),
    "head missing": ({"classifier.weight": None}, "no classifier.weight"),
    "other number of labels": (
        {"classifier.weight": (3, N)},
        r"classifier.weight is \(3, 5\) in the base model, \(2, 5\)",
    ),
    "second targeted layer": ({"encoder.layer.1.query.weight": (N, K)}, "target_modules covers encoder.layer.1.query"),
    "more of the head": ({"classifier.extra": (1,)}, "modules_to_save covers classifier.extra"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfit_is_named(tmp_path: Path, misfit: str) -> None:
    change, words = MISFITS[misfit]
    base = {name: shape for name, shape in (BASE | change).items() if shape is not None}
    with pytest.raises(UserError, match=words):
        check_fits(read_adapter(write(tmp_path)), base)


NEXT = "encoder.layer.1.query"
BOTH = BASE | {f"{NEXT}.weight": (N, K), f"{NEXT}.bias": (N,)}


def both_layers(*suffixes: str) -> dict[str, np.ndarray]:
    """The sample's tensors, those of the next layer too: all of them, or those that end in one of `suffixes`."""
    tensors = some_tensors()
    next_ones = {key.replace(LAYER, NEXT): value for key, value in tensors.items() if LAYER in key}
    return tensors | {key: value for key, value in next_ones.items() if not suffixes or key.endswith(suffixes)}


CONTRADICTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str]]] = {
    # Config of a file with both layers, suffixes of what it holds of the second, what must be said.
    "none": ({}, (), []),
    "narrowed": ({"target_modules": ["0.query"]}, (), [f"low-rank.*{NEXT}, which target_modules", f"filter.*{NEXT}"]),
    "narrowed by a regular expression": ({"target_modules": r".*\.0\.query"}, (), [f"low-rank weights for {NEXT}"]),
    "narrowed filters": (
        {"filter_target_modules": ["0.query"]},
        (),
        [f"filter weights for {NEXT}, which filter_target"],
    ),
    "excluded": ({"exclude_modules": ["1.query"]}, (), [f"low-rank weights for {NEXT}"]),
    "other layers": ({"layers_to_transform": [0]}, (), [f"low-rank weights for {NEXT}, which target_modules leaves"]),
    "saved": ({"modules_to_save": ["classifier", "1.query"]}, (), [f"low-rank weights for {NEXT}"]),
    "widened": ({"target_modules": ["query", "classifier"], "modules_to_save": None}, (), ["classifier.*no low-rank"]),
    "half a layer": ({}, ("lora_A.weight", "lora_B.weight"), [f"filter_target_modules covers {NEXT}.*no filter"]),
    "all-linear": ({"target_modules": "all-linear", "modules_to_save": ["classifier"]}, (), []),
    "biases": ({"bias": "lora_only"}, (), [f'bias is "lora_only", but the file doesn\'t hold {NEXT}.bias']),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_config_and_file_are_held_against_each_other(tmp_path: Path, case: str) -> None:
    config, suffixes, words = CONTRADICTIONS[case]
    tensors = both_layers(*suffixes)
    if config.get("modules_to_save", ()) is None:
        tensors = {key: value for key, value in tensors.items() if "classifier" not in key}
    adapter = read_adapter(write(tmp_path, tensors, **config))
    found = contradictions(adapter, BOTH)
    assert bool(found) == bool(words)
    for word in words:
        assert any(re.search(word, problem) for problem in found), found
        with pytest.raises(UserError, match=word):
            check_fits(adapter, BOTH)


def test_all_linear_leaves_out_the_head(tmp_path: Path) -> None:
    head = {key.replace(LAYER, "lm_head"): value for key, value in some_tensors().items() if LAYER in key}
    adapter = read_adapter(write(tmp_path, head, target_modules="all-linear", modules_to_save=None))
    assert any("low-rank weights for lm_head" in problem for problem in contradictions(adapter, BASE))


def test_filter_targets_without_filter_weights_are_a_partial_adapter(tmp_path: Path) -> None:
    low_rank_alone = {name: value for name, value in some_tensors().items() if "trf_" not in name}
    with pytest.raises(UserError, match=r"filter_target_modules covers .*holds no filter weights"):
        check_fits(read_adapter(write(tmp_path, low_rank_alone)), BASE)


def test_conv1d_weights_are_transposed(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path))
    transposed = BASE | {f"{LAYER}.weight": (K, N)}
    check_fits(adapter, transposed, conv1d={LAYER})
    with pytest.raises(UserError, match="maps 5 -> 6"):
        check_fits(adapter, transposed)


def test_long_lists_are_cut(tmp_path: Path) -> None:
    more = {f"encoder.layer.{index}.query.weight": (N, K) for index in range(1, 40)}
    with pytest.raises(UserError, match="and 73 more"):
        check_fits(read_adapter(write(tmp_path)), BASE | more)


def test_known_kinds_are_those_of_peft() -> None:
    from peft import PeftType

    known = set(_adapter_config.ADAPTED_TYPES) | _adapter_config._OTHER_TYPES
    assert {kind.value for kind in PeftType} <= known


MODULES = [
    f"{stem}.{index}.{leaf}"
    for stem in ("bert.encoder.layer", "model.h", "blocks.layers")
    for index in (0, 1, 11)
    for leaf in ("attention.query", "attention.self.key", "mlp.dense", "experts.3.dense", "xquery")
] + ["query", "classifier", "classifier.dense", "head.dense"]
RULES: list[dict[str, Any]] = [
    {"target_modules": ["query"]},
    {"target_modules": ["attention.query", "dense"], "modules_to_save": ["classifier", "head"]},
    {"target_modules": r".*\.(query|key)"},
    {"target_modules": r".*query", "exclude_modules": r".*xquery"},
    {"target_modules": ["dense"], "exclude_modules": ["mlp.dense"]},
    {"target_modules": ["query", "dense"], "layers_to_transform": 1},
    {"target_modules": ["query", "dense"], "layers_to_transform": [0, 11]},
    {"target_modules": ["query", "dense"], "layers_to_transform": []},
    {"target_modules": ["query", "dense"], "layers_to_transform": [0, 11], "layers_pattern": "layer"},
    {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["query", "dense"], "layers_to_transform": [3], "layers_pattern": "experts"},
    {"target_modules": []},
]


@pytest.mark.parametrize("rule", RULES, ids=[str(index) for index in range(len(RULES))])
def test_targets_match_as_in_peft(rule: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(**rule)
    theirs = [name for name in MODULES if check_target_module_exists(config, name)]
    assert [name for name in MODULES if matches_target(rule, name)] == theirs
    assert bool(theirs) == bool(rule["target_modules"])


def test_filter_targets_default_to_targets() -> None:
    rule: dict[str, Any] = {"target_modules": ["query"], "filter_target_modules": None}
    assert matches_target(rule, "a.query", "filter_target_modules")
    assert not matches_target(rule | {"filter_target_modules": []}, "a.query", "filter_target_modules")
    assert matches_target(rule | {"filter_target_modules": ["key"]}, "a.key", "filter_target_modules")
    assert not matches_target(rule | {"filter_target_modules": ["key"]}, "a.query", "filter_target_modules")


def test_reading_needs_no_framework(tmp_path: Path) -> None:
    write(tmp_path)
    code = "from loratrf_deploy.adapters.adapter import read_adapter; print(len(read_adapter(sys.argv[1]).layers))"
    done = run_python(code, tmp_path, without=(*FRAMEWORKS, "onnxruntime"))
    assert (done.stdout.strip(), done.returncode) == ("1", 0), done.stderr


def test_public_names() -> None:
    import loratrf_deploy.adapters.adapter as module

    assert {"Adapter", "LayerAdapter", "matches_target", "read_adapter"} <= set(module.__all__)
    assert re.match("An adapter folder", Adapter.__doc__ or "")
