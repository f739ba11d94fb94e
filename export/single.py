"""The export itself: adapter directory -> validated adapter -> adapted torch model -> ONNX graph -> files -> proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..adapters.adapter import Adapter, LayerAdapter, read_adapter
from ..errors import UserError
from ..formats.adapter_file import adapter_facts, file_facts, write_adapter_file
from ..formats.fit import check_swappable
from ..formats.swappable import DEFAULTS
from ..ops.schemas import MAX_CUDA_RANK, MAX_RANK
from ..parity.single import check_parity
from ..pytorch.base import GENERATION, load_base
from ..runtime.session import PROVIDERS, check_providers
from .files import check_writable
from .proven import (
    Clock,
    ExportResult,
    check_opset,
    collector_off,
    common_facts,
    traced_inputs,
    write_companions,
    write_proven,
)

if TYPE_CHECKING:
    from ..parity.single import ParityReport
    from ..pytorch.base import BaseModel

__all__ = ["DTYPES", "MODES", "QUANTIZATIONS", "export_adapter"]

MODES = ("merged", "separate")
DTYPES = ("float32", "float16", "bfloat16")
QUANTIZATIONS = ("none", "int4", "int8")
_LOST_STARTS = ("lora_ga", "corda")
"""Initialisations that change the base by gradients or data: PEFT can't redo them when it loads the adapter."""


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
        proven_on = "cpu" if manifest["task"] == GENERATION else device
        return check_parity(model, Path(adapter), base_model, device=proven_on)

    return write_proven(out, write, prove if check else None, step)


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
