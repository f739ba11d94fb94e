"""What every export goes through: written aside, proven against PyTorch, moved into place."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..formats.manifest import (
    AdapterPart,
    BaseId,
    LayerRow,
    Manifest,
    ModelId,
    Swappable,
    file_sha256,
    write_manifest,
)
from ..formats.settings import read_settings
from ..formats.tasks import label_names
from ..ops.dtypes import DType
from ..ops.library import library_path
from ..ops.schemas import FilterInput
from ..pytorch.base import TRANSCRIPTION, BaseModel, sample_inputs, tokenizer_of
from ..pytorch.processors import processor_files
from ..pytorch.quiet import quiet
from ..pytorch.vocabulary import token_table
from ..version import __version__
from .files import base_sha256, written_aside
from .moving import companions
from .options import ExportOptions

if TYPE_CHECKING:
    import torch

    from ..parity.result import ParityReport

__all__ = [
    "Clock",
    "ExportResult",
    "ParityFailed",
    "check_tokens",
    "collector_off",
    "common_facts",
    "filter_input_of",
    "no_tokenizer",
    "traced_inputs",
    "write_companions",
    "write_proven",
]


@dataclass(frozen=True)
class ExportResult:
    """What an export made: loratrf.json's content, the files' sizes in bytes, the time by stage in seconds.

    `warnings` are what is no error, but hardly meant: an adapter that changes nothing.
    """

    model: Path
    manifest: Manifest
    parity: ParityReport | None
    sizes: dict[str, int]
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class ParityFailed(Exception):
    """The exported model doesn't compute what PyTorch computed; `report` says where. Nothing was written."""

    def __init__(self, report: ParityReport):
        super().__init__("the exported model doesn't compute what PyTorch computed")
        self.report = report


Step = Callable[[str], None]


def write_proven(
    out: Path,
    write: Callable[[Path, Clock], Manifest],
    prove: Callable[[Path, Manifest, Step], ParityReport] | None,
    step: Step,
    warnings: Sequence[str] = (),
    root: Path | None = None,
) -> ExportResult:
    """Writes a model aside, proves it, and moves it into place with its manifest, and what goes into `root` above it.

    `write` writes the model and what belongs to it beside the path that it is given, and returns the manifest; `prove`
    is given both and what tells its steps, None skips the proof; `warnings` are the result's. Raises ParityFailed where
    the proof fails, UserError where `out` can't be written; then nothing is left behind.
    """
    inside = out.relative_to(root or out.parent)
    with written_aside(out, root) as aside:
        model, clock = aside / inside, Clock(step)
        model.parent.mkdir(exist_ok=True)
        report = None
        with quiet():
            clock("importing torch and transformers")
            manifest = write(model, clock)
            write_manifest(manifest, model.parent)
            if prove:
                gc.collect()  # the traced graph is full of cycles, and the proof needs its room
                clock("checking parity with PyTorch")
                report = prove(model, manifest, lambda text: step(f"checking parity: {text}"))
                if not report.passed:
                    raise ParityFailed(report)
                manifest = dataclasses.replace(manifest, parity=report.summary())
        clock("writing")
        manifest = dataclasses.replace(manifest, companions=companions(aside, inside.as_posix()))
        write_manifest(manifest, model.parent)
        sizes = {path.name: path.stat().st_size for path in sorted(aside.rglob("*")) if path.is_file()}
    clock("done")
    return ExportResult(out, manifest, report, sizes, clock.seconds, tuple(warnings))


def traced_inputs(base: BaseModel, dtype: DType) -> dict[str, torch.Tensor]:
    """What a model is traced with: random inputs, floats in `dtype`."""
    import torch

    arrays = sample_inputs(base, batch=2, sequence=16, seed=0)
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return {name: x.to(getattr(torch, dtype)) if x.is_floating_point() else x for name, x in tensors.items()}


def common_facts(
    base: BaseModel,
    adapters: Sequence[Adapter],
    out: Path,
    options: ExportOptions,
    opset: int,
    layers: Sequence[LayerRow],
    *,
    swappable: Swappable | None = None,
    versions: Mapping[str, str] | None = None,
    others: Sequence[str] = (),
    kept: Sequence[str] = (),
) -> Manifest:
    """The manifest of the model written to `out`; `layers` are its adapted ones, `versions` of further packages,
    `others` further files that run, `kept` layers that stayed in float32 beside quantised ones."""
    grouped = swappable is not None and bool(swappable.slots)
    alone = None if grouped else adapters[0]
    packages = ("torch", "transformers", "peft", "onnx_ir")
    return Manifest(
        loratrf_deploy=__version__,
        mode="grouped" if grouped else "merged" if options.merges else "separate",
        task=base.task,
        dtype=options.dtype,
        opset=opset,
        versions={name: metadata.version(name) for name in packages} | dict(versions or {}),
        adapter=AdapterPart(
            filter_input_of(adapters),
            sum(layer.parameters for adapter in adapters for layer in adapter.layers.values()),
            name=alone.name if alone else None,
            sha256=alone.sha256 if alone else None,
            peft_type=alone.peft_type if alone else None,
            dora=alone is not None and alone.is_dora,
        ),
        base=BaseId(Path(base.path).name, base_sha256(Path(base.path))),
        model=ModelId.of(out, others),
        layers=tuple(layers),
        quantize=options.quantize,
        keep_float=tuple(kept),
        portable=options.portable,
        device=options.device,
        swappable=swappable,
        library_sha256=file_sha256(library_path()) if options.bundle_library else None,
        embedding=base.embedding,
    )


def filter_input_of(adapters: Sequence[Adapter]) -> FilterInput:
    """That of the first adapter for which it makes a difference; `fit` holds others to it."""
    for adapter in adapters:
        if any(layer.A is not None and layer.tau is not None for layer in adapter.layers.values()):
            return adapter.filter_input
    return adapters[0].filter_input if len(adapters) == 1 else "adapted"


def no_tokenizer(source: Path | str) -> UserError:
    """What to say where a model that generates has no tokenizer in `source`."""
    return UserError(
        f"There is no tokenizer in {source}, and generation needs one. Save it with the base model or the adapter: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
    )


def check_tokens(adapter: Adapter, base: BaseModel) -> None:
    """UserError where the tokenizer makes ids that the embeddings of `base` have no row for."""
    if "input_ids" not in base.input_names:
        return
    tokenizer, source = tokenizer_of(adapter, base)
    table = token_table(base.model)
    rows = len(table.weight) if table is not None else 0
    if tokenizer and table is not None and len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer in {source} has {len(tokenizer)} tokens, but the base model {base.path} embeds {rows}, and "
            f"the adapter {adapter.path} brings no others. Pass the base that it was trained on (--base-model), or "
            "save the adapter again from the training run with its embeddings: save_pretrained(..., "
            "save_embedding_layers=True)."
        )


def _rename_class(settings: Path) -> None:
    """A tokenizer that is its tokenizer.json alone by the name that transformers had for it before version 5, which
    knows it too: optimum-onnx is of before."""
    content = read_settings(settings) if settings.is_file() else {}
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_companions(
    base: BaseModel, adapter: Adapter, out: Path, options: ExportOptions, *, alone: bool = True
) -> None:
    """config.json, and what makes inputs and reads answers, the adapter's own where it has one: tokenizer, processor.

    They go beside `out`, or where the options' layout has them. config.json says which class was exported and, of an
    adapter `alone`, what its labels are called. The tokenizer of sound reads answers: it knows the letters. Images and
    sound have a processor's settings.
    """
    folder, config = options.root(out), base.model.config
    if options.layout == "transformers.js":  # it would look for an 8-bit model.onnx, and for no weights beside it
        setattr(config, "transformers.js_config", {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}})
    if type(base.model).__module__.startswith("transformers."):
        config.architectures = [type(base.model).__name__]
    if alone and (labels := label_names(adapter, base.task, config.id2label)):
        config.id2label, config.label2id = dict(enumerate(labels)), {name: at for at, name in enumerate(labels)}
    config.save_pretrained(folder)
    texts = "input_ids" in base.input_names
    if texts or base.task == TRANSCRIPTION:
        tokenizer, _ = tokenizer_of(adapter, base)
        if tokenizer and texts:
            # What the tokenizer returns is what the graph takes: a caller passes it on as it is.
            tokenizer.model_input_names = [name for name in base.input_names if not name.startswith("pixel_")]
        if tokenizer:
            tokenizer.save_pretrained(folder)
            _rename_class(folder / "tokenizer_config.json")
    if set(base.input_names) & {"pixel_values", "input_values", "input_features"}:
        for name, text in processor_files(adapter, base).items():
            (folder / name).write_text(text, encoding="utf-8")


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

    def __init__(self, step: Step):
        self.seconds: dict[str, float] = {}
        self._step, self._stage, self._begin = step, "", time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._begin
        self._stage, self._begin = stage, now
        self._step(stage)
