"""Devices that aren't there: what --device cuda and --providers cuda say on a machine without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from loratrf_deploy import UserError, create_session
from operators import built_kernels

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")
CUDA = "CUDAExecutionProvider"


@pytest.fixture
def no_gpu():
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has a CUDA provider")


def test_session_without_the_gpu_build(no_gpu, tmp_path):
    model = tmp_path / "model.onnx"
    model.write_bytes(b"")
    with pytest.raises(UserError, match=r"without CUDAExecutionProvider.*pip install 'loratrf-deploy\[gpu\]'"):
        create_session(model, providers=[CUDA])
    with pytest.raises(UserError, match=r"has no NoSuchProvider; it has .*CPUExecutionProvider"):
        create_session(model, providers=["NoSuchProvider"])


@pytest.fixture
def asked(monkeypatch):
    """The GPU build on a machine without a driver lists the provider, and runs on the CPU: what sessions asked for."""
    providers_asked = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, model, options, providers):
            providers_asked.append(providers)
            super().__init__(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return providers_asked


def test_a_provider_that_fails_to_start_is_no_silent_cpu(make_export, asked):
    with pytest.raises(UserError, match=r"can't start CUDAExecutionProvider here: it needs an NVIDIA GPU.*nvidia-smi"):
        create_session(make_export().model, providers=[CUDA])


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("libcublasLt.so.13", r"is not to be found. `pip install 'loratrf-deploy\[gpu\]'` brings it"),
        ("libcuda.so.1", "is not to be found, which comes with the NVIDIA GPU's driver"),
    ],
)
def test_the_library_that_is_missing_is_named(make_export, asked, monkeypatch, capsys, library, words):
    """The libraries of pip's packages are loaded first; what is printed on the way is not the user's to see."""
    loaded = []

    def preload() -> None:
        loaded.append(len(asked))
        print("Failed to load libcublasLt.so.13")

    real = ctypes.CDLL

    def missing(name: str, *rest: object, **options: object) -> ctypes.CDLL:
        if "providers_cuda" in str(name):
            raise OSError(f"{library}: cannot open shared object file: No such file or directory")
        return real(name, *rest, **options)

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr("loratrf_deploy.runtime.session.ctypes.CDLL", missing)
    with pytest.raises(UserError, match=f"here: {library} {words}"):
        create_session(make_export().model, providers=[CUDA])
    assert loaded == [0]
    assert capsys.readouterr().out == ""
    create_session(make_export().model)
    assert loaded == [0]


def test_float32_on_a_gpu_is_not_rounded_to_tf32(make_export, asked):
    with pytest.raises(UserError):
        create_session(make_export().model, providers=[CUDA, "CPUExecutionProvider"])
    assert asked == [[(CUDA, {"use_tf32": "0"}), ("CPUExecutionProvider", {})]]


def test_export_and_parity_without_the_gpu_build(no_gpu, make_export, tmp_path, capsys):
    from loratrf_deploy.cli.export import main as export
    from loratrf_deploy.cli.parity import main as parity

    base, adapter, model = make_export()
    out = tmp_path / "out" / "model.onnx"
    arguments = ["--adapter", str(adapter), "--base-model", str(base)]
    assert export([*arguments, "--out", str(out), "--device", "cuda"]) == 2
    assert "pip install 'loratrf-deploy[gpu]'" in capsys.readouterr().err
    assert not out.parent.exists()
    assert export([*arguments, "--out", str(out), "--dtype", "bfloat16"]) == 2
    assert "--dtype bfloat16 is for --device cuda" in capsys.readouterr().err
    assert parity([*arguments, "--model", str(model), "--providers", "cuda"]) == 2
    assert "pip install 'loratrf-deploy[gpu]'" in capsys.readouterr().err


def test_parity_on_a_gpu_compares_the_layers_there_too(make_export, asked, monkeypatch):
    from loratrf_deploy.parity import check_parity

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda session: [CUDA])
    base, adapter, model = make_export()
    report = check_parity(model, adapter, base, device="cuda")
    assert report.passed
    assert report.layers
    assert [providers[0][0] for providers in asked] == [
        CUDA
    ] * 3  # with the library, without, and with the layers as outputs


def test_what_cuda_has_no_kernels_for_is_refused_before_it_is_written(make_tiny, tmp_path):
    from loratrf_deploy.export import ExportOptions, export_adapter

    base, adapter = make_tiny()
    _, high = make_tiny(r=257)
    out = tmp_path / "out" / "model.onnx"
    options = {"base_model": base, "mode": "separate", "device": "cuda", "check": False}
    with pytest.raises(UserError, match=r"ranks over 256 at .*operators take on cuda.*--mode merged"):
        export_adapter(high, out, ExportOptions(**options))
    with pytest.raises(UserError, match=r"--swappable has no --dtype bfloat16: .*Take float16"):
        export_adapter(adapter, out, ExportOptions(dtype="bfloat16", swappable="base", **options))
    assert not out.parent.exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_for_a_gpu_needs_none_without_the_check(make_tiny, tmp_path, dtype):
    import onnx_ir as ir

    from loratrf_deploy.export import ExportOptions, export_adapter

    base, adapter = make_tiny()
    out = tmp_path / "model.onnx"
    export_adapter(
        adapter, out, ExportOptions(base_model=base, mode="separate", dtype=dtype, device="cuda", check=False)
    )
    graph = ir.load(out).graph
    nodes = [node for node in graph if node.op_type == "LoraTrf"]
    expected = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}[dtype]
    assert {value.const_value.dtype for node in nodes for value in node.inputs[2:]} == {expected}
    # numpy has no bfloat16 that ONNX Runtime would give.
    (logits,) = graph.outputs
    assert (logits.name, logits.dtype) == (
        "logits",
        ir.DataType.FLOAT if dtype == "bfloat16" else ir.DataType.FLOAT16,
    )


def test_bfloat16_pixels_are_given_as_float32(make_tiny, tmp_path):
    import onnx_ir as ir

    from loratrf_deploy.export import ExportOptions, export_adapter

    base, adapter = make_tiny("vit", "image-classification")
    out = tmp_path / "model.onnx"
    export_adapter(adapter, out, ExportOptions(base_model=base, dtype="bfloat16", device="cuda", check=False))
    graph = ir.load(out).graph
    (pixels,), (logits,) = graph.inputs, graph.outputs
    assert (pixels.dtype, logits.dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT)
    (cast,) = pixels.consumers()
    assert (cast.op_type, cast.outputs[0].dtype) == ("Cast", ir.DataType.BFLOAT16)
    # Of the right types all through: what ONNX Runtime's CPU lacks is the kernels.
    with pytest.raises(UserError, match="NOT_IMPLEMENTED"):
        create_session(out)


def lent(device: int, *shape: int) -> SimpleNamespace:
    """What is asked of a float32 tensor of torch's, said to lie on a CUDA device; its address is null."""
    place = SimpleNamespace(type="cuda", index=device)
    methods = {"data_ptr": lambda: 0, "is_contiguous": lambda: True}
    return SimpleNamespace(device=place, shape=shape, dtype=np.dtype(np.float32), **methods)


def test_tensors_of_two_gpus_in_one_call():
    kernels = built_kernels()
    shapes = {"base": (3, 8), "x": (3, 8), "A": (2, 8), "B": (8, 2), "out": (3, 8)}
    for name in ("x", "B", "out"):
        *inputs, out = (lent(int(name == key), *shape) for key, shape in shapes.items())
        with pytest.raises(TypeError, match=rf"{name} is on device 1, expected all tensors on device 0, where base is"):
            kernels.run_on_cuda("LowRank", inputs, out, "adapted", stream=0, allocate=bytes)
    # On one device the call gets as far as CUDA, the null addresses, or a build without it.
    *inputs, out = (lent(0, *shape) for shape in shapes.values())
    words = "LowRank: " if kernels.MAX_CUDA_RANK else "built without CUDA.*LORATRF_CUDA=ON"
    with pytest.raises((RuntimeError, ValueError), match=words):
        kernels.run_on_cuda("LowRank", inputs, out, "adapted", stream=0, allocate=bytes)
