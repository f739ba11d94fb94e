"""Mixed rows in language models: each row of a batch the tokens of its own adapter; slots refilled; what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from loratrf_deploy import read_adapter
from loratrf_deploy.cli.export import main
from loratrf_deploy.export import ExportOptions, convert_adapter, export_adapter, export_grouped
from loratrf_deploy.formats.adapter_file import read_adapter_file, write_adapter_file
from loratrf_deploy.formats.manifest import read_swappable
from loratrf_deploy.genai.generate import CONFIG_FILE, generate_tokens, load_model
from loratrf_deploy.ops.schemas import DOMAIN
from loratrf_deploy.parity import check_parity
from loratrf_deploy.parity.grouped import check_grouped_parity
from loratrf_deploy.pytorch.oracle import load_reference
from loratrf_deploy.runtime.slots import Slots
from shared import edit_json, read_json

Make = Callable[..., tuple[Path, Path]]
Grouped = Callable[..., tuple[Path, dict[str, Path], Path]]

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24], [30, 31]]
TOKENS = 24

# Plain LoRA beside LoRATRF, other ranks, other layers.
ADAPTERS = {
    "llama": {
        "fr": {"kind": "loratrf", "seed": 1},
        "de": {"kind": "lora", "r": 7, "seed": 2, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        "it": {"kind": "loratrf", "r": 2, "filter_rank": 5, "seed": 3, "target_modules": ["v_proj", "up_proj"]},
    },
    "qwen2": {"fr": {"kind": "loratrf", "seed": 1}, "de": {"kind": "lora", "r": 7, "seed": 2}},
    "phi3": {"fr": {"kind": "lora", "seed": 1}, "de": {"kind": "lora", "r": 7, "seed": 2}},
}


@pytest.fixture(scope="module")
def grouped(make_llm: Make, tmp_path_factory: pytest.TempPathFactory) -> Grouped:
    """grouped(bundled, family=, quantize=) -> (base, {name: adapter folder}, model.onnx, unchecked), to read only."""
    made: dict[tuple[bool, str, str], Path] = {}

    def make(bundled: bool = True, family: str = "llama", quantize: str = "none"):
        adapters = {}
        for name, options in ADAPTERS[family].items():
            base, adapters[name] = make_llm(family, **options)
        key = (bundled, family, quantize)
        if key not in made:
            out = tmp_path_factory.mktemp("grouped") / "model.onnx"
            options = ExportOptions(base_model=base, quantize=quantize, bundle_library=bundled, check=False)
            made[key] = export_grouped(adapters, out, options).model
        return base, adapters, made[key]

    return make


def generate(
    folder: Path, ids: np.ndarray | None, prompts: Sequence[list[int]], slots: Path | None = None
) -> list[list[int]]:
    """What a program with onnxruntime_genai alone does; `slots` is a file that replaces what the model holds."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    pad = read_json(folder / CONFIG_FILE)["model"]["pad_token_id"]
    width = max(map(len, prompts))
    params = og.GeneratorParams(model)
    length = width + TOKENS
    params.set_search_options(do_sample=False, batch_size=len(prompts), max_length=length, min_length=length)
    generator = og.Generator(model, params)
    if slots is not None:
        adapters = og.Adapters(model)
        adapters.load(str(slots), "slots")
        generator.set_active_adapter(adapters, "slots")
    if ids is not None:
        generator.set_model_input("adapter_ids", ids)
    generator.append_tokens(np.array([prompt + [pad] * (width - len(prompt)) for prompt in prompts], np.int32))
    steps = []
    while not generator.is_done():
        generator.generate_next_token()
        steps.append(generator.get_next_tokens().tolist())
    return [list(row) for row in zip(*steps, strict=True)]


def torch_tokens(base: Path, adapter: Path | None, prompt: list[int]) -> list[int]:
    """transformers' own generate(), by PEFT's model of the adapter or by the base alone."""
    if adapter is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
    else:
        model = load_reference(read_adapter(adapter), base).model
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return model.generate(input_ids=torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


# What GenAI makes of it.


@pytest.mark.parametrize("bundled", [True, False])
def test_each_row_gets_the_tokens_that_pytorch_gives_it_alone(bundled: bool, grouped: Grouped) -> None:
    base, adapters, model = grouped(bundled)
    options = read_json(model.parent / CONFIG_FILE)["model"]["decoder"]["session_options"]
    assert options.get("custom_ops_library") == ("libloratrf_ort.so" if bundled else None)
    assert (model.parent / "libloratrf_ort.so").is_file() == bundled
    rows = [*adapters.values(), None]
    expected = [torch_tokens(base, row, prompt) for row, prompt in zip(rows, PROMPTS, strict=True)]
    ids = np.array([0, 1, 2, -1], np.int64)
    assert generate(model.parent, ids, PROMPTS) == expected
    # The same prompts with each other's adapters: not the prompt decides.
    assert all(a != b for a, b in zip(generate(model.parent, ids[::-1].copy(), PROMPTS), expected, strict=True))
    order = [3, 1, 0, 2, 1]
    mixed = generate(model.parent, ids[order], [PROMPTS[row] for row in order])
    assert mixed == [expected[row] for row in order]
    # No default: a forgotten adapter_ids is not the base's answer. Nor is an id too few, or one of no slot.
    for wrong in (None, ids[:3], np.array([0, 1, 3, -1], np.int64)):
        with pytest.raises(RuntimeError):
            generate(model.parent, wrong, PROMPTS)


def test_int4_rows_get_the_tokens_of_their_separate_exports(grouped: Grouped, tmp_path: Path) -> None:
    base, adapters, model = grouped(quantize="int4")
    rows = generate(model.parent, np.array([0, 1], np.int64), PROMPTS[:2])
    for adapter, prompt, row in zip([adapters["fr"], adapters["de"]], PROMPTS, rows, strict=False):
        out = tmp_path / adapter.parent.name / "model.onnx"
        options = ExportOptions(base_model=base, mode="separate", quantize="int4", bundle_library=True, check=False)
        export_adapter(adapter, out, options)
        assert row == list(generate_tokens(load_model(out.parent), prompt, TOKENS, stop=False))


@pytest.mark.parametrize("bundled", [True, False])
def test_slots_are_refilled_through_genais_own_adapters(
    bundled: bool, grouped: Grouped, make_llm: Make, tmp_path: Path
) -> None:
    base, adapters, model = grouped(bundled)
    # A stranger to the export, of a higher rank than any in it, in five slots instead of three.
    _, new = make_llm("llama", "loratrf", r=11, filter_rank=9, seed=31)
    file = tmp_path / "new.onnx_adapter"
    command = ["--adapter", new, "--onto", model, "--base-model", base, "--out", file]
    assert main([str(part) for part in command]) == 0
    converted = read_adapter_file(file)
    slots = Slots(read_swappable(model)[1].weights, 5)
    slots.put(4, converted.values)
    slots.put(0, read_adapter_file(model.with_name("de.onnx_adapter")).values)
    write_adapter_file(tmp_path / "slots.onnx_adapter", slots.values, converted.origin)
    ids = np.array([4, 0, -1], np.int64)
    rows = generate(model.parent, ids, PROMPTS[:3], tmp_path / "slots.onnx_adapter")
    assert rows == [torch_tokens(base, row, PROMPTS[at]) for at, row in enumerate((new, adapters["de"], None))]
    # What the model holds is untouched.
    assert generate(model.parent, np.array([0], np.int64), PROMPTS[:1])[0] == torch_tokens(
        base, adapters["fr"], PROMPTS[0]
    )


@pytest.mark.parametrize(("quantize", "mixed"), [("none", True), ("int4", True), ("int4", False)])
def test_a_conversion_is_proven_where_it_is_asked_for(
    quantize: str, mixed: bool, grouped: Grouped, exported: Callable, make_llm: Make, tmp_path: Path
) -> None:
    base = make_llm()[0]
    model = grouped(quantize=quantize)[2] if mixed else exported("loratrf", swappable="base", quantize=quantize)
    new = make_llm("llama", "lora", r=9, seed=40, target_modules=["q_proj", "down_proj"])[1]
    file = tmp_path / "new.onnx_adapter"
    report = convert_adapter(new, model, file, base_model=base, check=True).parity
    assert report is not None
    assert {check.status for check in report.checks} == {"passed"}
    found = {(check.variant, check.output) for check in report.checks}
    greedy = {(variant, "64 greedy tokens") for variant in ("with library", "without library", "no adapter")}
    assert greedy <= found
    # PyTorch's model is made of the folder: with another alpha there, the same weights fail.
    other = Path(shutil.copytree(new, tmp_path / "other"))
    edit_json(other / "adapter_config.json", lora_alpha=-8)
    assert not check_parity(model, dataclasses.replace(read_adapter(new), path=other), base).passed


def test_onto_holds_a_config_against_the_layers_of_a_language_model(
    grouped: Grouped, exported: Callable, make_llm: Make, refused: Callable[..., str], tmp_path: Path
) -> None:
    base, original = make_llm("llama", "lora", r=9, seed=40, target_modules=["q_proj", "down_proj"])
    adapter = tmp_path / "adapter"
    shutil.copytree(original, adapter)
    for model in (grouped()[2], exported("loratrf", swappable="base")):
        for targets, words in (
            (["q_proj"], "low-rank weights for model.layers.0.mlp.down_proj, which target_modules leaves out"),
            (
                ["q_proj", "down_proj", "lm_head"],
                "target_modules covers lm_head, but the file holds no low-rank weights",
            ),
        ):
            edit_json(adapter / "adapter_config.json", target_modules=targets)
            command = ["--adapter", adapter, "--onto", model, "--base-model", base]
            assert words in refused(tmp_path / "out" / "a.onnx_adapter", *command)


def test_the_graph_and_the_manifest(grouped: Grouped) -> None:
    _, adapters, path = grouped()
    model = ir.load(path)
    inputs = {value.name: value for value in model.graph.inputs}
    assert "adapter_ids" not in model.graph.initializers
    assert [str(dim) for dim in inputs["adapter_ids"].shape] == ["batch_size"]
    assert str(inputs["input_ids"].shape[0]) == "batch_size"
    query = "model.layers.0.self_attn.q_proj"
    assert [str(dim) for dim in inputs[f"{query}.lora_A.weight"].shape] == ["slots", f"{query}.R", "64"]
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if name in inputs}
    for slot, path_of in enumerate(adapters.values()):
        for name, layer in read_adapter(path_of).layers.items():
            np.testing.assert_array_equal(weights[f"{name}.lora_B.weight"][slot][:, : layer.rank], layer.scaled_B())
    assert weights["model.layers.0.mlp.up_proj.trf_C.weight"].shape == (3, 5, 96)
    assert weights["model.layers.0.mlp.down_proj.lora_A.weight"].shape == (3, 7, 96)
    assert not weights[f"{query}.trf_tau"][1].any()  # plain LoRA has none
    assert {node.op_type for node in model.graph if node.domain == DOMAIN} == {"GroupedLoraTrf"}
    assert {function.name for function in model.functions.values()} == {"GroupedLoraTrf"}
    manifest = read_json(path.parent / "loratrf.json")
    assert (manifest["mode"], manifest["task"]) == ("grouped", "text-generation")
    assert manifest["swappable"]["slots"] == {"fr": 0, "de": 1, "it": 2}
    assert {"fr.onnx_adapter", "de.onnx_adapter", "it.onnx_adapter"} <= {file.name for file in path.parent.iterdir()}


# The proof.


@pytest.mark.parametrize(("family", "quantize"), [("llama", "int4"), ("qwen2", "none"), ("phi3", "int4")])
def test_the_export_proves_what_it_writes(family: str, quantize: str, make_llm: Make, tmp_path: Path) -> None:
    adapters = {}
    for name, options in ADAPTERS[family].items():
        base, adapters[name] = make_llm(family, **options)
    report = export_grouped(adapters, tmp_path / "model.onnx", ExportOptions(base_model=base, quantize=quantize)).parity
    assert report is not None
    assert {check.status for check in report.checks} == {"passed"}
    assert report.tolerance == 1e-4
    rows = [*adapters, "id -1"]
    for variant in ("with library", "without library"):
        outputs = [check.output for check in report.checks if check.variant == variant]
        assert outputs == [
            *(f"logits ({row})" for row in [*rows, "mixed rows"]),
            *(f"64 greedy tokens ({row})" for row in rows),
        ]
    assert [check.output for check in report.checks if check.variant == "quantised"] == ["weights"] * (
        quantize != "none"
    )
    for check in report.checks:
        if check.output.startswith("logits") and check.variant != "base-off":
            assert check.figures is not None
            assert check.figures.relative < 1e-5, check


def damaged(model: Path, folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of the export in which `change` was done to one weight, and whose manifest takes it for its own."""
    shutil.copytree(model.parent, folder)
    graph, out = ir.load(folder / model.name), folder / model.name
    value = graph.graph.initializers[name]
    value.const_value = ir.tensor(np.ascontiguousarray(change(value.const_value.numpy().copy())), name=name)
    ir.save(graph, out)
    edit_json(folder / "loratrf.json", model={"sha256": hashlib.sha256(out.read_bytes()).hexdigest()})
    return out


def failed(model: Path, adapters: dict[str, Path], base: Path) -> set[str]:
    report = check_grouped_parity(model, adapters, base)
    assert not report.passed
    return {check.output for check in report.checks if check.status == "failed"}


def test_parity_notices_swapped_adapters(grouped: Grouped) -> None:
    base, adapters, model = grouped()
    swapped = {"fr": adapters["de"], "de": adapters["fr"], "it": adapters["it"]}
    wrong = {"logits (fr)", "logits (de)", "logits (mixed rows)", "64 greedy tokens (fr)", "64 greedy tokens (de)"}
    assert failed(model, swapped, base) == wrong


def one_percent(slot: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[slot] *= np.float32(1.01)
        return weight

    return change


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_parity_notices_one_wrong_row(quantize: str, grouped: Grouped, tmp_path: Path) -> None:
    base, adapters, model = grouped(quantize=quantize)
    weight = "model.layers.1.self_attn.q_proj.lora_B.weight"
    outputs = failed(damaged(model, tmp_path / "copy", weight, one_percent(1)), adapters, base)
    assert {"logits (de)", "logits (mixed rows)"} <= outputs <= {
        "logits (de)", "logits (mixed rows)", "64 greedy tokens (de)"
    }  # fmt: skip


def test_parity_notices_quantised_weights_of_another_model(grouped: Grouped, tmp_path: Path) -> None:
    base, adapters, model = grouped(quantize="int4")
    scales = "model.layers.1.mlp.up_proj.MatMul.weight_scales"
    # Everything computes what the graph's weights say; that these aren't the base's is for this check alone to say.
    assert failed(damaged(model, tmp_path / "copy", scales, lambda value: value * 2), adapters, base) == {"weights"}


# What is refused.


def test_what_rows_can_not_have_of_their_own(refused: Callable[..., str], make_llm: Make, tmp_path: Path) -> None:
    base, fr = make_llm("llama", "loratrf", seed=1)
    out = tmp_path / "out" / "model.onnx"

    def beside(*options: object, **adapter: object) -> str:
        other = make_llm("llama", "lora", **adapter)[1]
        return refused(out, "--adapters", f"fr={fr}", f"other={other}", "--base-model", base, *options)

    text = beside(modules_to_save=["lm_head"])
    assert "The adapter other saves lm_head whole" in text
    assert "train it without modules_to_save" in text
    assert "embed_tokens" in beside(modules_to_save=["embed_tokens"])
    assert "The adapter other is a DoRA" in beside(use_dora=True)
    assert "--quantize int4 --dtype float32" in beside("--dtype", "float16")
    assert "Leave it out" in beside("--opset", "20")
    assert "--device is for one adapter" in beside("--device", "cuda")
    biased = {"attention_bias": True, "mlp_bias": True}
    for options, problem in (({"bias": "all"}, "it trains biases"), ({"lora_bias": True}, "it has lora_bias")):
        base, fr = make_llm("llama", "lora", biased, **options)
        assert problem in refused(out, "--adapters", f"fr={fr}", "--base-model", base)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quantize", "int4"), "int4, and this adapter's task is text-classification. int4 weights are for causal"),
        (("--bundle-library",), "for causal language models, and this adapter's task is text-classification"),
    ],
)
def test_options_of_language_models_on_encoders(options, words, refused, make_tiny, tmp_path: Path) -> None:
    base, a = make_tiny()
    text = refused(tmp_path / "out" / "model.onnx", "--adapters", f"a={a}", "--base-model", base, *options)
    assert f"{options[0]} is {words}" in text
