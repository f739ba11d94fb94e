"""One adapter: adapter directory -> validated adapter -> adapted torch model -> ONNX graph -> files -> proof."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..adapters.adapter import Adapter, read_adapter
from ..adapters.fits import check_exportable
from ..errors import UserError, some
from ..formats.adapter_file import SUFFIX, Origin, write_adapter_file
from ..formats.fit import check_always_active, check_swappable, fit
from ..formats.manifest import LayerRow, Manifest, Swappable
from ..parity.single import check_parity
from ..pytorch.base import GENERATION, BaseModel, load_base, tokenizer_of
from ..pytorch.embedding import as_embedder
from ..pytorch.language import language_part, left_out
from ..pytorch.oracle import apply_adapter, tie_equal, untie_adapted
from ..pytorch.processors import processor_files
from ..pytorch.vocabulary import without_copies
from ..runtime.session import PROVIDERS, check_providers
from .files import check_writable
from .options import (
    DEFAULT_OPSET,
    ExportOptions,
    check_encodes,
    check_generates,
    check_layout,
    check_ranks,
    check_stages,
)
from .proven import (
    Clock,
    ExportResult,
    check_tokens,
    collector_off,
    common_facts,
    no_tokenizer,
    traced_inputs,
    write_companions,
    write_proven,
)

if TYPE_CHECKING:
    from ..parity.result import ParityReport

__all__ = ["export_adapter"]

Values = dict[str, NDArray]


def export_adapter(
    adapter: str | Path,
    out: str | Path,
    options: ExportOptions = ExportOptions(),
    *,
    step: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Writes the adapted model as ONNX: `out`, `out`.data, config.json, tokenizer files and loratrf.json beside it.

    `adapter` is a folder in PEFT's layout; `step` is told what is being done. Raises UserError for input at fault,
    ParityFailed where the proof fails; either way nothing is left behind.
    """
    out = Path(out)
    check_writable(out)
    check_layout(out, options)
    loaded = read_adapter(adapter) if options.pooling is None else as_embedder(read_adapter(adapter))
    check_exportable(loaded)
    if not options.merges and loaded.not_separable:
        raise UserError(
            f"The adapter {adapter} can't be kept separate: {loaded.not_separable}. Export it merged: --mode merged."
        )
    if options.swappable is not None:
        check_swappable(loaded)
    else:
        check_always_active(loaded)
    check_ranks(
        loaded, merges=options.merges, device=options.device, remedy="Export it merged: --mode merged, not swappable."
    )

    warnings = [loaded.warning] if loaded.warning else []

    def write(model: Path, clock: Clock) -> Manifest:
        return _write_model(loaded, model, clock, options, warnings)

    def prove(model: Path, manifest: Manifest, step: Callable[[str], None]) -> ParityReport:
        device = "cpu" if manifest.task == GENERATION else options.device
        return check_parity(
            model,
            loaded,
            options.base_model,
            evaluate_on=options.evaluate,
            max_loss=options.max_loss,
            device=device,
            trust_remote_code=options.trust_remote_code,
            step=step,
        )

    return write_proven(out, write, prove if options.check else None, step, warnings, options.root(out))


def _write_model(adapter: Adapter, out: Path, clock: Clock, options: ExportOptions, warnings: list[str]) -> Manifest:
    from ..pytorch.dora import with_gains
    from .images import exports_images
    from .pool import with_embedding

    clock("loading the base model")
    base = load_base(adapter, options.base_model, trust_remote_code=options.trust_remote_code)
    base = with_embedding(base, [adapter], options)
    adapter = with_gains(without_copies(adapter, base.model), base.model)
    images = base.task == GENERATION and exports_images(base, options)
    adapter, seeing = language_part(adapter, base.model, images=images)
    if not images:
        warnings += left_out(seeing)
    write = _writer(adapter, base, out, seeing if images else None)
    manifest, values = write(adapter, base, out, clock, options)
    if manifest.swappable is not None:
        write_adapter_file(out.with_name(str(manifest.swappable.file)), values, Origin.of(adapter, manifest))
    return manifest


def _writer(
    adapter: Adapter, base: BaseModel, out: Path, seeing: Adapter | None
) -> Callable[[Adapter, BaseModel, Path, Clock, ExportOptions], tuple[Manifest, Values]]:
    """What writes the model of `base`; GenAI's builder is asked whether it knows one that generates.

    `seeing` is what of the adapter is in its vision tower, where that is exported too.
    """
    if base.task == GENERATION:
        from .genai import knows

        return partial(_write_generating, seeing) if knows(adapter, base, out) else _write_stages
    return _write_stages if base.answers else _write_encoder


def _write_generating(
    seeing: Adapter | None, adapter: Adapter, base: BaseModel, out: Path, clock: Clock, options: ExportOptions
) -> tuple[Manifest, Values]:
    """Writes a causal language model; returns its manifest and its run-time weights."""
    import onnx_ir as ir

    from .genai import write_genai
    from .images import FILES, exports_images, fold_seeing

    check_generates(options)
    folded = []
    if seeing is not None:
        folded = fold_seeing(base, seeing)
    if options.swappable is not None and adapter.modules_to_save:
        raise UserError(
            f"The adapter {adapter.path} saves {some(adapter.modules_to_save)} whole, which becomes part of a language "
            "model's own weights and can't be swapped. Export it without --swappable, or train it without "
            "modules_to_save."
        )
    if options.check and options.dtype == "bfloat16":
        raise UserError(
            "bfloat16 language models run on a GPU alone, and their parity is checked on the CPU. Export it unchecked "
            "(--no-check), after a float16 export that was checked."
        )
    layers, weights = write_genai(
        adapter, base, out, options, merge_with_peft=lambda: _merge_with_peft(adapter, base), step=clock
    )
    layers += folded
    swappable, values = None, {}
    if options.swappable is not None:
        file = f"{adapter.name}{SUFFIX}"
        swappable = Swappable(options.swappable, tuple(weights), file=file, base_parameters=base.parameters)
        values = fit(adapter, weights, adapter.filter_input)
    versions, opset = {"onnxruntime-genai": metadata.version("onnxruntime-genai")}, ir.load(out).opset_imports[""]
    others: tuple[str, ...] = ()
    if exports_images(base, options):
        others = FILES
        for name, text in processor_files(adapter, base).items():
            (out.parent / name).write_text(text, encoding="utf-8")
    manifest = common_facts(
        base, [adapter], out, options, opset, layers, swappable=swappable, versions=versions, others=others
    )
    return manifest, values


def _write_encoder(
    adapter: Adapter, base: BaseModel, out: Path, clock: Clock, options: ExportOptions
) -> tuple[Manifest, Values]:
    """Writes any other model; returns its manifest and its run-time weights."""
    import onnx_ir as ir
    import torch

    from .graph import finish, inline, trace
    from .pool import pool
    from .quantise import quantise
    from .sparing import spared
    from .swappable import Swap

    check_always_active(adapter)
    opset = options.opset or DEFAULT_OPSET
    check_encodes(options, base.task)
    check_tokens(adapter, base)
    if options.check:
        check_providers([PROVIDERS[options.device]])
    clock("adapting")
    swap = Swap(adapter, base, options.dtype, options.swappable) if options.swappable is not None else None
    layers = _attach(swap.placeholders if swap else adapter, base, options.merges, getattr(torch, options.dtype))
    clock("tracing")
    with collector_off():
        inputs = traced_inputs(base, options.dtype)
        fusions = None if options.portable else options.device
        program = trace(base.model, inputs, opset, fusions, base.outputs, any_size=base.any_size)
        finish(program, opset)
    if base.embedding is not None:
        pool(program, base.embedding)
    values, swappable = swap.apply(program.graph) if swap else ({}, None)
    write_companions(base, adapter, out, options)
    kept: list[str] = []
    if options.quantize != "none":
        patterns = options.keep_float
        if options.max_loss is not None:
            clock("finding what stays in float32")
            patterns = spared(program, adapter, base, out.parent, options, values)
        kept = quantise(program, adapter.modules_to_save, patterns, base.model)
    if options.portable:
        inline(program)
    clock("writing")
    ir.save(program, out, external_data=options.weights_of(out))
    facts = common_facts(base, [adapter], out, options, opset, layers, swappable=swappable, kept=kept)
    return facts, values


def _write_stages(
    adapter: Adapter, base: BaseModel, out: Path, clock: Clock, options: ExportOptions
) -> tuple[Manifest, Values]:
    """Writes a model that generates and that onnxruntime-genai's builder doesn't make; it has no run-time weights."""
    import torch

    from .stages import check_hears, save_stages, trace_stages

    check_always_active(adapter)
    check_stages(options, type(base.model).__name__)
    tokenizer, source = tokenizer_of(adapter, base)
    if tokenizer is None:
        raise no_tokenizer(source)
    check_tokens(adapter, base)
    if base.row_shape:
        check_hears(adapter, base)
    opset = options.opset or DEFAULT_OPSET
    clock("adapting")
    layers = _attach(adapter, base, options.merges, getattr(torch, options.dtype))
    clock("tracing")
    with collector_off():
        components = trace_stages(base, opset)
    clock("writing")
    others = save_stages(components, out)
    write_companions(base, adapter, out, options)
    base.model.generation_config.save_pretrained(out.parent)
    return common_facts(base, [adapter], out, options, opset, layers, others=others), {}


def _attach(adapter: Adapter, base: BaseModel, merge: bool, dtype: Any) -> list[LayerRow]:
    if adapter.not_separable is None:
        from .adapted import attach

        return attach(base.model, adapter, merge=merge, dtype=dtype)
    rows = _merge_with_peft(adapter, base)
    base.model.to(dtype)
    return rows


def _merge_with_peft(adapter: Adapter, base: BaseModel) -> list[LayerRow]:
    """PEFT's own merge, in place and in float32, for kinds that have no low-rank operator form (DoRA, LoHa, ...)."""
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    base.model.float()
    model = apply_adapter(adapter, base.model)
    try:
        names = [name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
        untie_adapted(model)
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
    tie_equal(base.model)
    return [LayerRow(name, "merged") for name in names]
