"""How to export: `ExportOptions`, and what of it nothing can be exported with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ..adapters.adapter import Adapter
from ..errors import UserError, some
from ..formats.embedding import POOLINGS, Pooling
from ..formats.manifest import Mode, Quantization
from ..formats.swappable import Default
from ..ops.dtypes import DTYPES, RUN_TIME_DTYPES, DType
from ..ops.schemas import MAX_CUDA_RANK, MAX_RANK, Device

__all__ = [
    "DEFAULTS",
    "DEFAULT_OPSET",
    "DEVICES",
    "LAYOUTS",
    "MODES",
    "OPSETS",
    "POOLING",
    "QUANTIZATIONS",
    "ExportOptions",
    "check_encodes",
    "check_generates",
    "check_layout",
    "check_ranks",
    "check_stages",
]

MODES = ("merged", "separate")
POOLING = (*POOLINGS, "auto")
DEFAULTS: tuple[Default, ...] = get_args(Default)
DEVICES: tuple[Device, ...] = get_args(Device)
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
Layout = Literal["transformers.js"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
OPSETS = range(18, 24)
DEFAULT_OPSET = 20


@dataclass(frozen=True)
class ExportOptions:
    """How an adapter becomes a model. Raises UserError for values, and combinations, that nothing is exported with.

    `base_model` is a folder or a hub name; None takes the adapter's own. mode "merged" folds the low-rank halves into
    the weights and keeps an operator only where there is a task-aware filter; "separate" keeps every half as an
    operator beside its frozen layer; None is "separate" for a swappable model, else "merged". `swappable` "base" or
    "adapter" makes the adapter's weights inputs of the graph, which have the values of the one or the other when nobody
    feeds them, "required" (for encoders) none, and writes the adapter to <its name>.onnx_adapter. `device` "cuda" takes
    the fusions of ONNX Runtime's GPU provider; bfloat16 needs it. `opset` None takes the default, 20. `quantize` is of
    the base's weights, int4 for causal language models alone; modules of an encoder that match a pattern of
    `keep_float` ("*.pooler.*") stay as they are, and with `max_loss` as many more as it takes for no more than so many
    percent of the answers to the rows of `evaluate` to change. The proof counts answers on these rows, as in
    `check_parity`. `portable` is for other engines: ONNX's own operators alone, without fusions of ONNX Runtime's, and
    with the definitions of ours in their place. `bundle_library` (a copy of the custom-op library in the folder) is for
    causal language models, whose folder ONNX Runtime GenAI loads. `check` proves parity with PyTorch before anything is
    moved into place, on `device` but for causal language models, which are proven on the CPU. `trust_remote_code` runs
    Python that the base model and the tokenizer bring, which is otherwise refused. `pooling` adds the output
    sentence_embedding to a model of feature extraction, cut to the first `dimensions` and with `normalize` of length 1;
    "auto" pools, and normalises, as modules.json of adapter or base says. `layout` "transformers.js" is for an encoder
    whose file is FOLDER/onnx/model.onnx: config.json and the tokenizer go into FOLDER, which its pipelines then load.
    """

    base_model: str | Path | None = None
    mode: Mode | None = None
    swappable: Default | None = None
    dtype: DType = "float32"
    device: Device = "cpu"
    opset: int | None = None
    quantize: Quantization = "none"
    keep_float: tuple[str, ...] = ()
    max_loss: float | None = None
    evaluate: Path | None = None
    portable: bool = False
    bundle_library: bool = False
    check: bool = True
    trust_remote_code: bool = False
    pooling: Pooling | Literal["auto"] | None = None
    normalize: bool = False
    dimensions: int | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        _one_of("--mode", self.mode, (None, *MODES))
        _one_of("--swappable", self.swappable, (None, *DEFAULTS))
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--device", self.device, DEVICES)
        _one_of("--quantize", self.quantize, QUANTIZATIONS)
        _one_of("--pooling", self.pooling, (None, *POOLING))
        _one_of("--layout", self.layout, (None, *LAYOUTS))
        if self.pooling is None and (flag := self.given(("normalize", "dimensions"))):
            raise UserError(
                f"{flag} is of the sentence's embedding, and without --pooling there is none. Add --pooling auto, or "
                "mean, cls or last."
            )
        if self.dimensions is not None and self.dimensions < 1:
            raise UserError(f"--dimensions is {self.dimensions}, expected at least 1. Leave it out to keep all.")
        if self.opset is not None and self.opset not in OPSETS:
            raise UserError(f"--opset is {self.opset}, expected {OPSETS[0]} to {OPSETS[-1]} (default {DEFAULT_OPSET}).")
        if self.swappable is not None and self.mode == "merged":
            raise UserError(
                f"--swappable is {self.swappable!r} with --mode merged, expected --mode separate: an adapter that is "
                "folded into the weights can't be swapped."
            )
        if self.keep_float and self.quantize != "int8":
            raise UserError(
                f"--keep-float {' '.join(self.keep_float)} says which layers stay float32 beside --quantize int8, got "
                f"--quantize {self.quantize}. Take int8, or leave --keep-float out."
            )
        if self.max_loss is not None:
            self._check_max_loss()
        if self.dtype == "bfloat16" and self.device == "cpu":
            raise UserError(
                "--dtype bfloat16 is for --device cuda: ONNX Runtime's CPU has no bfloat16 for most operators. Export "
                "with --dtype float32 or float16, or add --device cuda."
            )
        if self.swappable is not None and self.dtype not in RUN_TIME_DTYPES.values():
            raise UserError(
                f"--swappable has no --dtype {self.dtype}: run-time weights are float32 or float16. Take float16."
            )

    def _check_max_loss(self) -> None:
        if self.quantize != "int8" or self.evaluate is None:
            raise UserError(
                "--max-loss says how many answers int8 may change, and needs both --quantize int8 and rows to count "
                "on, --evaluate FILE.jsonl. Add what is missing, or leave it out."
            )
        if self.max_loss is not None and not 0 <= self.max_loss < 100:
            raise UserError(f"--max-loss is {self.max_loss:g}, expected percent of the answers: 0 or more, under 100.")

    def root(self, out: Path) -> Path:
        """The folder that config.json and the tokenizer go into: that of the model `out`, or what the layout says."""
        return out.parent.parent if self.layout else out.parent

    def weights_of(self, out: Path) -> str:
        """What the file of the model's weights is called, which the graph knows."""
        return f"{out.name}{'_data' if self.layout else '.data'}"

    @property
    def merges(self) -> bool:
        """Whether low-rank halves are folded into the weights."""
        return self.mode == "merged" or (self.mode is None and self.swappable is None)

    def given(self, names: Iterable[str]) -> str | None:
        """The command line's word for the first of the fields `names` that isn't at its default."""
        wanted = set(names)
        for field in fields(self):
            if field.name in wanted and getattr(self, field.name) != field.default:
                return "--no-check" if field.name == "check" else f"--{field.name.replace('_', '-')}"
        return None


def _one_of(option: str, value: Any, known: Iterable[Any]) -> None:
    if value not in known:
        raise UserError(f"{option} is {value!r}, expected one of: {', '.join(str(entry) for entry in known if entry)}.")


def check_layout(out: Path, options: ExportOptions) -> None:
    """UserError where `out` isn't where the layout has its model."""
    if options.layout and (out.parent.name, out.name) != ("onnx", "model.onnx"):
        folder = out.parent.parent if out.parent.name == "onnx" else out.parent
        raise UserError(
            f"--layout transformers.js has its model at FOLDER/onnx/model.onnx, and --out is {out}. Take --out "
            f"{folder / 'onnx' / 'model.onnx'}: config.json and the tokenizer go into {folder}."
        )


def check_generates(options: ExportOptions) -> None:
    """UserError for options that a causal language model isn't exported with."""
    if options.layout:
        raise UserError(
            "--layout transformers.js is for encoders, and this is a causal language model, made for "
            "onnxruntime-genai. Leave it out."
        )
    if options.portable:
        raise UserError(
            "--portable is for ONNX's own operators alone, and onnxruntime-genai's builder makes ONNX Runtime's (its "
            "attention has a cache). Leave it out."
        )
    if options.swappable == "required":
        raise UserError(
            "--swappable required is for encoders, and this is a causal language model, which onnxruntime-genai runs: "
            "its adapters replace defaults. Take --swappable base."
        )
    if flag := options.given(("keep_float", "max_loss")):
        raise UserError(
            f"{flag} is for encoders, and this is a causal language model, whose builder quantises all linear "
            "layers. Leave it out."
        )


def check_stages(options: ExportOptions, architecture: str) -> None:
    """UserError for options that a model in stages, of `architecture`, isn't exported with."""
    if flag := options.given(("quantize", "keep_float", "swappable", "device", "portable", "bundle_library", "layout")):
        raise UserError(
            f"{flag} isn't for a {architecture}: it isn't made by onnxruntime-genai's builder, but exported in stages "
            "of ONNX Runtime's own, for --device cpu, merged or separate, in float32 or float16. Leave "
            f"{flag} out."
        )


def check_encodes(options: ExportOptions, task: str) -> None:
    """UserError for options that an encoder, of `task`, isn't exported with."""
    if options.bundle_library:
        raise UserError(
            f"--bundle-library is for causal language models, and this adapter's task is {task}. Leave it out."
        )
    if options.quantize == "int4":
        raise UserError(
            f"--quantize is int4, and this adapter's task is {task}. int4 weights are for causal language models: "
            "encoders lose more answers to them than to int8, and are slower. Take --quantize int8."
        )
    if options.quantize == "int8" and (options.dtype, options.device) != ("float32", "cpu"):
        raise UserError(
            f"--quantize int8 of an encoder (this adapter's task is {task}) is for --device cpu with --dtype float32, "
            f"got {options.device} and {options.dtype}: ONNX Runtime has no int8 products elsewhere. On a GPU, "
            "--dtype float16 halves the weights."
        )


def check_ranks(adapter: Adapter, *, merges: bool, device: Device, remedy: str) -> None:
    """UserError, ending in `remedy`, where ranks that stay in the graph are over what the operators take on `device`.

    A merged low-rank half has no rank there; a filter and an aLoRA are never merged.
    """
    most = MAX_CUDA_RANK if device == "cuda" else MAX_RANK
    filters = [name for name, layer in adapter.layers.items() if layer.filter_rank > most]
    high = filters or [name for name, layer in adapter.layers.items() if not merges and layer.rank > most]
    if filters or adapter.invocation_tokens is not None:
        remedy = f"It can't be folded into the weights: train it with ranks of at most {most}."
    if high:
        raise UserError(
            f"The adapter {adapter.path} has ranks over {most} at {some(high)}, more than the operators take on "
            f"{device}. {remedy}".strip()
        )
