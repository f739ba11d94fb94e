"""Adapters of every flavour, made and saved by PEFT itself: read back as PEFT's own weights, or explained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora.config import MontecloraConfig

from loratrf_deploy.adapters.adapter import read_adapter
from loratrf_deploy.adapters.fits import check_fits
from loratrf_deploy.errors import UserError
from loratrf_deploy.export.adapted import fold
from loratrf_deploy.pytorch.dora import with_gains
from loratrf_deploy.pytorch.oracle import apply_adapter
from tiny import bert, conv1d_layers, gpt2, shapes

pytestmark = [
    # PEFT's own habits while wrapping tiny random models; none concerns what is read back.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape"),  # lora_B.bias
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


def roberta() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=20, **sizes)
    return transformers.RobertaForSequenceClassification(config)


def saved(folder: Path, model: Any, config: Any, randomise: bool = True, **how: Any) -> Any:
    """`model` with PEFT's adapter of that config, every trained value random, saved in `folder`."""
    adapted = peft.get_peft_model(model, config)
    if randomise:
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    adapted.save_pretrained(folder, **how)
    return adapted


PLAIN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (bert, {"target_modules": ["query", "dense"]}),
    "regular expression": (bert, {"target_modules": r".*layer\.1.*\.(query|key)"}),
    "all-linear": (bert, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "one layer": (bert, {"target_modules": ["query"], "layers_to_transform": [1]}),
    "excluded": (bert, {"target_modules": ["query", "key"], "exclude_modules": ["0.attention.self.key"]}),
    "rank-stabilised with patterns": (
        bert,
        {
            "target_modules": ["query", "key", "value"],
            "use_rslora": True,
            "lora_alpha": 16,
            "rank_pattern": {"query": 3, r"1\.attention\.self\.key": 2},
            "alpha_pattern": {"layer.0.attention.self.value": 5},
        },
    ),
    "with its own bias": (bert, {"target_modules": ["query"], "lora_bias": True}),
    "DoRA": (bert, {"target_modules": ["query"], "use_dora": True}),
    "gaussian": (bert, {"target_modules": ["query"], "init_lora_weights": "gaussian"}),
    "orthogonal": (bert, {"target_modules": ["query"], "init_lora_weights": "orthogonal"}),
    "mica": (bert, {"target_modules": ["query"], "init_lora_weights": "mica"}),
    "velora": (bert, {"target_modules": ["query"], "velora_config": {"num_groups": 4}}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
}


@pytest.mark.parametrize("flavour", PLAIN)
def test_layers_are_those_of_peft(tmp_path: Path, flavour: str) -> None:
    make, config = PLAIN[flavour]
    base = make()
    base_shapes = shapes(base)
    conv1d = conv1d_layers(base)
    adapted = saved(tmp_path, base, LoraConfig(**({"r": 4} | config)))
    adapter = read_adapter(tmp_path)
    assert adapter.not_separable is None
    check_fits(adapter, base_shapes, conv1d=conv1d)

    theirs = {
        name.removeprefix("base_model.model."): part
        for name, part in adapted.named_modules()
        if hasattr(part, "lora_A")
    }
    assert adapter.layers.keys() == theirs.keys()
    for name, layer in adapter.layers.items():
        assert layer.A is not None
        delta = theirs[name].get_delta_weight("default").detach().numpy()
        delta = delta.T if theirs[name].fan_in_fan_out else delta
        np.testing.assert_allclose(layer.scaled_B() @ layer.A, delta, rtol=1e-5, atol=1e-5)
        assert layer.rank == theirs[name].r["default"]
        if config.get("lora_bias"):
            np.testing.assert_array_equal(layer.lora_bias, theirs[name].lora_B["default"].bias.detach())
        else:
            assert layer.lora_bias is None


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_come_back_under_their_base_names(tmp_path: Path, bias: str) -> None:
    base = bert()
    base_shapes = shapes(base)
    adapted = saved(tmp_path, base, LoraConfig(r=2, target_modules=["query"], bias=bias, task_type="SEQ_CLS"))
    adapter = read_adapter(tmp_path)
    check_fits(adapter, base_shapes)
    name = "bert.encoder.layer.0.attention.self.query"
    assert f"{name}.bias" in adapter.biases
    assert ("bert.pooler.dense.bias" in adapter.biases) == (bias == "all")
    query = adapted.get_submodule(f"base_model.model.{name}")
    np.testing.assert_array_equal(adapter.biases[f"{name}.bias"], query.base_layer.bias.detach())
    # The head is saved whole, and under one name alone.
    assert not any("classifier" in name for name in adapter.biases)
    head = adapted.base_model.model.classifier.modules_to_save["default"]
    np.testing.assert_array_equal(adapter.modules_to_save["classifier"]["bias"], head.bias.detach())


def test_head_of_several_layers_is_one_saved_module(tmp_path: Path) -> None:
    base = roberta()
    base_shapes = shapes(base)
    saved(tmp_path, base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    adapter = read_adapter(tmp_path)
    names = {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
    assert {module: set(values) for module, values in adapter.modules_to_save.items()} == {"classifier": names}
    check_fits(adapter, base_shapes)


def test_saved_embeddings_are_saved_modules(tmp_path: Path) -> None:
    base = bert()
    base_shapes = shapes(base)
    saved(tmp_path, base, LoraConfig(r=2, target_modules=["query"]), save_embedding_layers=True)
    adapter = read_adapter(tmp_path)
    assert adapter.modules_to_save.keys() == {"bert.embeddings.word_embeddings"}
    check_fits(adapter, base_shapes)
    base_shapes["bert.embeddings.word_embeddings.weight"] = (60, 16)
    with pytest.raises(UserError, match=r"\(60, 16\) in the base model, \(50, 16\) in the adapter"):
        check_fits(adapter, base_shapes)


def test_converted_pissa_is_plain_lora(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights="pissa")
    adapted = peft.get_peft_model(bert(), config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    adapted.save_pretrained(tmp_path / "pissa")
    adapted.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert "changed base weights" in (read_adapter(tmp_path / "pissa").not_separable or "")
    converted = read_adapter(tmp_path / "plain")
    assert converted.not_separable is None
    assert {layer.rank for layer in converted.layers.values()} == {4}


@pytest.mark.parametrize(("make", "target"), [(bert, "query"), (gpt2, "c_attn")])
def test_gains_of_a_dora_are_those_of_peft(tmp_path: Path, make: Callable[[], Any], target: str) -> None:
    """gain⊙h + offset + (x Aᵀ)Bᵀ beside the base, and W' of the merge, against PEFT's forward of a layer."""
    adapted = saved(tmp_path, make(), lora(target_modules=[target], use_dora=True, lora_alpha=9)).eval()
    base = make()
    read = with_gains(read_adapter(tmp_path), base)
    x = torch.randn(3, 5, 16)
    for path, layer in read.layers.items():
        with torch.no_grad():
            wanted = adapted.get_submodule(f"base_model.model.{path}")(x).numpy()
            h = base.get_submodule(path)(x).numpy()
        assert layer.A is not None
        beside = layer.gain * h + layer.offset + x.numpy() @ layer.A.T @ layer.scaled_B().T
        np.testing.assert_allclose(beside, wanted, rtol=1e-5, atol=1e-5)
    assert fold(base, read, merge=True) == {}
    with torch.no_grad():
        np.testing.assert_allclose(base.get_submodule(path)(x).numpy(), wanted, rtol=1e-5, atol=1e-5)


class ConvAndAttention(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Conv2d(3, 4, 3), torch.nn.MultiheadAttention(8, 2))


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.inner = torch.nn.Linear(4, 4)


def lora(**config: Any) -> Any:
    return LoraConfig(**({"r": 4, "target_modules": ["query"]} | config))


APART: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "PiSSA": (bert, lambda: lora(init_lora_weights="pissa"), 'init_lora_weights="pissa"'),
    "OLoRA": (bert, lambda: lora(init_lora_weights="olora"), 'init_lora_weights="olora"'),
    "DoRA of a table": (
        bert,
        lambda: lora(target_modules=["query", "word_embeddings"], use_dora=True),
        "DoRA of an embedding table",
    ),
    "tokens": (bert, lambda: lora(trainable_token_indices={"word_embeddings": [1, 2]}), "trainable_token_indices"),
    "replicated": (bert, lambda: lora(layer_replication=[(0, 1), (0, 2)]), "layer_replication"),
    "KaSA": (bert, lambda: lora(kasa_config={}), "kasa_config"),
    "Monteclora": (bert, lambda: lora(monteclora_config=MontecloraConfig(num_samples=2)), "monteclora_config"),
    "block-diagonal": (
        bert,
        lambda: lora(use_bdlora={"target_modules_bd_a": ["query"], "nblocks": 2}),
        "use_bdlora",
    ),
    "convolution": (ConvAndAttention, lambda: lora(target_modules=["0"]), "convolution"),
    "attention": (ConvAndAttention, lambda: lora(target_modules=["1"]), "nested adapted layers"),
    "parameter": (
        Experts,
        lambda: lora(target_modules=["linear"], target_parameters=["inner.weight"]),
        "target_parameters",
    ),
    "LoHa": (bert, lambda: peft.LoHaConfig(r=4, target_modules=["query"]), "peft_type LOHA"),
    "LoKr": (bert, lambda: peft.LoKrConfig(r=4, target_modules=["query"]), "peft_type LOKR"),
    "IA3": (bert, lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "peft_type IA3"),
    "VeRA": (bert, lambda: peft.VeraConfig(r=4, target_modules=["query"]), "peft_type VERA"),
    "prompt": (
        gpt2,
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "peft_type PROMPT_TUNING",
    ),
}


@pytest.mark.parametrize("flavour", APART)
def test_what_cannot_be_kept_separate_says_why(tmp_path: Path, flavour: str) -> None:
    make, config, why = APART[flavour]
    saved(tmp_path, make(), config(), randomise=False)
    adapter = read_adapter(tmp_path)
    assert why in (adapter.not_separable or "")
    assert adapter.layers == {}


# Prompts never reach PEFT: they can't be folded into weights.
@pytest.mark.parametrize("flavour", [name for name in (*PLAIN, *APART) if name != "prompt"])
def test_what_peft_saved_it_takes_whole(tmp_path: Path, flavour: str) -> None:
    """The oracle refuses what PEFT would leave out: nothing of a file that PEFT itself wrote, of whatever kind."""
    make, *rest = (PLAIN | APART)[flavour]
    config = LoraConfig(**({"r": 4} | rest[0])) if flavour in PLAIN else rest[0]()
    saved(tmp_path, make(), config, randomise=False)
    refused = pytest.raises(UserError, match="layer_replication") if flavour == "replicated" else nullcontext()
    with refused:
        apply_adapter(read_adapter(tmp_path), make())


def test_head_of_another_kind_is_still_read(tmp_path: Path) -> None:
    base = bert()
    base_shapes = shapes(base)
    saved(tmp_path, base, peft.LoHaConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    adapter = read_adapter(tmp_path)
    assert adapter.modules_to_save["classifier"].keys() == {"weight", "bias"}
    check_fits(adapter, base_shapes)
    with pytest.raises(UserError, match=r"classifier.weight is \(2, 16\)"):
        check_fits(adapter, base_shapes | {"classifier.weight": (2, 16)})
