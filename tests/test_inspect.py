"""loratrf-inspect: what it says about adapters and models, without any framework, and of damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from loratrf_deploy import UserError
from loratrf_deploy.cli import inspect as inspect_cli
from loratrf_deploy.export.onto import convert_adapter
from loratrf_deploy.formats.inspection import inspect_path
from shared import edit_tensors

QUERY = "bert.encoder.layer.0.attention.self.query"
VALUE = "bert.encoder.layer.0.attention.self.value"


def outcomes(facts: dict) -> dict[str, str]:
    return {layer["module"]: layer["merged"] for layer in facts["layers"]}


def test_lora_adapter(make_tiny):
    base, adapter = make_tiny(kind="lora", rank_pattern={"layer.0.attention.self.query": 2})
    facts = inspect_path(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert facts["kind"] == "adapter"
    assert facts["peft_type"] == "LORA"
    assert facts["base_model"] == str(base)
    assert facts["bytes"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert facts["parameters"] == sum(value.size for name, value in tensors.items() if "lora_" in name)
    assert facts["modules_to_save"] == {
        "classifier": sum(value.size for name, value in tensors.items() if "classifier" in name)
    }
    assert facts["filter_input"] is None
    assert facts["merge"] == {"folds": 4}
    first = next(layer for layer in facts["layers"] if layer["module"] == QUERY)
    assert (first["rank"], first["filter_rank"], first["scale"], first["gamma"]) == (2, 0, 4.0, None)
    assert (first["in_features"], first["out_features"], first["parameters"]) == (32, 32, 2 * 64)


def test_filters_stay_in_a_merged_export(make_tiny):
    _, adapter = make_tiny(target_modules=["query"], filter_target_modules=["query", "value"])
    facts = inspect_path(adapter)
    assert outcomes(facts)[QUERY] == outcomes(facts)[VALUE] == "keeps TaskFilter"
    value = next(layer for layer in facts["layers"] if layer["module"] == VALUE)
    assert (value["rank"], value["in_features"], value["filter_rank"]) == (0, None, 3)


def test_filter_on_the_base_output_keeps_the_whole_operator(make_tiny):
    _, adapter = make_tiny(filter_input="base", target_modules=["query", "value"], filter_target_modules=["query"])
    facts = inspect_path(adapter)
    assert (outcomes(facts)[QUERY], outcomes(facts)[VALUE]) == ("keeps LoraTrf", "folds")
    assert facts["filter_input"] == "base"
    assert facts["merge"] == {"keeps LoraTrf": 2, "folds": 2}


@pytest.mark.parametrize("filter_input", ["adapted", "base"])
def test_what_it_says_of_merging_is_what_the_export_does(make_export, filter_input):
    targets = {"target_modules": ["query", "value"], "filter_target_modules": ["query"]}
    exported = make_export(mode="merged", filter_input=filter_input, **targets)
    said = {name: word.removeprefix("keeps ") for name, word in outcomes(inspect_path(exported.adapter)).items()}
    made = {layer["module"]: layer["op"] for layer in inspect_path(exported.model)["layers"]}
    assert made == {name: "merged" if op == "folds" else op for name, op in said.items()}


def test_adapter_that_only_merges(make_tiny, capsys):
    _, adapter = make_tiny(kind="lora", trainable_token_indices={"word_embeddings": [1, 2]})
    assert "trainable_token_indices" in inspect_path(adapter)["not_separable"]
    assert inspect_cli.main([str(adapter)]) == 0
    assert "only merged" in capsys.readouterr().out


def test_a_dora_whose_gains_alone_matter_is_not_idle(make_export, tmp_path):
    exported = make_export(kind="lora", use_dora=True, swappable="base")
    adapter = shutil.copytree(exported.adapter, tmp_path / "gains")
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: {name: value * ("lora_B" not in name) for name, value in tensors.items()},
    )
    file = tmp_path / "gains.onnx_adapter"
    convert_adapter(adapter, exported.model, file, base_model=exported.base)
    facts = inspect_path(file)
    assert {layer["rank"] for layer in facts["layers"]} == {0}
    assert facts["warnings"] == []


def test_a_dora_is_called_one_with_what_is_its_own(make_export, capsys):
    """PEFT's type is LORA. BERT's linear layers have biases, so each gain comes with an offset."""
    exported = make_export(kind="lora", use_dora=True, swappable="base")
    plain = make_export(kind="lora")
    for path, gains in (
        (exported.adapter, "lora_magnitude_vector in 4 layers; an export makes gains and offsets of it"),
        (exported.model.with_name("lora.onnx_adapter"), "lora_gain in 4 layers, lora_offset in 4 (DoRA)"),
        (exported.model, "lora_gain in 4 layers, lora_offset in 4 (DoRA)"),
        (plain.adapter, None),
        (plain.model, None),
    ):
        capsys.readouterr()
        assert inspect_cli.main([str(path)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert ("DoRA" in shown) == (gains is not None)
        assert gains is None or f"gains {gains}" in shown
        assert ("LORA" in shown) == (gains is None)
        facts = inspect_path(path)
        assert (facts["adapter"] if facts["kind"] == "model" else facts)["dora"] == (gains is not None)


def test_model_by_file_and_by_folder(make_export):
    _, adapter, model = make_export()
    facts = inspect_path(model)
    assert inspect_path(model.parent) == facts
    assert facts["kind"] == "model"
    assert facts["bytes"] == sum((model.parent / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert facts["operators"] == {"LoraTrf": 4}
    assert facts["custom_operators"] == ["LoraTrf"]
    assert facts["adapter"]["sha256"] == inspect_path(adapter)["sha256"]
    # The fixture exports without the check.
    assert [warning[:22] for warning in facts["warnings"]] == ["parity was not checked"]


def test_quantisation_is_shown(make_export, tmp_path, capsys):
    folder = tmp_path / "export"
    shutil.copytree(make_export().model.parent, folder)
    for quantize, line in (("none", "separate, float32, opset"), ("int4", "separate, int4 weights, float32, opset")):
        manifest = json.loads((folder / "loratrf.json").read_text())
        (folder / "loratrf.json").write_text(json.dumps(manifest | {"quantize": quantize}))
        assert inspect_cli.main([str(folder)]) == 0
        assert line in capsys.readouterr().out
    (folder / "loratrf.json").write_text(json.dumps(manifest | {"quantize": "int8", "keep_float": ["a.b", "c.d"]}))
    assert inspect_cli.main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "separate, int8 weights but for 2 layers, float32, opset" in shown
    assert "a.b, c.d" in shown


def test_merged_lora_needs_nothing(make_export, capsys):
    model = make_export(kind="lora", mode="merged").model
    assert inspect_path(model)["custom_operators"] == []
    assert inspect_cli.main([str(model)]) == 0
    assert "ONNX Runtime's own operators alone" in capsys.readouterr().out


def test_changed_or_incomplete_model_is_noticed(make_export, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(make_export().model.parent, folder)
    (folder / "model.onnx.data").unlink()
    with (folder / "model.onnx").open("ab") as file:
        file.write(b"\0")
    text = " ".join(inspect_path(folder)["warnings"])
    assert "model.onnx is not the file that loratrf.json describes" in text
    assert "model.onnx.data is missing" in text


def test_folder_with_two_models_shows_the_one_described(make_export, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(make_export().model.parent, folder)
    (folder / "another.onnx").write_bytes(b"something else")
    assert inspect_path(folder)["path"] == str(folder / "model.onnx")


def damage(**changes: object):
    def apply(manifest: dict) -> str:
        return json.dumps(manifest | changes)

    return apply


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda manifest: "", "can't be read"),
        (lambda manifest: "[1]", "format 'list'"),
        (lambda manifest: "[" * 100_000, "can't be read"),
        (damage(format=2), "format 2"),
        (damage(layers=3), "layers"),
        (damage(layers=[{"module": "x", "op": "Evil"}]), "layers"),
        (damage(adapter=None), "adapter"),
        (damage(model="x"), "model"),
        (damage(parity={"checks": [1]}), "parity"),
        (lambda manifest: json.dumps({key: manifest[key] for key in manifest if key != "opset"}), "opset"),
    ],
)
def test_damaged_manifest(make_export, tmp_path, change, problem):
    folder = tmp_path / "export"
    shutil.copytree(make_export().model.parent, folder)
    manifest = json.loads((folder / "loratrf.json").read_text())
    (folder / "loratrf.json").write_text(change(manifest))
    with pytest.raises(UserError, match=problem):
        inspect_path(folder)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nothing", "Nothing at"),
        ("empty", "neither an adapter folder"),
        ("notes.txt", "neither an adapter folder"),
        ("alone.onnx", "no loratrf.json beside it"),
        ("half", "no adapter_model.safetensors"),
        ("manifest", "no .onnx file"),
    ],
)
def test_other_paths_are_one_paragraph_and_2(make_export, tmp_path, capsys, name, problem):
    for folder in ("empty", "half", "manifest"):
        (tmp_path / folder).mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copy(make_export().model.parent / "loratrf.json", tmp_path / "manifest")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "alone.onnx").touch()
    capsys.readouterr()  # what fixtures printed
    assert inspect_cli.main([str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert problem in err


def test_escape_sequences_in_names_reach_no_terminal(make_export, tmp_path, capsys):
    folder = tmp_path / "export"
    shutil.copytree(make_export().model.parent, folder)
    manifest = json.loads((folder / "loratrf.json").read_text())
    manifest["layers"][0]["module"] = "query\x1b[31m[bold]"
    (folder / "loratrf.json").write_text(json.dumps(manifest))
    assert inspect_cli.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "query?[31m[bold]" in out
    assert "\x1b" not in out


def test_json_of_a_manifest_with_no_number(make_export, tmp_path, capsys):
    folder = tmp_path / "export"
    shutil.copytree(make_export().model.parent, folder)
    manifest = json.loads((folder / "loratrf.json").read_text())
    check = {"variant": "with library", "relative": float("nan")}
    parity = {"passed": False, "tolerance": 1e-5, "inputs": 1, "checks": [check]}
    (folder / "loratrf.json").write_text(json.dumps(manifest | {"parity": parity}))
    assert inspect_cli.main([str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["parity"]["checks"][0]["relative"] == "nan"


def test_table_for_a_pipe_has_whole_names(make_export, capsys):
    exported = make_export()
    for path in (exported.adapter, exported.model):
        assert inspect_cli.main([str(path)]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        for layer in inspect_path(path)["layers"]:
            assert layer["module"] in out


WITHOUT_FRAMEWORKS = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft", "onnx", "onnx_ir", "onnxruntime", "optimum"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from loratrf_deploy.cli.inspect import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_needs_no_framework(make_export, tmp_path):
    exported = make_export()
    for path in (exported.adapter, exported.model):
        for options in ([], ["--json"]):
            command = [sys.executable, "-c", WITHOUT_FRAMEWORKS, str(path), *options]
            result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == inspect_path(exported.model)
    assert not list(Path(tmp_path).iterdir())
