"""LoRATRF as a PEFT method: the formula, PEFT's whole life cycle, merging, and training."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file

from loratrf_deploy.adapters.adapter import read_adapter
from loratrf_deploy.adapters.fits import check_fits
from loratrf_deploy.errors import UserError
from loratrf_deploy.ops import reference
from loratrf_deploy.peft import FilteredLinear, LoraTrfConfig, LoraTrfLinear, LoraTrfModel, initialize_filters
from loratrf_deploy.peft.layer import filter_score
from tiny import bert, conv1d_layers, gpt2, shapes

# Raised by PEFT and by the renaming of gradient checkpointing in this transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated"
)


def config(**fields: Any) -> LoraTrfConfig:
    return LoraTrfConfig(
        **(
            {"r": 3, "lora_alpha": 5, "filter_rank": 2, "filter_gamma": 0.7, "target_modules": ["query", "dense"]}
            | fields
        )
    )


def adapted(model: Any | None = None, random: bool = True, seed: int = 1, **fields: Any) -> Any:
    """A model with an adapter whose every trained value is random, so that a dropped term can't go unseen."""
    model = get_peft_model(bert() if model is None else model, config(**fields)).eval()
    if random:
        randomise(model, seed)
    return model


def randomise(model: Any, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(input_ids=ids).logits


def layers(model: Any) -> dict[str, LoraTrfLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, LoraTrfLinear)}


def worst(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.detach().float() - right.detach().float()).abs().max())


def formula(layer: LoraTrfLinear, x: torch.Tensor, adapter: str = "default") -> np.ndarray:
    """The reference's answer, float64, for one adapter."""

    def array(value: Any) -> np.ndarray:
        return value.detach().double().numpy()

    weight = array(layer.base_layer.weight)
    h = array(x) @ (weight if layer.fan_in_fan_out else weight.T) + array(layer.base_layer.bias)
    A = array(layer.lora_A[adapter].weight) if adapter in layer.lora_A else np.zeros((1, x.shape[-1]))
    B = (
        array(layer.lora_B[adapter].weight) * layer.scaling[adapter]
        if adapter in layer.lora_B
        else np.zeros((h.shape[-1], 1))
    )
    if adapter not in layer.trf_tau:
        return reference.low_rank(h, array(x), A, B)
    D = array(layer.trf_D[adapter].weight) * layer.gamma[adapter]
    tau, C = array(layer.trf_tau[adapter]), array(layer.trf_C[adapter].weight)
    return reference.lora_trf(h, array(x), A, B, tau, C, D, layer.filter_input[adapter])


HALVES = {
    "both": {},
    "low-rank": {"filter_target_modules": []},
    "filter": {"target_modules": [], "filter_target_modules": ["query"]},
    "rank-stabilised": {"use_rslora": True},
}


@pytest.mark.parametrize("filter_input", ["adapted", "base"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("make", [bert, gpt2])
def test_forward_is_the_formula(make: Callable[[], Any], half: str, filter_input: str) -> None:
    targets = ["query"] if make is bert else ["c_attn"]
    fields = {"target_modules": targets} | HALVES[half] | {"filter_input": filter_input}
    if half == "filter":
        fields["filter_target_modules"] = targets
    layer = next(iter(layers(adapted(make(), **fields)).values()))
    x = torch.randn(2, 4, layer.in_features)
    x[0, 0] = 0  # z is then the bias alone
    out = layer(x)
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out.detach().numpy(), formula(layer, x), rtol=1e-5, atol=1e-5)
    if half != "low-rank":
        with torch.no_grad():
            layer.trf_tau["default"].neg_()
        # Tokens along τ become tokens against it: a filter that let nothing through either way would test nothing.
        assert worst(layer(x), out) > 1e-3


def test_zero_representation_and_zero_tau_pass_nothing() -> None:
    layer = next(iter(layers(adapted(target_modules=[], filter_target_modules=["query"])).values()))
    x = torch.randn(5, 16)
    with torch.no_grad():
        layer.trf_tau["default"].zero_()
        assert worst(layer(x), layer.base_layer(x)) == 0.0
        layer.base_layer.bias.zero_()
        assert torch.isfinite(layer(torch.zeros(2, 16))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_keeps_the_score_in_float32(dtype: torch.dtype, upcast: bool) -> None:
    model = get_peft_model(bert(dtype), config(), autocast_adapter_dtype=upcast).eval()
    randomise(model)
    layer = next(iter(layers(model).values()))
    assert layer.lora_A["default"].weight.dtype == (torch.float32 if upcast else dtype)
    x = torch.randn(4, 16).to(dtype)
    with torch.no_grad():
        layer.base_layer.bias.fill_(400.0)  # 16 * 400² is beyond float16
        out = layer(x)
    assert out.dtype == dtype
    expected = formula(layer, x)
    spacing = torch.finfo(dtype).eps * np.abs(expected).max()
    assert np.abs(out.double().numpy() - expected).max() < 4 * spacing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_score_of_half_precision_inputs_is_exact(dtype: torch.dtype) -> None:
    z, tau = (torch.randn(9, 16) * 3e4).clamp(-6e4, 6e4).to(dtype), torch.randn(16).to(dtype)  # ‖z‖ is beyond float16
    score = filter_score(z, tau)
    assert score.dtype == torch.float32
    np.testing.assert_allclose(score, reference.filter_score(z.double().numpy(), tau.double().numpy()), atol=1e-6)
    assert 0 < float(score.max()) < 1


def test_starts_at_the_base_model() -> None:
    model = bert()
    before = logits(model)
    assert worst(logits(adapted(model, random=False)), before) == 0.0


def test_saved_keys_and_config(tmp_path: Path) -> None:
    model = adapted(target_modules=["query"], filter_target_modules=["query", "value"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    prefix = "base_model.model.bert.encoder.layer"
    names = ["lora_A.weight", "lora_B.weight", "trf_tau", "trf_C.weight", "trf_D.weight"]
    expected = {f"{prefix}.{index}.attention.self.query.{name}" for index in (0, 1) for name in names}
    expected |= {f"{prefix}.{index}.attention.self.value.{name}" for index in (0, 1) for name in names[2:]}
    expected |= {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == expected
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORATRF"
    assert saved["filter_target_modules"] == ["query", "value"]
    fields = ("r", "lora_alpha", "filter_rank", "filter_gamma", "filter_input")
    assert [saved[field] for field in fields] == [3, 5, 2, 0.7, "adapted"]


@pytest.mark.parametrize("make", [bert, gpt2])
def test_round_trip_through_files(tmp_path: Path, make: Callable[[], Any]) -> None:
    targets = ["query", "dense"] if make is bert else ["c_attn", "c_fc"]
    task = "SEQ_CLS" if make is bert else "CAUSAL_LM"
    model = adapted(make(), target_modules=targets, task_type=task, rank_pattern={targets[0]: 2}, filter_input="base")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert worst(logits(again), logits(model)) == 0.0
    assert isinstance(again.peft_config["default"], LoraTrfConfig)

    adapter = read_adapter(tmp_path)
    check_fits(adapter, shapes(make()), conv1d=conv1d_layers(make()))
    assert adapter.config["fan_in_fan_out"] == (make is gpt2)
    for name, layer in layers(again).items():
        read = adapter.layers[name.removeprefix("base_model.model.")]
        assert (read.rank, read.scale) == (layer.r["default"], layer.scaling["default"])
        np.testing.assert_array_equal(read.tau, layer.trf_tau["default"].detach())
        np.testing.assert_array_equal(read.D, layer.trf_D["default"].weight.detach())
        np.testing.assert_array_equal(read.A, layer.lora_A["default"].weight.detach())


@pytest.mark.parametrize("part", ["lora_A.weight", "trf_tau", "trf_D.weight"])
def test_incomplete_files_are_refused(tmp_path: Path, part: str) -> None:
    adapted().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    removed = next(name for name in weights if name.endswith(part))
    del weights[removed]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"incomplete: nothing for .*" + part.split(".")[0]):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_several_adapters_live_side_by_side(tmp_path: Path) -> None:
    first, second = adapted(seed=1), adapted(seed=2, r=2, filter_rank=1, filter_input="base", target_modules=["key"])
    expected = logits(first), logits(second)
    assert worst(*expected) > 1e-3
    second.save_pretrained(tmp_path)
    model = first
    model.load_adapter(str(tmp_path), "second")
    assert worst(logits(model), expected[0]) == 0.0
    model.set_adapter("second")
    assert worst(logits(model), expected[1]) < 1e-6
    with model.disable_adapter():
        assert worst(logits(model), logits(bert())) == 0.0
    model.add_adapter("third", config(target_modules=["value"]))
    model.set_adapter("third")
    assert worst(logits(model), logits(bert())) < 1e-6
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".third" in name for name in trainable)
    model.set_adapter("default")
    model.delete_adapter("second")
    model.delete_adapter("third")
    assert worst(logits(model), expected[0]) == 0.0
    assert not any("second" in name or "third" in name for name in model.state_dict())


def test_active_adapters_add_up() -> None:
    model = adapted(target_modules=["query"])
    model.add_adapter("other", config(target_modules=["query"], filter_input="base"))
    layer = next(iter(layers(model).values()))
    model.set_adapter("other")
    randomise(model, 3)
    x = torch.randn(4, 16)
    model.base_model.set_adapter(["default", "other"])
    expected = formula(layer, x) + formula(layer, x, "other") - layer.base_layer(x).detach().double().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"filter_target_modules": ["key"]}, {"filter_input": "base"}], ids=str)
@pytest.mark.parametrize("make", [bert, gpt2])
def test_merging_changes_no_output(make: Callable[[], Any], fields: dict[str, Any]) -> None:
    if make is gpt2:
        swap = {"filter_target_modules": ["c_fc"]} if "filter_target_modules" in fields else fields
        fields = swap | {"target_modules": ["c_attn", "c_proj"]}
    model = adapted(make(), **fields)
    expected, weights = logits(model), {name: part.weight.clone() for name, part in layers(model).items()}
    model.merge_adapter(safe_merge=True)
    assert worst(logits(model), expected) < 2e-5
    changed = [name for name, part in layers(model).items() if worst(part.weight, weights[name]) > 0]
    # A filter that reads the base output keeps the low-rank half out of the weight.
    assert bool(changed) == (fields.get("filter_input") != "base")
    with model.disable_adapter():
        assert worst(logits(model), logits(make())) < 2e-5
    model.merge_adapter()
    model.unmerge_adapter()
    assert worst(logits(model), expected) < 2e-5
    assert all(worst(part.weight, weights[name]) < 1e-6 for name, part in layers(model).items())

    plain = model.merge_and_unload()
    assert worst(logits(plain), expected) < 2e-5
    assert not layers(plain)
    filtered = [part for part in plain.modules() if isinstance(part, FilteredLinear)]
    assert filtered
    assert all((part.A is not None) == (fields.get("filter_input") == "base") for part in filtered)


def test_merging_without_filters_leaves_plain_layers() -> None:
    model = adapted(filter_target_modules=[])
    expected = logits(model)
    plain = model.merge_and_unload()
    assert worst(logits(plain), expected) < 2e-5
    assert {type(part) for part in plain.modules()} == {type(part) for part in bert().modules()}


def test_unload_gives_the_base_back() -> None:
    model = adapted()
    model.merge_adapter()
    assert worst(logits(model.unload()), logits(bert())) < 2e-5


def test_two_filtered_adapters_do_not_merge_together() -> None:
    model = adapted(target_modules=["query"])
    model.add_adapter("other", config(target_modules=["query"]))
    with pytest.raises(ValueError, match="Merge one adapter at a time"):
        model.merge_adapter(adapter_names=["default", "other"])


def test_safe_merge_refuses_infinite_weights() -> None:
    model = adapted()
    with torch.no_grad():
        next(iter(layers(model).values())).lora_B["default"].weight.fill_(float("inf"))
    before = logits(bert())
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert worst(logits(model.unload()), before) < 2e-5


@pytest.mark.parametrize("fields", [{}, {"filter_input": "base"}, {"filter_target_modules": ["key"]}], ids=str)
def test_every_part_gets_gradient_and_moves(fields: dict[str, Any]) -> None:
    model = adapted(random=False, task_type="SEQ_CLS", **fields).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, labels = torch.randint(0, 50, (8, 7)), torch.arange(8) % 3
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        moved = worst(parameter.detach(), start[name]) > 0
        assert moved == (any(part in name for part in (".lora_", ".trf_", "modules_to_save"))), name


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(task_type="SEQ_CLS")
        if checkpointing:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(5)
        model(input_ids=torch.arange(14).reshape(2, 7), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert max(worst(gradients[0][name], gradients[1][name]) for name in gradients[0]) < 1e-6


def test_bias_settings_train_biases(tmp_path: Path) -> None:
    model = adapted(bias="lora_only")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    assert trained == {f"{name}.base_layer.bias" for name in layers(model)}
    model.save_pretrained(tmp_path)
    assert set(read_adapter(tmp_path).biases) == {f"{name[17:]}.bias" for name in layers(model)}


def test_trainer_trains_and_resumes(tmp_path: Path) -> None:
    rows = [{"input_ids": [index % 50, 3, 4], "attention_mask": [1, 1, 1], "labels": index % 3} for index in range(24)]

    def trainer(model: Any, epochs: int) -> transformers.Trainer:
        settings = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=epochs,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="epoch",
            use_cpu=True,
        )
        return transformers.Trainer(model, settings, train_dataset=rows)  # type: ignore[arg-type]

    model = adapted(random=False, task_type="SEQ_CLS")
    trainer(model, 1).train()
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    adapter = read_adapter(checkpoint)
    assert adapter.layers
    assert adapter.modules_to_save.keys() == {"classifier"}
    assert any(np.abs(layer.D).max() > 0 for layer in adapter.layers.values() if layer.D is not None)
    trainer(adapted(random=False, task_type="SEQ_CLS"), 2).train(resume_from_checkpoint=str(checkpoint))


def test_filters_start_along_the_bias_and_learn_their_direction_from_data() -> None:
    model = adapted(random=False, target_modules=["query"], seed=4)
    layer = next(iter(layers(model).values()))
    bias = torch.nn.functional.normalize(layer.base_layer.bias.detach(), dim=0)
    assert worst(layer.trf_tau["default"].detach(), bias) < 1e-6
    seen: list[torch.Tensor] = []
    handle = layer.base_layer.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    batch = {"input_ids": torch.randint(0, 50, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    batch["attention_mask"][1, 3:] = 0
    model.train()
    initialize_filters(model, [batch])
    handle.remove()
    assert model.training
    z = torch.nn.functional.normalize(seen[0], dim=-1)[batch["attention_mask"].bool()]
    mean = torch.nn.functional.normalize(z.mean(0), dim=0)
    assert worst(layer.trf_tau["default"].detach(), mean) < 1e-6


def test_registration_is_idempotent_and_survives_copies() -> None:
    import importlib

    import loratrf_deploy.peft as module

    member = PeftType("LORATRF")
    importlib.reload(module)
    assert PeftType["LORATRF"] is member is PeftType.LORATRF
    assert [kind.value for kind in PeftType].count("LORATRF") == 1
    assert "LORATRF" in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps(member) == '"LORATRF"'
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[member] is LoraTrfConfig
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING[member] is LoraTrfModel


BAD_CONFIGS = {
    "rank": ({"r": 0}, "r is 0.*target_modules=\\[\\]"),
    "filter rank": ({"filter_rank": -1}, "filter_rank is -1.*filter_target_modules=\\[\\]"),
    "filter input": ({"filter_input": "both"}, "filter_input is 'both'"),
    "filter start": ({"filter_init": "zero"}, "filter_init is 'zero'"),
    "bias": ({"bias": "some"}, "bias is 'some'"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    "layers with a pattern": ({"target_modules": "q.*", "layers_to_transform": [1]}, "layers_to_transform needs"),
    "pattern without layers": ({"layers_pattern": "layer"}, "layers_pattern needs"),
}


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_bad_settings_are_named(fault: str) -> None:
    fields, words = BAD_CONFIGS[fault]
    with pytest.raises(UserError, match=words):
        config(**fields)


@pytest.mark.parametrize("half", ["target_modules", "filter_target_modules"])
@pytest.mark.parametrize("names", [["querry"], "encoder.*querry"], ids=["names", "pattern"])
def test_a_half_that_matches_no_module_is_named(half: str, names: Any) -> None:
    fields = {"target_modules": ["query"], "filter_target_modules": ["query"], half: names}
    with pytest.raises(UserError, match=rf"^{half} is .*querry.*matches no module of BertForSequenceClassification"):
        adapted(**fields)


def test_only_linear_layers_are_adapted() -> None:
    with pytest.raises(TypeError, match=r"word_embeddings is Embedding.*Narrow target_modules"):
        adapted(target_modules=["word_embeddings"])
    attention = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        get_peft_model(attention, config(target_modules=["out_proj"]))


def test_all_linear_works_for_both_halves() -> None:
    model = adapted(target_modules=["query"], filter_target_modules="all-linear", task_type="SEQ_CLS")
    found = layers(model)
    assert sum("default" in layer.trf_tau for layer in found.values()) == 13
    assert sum("default" in layer.lora_A for layer in found.values()) == 2
    assert not any("classifier" in name for name in found)


def test_injection_from_a_state_dict_finds_both_halves(tmp_path: Path) -> None:
    source = adapted(target_modules=["query"], filter_target_modules=["value"])
    weights = {name[17:]: value for name, value in peft.get_peft_model_state_dict(source).items()}
    model = bert()
    settings = config(target_modules=["query"], filter_target_modules=["value"])
    model = peft.inject_adapter_in_model(settings, model, state_dict=weights)
    peft.set_peft_model_state_dict(model, weights)
    assert worst(logits(model), logits(source)) == 0.0


def test_the_defaults_train_a_third_less_than_lora_of_rank_8() -> None:
    """The budget that docs/method.md measures, on MiniLM's shapes; heads are the same and not counted."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    linears = ["query", "value", "attention.output.dense", "output.dense", "pooler.dense"]

    def trained(settings: Any) -> int:
        model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
        adapted = get_peft_model(model, settings)
        return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)

    ours, lora = trained(LoraTrfConfig(target_modules=linears)), trained(peft.LoraConfig(r=8, target_modules=linears))
    # R (K + N) for 24 layers of 384 -> 384 or 1536 -> 384 and the pooler; (1 + 2F) N for each filter.
    assert (ours, lora) == (4 * 26112 + 25 * 3 * 384, 8 * 26112)
    assert ours <= 0.6629 * lora
