"""A stranger's model.onnx reads no file outside of its folder, whatever version of ONNX Runtime opens it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from loratrf_deploy import AdapterSession, UserError, create_session
from loratrf_deploy.onnx_file import external_files

INPUT, OUTPUT = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 2]) for name in ("x", "y"))


def external(location: str, name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2, 2], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def constant(location: str) -> onnx.NodeProto:
    node = helper.make_node("Constant", [], ["w"])
    node.attribute.append(AttributeProto(name="value", type=AttributeProto.TENSOR, t=external(location)))
    return node


def model_of(nodes: list[onnx.NodeProto], tensors: list[TensorProto]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", [INPUT], [OUTPUT], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def initializer(location: str) -> onnx.ModelProto:
    return model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [external(location)])


def in_a_node(location: str) -> onnx.ModelProto:
    return model_of([constant(location), helper.make_node("MatMul", ["x", "w"], ["y"])], [])


def in_a_branch(location: str) -> onnx.ModelProto:
    branches = {
        name: helper.make_graph([constant(location), helper.make_node("Identity", ["w"], ["z"])], name, [], [OUTPUT])
        for name in ("then_branch", "else_branch")
    }
    return model_of([helper.make_node("If", ["c"], ["y"], **branches)], [helper.make_tensor("c", 9, [], [True])])


def in_a_function(location: str) -> onnx.ModelProto:
    model = model_of([helper.make_node("F", ["x"], ["y"], domain="d")], [])
    nodes = [constant(location), helper.make_node("MatMul", ["x", "w"], ["y"])]
    model.functions.append(helper.make_function("d", "F", ["x"], ["y"], nodes, [helper.make_opsetid("", 20)]))
    return model


def sparse(location: str) -> onnx.ModelProto:
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [])
    model.graph.sparse_initializer.add(values=external(location), indices=external("own.bin", "i"), dims=[2, 2])
    return model


def in_training(location: str) -> onnx.ModelProto:
    model = model_of([helper.make_node("Identity", ["x"], ["y"])], [])
    model.training_info.add().initialization.initializer.append(external(location))
    return model


PLACES = (initializer, in_a_node, in_a_branch, in_a_function, sparse, in_training)


@pytest.mark.parametrize("make", PLACES)
def test_every_place_of_a_tensor_is_found(make: Callable[[str], onnx.ModelProto], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(make("somewhere/weights.bin").SerializeToString())
    assert "somewhere/weights.bin" in external_files(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(make("../secret.bin").SerializeToString())
    with pytest.raises(UserError, match=r"has weights in '\.\./secret\.bin', expected a file in its own folder"):
        create_session(tmp_path / "model.onnx", library=False)


def test_an_entry_whose_value_comes_first(tmp_path: Path) -> None:
    """The order of fields is the writer's; so is how many bytes a length takes."""
    raw = initializer("../secret.bin").SerializeToString()
    entry = b"\x0a\x08location\x12\x0d../secret.bin"
    assert entry in raw
    (tmp_path / "model.onnx").write_bytes(raw.replace(entry, b"\x12\x0d../secret.bin\x0a\x08location"))
    assert external_files(tmp_path / "model.onnx") == ["../secret.bin"]


def weights(folder: Path, location: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(initializer(location).SerializeToString())
    return folder / "model.onnx"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    return tmp_path / "secret.bin"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", ["up", "absolute", "link", "fifo"])
def test_weights_elsewhere(how: str, secret: Path, tmp_path: Path) -> None:
    location = {"up": "../secret.bin", "absolute": str(secret)}.get(how, "weights.bin")
    model = weights(tmp_path / "model", location)
    if how == "link":
        (model.parent / location).symlink_to(secret)
    elif how == "fifo":
        os.mkfifo(model.parent / location)
    with pytest.raises(UserError, match=r"expected a file in its own|outside of its folder|is a FIFO"):
        create_session(model, library=False)


@pytest.mark.parametrize("location", ["weights.bin", "inner/weights.bin", "./weights.bin", "linked.bin"])
def test_weights_in_the_folder(location: str, secret: Path, tmp_path: Path) -> None:
    model = weights(tmp_path / "model", location)
    (model.parent / "inner").mkdir()
    for name in ("weights.bin", "inner/weights.bin"):
        shutil.copy(secret, model.parent / name)
    (model.parent / "linked.bin").symlink_to("weights.bin")
    x = np.eye(2, dtype=np.float32)
    (y,) = create_session(model, library=False).run(None, {"x": x})
    np.testing.assert_array_equal(y, [[0, 1], [2, 3]])


def test_a_missing_file_is_named_by_onnx_runtime(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"refuses .*weights\.bin"):
        create_session(weights(tmp_path / "model", "weights.bin"), library=False)


TORN = (
    *(b"location", b"\x3a\xff\xff\xff\x7flocation", b"\x3b location", b"\xff" * 11 + b"location"),
    b"\x3a\x02\x0a location",
)


@pytest.mark.parametrize("raw", TORN)
def test_what_is_no_model(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(raw)
    with pytest.raises(UserError, match="is not a readable ONNX model"):
        create_session(tmp_path / "model.onnx", library=False)


def test_a_model_of_nothing_but_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratrf_deploy.onnx_file._MOST_FIELDS", 1000)
    (tmp_path / "model.onnx").write_bytes(b"\x3a\x00" * 2000 + b"\x0a\x08location")
    with pytest.raises(UserError, match="more than 1,000 fields"):
        create_session(tmp_path / "model.onnx", library=False)


def test_everything_that_opens_a_model_looks(make_export, exported, tmp_path: Path) -> None:
    from loratrf_deploy.genai.generate import load_model
    from loratrf_deploy.parity.case import load_graph

    def elsewhere(model: Path) -> Path:
        folder = Path(shutil.copytree(model.parent, tmp_path / model.parent.name))
        graph = onnx.load(folder / model.name, load_external_data=False)
        graph.graph.initializer.append(external("../secret.bin", "another"))
        (folder / model.name).write_bytes(graph.SerializeToString())
        return folder / model.name

    swappable = elsewhere(make_export("bert", "text-classification", "loratrf", swappable="base").model)
    from loratrf_deploy.formats.manifest import file_sha256
    from shared import edit_json

    edit_json(swappable.with_name("loratrf.json"), model={"sha256": file_sha256(swappable)})
    language = elsewhere(exported(mode="separate"))
    for look in (
        lambda: AdapterSession(swappable),
        lambda: load_graph(swappable),
        lambda: load_model(language.parent),
    ):
        with pytest.raises(UserError, match=r"has weights in '\.\./secret\.bin'"):
            look()
