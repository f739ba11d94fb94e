"""Times LoraTrf on a GPU: our operator, PyTorch eager, torch.compile, the function body in ONNX Runtime.

    python benchmarks/bench_cuda.py [--dtype bfloat16] [--features 4096] [--rank 16] [--tokens 1 16] [--out bench.json]

Every contestant is captured in a CUDA graph of many calls over inputs that together are several times the L2 cache, and
rounds are interleaved; a time is the median over rounds of a replay's device time by the number of calls, a ratio the
median of the rounds' own ratios. The floor is the time of a copy of as many bytes as the operator has to move (x, base
and the weights read once, y written once), measured in the same rounds; gemm is the frozen layer's x Wᵀ.

ONNX Runtime is timed by the host's clock around runs with IO binding, so its figure holds its own launch overhead. It
has no bfloat16 for most operators: there float16, of the same bytes, stands in.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable

import common
import torch
import torch.nn.functional as F

from loratrf_deploy.ops import kernels, torch_ops  # type: ignore[attr-defined]

TOKENS = (1, 16, 256, 2048, 8192)
ROTATED_BYTES = 256 << 20
ROUNDS = 15
Tensors = list[torch.Tensor]


def tensors_of(T: int, features: int, rank: int, dtype: torch.dtype) -> Tensors:
    """base, x, A, B, tau, C, D."""
    shapes = [(T, features), (T, features), (rank, features), (features, rank), (features,), (rank, features)]
    made = [torch.randn(*shape, device="cuda") / shape[-1] ** 0.5 for shape in [*shapes, (features, rank)]]
    made[-1] *= 0.01  # in place, call after call, y must not grow
    return [tensor.to(dtype) for tensor in made]


def eager(base, x, A, B, tau, C, D):
    """LoraTrf as one writes it in PyTorch."""
    h = base + F.linear(F.linear(x, A), B)
    s = F.cosine_similarity(h, tau, dim=-1).clamp(0, 1)
    return h + F.linear(F.linear(s.unsqueeze(-1) * h, C), D)


def captured(function: Callable[[Tensors], object], sets: list[Tensors], calls: int) -> Callable[[], float]:
    """A timer: replays `calls` calls, over the sets in turn, and returns the device's milliseconds for one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for tensors in sets[:3]:
            function(tensors)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in range(calls):
            function(sets[call % len(sets)])
    graph.replay()

    def replay() -> float:
        return elapsed(graph.replay) / calls

    return replay


def elapsed(body: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    body()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def function_body(T: int, features: int, rank: int, dtype: str, library: bool) -> Callable[[], float] | None:
    """ONNX Runtime's CUDA provider on one node, as a function body or with the library; None where there is none."""
    if not all(map(importlib.util.find_spec, ("onnxruntime", "onnx_ir"))):
        return None
    import numpy as np
    import onnx_ir as ir
    import onnxruntime as ort
    from bench_ops import op_model, shapes_of, values_of

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return None
    dtype = "float16" if dtype == "bfloat16" else dtype
    options = common.session_options(0)
    if library:
        from loratrf_deploy import library_path

        options.register_custom_ops_library(str(library_path()))
    values = values_of(shapes_of("LoraTrf", T, features, features, rank), dtype)
    model = ir.to_proto(op_model("LoraTrf", values, constant=True)).SerializeToString()
    session = ort.InferenceSession(model, options, ["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" not in session.get_providers():  # which is only a warning to ONNX Runtime
        raise RuntimeError("ONNX Runtime can't start its CUDA provider: it lacks a library, such as cuDNN")
    binding = session.io_binding()
    for name in ("base", "x"):
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values[name], "cuda", 0))
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_numpy(np.empty_like(values["base"]), "cuda", 0))
    calls = 10

    def run() -> None:
        for _ in range(calls):
            session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    run()
    # ONNX Runtime has a stream of its own, which events on ours don't see: the host's clock, in milliseconds.
    return lambda: common.timed(run) * 1e3 / calls


def bench(T: int, features: int, rank: int, dtype: str) -> dict[str, float]:
    """Medians in microseconds by contestant, and ratios to our operator."""
    torch_dtype = getattr(torch, dtype)
    first = tensors_of(T, features, rank, torch_dtype)
    moved = sum(tensor.nbytes for tensor in first) + first[0].nbytes
    sets = [first] + [
        tensors_of(T, features, rank, torch_dtype) for _ in range(min(64, max(2, ROTATED_BYTES // moved)))
    ]
    calls = max(2 * len(sets), 20)
    weights = [(torch.randn(features, features, device="cuda") / features**0.5).to(torch_dtype) for _ in range(8)]
    layers = [[sets[i % len(sets)][1], weights[i % 8]] for i in range(max(8, len(sets)))]
    half = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    copies = [(torch.empty_like(half), torch.randint_like(half, 255)) for _ in range(len(sets))]
    compiled = torch.compile(eager, fullgraph=True, dynamic=False)

    def ours(tensors: Tensors) -> None:  # in place, as ONNX Runtime runs it
        kernels.run_on_cuda(
            "LoraTrf",
            tensors,
            tensors[0],
            "adapted",
            stream=torch.cuda.current_stream().cuda_stream,
            allocate=lambda size: torch.empty(size, dtype=torch.uint8, device="cuda"),
        )

    timers: dict[str, Callable[[], float]] = {
        "ours": captured(ours, sets, calls),
        "ours, out of place": captured(lambda tensors: torch_ops.lora_trf(*tensors), sets, calls),
        "eager": captured(lambda tensors: eager(*tensors), sets, calls),
        "floor": captured(lambda pair: pair[0].copy_(pair[1]), [list(pair) for pair in copies], calls),
        "gemm": captured(lambda layer: layer[0] @ layer[1].T, layers, calls),
    }
    try:
        timers["compile"] = captured(lambda tensors: compiled(*tensors), sets, calls)
    except Exception as error:  # no Triton, or no compiler for it
        print(f"torch.compile is left out: {str(error).splitlines()[0]}")
    for name, library in (("ort body", False), ("ort library", True)):
        if timer := function_body(T, features, rank, dtype, library):
            timers[name] = timer
    rounds = [{name: timer() for name, timer in timers.items()} for _ in range(ROUNDS)]
    # `ours` runs in place, again and again: the values must stay finite to be honest work.
    assert all(torch.isfinite(tensors[0]).all() for tensors in sets), "the in-place rounds overflowed"
    times = {name: [round_[name] for round_ in rounds] for name in timers}
    result = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    result |= {f"{name}/ours": ratio for name, ratio in common.ratios(times, "ours").items()}
    return result


def main() -> None:
    parser = common.parser(__doc__, rank=16, out=None)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--features", type=int, default=4096, help="K = N")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}, K = N = {args.features}, ", end="")
    print(f"R = F = {args.rank}; microseconds of one call, and times our operator's")
    names = ["ours", "ours, out of place", "floor", "gemm", "eager", "compile", "ort body", "ort library"]
    print(common.head(["T", *names]))
    results = {}
    for T in args.tokens:
        result = results[T] = bench(T, args.features, args.rank, args.dtype)
        cells = [
            f"{result[name]:.1f} ({result[f'{name}/ours']:.2f}x)" if name in result else "not here" for name in names
        ]
        print(common.line([T, *cells]), flush=True)
    common.save(args.out, {"device": torch.cuda.get_device_name(), **vars(args), "results": results})


if __name__ == "__main__":
    main()
