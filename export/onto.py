"""--onto: a further adapter for a swappable model that exists already. Needs neither torch nor onnx."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapters.adapter import Adapter, read_adapter
from ..errors import UserError
from ..formats.adapter_file import SUFFIX, Origin, write_adapter_file
from ..formats.fit import check_always_active, fit
from ..formats.manifest import Manifest, read_swappable
from ..pytorch.base import GENERATION, TASKS
from .files import base_sha256, check_writable, written_aside

__all__ = ["Converted", "convert_adapter"]


@dataclass(frozen=True)
class Converted:
    """What a conversion made. `layers` of the model's `model_layers` are adapted; `base_by` says how the base was held
    against the model's: by its "hash", or by its "name" where one of the two has no folder here."""

    file: Path
    bytes: int
    layers: int
    model_layers: int
    base_by: str


def convert_adapter(
    adapter: str | Path, onto: str | Path, out: str | Path, *, base_model: str | Path | None = None
) -> Converted:
    """Writes the adapter folder `adapter` to `out` (.onnx_adapter) for the swappable model `onto`, whatever its rank.

    Layers of the model that the adapter doesn't cover get explicit zeros. `base_model` is the folder of the adapter's
    base; None takes the adapter's own. Raises UserError where the adapter doesn't fit; nothing is left behind then.
    """
    out = Path(out)
    check_writable(out, SUFFIX)
    manifest, swappable = read_swappable(onto)
    loaded = read_adapter(adapter)
    base_by = _check_origin(loaded, onto, manifest, base_model)
    if manifest.task != GENERATION or swappable.slots:
        check_always_active(loaded)
    values = fit(loaded, swappable.weights, manifest.adapter.filter_input)
    with written_aside(out) as aside:
        write_adapter_file(aside / out.name, values, Origin.of(loaded, manifest))
        size = (aside / out.name).stat().st_size
    modules = {weight.module for weight in swappable.weights if weight.in_layer}
    return Converted(out, size, len(loaded.layers), len(modules), base_by)


def _check_origin(adapter: Adapter, model: str | Path, manifest: Manifest, base_model: str | Path | None) -> str:
    """Whether task and base are the model's; how the base was told. Raises UserError where they aren't."""
    task = TASKS.get(adapter.task_type or "")
    if task is not None and task != manifest.task and manifest.task != "image-classification":
        raise UserError(
            f"The adapter {adapter.path} was trained for {task}, the model {model} was exported for "
            f"{manifest.task}. Export a model for its task."
        )
    base, name = manifest.base, str(base_model or adapter.base_model or "")
    own = base_sha256(Path(name)) if name else None
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
