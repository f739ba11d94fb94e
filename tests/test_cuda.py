"""The CUDA operators on a real GPU, against the float64 reference: `pytest -m gpu`; skipped by name without one.

What they compute is proven without a GPU in test_cuda_emulation.py; here it is the compiled code, streams, CUDA graphs
and ONNX Runtime's CUDA provider.
"""

from __future__ import annotations

import numpy as np
import pytest

import operators
from loratrf_deploy import AdapterSession
from loratrf_deploy.ops.dtypes import DTYPES
from operators import CASES, reference_of
from tolerances import assert_close

torch = pytest.importorskip("torch")
kernels = operators.built_kernels()
from loratrf_deploy.ops import torch_ops  # noqa: E402

pytestmark = pytest.mark.gpu

PROVIDER = "CUDAExecutionProvider"

SIZES = [
    *((T, 131, 77, 19, 8) for T in (0, 1, 3, 16, 17, 130)),
    (1, 4096, 4096, 16, 16),
    (16, 4096, 4096, 16, 16),
    (100, 768, 3072, 64, 1),
    (2049, 1024, 1000, 8, 64),
    (33, 520, 2048, 256, 256),
    (5000, 256, 384, 1, 19),
]


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU, or a PyTorch without CUDA")
    if not kernels.MAX_CUDA_RANK:
        pytest.skip("the library was built without CUDA")


def tensors_of(op, T, K, N, R, F, dtype, seed=0):
    """The op's inputs on the GPU; about half of the tokens pass the filter."""
    values = operators.values_of(op, T, K, N, R, F, seed).values()
    return [torch.from_numpy(value).to("cuda", getattr(torch, dtype)) for value in values]


def function_of(op):
    return getattr(torch_ops, operators.FUNCTIONS[op])


def run_into(out, op, tensors, filter_input="adapted"):
    """The operator into `out`, which may be its first input, on the current stream; returns the scratch."""
    scratch = []

    def allocate(size):
        scratch.append(torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda"))  # NaN
        return scratch[-1]

    stream = torch.cuda.current_stream().cuda_stream
    kernels.run_on_cuda(op, tensors, out, filter_input, stream=stream, allocate=allocate)
    return scratch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "filter_input"), CASES)
def test_matches_reference(op, filter_input, dtype):
    for seed, sizes in enumerate(SIZES):
        tensors = tensors_of(op, *sizes, dtype, seed)
        what = f"{op} {filter_input} T,K,N,R,F={sizes}"
        expected = reference_of(op, tensors, filter_input)
        out = torch.full_like(tensors[0], float("nan"))
        run_into(out, op, tensors, filter_input)
        assert_close(out.cpu().double(), expected, dtype, what)
        again = function_of(op)(*tensors, **operators.attributes_of(op, filter_input))
        assert torch.equal(again, out), f"{what}: two runs differ"
        run_into(tensors[0], op, tensors, filter_input)
        assert torch.equal(tensors[0], out), f"{what}: in place differs"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
def test_grouped(dtype, tokens):
    base, x, *weights = tensors_of("LoraTrf", 7 * tokens, 264, 520, 19, 8, dtype)
    slots = [torch.stack([weight, weight * 0.5, -weight]) for weight in weights]
    ids = torch.tensor([2, -1, 0, 0, 1, -1, 2])
    tensors = [base.reshape(7, tokens, -1), x.reshape(7, tokens, -1), *slots, ids]
    out = torch_ops.grouped_lora_trf(*tensors)
    assert_close(out.cpu().double(), reference_of("GroupedLoraTrf", tensors), dtype, f"grouped {tokens}")
    with pytest.raises(ValueError, match=r"adapter_ids\[1\] is 3, expected -1"):
        torch_ops.grouped_lora_trf(*tensors[:-1], torch.tensor([0, 3, 0, 0, 0, 0, 0]))


def test_unaligned_and_strided_tensors():
    for op, _ in CASES:
        tensors = tensors_of(op, 19, 131, 136, 19, 8, "float16")
        shifted = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for t in tensors]
        assert torch.equal(function_of(op)(*shifted), function_of(op)(*tensors))
        strided = [t.mT.contiguous().mT if t.dim() > 1 else t for t in tensors]
        assert torch.equal(function_of(op)(*strided), function_of(op)(*tensors))


@pytest.mark.parametrize("T", [1, 16, 300])
def test_cuda_graph(T):
    tensors = tensors_of("LoraTrf", T, 512, 1024, 16, 8, "bfloat16")
    out = torch.empty_like(tensors[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run_into(out, "LoraTrf", tensors)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        scratch = run_into(out, "LoraTrf", tensors)
    tensors[1].normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert_close(out.cpu().double(), reference_of("LoraTrf", tensors), "bfloat16", f"replay, {len(scratch)} scratch")


def test_compile_passes_through():
    tensors = tensors_of("LowRank", 5, 64, 96, 4, 4, "float32")
    compiled = torch.compile(lambda *t: torch.ops.loratrf.low_rank(*t).relu(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), torch_ops.low_rank(*tensors).relu())


def test_ranks_over_the_limit():
    with pytest.raises(ValueError, match=r"LowRank: A .* has rank 257, the kernels take at most 256"):
        torch_ops.low_rank(*tensors_of("LowRank", 3, 19, 99, 257, 1, "float32"))


@pytest.fixture(scope="session")
def ort():
    onnxruntime = pytest.importorskip("onnxruntime")
    if PROVIDER not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: install loratrf-deploy[gpu]")
    return onnxruntime


def cuda_session(ort, model, **provider_options):
    """A session in which an operator without a CUDA kernel is an error, not the CPU's."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.register_custom_ops_library(str(operators.built_library()))
    return ort.InferenceSession(model, options, [(PROVIDER, provider_options)])


@pytest.mark.parametrize("constant", [(), operators.WEIGHTS], ids=["inputs", "constants"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "filter_input"), [*CASES, ("GroupedLoraTrf", "adapted")])
def test_onnx_runtime(ort, op, filter_input, dtype, constant):
    for T in ((2, 1), (3, 70)):
        values = operators.values_of(op, T=T, K=264, N=520, R=19, F=8)
        attributes = operators.attributes_of(op, filter_input)
        session = cuda_session(ort, operators.model_of(op, values, dtype, constant, attributes))
        expected = operators.expected_of(op, values, dtype, filter_input)
        for _ in range(3):  # scratch is lent and given back
            assert_close(operators.run(session, values), expected, dtype, f"{op} in ONNX Runtime")


def test_onnx_runtime_cuda_graph(ort):
    values = operators.values_of("LoraTrf", T=(4, 1), K=264, N=520)
    session = cuda_session(ort, operators.model_of("LoraTrf", values), enable_cuda_graph="1")
    held = {name: ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in values.items()}
    y = ort.OrtValue.ortvalue_from_numpy(np.full_like(values["base"], np.nan), "cuda", 0)
    binding = session.io_binding()
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("y", y)
    for scale in (1, 2, -3):  # captured, then replayed on new values
        base = values["base"] * np.float32(scale)
        held["base"].update_inplace(base)
        session.run_with_iobinding(binding)
        expected = reference_of("LoraTrf", (values | {"base": base}).values())
        assert_close(y.numpy(), expected, "float32", f"replay {scale}")


IDS = {
    "input_ids": np.arange(5, 47).reshape(6, 7),
    "attention_mask": np.ones((6, 7), np.int64),
    "token_type_ids": np.zeros((6, 7), np.int64),
}


@pytest.fixture(scope="session")
def adapters(make_tiny):
    """name -> adapter folder; "later" has a higher rank than the others."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("optimum.exporters.tasks")
    pytest.importorskip("transformers", minversion="5.23")
    return {
        "ours": make_tiny(kind="loratrf")[1],
        "small": make_tiny(kind="lora", r=2, seed=4, lora_alpha=9)[1],
        "later": make_tiny(kind="loratrf", r=11, filter_rank=6, seed=8)[1],
    }


@pytest.fixture
def both(ort, adapters, tmp_path, monkeypatch):
    """both(model) -> sessions with all adapters on the CPU and the GPU, and the list of arrays copied to the GPU."""
    from loratrf_deploy.export.onto import convert_adapter

    real, copied = ort.OrtValue.ortvalue_from_numpy, []

    def recorded(array, device="cpu"):
        copied.extend([array.shape] if device == "cuda" else [])
        return real(array, device)

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", recorded)

    def open_both(model):
        sessions = [AdapterSession(model), AdapterSession(model, providers=[PROVIDER])]
        for name, adapter in adapters.items():
            convert_adapter(adapter, model, tmp_path / f"{name}.onnx_adapter")
            for session in sessions:
                session.load(name, tmp_path / f"{name}.onnx_adapter")
        return *sessions, copied

    return open_both


def assert_same(cpu, gpu, dtype, **chosen):
    """The two sessions agree on IDS, the whole model's rounding counted; returns the logits."""
    expected, got = (session.run(IDS, **chosen)["logits"].astype(np.float64) for session in (cpu, gpu))
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < {"float32": 1e-5, "float16": 1e-2}[dtype], f"{chosen}: {error:.1e}"
    return expected


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_adapter_per_run(both, make_export, dtype, tmp_path):
    cpu, gpu, copied = both(make_export(kind="loratrf", swappable="base", dtype=dtype).model)
    for weights in (entry.weights for entry in gpu._residents._entries.values()):
        assert {value.device_name() for value in weights._values.values()} == {"cuda"}
    copied.clear()
    answers = [assert_same(cpu, gpu, dtype, adapter=name) for name in ("ours", "small", None, "later", "ours", "small")]
    assert all(np.abs(answers[0] - answer).max() > 0.03 for answer in answers[1:4])
    assert copied == []
    assert_same(cpu, gpu, dtype, adapter="ours", scale=0.5)
    for session in (cpu, gpu):
        session.load("ours", tmp_path / "later.onnx_adapter", replace=True)
        session.unload("later")
    assert_same(cpu, gpu, dtype, adapter="ours")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_adapter_per_row(both, adapters, make_tiny, dtype, tmp_path):
    from loratrf_deploy.export import ExportOptions, export_grouped

    model = tmp_path / "model.onnx"
    export_grouped(
        {"ours": adapters["ours"]}, model, ExportOptions(base_model=make_tiny()[0], dtype=dtype, check=False)
    )
    cpu, gpu, copied = both(model)
    rows = [["ours", "small", "later"] * 2, [None] * 6, ["later", None, None, "ours", "ours", "small"], ["small"] * 6]
    assert_same(cpu, gpu, dtype, adapters=rows[0])
    bound = gpu._way._bank.bound()
    assert {value.device_name() for value in bound._values.values()} == {"cuda"}
    copied.clear()
    for names in rows:
        assert_same(cpu, gpu, dtype, adapters=names)
    assert gpu._way._bank.bound() is bound
    assert copied == []
    for session in (cpu, gpu):
        session.unload("small")
        session.load("small", tmp_path / "ours.onnx_adapter")
    assert_same(cpu, gpu, dtype, adapters=rows[2])


@pytest.mark.parametrize("mode", ["merged", "separate"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_is_proven_on_the_gpu(ort, adapters, make_tiny, dtype, mode, tmp_path):
    from loratrf_deploy.export import ExportOptions, export_adapter

    options = {"base_model": make_tiny()[0], "mode": mode, "dtype": dtype, "device": "cuda"}
    result = export_adapter(adapters["ours"], tmp_path / "model.onnx", ExportOptions(**options))
    assert result.parity.passed
