"""Times every operator: our kernel, its function body in ONNX Runtime, PyTorch eager, and the layer's own GEMM.

    python benchmarks/bench_ops.py [--quick] [--threads 2] [--dtype float32] [--inputs] [--out bench.json]

Rounds are interleaved: every round times each contestant for about 2 ms, back to back, and a ratio is the median of
the rounds' own ratios, so that a noisy neighbour slows both sides of a ratio alike. Threads are pinned, thread i to
core i: left alone, the scheduler puts both threads of one contestant on one core for whole stretches. Caches are warm,
as they are for an adapter that serves. The floor is max(bytes / copy bandwidth, FLOPs / SGEMM rate), both measured in
the same run; the copy is one of main memory, so what fits the caches can be below it. `--inputs` makes the weights
graph inputs (run-time adapters) instead of constants.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable

import common
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from loratrf_deploy import library_path
from loratrf_deploy.ops.schemas import DOMAIN, OPS, VERSION, function_body

SINGLE = [op for op in OPS if op != "GroupedLoraTrf"]
"""The operators of one adapter; bench_grouped.py times the other."""
TOKENS = (1, 16, 128, 512)
FEATURES = (384, 768, 2048, 4096)
RANKS = (8, 16, 64)
OPSET = 20
SETTLE_SECONDS = 5e-3
DTYPES = ("float32", "float16")


def shapes_of(op: str, T: int, K: int, N: int, R: int) -> dict[str, tuple[int, ...]]:
    """The inputs of `op`, in order."""
    every = {"base": (T, N), "z": (T, N), "x": (T, K), "A": (R, K), "B": (N, R), "tau": (N,), "C": (R, N), "D": (N, R)}
    return {name: every[name] for name in OPS[op].inputs}


def values_of(shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype) for name, shape in shapes.items()}


def session_of(model: ir.Model, threads: int, library: bool) -> ort.InferenceSession:
    options = common.session_options(threads, pinned=True)
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


def one_node(
    op: str, domain: str, values: dict[str, np.ndarray], constants: Iterable[str], shape: tuple[int, ...]
) -> ir.Model:
    """A model of one node with the output y of that shape; `constants` are initializers, the other values inputs."""
    inputs = []
    for name, value in values.items():
        tensor = ir.tensor(value, name=name)
        const = tensor if name in constants else None
        inputs.append(ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=const))
    node = ir.node(op, inputs, domain=domain)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", inputs[0].type, ir.Shape(shape)
    graph = ir.Graph(
        [value for value in inputs if value.const_value is None],
        node.outputs,
        nodes=[node],
        initializers=[value for value in inputs if value.const_value is not None],
        opset_imports={"": OPSET, DOMAIN: VERSION},
        name=op,
    )
    return ir.Model(graph, ir_version=10, functions=[function_body(op, OPSET)] if domain else [])


def op_model(op: str, values: dict[str, np.ndarray], constant: bool) -> ir.Model:
    """With its function body; weights and tau are initializers if `constant`."""
    first, *_ = values.values()
    return one_node(op, DOMAIN, values, set(values) - {"base", "x", "z"} if constant else (), first.shape)


def gemm_model(T: int, K: int, N: int) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The adapted layer's own product, x Wᵀ, with a constant weight."""
    rng = np.random.default_rng(0)
    values = {"x": rng.standard_normal((T, K), np.float32), "w": rng.standard_normal((K, N), np.float32)}
    return one_node("MatMul", "", values, ("w",), (T, N)), values


def runner(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> Callable[[], None]:
    """One run into a bound output: copies between Python and ONNX Runtime are not what is measured."""
    binding = session.io_binding()
    for name in (value.name for value in session.get_inputs()):
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(feeds[name]))
    first = next(iter(feeds.values()))
    shape = session.get_outputs()[0].shape
    binding.bind_ortvalue_output("y", ort.OrtValue.ortvalue_from_shape_and_type(shape, first.dtype.type))
    return lambda: session.run_with_iobinding(binding)


def torch_runner(op: str, values: dict[str, np.ndarray], threads: int) -> Callable[[], object] | None:
    try:
        import torch
        from torch.nn.functional import cosine_similarity
    except ModuleNotFoundError:
        return None
    torch.set_num_threads(threads)
    w = {name: torch.from_numpy(value) for name, value in values.items()}

    def low_rank(base: torch.Tensor) -> torch.Tensor:
        return base + (w["x"] @ w["A"].T) @ w["B"].T

    def task_filter(z: torch.Tensor) -> torch.Tensor:
        score = cosine_similarity(z, w["tau"], dim=-1).clamp(0, 1)[..., None]
        return z + (score * (z @ w["C"].T)) @ w["D"].T

    def run() -> object:
        with torch.inference_mode():
            if op == "LowRank":
                return low_rank(w["base"])
            return task_filter(w["z"] if op == "TaskFilter" else low_rank(w["base"]))

    return run


def interleaved(
    runs: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds per run of each contestant, round by round, for about `seconds` in all."""
    repeats = {}
    for name, run in runs.items():
        common.timed(run, 2)
        repeats[name] = max(1, int(2e-3 / common.timed(run, 3, clock)))
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(rounds["kernel"]) < 7:
        for name, run in runs.items():
            # The last contestant's idle threads spin for a while: they would take this one's cores.
            time.sleep(SETTLE_SECONDS)
            run()
            rounds[name].append(common.timed(run, repeats[name], clock))
    return rounds


def machine_rates(threads: int, clock: Callable[[], float]) -> dict[str, float]:
    """Copy bandwidth (bytes read plus written a second) and SGEMM rate, the best of several tries."""
    from concurrent.futures import ThreadPoolExecutor

    source = np.ones(16 << 20, np.float32)
    target = np.empty_like(source)
    size = source.size // threads
    spans = [slice(i * size, (i + 1) * size) for i in range(threads)]
    with ThreadPoolExecutor(threads, initializer=lambda: os.sched_setaffinity(0, range(threads))) as pool:

        def copy() -> None:
            if threads == 1:  # in this thread, whose time the cpu clock counts
                np.copyto(target, source)
            else:
                list(pool.map(lambda span: np.copyto(target[span], source[span]), spans))

        copy_seconds = min(common.timed(copy, clock=clock) for _ in range(8))
    size = 1024
    model, feeds = gemm_model(size, size, size)
    gemm = runner(session_of(model, threads, library=False), feeds)
    gemm()
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy_seconds,
        "sgemm_flops_per_s": 2 * size**3 / min(common.timed(gemm, clock=clock) for _ in range(12)),
    }


def floor_seconds(op: str, values: dict[str, np.ndarray], rates: dict[str, float]) -> float:
    """What no implementation beats by much: every tensor moved once, every product's FLOPs at the SGEMM rate."""
    first = next(iter(values.values()))
    moved = sum(value.nbytes for value in values.values()) + first.nbytes
    flops = sum(2 * first.shape[0] * value.size for name, value in values.items() if name in "ABCD")
    return max(moved / rates["copy_bytes_per_s"], flops / rates["sgemm_flops_per_s"])


def measure(op: str, T: int, features: int, R: int, options: argparse.Namespace, rates: dict[str, float]) -> dict:
    values = values_of(shapes_of(op, T, features, features, R), options.dtype)
    model = op_model(op, values, constant=not options.inputs)
    runs: dict[str, Callable[[], object]] = {
        "kernel": runner(session_of(model, options.threads, library=True), values),
        "function": runner(session_of(model, options.threads, library=False), values),
    }
    if not options.no_torch and (torch := torch_runner(op, values, options.threads)):
        runs["torch"] = torch
    if not options.no_gemm:
        gemm, feeds = gemm_model(T, features, features)
        runs["gemm"] = runner(session_of(gemm, options.threads, library=False), feeds)
    rounds = interleaved(runs, options.seconds, common.CLOCKS[options.clock])
    row = {"op": op, "T": T, "K=N": features, "R=F": R, "floor_us": floor_seconds(op, values, rates) * 1e6}
    for name, times in rounds.items():
        row[f"{name}_us"] = statistics.median(times) * 1e6
        row[f"{name}/kernel"] = common.ratio(times, rounds["kernel"])
    return row


def table(rows: list[dict]) -> str:
    columns = {
        "op": "op", "T": "T", "K=N": "K=N", "R=F": "R=F", "kernel_us": "kernel µs", "function_us": "function µs",
        "function/kernel": "function / kernel", "torch/kernel": "torch / kernel", "gemm_us": "base GEMM µs",
        "floor_us": "floor µs", "kernel/floor": "kernel / floor",
    }  # fmt: skip
    kept = [key for key in columns if key in rows[0]]
    cells = (
        [f"{row[key]:.2f}x" if "/" in key else f"{row[key]:.0f}" if "_us" in key else row[key] for key in kept]
        for row in rows
    )
    return common.table([columns[key] for key in kept], cells)


def main() -> None:
    parser = common.parser(__doc__, threads=os.cpu_count(), clock="wall", out=None)
    parser.add_argument("--quick", action="store_true", help="corner shapes only")
    parser.add_argument("--ops", nargs="+", default=SINGLE, choices=SINGLE)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--features", nargs="+", type=int, default=list(FEATURES))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--inputs", action="store_true", help="weights are graph inputs, not constants")
    parser.add_argument("--seconds", type=float, default=0.6, help="per row")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-gemm", action="store_true")
    options = common.parse(parser)
    if options.quick:
        options.tokens, options.features, options.ranks = [1, 128], [384, 2048], [8, 64]
    common.pin_threads(options.threads)
    rates = machine_rates(options.threads, common.CLOCKS[options.clock])
    about = {
        "cpu": common.cpu_name(),
        "threads": options.threads,
        "dtype": options.dtype,
        "clock": options.clock,
        "weights": "graph inputs" if options.inputs else "constants",
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        **rates,
    }
    print(
        f"{about['cpu']}, {options.threads} threads, {options.clock} clock, {options.dtype}, "
        f"weights {about['weights']}, ONNX Runtime {ort.__version__}, copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"SGEMM {rates['sgemm_flops_per_s'] / 1e9:.0f} GFLOP/s, load average {about['load_average']:.1f} at the start\n"
    )
    rows = []
    shapes = list(itertools.product(options.ops, options.tokens, options.features, options.ranks))
    for done, (op, T, features, R) in enumerate(shapes, 1):
        row = measure(op, T, features, R, options, rates)
        row["kernel/floor"] = row["kernel_us"] / row["floor_us"]
        del row["kernel/kernel"]
        rows.append(row)
        print(f"\r{done}/{len(shapes)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(table(rows))
    worst = min(row["function/kernel"] for row in rows)
    print(f"\nSmallest function / kernel: {worst:.2f}x; shapes below 1: {sum(r['function/kernel'] < 1 for r in rows)}")
    common.save(options.out, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
