"""--onto: a further adapter for a swappable model that exists already. Only the proof needs torch and onnx."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..adapters.adapter import Adapter, read_adapter
from ..adapters.fits import contradictions
from ..errors import UserError, some
from ..formats.adapter_file import SUFFIX, Origin, write_adapter_file
from ..formats.fit import check_always_active, fit
from ..formats.manifest import AdapterId, Manifest, Swappable, read_swappable
from ..formats.tasks import in_graph, label_names, part_of
from ..parity.single import check_parity
from ..pytorch.base import GENERATION, TASKS, load_base
from ..pytorch.language import language_part_for, left_out
from ..pytorch.quiet import quiet
from .files import base_sha256, check_writable, written_aside
from .proven import ParityFailed

if TYPE_CHECKING:
    from ..parity.result import ParityReport

__all__ = ["Converted", "check_names", "convert_adapter", "convert_adapters"]

_UNNAMED = ("image-classification", "audio-classification")


@dataclass(frozen=True)
class Converted:
    """What a conversion made. `layers` of the model's `model_layers` are adapted; `base_by` says how the base was held
    against the model's: by its "hash", or by its "name" where one of the two has no folder here. `base_listed` is False
    where the model's loratrf.json, of an older version, doesn't list the base's layers: the adapter's config was held
    against those of the model alone then. `parity` is there where it was asked for; `warnings` as of an export."""

    file: Path
    bytes: int
    layers: int
    model_layers: int
    base_by: str
    base_listed: bool = True
    parity: ParityReport | None = None
    warnings: tuple[str, ...] = ()


def convert_adapter(
    adapter: str | Path,
    onto: str | Path,
    out: str | Path,
    *,
    base_model: str | Path | None = None,
    check: bool = False,
    trust_remote_code: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> Converted:
    """Writes the adapter folder `adapter` to `out` (.onnx_adapter) for the swappable model `onto`, whatever its rank.

    Layers of the model that the adapter doesn't cover get explicit zeros. `base_model` is the folder of the adapter's
    base; None takes the adapter's own. `check` proves that the model computes with it what PyTorch computes, on the
    device that it was exported for, which needs the base at hand, and `trust_remote_code` as in `ExportOptions` where
    that brings Python of its own; `step` is told what is being done. Raises UserError where the adapter doesn't fit,
    ParityFailed where the proof fails; either way nothing is left behind.
    """
    how: dict[str, Any] = {"base_model": base_model, "check": check, "trust_remote_code": trust_remote_code}
    (converted,) = _convert({Path(out): adapter}, onto, step, **how)
    return converted


def convert_adapters(
    adapters: Mapping[str, str | Path],
    onto: str | Path,
    folder: str | Path,
    *,
    base_model: str | Path | None = None,
    check: bool = False,
    trust_remote_code: bool = False,
    step: Callable[[str], None] = lambda text: None,
) -> list[Converted]:
    """Writes each of `adapters`, by name, to NAME.onnx_adapter in `folder`, as `convert_adapter` does: all, or none."""
    folder = Path(folder)
    if folder.suffix in (SUFFIX, ".onnx") or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--out {folder} is to be a folder: with --adapters it gets a file for each, NAME{SUFFIX}.")
    check_names(adapters)
    how: dict[str, Any] = {"base_model": base_model, "check": check, "trust_remote_code": trust_remote_code}
    return _convert({folder / f"{name}{SUFFIX}": path for name, path in adapters.items()}, onto, step, **how)


def check_names(names: Iterable[str]) -> None:
    """UserError for the name of an adapter that can't be a file's."""
    for name in names:
        if not re.fullmatch(r"(?!\.)[\w .+-]{1,60}", name):
            raise UserError(
                f"--adapters has the name {name[:80]!r}, which is to be a file's too (NAME{SUFFIX}): expected up to 60 "
                "letters, digits, spaces and . _ + -, not beginning with a dot."
            )


def _convert(
    adapters: Mapping[Path, str | Path],
    onto: str | Path,
    step: Callable[[str], None],
    *,
    base_model: str | Path | None,
    check: bool,
    trust_remote_code: bool,
) -> list[Converted]:
    """Each of `adapters` to its file; none is moved into place before all are written, and proven where asked for."""
    for out in adapters:
        check_writable(out, SUFFIX)
    manifest, swappable = read_swappable(onto)
    sha256 = cache(base_sha256)  # many adapters have one base
    with ExitStack() as places:
        made = []
        for out, adapter in adapters.items():
            step(f"converting {adapter}")
            loaded = read_adapter(adapter)
            base_by = _check_origin(loaded, onto, manifest, base_model, sha256)
            values, origin, counts, warnings = _fitted(
                loaded, manifest, swappable, base_model, trust_remote_code=trust_remote_code
            )
            file = places.enter_context(written_aside(out)) / out.name
            write_adapter_file(file, values, origin)
            size, report = file.stat().st_size, None
            if check:
                device = "cpu" if manifest.task == GENERATION else manifest.device
                with quiet():
                    report = check_parity(
                        onto, loaded, base_model, device=device, trust_remote_code=trust_remote_code, step=step
                    )
                if not report.passed:
                    raise ParityFailed(report)
            listed = bool(swappable.base_parameters)
            made.append(Converted(out, size, *counts, base_by, listed, report, warnings))
    return made


def _fitted(
    loaded: Adapter,
    manifest: Manifest,
    swappable: Swappable,
    base_model: str | Path | None,
    *,
    trust_remote_code: bool,
) -> tuple[dict[str, NDArray[Any]], Origin, tuple[int, int], tuple[str, ...]]:
    """The values of the model's inputs that make it the adapter's; whose they are; the number of layers that it adapts
    and that the model has; what to warn of. Raises UserError where it doesn't fit."""
    if manifest.task != GENERATION or swappable.slots:
        check_always_active(loaded)
    task = TASKS.get(loaded.task_type or "", manifest.task)
    part = part_of(task, swappable.tasks, loaded.path)
    _check_whole(loaded, swappable.known_to(part))
    fitting = _beside_base(loaded, swappable, base_model, trust_remote_code=trust_remote_code)
    modules = {weight.module for weight in swappable.weights if weight.in_layer}
    fitting, left = language_part_for(fitting, modules)
    named = in_graph(fitting, part, swappable.trunk)
    values = fit(named, swappable.weights, manifest.adapter.filter_input, task)
    known_as = AdapterId.of(loaded, task, label_names(loaded, task)) if swappable.slots else None
    warnings = (*([loaded.warning] if loaded.warning else []), *left_out(left))
    return values, Origin.of(loaded, manifest, known_as), (len(fitting.layers), len(modules)), warnings


def _beside_base(
    adapter: Adapter, swappable: Swappable, base_model: str | Path | None, *, trust_remote_code: bool
) -> Adapter:
    """`adapter` as `fit` takes it: a DoRA with its gains, and without copies of the base's weights.

    For either the base is loaded. UserError where the model takes no gains.
    """
    dora = [layer.name for layer in adapter.layers.values() if layer.magnitude is not None]
    if not dora and not adapter.copies:
        return adapter
    if dora and not any(weight.part == "gain" for weight in swappable.weights):
        raise UserError(
            f"The adapter {adapter.path} is a DoRA, which rescales the outputs of the base's layers ({some(dora)}), "
            "and the model takes no such gains: it was exported from a plain adapter. Export a swappable model from "
            "this adapter, which takes plain ones too."
        )
    with quiet():
        from ..pytorch.dora import with_gains
        from ..pytorch.vocabulary import without_copies

        model = load_base(adapter, base_model, trust_remote_code=trust_remote_code).model
        return with_gains(without_copies(adapter, model), model)


def _check_whole(adapter: Adapter, known: Mapping[str, tuple[int, ...]]) -> None:
    """UserError where the adapter's config and file say different things of the model's layers."""
    if problems := contradictions(adapter, known):
        raise UserError(
            f"The adapter {adapter.path} contradicts itself: {some(problems, '; ')}. Config and weights are not of one "
            "training run, or one of them was edited: save the adapter again with PEFT's save_pretrained."
        )


def _check_origin(
    adapter: Adapter,
    model: str | Path,
    manifest: Manifest,
    base_model: str | Path | None,
    sha256: Callable[[Path], str | None],
) -> str:
    """Whether task and base are the model's; how the base was told. Raises UserError where they aren't."""
    task = TASKS.get(adapter.task_type or "")
    # PEFT has no task type of its own for images and sound.
    several = manifest.swappable is not None and manifest.swappable.tasks
    if task is not None and task != manifest.task and not several and manifest.task not in _UNNAMED:
        raise UserError(
            f"The adapter {adapter.path} was trained for {task}, the model {model} was exported for "
            f"{manifest.task}. Export a model for its task."
        )
    base, name = manifest.base, str(base_model or adapter.base_model or "")
    own = sha256(Path(name)) if name else None
    if own is not None and base.sha256 is not None:
        if own != base.sha256:
            raise UserError(
                f"The adapter {adapter.path} was trained on {name} (sha256 {own[:12]}), and {model} was "
                f"exported from {base.name} (sha256 {base.sha256[:12]}): their weights differ. Pass the "
                "folder of the right base, --base-model PATH, or export a model from this adapter."
            )
        return "hash"
    if Path(name).name != base.name:
        raise UserError(
            f"The adapter {adapter.path} was trained on {name or 'a base that it does not name'}, the model "
            f"{model} was exported from {base.name}. Their weights can't be compared, since the first "
            "is no folder here with safetensors files. Pass the folder of the adapter's base: --base-model PATH."
        )
    return "name"
