"""Regular expressions of strangers: PEFT's answers for ordinary ones, an answer or a refusal in time for all."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_adapter import BASE, CONFIG, LAYER, write

from loratrf_deploy.adapters import patterns
from loratrf_deploy.adapters.adapter import read_adapter
from loratrf_deploy.adapters.config import matches_target, rank_and_scale
from loratrf_deploy.adapters.fits import check_fits
from loratrf_deploy.adapters.patterns import Matcher
from loratrf_deploy.errors import UserError
from loratrf_deploy.export import ExportOptions, export_adapter
from loratrf_deploy.pytorch.oracle import load_reference, run_torch
from shared import IDS, edit_json

MODULES = [
    f"{stem}.{index}.{leaf}"
    for stem in ("model.language_model.layers", "model.visual.blocks", "vision_tower.encoder.layer", "h", "a.1.layers")
    for index in (0, 5, 12)
    for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.3.down_proj", "mlp.fc1", "attn.qkv", "drop_proj")
] + ["lm_head", "score", "model.embed_tokens", "q_proj", "model.projector.linear_1"]
# What people write: Unsloth's and ms-swift's expressions for vision-language models, PEFT's documentation, suffixes.
WHOLE = [
    r".*\.(q_proj|v_proj)",
    r".*\.(q_proj|v_proj)$",
    r"^(?!.*visual).*(?:o_proj|up_proj|v_proj|down_proj|k_proj|q_proj|gate_proj).*",
    r"^(model\.language_model(?=\.).*\.(down_proj|o_proj|q_proj))$",
    r".*\.(?!5\b)\d+\.self_attn\.q_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|o_proj|down_proj).*?)"
    r"|(?:\bh\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|fc1)))",
    r"model\.layers\.[0-3]\.(self_attn|mlp)\.q_proj",
    r"^blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))$",
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
    r"(?i).*\.Q_PROJ",
    r".*(?<!drop)_proj",
    r"(.*)\.(\d+)\.(.*)\1",
    r"q_proj",
    r"all-linear",
    r".*projector.*linear.*",
    r".*\.layers?\.1[0-9]\..*|lm_head",
]
AT_END = [
    *("q_proj", "self_attn.q_proj", "layers.0.self_attn.q_proj", r"layers\.\d+\.self_attn\.(q|o)_proj", ".*proj", "h"),
    *(r"model\.language_model\.layers\.(?:0|12)\..*", "fc1|qkv", r"[qo]_proj", r".*\.experts\.[^.]+\.down_proj"),
    *(r"^h.0.mlp.fc1", r"(?:.*\.)?12\..*_proj", "lm_head", r"\1self_attn.o_proj", "self.attn.q.proj"),
]
LAYERS = [
    *("layers", "blocks", "h", r"enc\w+\.layer", "experts", "a|h", "(model.)?visual.blocks", "nothing", r"[^.]*"),
    "x|layers",
]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", WHOLE)
def test_whole_paths_match_as_in_peft(field: str, pattern: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    rule: dict[str, Any] = {"target_modules": ["q_proj", "fc1", "lm_head"]} | {field: pattern}
    if pattern == "all-linear":  # PEFT replaces it by names before it matches
        assert all(matches_target({"target_modules": pattern}, name) for name in MODULES)
        return
    theirs = [name for name in MODULES if check_target_module_exists(LoraConfig(**rule), name)]
    assert [name for name in MODULES if matches_target(rule, name)] == theirs


@pytest.mark.parametrize("pattern", AT_END)
def test_ends_match_as_in_peft(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    config = {"r": 1, "lora_alpha": 2, "rank_pattern": {pattern: 4}, "alpha_pattern": {"nothing": 3, pattern: 6}}
    for name in MODULES:
        key = get_pattern_key([pattern], name)
        assert rank_and_scale(config, name) == ((4, 6 / 4) if key == pattern else (1, 2.0)), name


@pytest.mark.parametrize("pattern", LAYERS)
@pytest.mark.parametrize("several", [False, True])
def test_layers_match_as_in_peft(pattern: str, several: bool) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    rule: dict[str, Any] = {
        "target_modules": ["q_proj", "down_proj", "qkv", "fc1"],
        "layers_to_transform": [0, 3, 12],
        "layers_pattern": ["decoder", pattern, "layers"] if several else pattern,
        "modules_to_save": [r"visual\.blocks\.0", "layers.1."],
    }
    config = LoraConfig(**rule)
    theirs = [name for name in MODULES if check_target_module_exists(config, name)]
    assert [name for name in MODULES if matches_target(rule, name)] == theirs


# All that `re` reads, and some that only `regex` does.
TOKENS = r"""a b . \. _ 0 \d \w \S \W \b \A \Z ^ $ [ab] [^a] []a] [a-] [\w.] [[a] [a||b] [a--b] [a&&b] {} {,} {1,2}
    {2} {,2} {0} * + ? *? +? ?? | | ( ) ( ) (?: ) (?= (?! (?<= (?<! (?P<n> (?P=n) \1 \2 (?(1) (?i: (?-i: (?s: (?x:
    (?#c) \n \x61 \141 \0 \- - / ! ~ A (?a: (?i) (?s) (?x) # \p{L} \h \K (?R) (?| (?<n> \L<a> \m"""
NAMES = "a ab aab abab a.b 0 1.12 h.0.ab A a_b a-b ac [a bb.aa ~a"


def test_any_pattern_that_is_read_matches_as_pythons_re_does() -> None:
    """Random ones, in each of PEFT's forms."""
    tokens, names = [" ", *TOKENS.split()], ["a\n", " a", *NAMES.split()]
    forms = ["@", r"(.*\.)?(@)$", r"(^|.*\.)@($|\..*)", r"(?:^|.*?\.)@\.(?P<idx>\d+)\."]
    rng, compared = random.Random(0), 0
    for _ in range(6000):
        pattern = rng.choice(forms).replace("@", "".join(rng.choices(tokens, k=rng.randint(1, 5))))
        matcher = Matcher("test")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                assert matcher.fault(pattern), pattern
                continue
        if matcher.fault(pattern):
            continue
        compared += 1
        for name in names:
            for how in ("match", "fullmatch", "search"):
                expected, found = getattr(theirs, how)(name), getattr(matcher, how)(pattern, name)
                assert (found is None) == (expected is None), (how, pattern, name)
                if expected and "idx" in expected.groupdict():
                    assert found["idx"] == expected["idx"]
    assert compared > 1000


# Python's `re` takes minutes to centuries over all of these, `regex` over the second ones.
ENDLESS = [r"(.*)*x", r"(\w+\.?)+!", r"((.*)*)*x", r"(a|.)*?(.|\w)*?x", r"(?:.*.*)*[!?]", r"(.*)*\1[!?]"]
SLOW = [r"(?:(\w|.)*)*[!?]", r"(\w|.|[a-z])*[!?]"]
LONG = ".".join(["encoder.layer.0.attention.output.dense"] * 3)
FIELDS = {
    "target_modules": lambda pattern: pattern,
    "exclude_modules": lambda pattern: pattern,
    "layers_pattern": lambda pattern: [pattern],
    "modules_to_save": lambda pattern: [pattern],
    "rank_pattern": lambda pattern: {pattern: 4},
    "alpha_pattern": lambda pattern: {pattern: 4},
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("pattern", "slow"), [(pattern, pattern in SLOW) for pattern in [*ENDLESS, *SLOW]])
@pytest.mark.parametrize("field", FIELDS)
def test_no_pattern_takes_for_ever(field: str, pattern: str, slow: bool) -> None:
    """The answer of PEFT's rules, had `re` the time, or a refusal that names the pattern."""
    config = CONFIG | {"exclude_modules": None, "layers_to_transform": [0]} | {field: FIELDS[field](pattern)}
    matcher, begin, module = Matcher("some/adapter"), time.process_time(), f"{LONG}.query"

    def answers() -> tuple[bool, tuple[int, float]]:
        return matches_target(config, module, matcher=matcher), rank_and_scale(config, module, matcher)

    if slow:
        words = rf"some/adapter: .* takes too long, the last one .*{re.escape(pattern[:8])}.* list the modules by name"
        with pytest.raises(UserError, match=words):
            answers()
        with pytest.raises(UserError, match="takes too long"):  # what is spent stays spent
            matcher.match("a", "a")
    else:
        assert answers() == (field not in ("target_modules", "layers_pattern"), (2, 3.0))
    assert time.process_time() - begin < 5


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pattern", [ENDLESS[0], SLOW[0]])
def test_an_adapter_with_such_a_pattern_is_read_and_checked_in_time(tmp_path: Path, pattern: str) -> None:
    base = {name: shape for name, shape in BASE.items() if "layer" in name or "classifier" in name}
    modules = {f"{LONG}.{number}.weight": (3, 3) for number in range(500)}
    if pattern == SLOW[0]:
        with pytest.raises(UserError, match="takes too long"):
            check_fits(read_adapter(write(tmp_path, exclude_modules=pattern)), modules)
    else:
        check_fits(read_adapter(write(tmp_path, exclude_modules=pattern, alpha_pattern={pattern: 9})), base | modules)


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("kind", ["lora", "loratrf"])
def test_peft_itself_gets_through_such_patterns(make_tiny: Callable, tmp_path: Path, kind: str) -> None:
    base, original = make_tiny(kind=kind)
    plain = Path(shutil.copytree(original, tmp_path / "plain"))
    edit_json(plain / "adapter_config.json", alpha_pattern={"query": 5})
    hostile = Path(shutil.copytree(original, tmp_path / "hostile"))
    alphas = {ENDLESS[0]: 9, ENDLESS[1]: 8, "query": 5}
    edit_json(hostile / "adapter_config.json", alpha_pattern=alphas, exclude_modules=ENDLESS[2])
    logits = [run_torch(load_reference(read_adapter(path), base), IDS)["logits"] for path in (plain, hostile)]
    np.testing.assert_array_equal(*logits)
    original_logits = run_torch(load_reference(read_adapter(original), base), IDS)["logits"]
    assert np.abs(logits[1] - original_logits).max() > 1e-3  # the pattern that does match took effect


@pytest.mark.timeout(300)
def test_a_kind_that_peft_alone_reads_is_refused_in_time(make_tiny: Callable, tmp_path: Path) -> None:
    """The patterns of such a config are matched by PEFT only; afterwards it has its own engine again."""
    import peft
    from transformers import AutoModelForSequenceClassification

    base, _ = make_tiny()
    model = AutoModelForSequenceClassification.from_pretrained(base)
    loha = peft.LoHaConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(model, loha).save_pretrained(str(tmp_path / "loha"))
    edit_json(tmp_path / "loha" / "adapter_config.json", exclude_modules=SLOW[0])
    # Parity's oracle, and what an export merges.
    with pytest.raises(UserError, match=r"PEFT .* can't load the adapter .* takes too long"):
        load_reference(read_adapter(tmp_path / "loha"), base)
    with pytest.raises(UserError, match=r"PEFT .* can't (load|merge) the adapter .* takes too long"):
        export_adapter(tmp_path / "loha", tmp_path / "out" / "model.onnx", ExportOptions(base_model=base))
    assert peft.tuners.tuners_utils.re is peft.utils.other.re is re


def test_many_patterns_share_one_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is quick; all of them together would take minutes."""
    monkeypatch.setattr(patterns, "_ALL_MATCHES", 1.0)
    matcher, begin = Matcher("adapter"), time.process_time()
    many = (rf"(?:\w?){{9}}(?:{number})?.*[!?]" for number in range(100_000))
    with pytest.raises(UserError, match="adapter: matching its regular expressions takes too long"):
        list(map(matcher.match, many, itertools.repeat(LONG)))
    assert time.process_time() - begin < 5


def test_plain_names_cost_next_to_nothing() -> None:
    """EVA and rank allocation name every layer: PEFT's form of 1000 names against 1000 modules."""
    names = [f"model.layers.{number}.{leaf}" for number in range(125) for leaf in "qkvougds"]
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": {name: number + 2 for number, name in enumerate(names)}}
    matcher, begin = Matcher("test"), time.process_time()
    for number in range(0, 1000, 40):
        assert rank_and_scale(config, names[number], matcher)[0] == number + 2
        assert rank_and_scale(config, f"base.{names[number]}", matcher)[0] == number + 2
        assert rank_and_scale(config, f"base{names[number]}", matcher)[0] == 1
    assert time.process_time() - begin < 3
    assert len(matcher._compiled) == 125  # those that end as these modules do


BOMBS = {
    "a group that nothing closes": "(query",
    "a flag in the middle": "a(?i)query",
    "counts that multiply": r"(?:(?:\w{200}){200}){200}",
    "one count": "a{100000000}",
    "a count within a look behind": "(?<!(?:ab){100000000})x",
    "ranges of letters": "(?i)" + r"[\x00-\U0010ffff]" * 500,
    "letters": "(?i)" + "[\u0100-\U0010fffe]" * 500,
    "groups": "(" * 3000 + ")" * 3000,
    "groups that repeat": "(?:" * 900 + "a" + ")*" * 900,
    "length": "a+" * 5_001,
    "a count beyond any": "a{99999999999999999999}",
    "syntax of another engine": r"\p{L}",
    "what another engine takes for an approximate match": "(?:query){e<=3}",
    "what another engine takes for a class": "[[:alpha:]]+",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "layers_pattern"])
def test_patterns_that_are_refused_when_they_are_read(tmp_path: Path, bomb: str, field: str) -> None:
    value = {BOMBS[bomb]: 4} if field == "rank_pattern" else BOMBS[bomb]
    begin = time.process_time()
    words = rf"{field} is .*expected a valid regular expression \(.*\)\. Correct"
    with pytest.raises(UserError, match=words) as caught:
        read_adapter(write(tmp_path, **{field: value}))
    assert len(str(caught.value)) < 900
    assert time.process_time() - begin < 5


def test_patterns_are_held_against_the_form_in_which_peft_matches_them(tmp_path: Path) -> None:
    """(?i) is whole in target_modules, and within another pattern an error; \\1 is an error alone."""
    with pytest.raises(UserError, match=r"alpha_pattern is .*regular expression \(global flags not at the start"):
        read_adapter(write(tmp_path, alpha_pattern={"(?i)query": 4}))
    with pytest.raises(UserError, match=r"target_modules is .*invalid group reference"):
        read_adapter(write(tmp_path, target_modules=r"\1"))
    adapter = read_adapter(write(tmp_path, alpha_pattern={r"(?:x|\1)query": 4}, target_modules="(?i).*QUERY"))
    assert adapter.layers[LAYER].scale == 3.0
    check_fits(adapter, {name: shape for name, shape in BASE.items() if "layer" in name or "classifier" in name})


def test_a_list_of_names_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"target_modules is .*at most 50000 names"):
        read_adapter(write(tmp_path, target_modules=[f"a{number}" for number in range(50_001)]))
