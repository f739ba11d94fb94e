"""docs/adapters.md's table of what each kind of adapter can do, read from the page and tried."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers

import tiny
import tiny_llm
from loratrf_deploy import UserError
from loratrf_deploy.export import ExportOptions, convert_adapter, export_adapter, export_grouped

PAGE = Path(__file__).parent.parent / "docs" / "adapters.md"
WAYS = ("--mode merged", "--mode separate", "--swappable", "--adapters")
TABLE = ["q_lin", "word_embeddings"]


def rows() -> dict[str, dict[str, str]]:
    """The page's table: kind -> way -> yes or no."""
    section = PAGE.read_text().partition("## What each kind can do")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    head, _, *cells = [[cell.strip().replace("`", "") for cell in line] for line in lines]
    assert head == ["kind", "--mode merged", "--mode separate", "--swappable, --onto", "--adapters"]
    return {kind: dict(zip(WAYS, own, strict=True)) for kind, *own in cells}


def lora(**config: Any) -> Callable[[Path, Path], Path]:
    return lambda base, out: tiny.make_adapter(base, out, "lora", **config)


def other(make: Callable[[], Any]) -> Callable[[Path, Path], Path]:
    """An adapter of one of PEFT's further kinds, as PEFT saves it, its values random."""

    def save(base: Path, out: Path) -> Path:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        adapted = peft.get_peft_model(model, make())
        tiny.randomise(adapted, 1, trainable_only=True)
        adapted.save_pretrained(str(out))
        return out

    return save


TASK: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]}
MAKERS: dict[str, Callable[[Path, Path], Path]] = {
    "LoRA (with rsLoRA, patterns, saved heads)": lora(use_rslora=True, rank_pattern={"v_lin": 3}),
    "LoRATRF": lambda base, out: tiny.make_adapter(base, out, "loratrf"),
    "LoRA on embedding tables": lora(target_modules=TABLE),
    "DoRA on linear layers": lora(use_dora=True),
    "DoRA on embedding tables": lora(use_dora=True, target_modules=TABLE),
    "trained biases (bias, lora_bias)": lora(bias="lora_only", lora_bias=True),
    "trained tokens (trainable_token_indices)": lora(trainable_token_indices={"word_embeddings": [1, 2]}),
    "PiSSA, OLoRA, not converted to plain LoRA": lora(init_lora_weights="pissa"),
    "LoHa": other(lambda: peft.LoHaConfig(r=3, **TASK)),
    "LoKr": other(lambda: peft.LoKrConfig(r=3, **TASK)),
    "VeRA": other(lambda: peft.VeraConfig(r=4, **TASK)),
    "IA3": other(lambda: peft.IA3Config(feedforward_modules=[], **TASK)),
    "RoAd": other(lambda: peft.RoadConfig(group_size=8, **TASK)),
    "OFT": other(lambda: peft.OFTConfig(r=0, oft_block_size=4, **TASK)),
    "aLoRA (causal language models)": lambda base, out: tiny_llm.make_adapter(
        base, out, "lora", alora_invocation_tokens=[7, 8]
    ),
    "prompts and prefixes": other(
        lambda: peft.PromptTuningConfig(
            **{"task_type": "SEQ_CLS", "num_virtual_tokens": 2, "token_dim": 32, "num_layers": 1},
            **{"num_transformer_submodules": 1, "num_attention_heads": 4},
        )
    ),
}


@pytest.fixture(scope="module")
def made(make_tiny: Callable[..., Any], make_llm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """made(kind) -> (base, adapter)"""
    folder, found = tmp_path_factory.mktemp("kinds"), dict[str, tuple[Path, Path]]()

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in found:
            base = make_llm()[0] if kind.startswith("aLoRA") else make_tiny("distilbert")[0]
            found[kind] = base, MAKERS[kind](base, folder / str(len(found)))
        return found[kind]

    return make


def command(way: str, adapter: Path) -> list[str]:
    if way == "--adapters":
        return [way, f"a={adapter}"]
    return ["--adapter", str(adapter), *(way.split() if "mode" in way else [way, "base"])]


def test_the_table_has_a_row_for_each_kind() -> None:
    assert rows().keys() == MAKERS.keys()


ADVICE = {
    r"Export it (by itself: --adapter PATH\.|as a model of its own)|export it merged|Export it merged": "--mode merged",
    r"export it with --swappable base": "--swappable",
}


@pytest.mark.filterwarnings("ignore:(PiSSA|Setting|adapter has rank)")
@pytest.mark.parametrize("kind", MAKERS)
def test_each_row_and_its_advice(
    kind: str, made: Any, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the page says yes, an export comes as far as tracing, and where it says no, to advice that the page allows.

    What is traced then is another test's: `test_each_yes_is_proven`, and those of each kind.
    """
    from transformers.exporters.exporter_onnx import OnnxExporter

    def stop(*arguments: object, **options: object) -> None:
        raise UserError("as far as tracing.")

    monkeypatch.setattr(OnnxExporter, "export", stop)
    for module in ("genai", "grouped"):
        monkeypatch.setattr(f"loratrf_deploy.export.{module}.build_graph", stop, raising=False)
    base, adapter = made(kind)
    said = rows()[kind]
    for way, cell in said.items():
        message = refused(tmp_path / "out" / "model.onnx", *command(way, adapter), "--base-model", base, "--no-check")
        assert ("as far as tracing" in message) == (cell == "yes"), f"{way} is {cell}: {message}"
        if cell == "no":
            advised = [told for words, told in ADVICE.items() if re.search(words, message)]
            assert all(said[told] == "yes" for told in advised), message
            assert bool(advised) == ("yes" in said.values()), message


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(PiSSA|Setting|adapter has rank)")
@pytest.mark.parametrize(
    ("kind", "way"), [(kind, way) for kind in MAKERS for way in WAYS if rows().get(kind, {}).get(way) == "yes"]
)
def test_each_yes_is_proven(kind: str, way: str, made: Any, tmp_path: Path) -> None:
    base, adapter = made(kind)
    out = tmp_path / "out" / "model.onnx"
    if way == "--adapters":
        reports = [export_grouped({"a": adapter}, out, ExportOptions(base_model=base)).parity]
    else:
        how = {"swappable": "base"} if way == "--swappable" else {"mode": way.removeprefix("--mode ")}
        reports = [export_adapter(adapter, out, ExportOptions(base_model=base, **how)).parity]
    if way == "--swappable":
        file = tmp_path / "a.onnx_adapter"
        reports.append(convert_adapter(adapter, out, file, base_model=base, check=True).parity)
    for report in reports:
        assert report is not None
        assert report.passed
