"""The export itself: adapter directory -> validated adapter -> adapted torch model -> ONNX graph -> files -> proof."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from .. import __version__
from ..adapters.adapter import Adapter, LayerAdapter, read_adapter
from ..cli.shared import quiet
from ..errors import UserError
from ..formats.adapter_file import adapter_facts, file_facts, write_adapter_file
from ..formats.manifest import MANIFEST, file_sha256
from ..formats.swappable import DEFAULTS, check_swappable
from ..ops.schemas import MAX_CUDA_RANK, MAX_RANK
from ..runtime.session import PROVIDERS, check_providers
from .files import base_sha256, check_writable, written_aside

if TYPE_CHECKING:
    import torch

    from ..parity.single import ParityReport
    from ..pytorch.base import BaseModel

__all__ = ["DTYPES", "MODES", "QUANTIZATIONS", "ExportResult", "export_adapter"]

MODES = ("merged", "separate")
DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("none", "int4", "int8")
_LOST_STARTS = ("lora_ga", "corda")
"""Initialisations that change the base by gradients or data: PEFT can't redo them when it loads the adapter."""


@dataclass(frozen=True)
class ExportResult:
    """What an export made. `manifest` is loratrf.json's content, `seconds` the time by stage."""

    model: Path
    manifest: dict[str, Any]
    parity: ParityReport | None
    sizes: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)


class ParityFailed(Exception):
    """The exported model doesn't compute what PyTorch computed; `report` says where. Nothing was written."""

    def __init__(self, report: ParityReport):
        super().__init__("the exported model doesn't compute what PyTorch computed")
        self.report = report


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    base_model: str | Path | None = None,
    mode: str = "merged",
    swappable: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    opset: int | None = None,
    quantize: str = "none",
    bundle_library: bool = False,
    check: bool = True,
    step: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Writes the adapted model as ONNX: `out`, `out`.data, config.json, tokenizer files and loratrf.json beside it.

    mode "merged" folds the low-rank halves into the weights and keeps an operator only where there is a task-aware
    filter; "separate" keeps every half as an operator beside its frozen layer. `swappable` "base" or "adapter" (with
    mode "separate") makes the adapter's weights inputs of the graph, which have the values of the one or the other when
    nobody feeds them, and writes the adapter to <its name>.onnx_adapter. `base_model` None takes the adapter's own.
    `device` "cuda" takes the fusions of ONNX Runtime's GPU provider; bfloat16 needs it. `opset` None takes the default,
    20. `quantize` ("int4", "int8") and `bundle_library` (a copy of the custom-op library in the folder) are for causal
    language models, whose folder ONNX Runtime GenAI loads. `check` proves parity with PyTorch before anything is moved
    into place, on `device` but for causal language models, which are proven on the CPU. `step` is told what is being
    done. Raises UserError for input at fault, ParityFailed where the proof fails; either way nothing is left behind.
    """
    out = Path(out)
    for option, value, known in (("mode", mode, MODES), ("quantize", quantize, QUANTIZATIONS)):
        if value not in known:
            raise UserError(f"--{option} is {value!r}, expected one of: {', '.join(known)}.")
    if swappable is not None and (mode != "separate" or swappable not in DEFAULTS):
        raise UserError(
            f"--swappable is {swappable!r} with --mode {mode}, expected {' or '.join(DEFAULTS)} with --mode separate: "
            "an adapter that is folded into the weights can't be swapped."
        )
    check_dtype(dtype, device)
    if swappable is not None and dtype == "bfloat16":
        raise UserError("--swappable has no --dtype bfloat16: run-time weights are float32 or float16. Take float16.")
    check_writable(out)
    loaded = read_adapter(adapter)
    if mode == "separate" and loaded.not_separable:
        raise UserError(
            f"The adapter {adapter} can't be kept separate: {loaded.not_separable}. Export it merged: --mode merged."
        )
    if swappable is not None:
        check_swappable(loaded)
    most = MAX_CUDA_RANK if device == "cuda" else MAX_RANK
    if high := [name for name, layer in loaded.layers.items() if max(_kept_ranks(layer, mode)) > most]:
        raise UserError(
            f"The adapter {adapter} has ranks over {most} at {', '.join(high[:5])}, more than the operators take on "
            f"{device}." + (" Export it merged: --mode merged." if mode == "separate" else "")
        )
    options = _Options(mode, swappable, dtype, device, opset, quantize, bundle_library, check)

    def write(model: Path, clock: Clock) -> dict[str, Any]:
        return _write_model(loaded, base_model, model, clock, options)

    def prove(model: Path, manifest: dict[str, Any]) -> ParityReport:
        from ..parity.single import check_parity
        from ..pytorch.base import GENERATION

        proven_on = "cpu" if manifest["task"] == GENERATION else device
        return check_parity(model, Path(adapter), base_model, device=proven_on)

    return write_proven(out, write, prove if check else None, step)


def write_proven(
    out: Path,
    write: Callable[[Path, Clock], dict[str, Any]],
    prove: Callable[[Path, dict[str, Any]], ParityReport] | None,
    step: Callable[[str], None],
) -> ExportResult:
    """Writes a model aside, proves it, and moves it into place with its manifest.

    `write` writes the model and what belongs to it beside the path that it is given, and returns the manifest; `prove`
    is given both, None skips the proof. Raises ParityFailed where the proof fails, UserError where `out` can't be
    written; then nothing is left behind.
    """
    with written_aside(out) as aside:
        model, clock = aside / out.name, Clock(step)
        report = None
        with quiet():
            manifest = write(model, clock)
            _write_manifest(aside, manifest)
            if prove:
                gc.collect()  # the traced graph is full of cycles, and the proof needs its room
                clock("checking parity with PyTorch")
                report = prove(model, manifest)
                if not report.passed:
                    raise ParityFailed(report)
                manifest["parity"] = report.summary()
        clock("writing")
        _write_manifest(aside, manifest)
        sizes = {path.name: path.stat().st_size for path in sorted(aside.iterdir())}
    clock("done")
    return ExportResult(out, manifest, report, sizes, clock.seconds)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _kept_ranks(layer: LayerAdapter, mode: str) -> tuple[int, int]:
    """The ranks that stay in the graph: a merged low-rank half has none."""
    return (layer.rank if mode == "separate" else 0, layer.filter_rank)


@dataclass(frozen=True)
class _Options:
    """How to export, as `export_adapter` takes it."""

    mode: str
    swappable: str | None
    dtype: str
    device: str
    opset: int | None
    quantize: str
    bundle_library: bool
    check: bool


def _write_model(
    adapter: Adapter, base_model: str | Path | None, out: Path, clock: Clock, options: _Options
) -> dict[str, Any]:
    clock("importing torch and transformers")
    from ..pytorch.base import GENERATION, load_base

    clock("loading the base model")
    base = load_base(adapter, base_model)
    write = _write_generating if base.task == GENERATION else _write_encoder
    manifest, values = write(adapter, base, out, clock, options)
    manifest["adapter"] = {
        **adapter_facts(adapter),
        "filter_input": adapter.filter_input,
        "parameters": sum(layer.parameters for layer in adapter.layers.values()),
    }
    if values:
        write_adapter_file(out.with_name(manifest["swappable"]["file"]), values, file_facts(adapter, manifest))
    return manifest


def _write_generating(
    adapter: Adapter, base: BaseModel, out: Path, clock: Clock, options: _Options
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Writes a causal language model; returns the manifest without what it says of the adapter, and no weights."""
    import onnx_ir as ir

    from .genai import write_genai

    if options.opset is not None:
        raise UserError("--opset isn't for causal language models: onnxruntime-genai's builder sets it. Leave it out.")
    if options.swappable is not None:
        raise UserError(
            "--swappable isn't for causal language models: ONNX Runtime GenAI feeds the graph and knows no adapter "
            "inputs. Export each adapter by itself, with --mode separate or merged."
        )
    if options.check and options.dtype == "bfloat16":
        raise UserError(
            "bfloat16 language models run on a GPU alone, and their parity is checked on the CPU. Export it unchecked "
            "(--no-check), after a float16 export that was checked."
        )
    layers = write_genai(
        adapter,
        base,
        out,
        mode=options.mode,
        dtype=options.dtype,
        quantize=options.quantize,
        device=options.device,
        bundle_library=options.bundle_library,
        merge_with_peft=lambda: _merge_with_peft(adapter, base),
        step=clock,
    )
    manifest = common_facts(base, out, options.mode, options.dtype, ir.load(out).opset_imports[""])
    manifest["versions"]["onnxruntime-genai"] = metadata.version("onnxruntime-genai")
    return manifest | {"quantize": options.quantize, "device": options.device, "layers": layers}, {}


def _write_encoder(
    adapter: Adapter, base: BaseModel, out: Path, clock: Clock, options: _Options
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Writes any other model; returns the manifest without what it says of the adapter, and its run-time weights."""
    import onnx_ir as ir
    import torch

    from .graph import finish, trace
    from .swappable import Swap

    opset, dtype = check_opset(options.opset), options.dtype
    if options.quantize != "none" or options.bundle_library:
        raise UserError(
            f"The adapter {adapter.path} is for {base.task}. --quantize and --bundle-library are for causal language "
            "models: leave them out."
        )
    if options.check:
        check_providers([PROVIDERS[options.device]])
    clock("adapting")
    swap = Swap(adapter, base, dtype, options.swappable) if options.swappable is not None else None
    layers = _attach(swap.placeholders if swap else adapter, base, options.mode, getattr(torch, dtype))
    clock("tracing")
    with collector_off():
        program = trace(base.model, traced_inputs(base, dtype), opset, options.device)
        finish(program, opset)
    if swap:
        swap.apply(program.graph)
    clock("writing")
    ir.save(program, out, external_data=f"{out.name}.data")
    write_companions(base, adapter, out.parent)
    manifest = common_facts(base, out, options.mode, dtype, opset) | {"layers": layers}
    return (manifest | {"swappable": swap.facts}, swap.values) if swap else (manifest, {})


def check_dtype(dtype: str, device: str = "cpu") -> None:
    """UserError for a type or device that nothing is exported in, or a type that the device has no kernels for."""
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, expected one of: {', '.join(DTYPES)}.")
    if device not in PROVIDERS:
        raise UserError(f"--device is {device!r}, expected one of: {', '.join(PROVIDERS)}.")
    if dtype == "bfloat16" and device == "cpu":
        raise UserError(
            "--dtype bfloat16 is for --device cuda: ONNX Runtime's CPU has no bfloat16 for most operators. Export with "
            "--dtype float32 or float16, or add --device cuda."
        )


def check_opset(opset: int | None) -> int:
    """`opset`, or the default for None. Raises UserError for one that can't be exported."""
    from .graph import DEFAULT_OPSET, OPSETS

    opset = DEFAULT_OPSET if opset is None else opset
    if opset not in OPSETS:
        raise UserError(f"--opset is {opset}, expected {OPSETS[0]} to {OPSETS[-1]} (default {DEFAULT_OPSET}).")
    return opset


def traced_inputs(base: BaseModel, dtype: str) -> dict[str, torch.Tensor]:
    """What a model is traced with: random inputs, floats in `dtype`."""
    import torch

    from ..pytorch.base import sample_inputs

    arrays = sample_inputs(base, batch=2, sequence=16, seed=0)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return {name: x.to(getattr(torch, dtype)) if x.is_floating_point() else x for name, x in tensors.items()}


def common_facts(base: BaseModel, out: Path, mode: str, dtype: str, opset: int) -> dict[str, Any]:
    """What every kind of export's manifest says of the model written to `out`; "adapter" and "layers" are to come."""
    return {
        "format": 1,
        "loratrf_deploy": __version__,
        "mode": mode,
        "task": base.task,
        "dtype": dtype,
        "opset": opset,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "onnx_ir")},
        "adapter": {},
        "base": {"name": Path(base.path).name, "sha256": base_sha256(Path(base.path))},
        "model": {"sha256": file_sha256(out)},
        "layers": [],
        "parity": None,
    }


def _attach(adapter: Adapter, base: BaseModel, mode: str, dtype: Any) -> list[dict[str, Any]]:
    if adapter.not_separable is None:
        from .adapted import attach

        return attach(base.model, adapter, merge=mode == "merged", dtype=dtype)
    rows = _merge_with_peft(adapter, base)
    base.model.to(dtype)
    return rows


def _merge_with_peft(adapter: Adapter, base: BaseModel) -> list[dict[str, Any]]:
    """PEFT's own merge, in place and in float32, for kinds that have no low-rank operator form (DoRA, LoHa, ...)."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    start = str(adapter.config.get("init_lora_weights")).lower()
    if start in _LOST_STARTS:
        raise UserError(
            f'The adapter {adapter.path} was trained with init_lora_weights="{start}" from changed base weights that '
            "its file doesn't record, so nobody can restore them. Save it again from the training run, converted to "
            "plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    base.model.float()
    try:
        model = peft.PeftModel.from_pretrained(base.model, str(adapter.path))
        names = [name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
        merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise UserError(
            f"PEFT {peft.__version__} can't merge the adapter {adapter.path} ({adapter.not_separable}): {error} Only "
            "adapters that fold into the weights can be exported."
        ) from error
    if merged is not base.model:
        raise UserError(
            f"The adapter {adapter.path} ({adapter.not_separable}) doesn't fold into the base model's weights, so it "
            "can't be exported."
        )
    return [{"module": name, "op": "merged", "rank": 0, "filter_rank": 0} for name in names]


def write_companions(base: BaseModel, adapter: Adapter, folder: Path) -> None:
    """config.json, and the tokenizer (the adapter's own where it has one) or the image preprocessor's settings."""
    from ..pytorch.base import load_tokenizer

    base.model.config.save_pretrained(folder)
    if "input_ids" in base.input_names:
        own = (adapter.path / "tokenizer_config.json").is_file()
        if tokenizer := load_tokenizer(adapter.path if own else base.path):
            # What the tokenizer returns is what the graph takes: a caller passes it on as it is.
            tokenizer.model_input_names = list(base.input_names)
            tokenizer.save_pretrained(folder)
    elif (preprocessor := Path(base.path) / "preprocessor_config.json").is_file():
        shutil.copy(preprocessor, folder)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Switches Python's cycle collector off: walking the millions of live objects of a trace takes 15 % of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Clock:
    """Tells `step` what begins and keeps how long each stage took, in seconds."""

    def __init__(self, step: Callable[[str], None]):
        self.seconds: dict[str, float] = {}
        self._step, self._stage, self._begin = step, "", time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._begin
        self._stage, self._begin = stage, now
        self._step(stage)
