"""What is in an adapter folder or an exported model, read without torch, transformers and onnx."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, LayerAdapter, read_adapter
from ..adapters.hub import is_hub_name
from ..errors import UserError, some
from ..files import readable
from ..genai.folder import CONFIG_FILE, libraries, read_config
from ..ops.library import library_path
from .adapter_file import SUFFIX, AdapterFile, read_adapter_file
from .manifest import MANIFEST, Manifest, Swappable, check_files, file_sha256, read_manifest
from .swappable import LAYER_PARTS, TABLE_PARTS, largest_file

__all__ = ["inspect_path"]

_ADAPTER_CONFIG = "adapter_config.json"


def inspect_path(path: str | Path, *, verify: bool = False) -> dict[str, Any]:
    """JSON-ready facts about an adapter folder, an .onnx_adapter, a model.onnx or the folder of one; "kind" says which.

    A model's files of weights are held against samples of their bytes, what differs is among its "warnings"; with
    `verify` every byte of graph and weights is, and what differs is a UserError, as where there is nothing of these
    kinds, or what is there is damaged.
    """
    path = Path(path)
    with readable(path):
        facts = _facts(path, verify)
    if verify and facts["kind"] != "model":
        raise UserError(
            f"--verify holds an exported model's files against its hashes, and {path} is an {facts['kind']}. Leave it "
            f"out: an {SUFFIX} has a checksum, which is checked whenever it is read."
        )
    return facts


def _facts(path: Path, verify: bool) -> dict[str, Any]:
    if path.is_dir() and (path / _ADAPTER_CONFIG).exists():
        return _adapter_facts(read_adapter(path))
    if path.is_dir() and (path / MANIFEST).is_file():
        return _model_facts(path, None, verify)
    if path.is_file() and path.suffix == SUFFIX:
        return _adapter_file_facts(read_adapter_file(path))
    if path.is_file() and path.suffix == ".onnx":
        if not (path.parent / MANIFEST).is_file():
            raise UserError(
                f"{path} has no {MANIFEST} beside it, which says what is in an exported model. Expected a model that "
                "loratrf-export wrote, in its folder."
            )
        return _model_facts(path.parent, path, verify)
    if path.is_file() and path.name in (MANIFEST, _ADAPTER_CONFIG, "adapter_model.safetensors"):
        return _facts(path.parent, verify)
    if is_hub_name(path):
        return _adapter_facts(read_adapter(path))
    if not path.exists():
        raise UserError(f"Nothing at {path}. Expected an adapter folder or file, an exported model.onnx or its folder.")
    raise UserError(
        f"{path} is neither an adapter folder (with {_ADAPTER_CONFIG}) nor an exported model (model.onnx with "
        f"{MANIFEST} beside it)."
    )


def merge_outcome(layer: LayerAdapter, filter_input: str) -> str:
    """What a merged export makes of a layer: "folds", or the operator that stays because a filter never folds."""
    if layer.tau is None:
        return "folds"
    return "keeps LoraTrf" if layer.A is not None and filter_input == "base" else "keeps TaskFilter"


def _adapter_facts(adapter: Adapter) -> dict[str, Any]:
    layers = [
        {
            "module": layer.name,
            "rank": layer.rank,
            "filter_rank": layer.filter_rank,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "table": layer.embedding,
            "scale": layer.scale,
            "gamma": layer.gamma if layer.tau is not None else None,
            "parameters": layer.parameters,
            "merged": merge_outcome(layer, adapter.filter_input),
        }
        for layer in adapter.layers.values()
    ]
    outcomes: dict[str, int] = {}
    for entry in layers:
        outcomes[str(entry["merged"])] = outcomes.get(str(entry["merged"]), 0) + 1
    saved = {
        name: sum(int(value.size) for value in tensors.values()) for name, tensors in adapter.modules_to_save.items()
    }
    return {
        "kind": "adapter",
        "path": str(adapter.path),
        "peft_type": adapter.peft_type,
        "dora": adapter.is_dora,
        "magnitudes": sum(layer.magnitude is not None for layer in adapter.layers.values()),
        "task_type": adapter.task_type,
        "base_model": adapter.base_model,
        "dtype": adapter.dtype,
        "filter_input": adapter.filter_input
        if any(layer.tau is not None for layer in adapter.layers.values())
        else None,
        "sha256": adapter.sha256,
        "bytes": (adapter.path / "adapter_model.safetensors").stat().st_size,
        "parameters": sum(layer.parameters for layer in adapter.layers.values()),
        "layers": layers,
        "biases": {name: int(value.size) for name, value in adapter.biases.items()},
        "modules_to_save": saved,
        "merge": outcomes,
        "not_separable": adapter.not_separable,
        "warnings": [adapter.warning] if adapter.warning else [],
    }


def _adapter_file_facts(file: AdapterFile) -> dict[str, Any]:
    layers: dict[str, dict[str, Any]] = {}
    saved: dict[str, int] = {}
    suffixes = {f".{suffix}": part for parts in (LAYER_PARTS, TABLE_PARTS) for part, suffix in parts.items()}
    for name, value in file.values.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix is None:
            saved[name] = int(value.size)
            continue
        layer = layers.setdefault(name.removesuffix(suffix), {"rank": 0, "filter_rank": 0})
        # Gains of one and offsets of zero are a plain adapter's.
        if (part := suffixes[suffix]) in ("gain", "offset"):
            layer[part] = bool((value != (1 if part == "gain" else 0)).any())
        # A half that is all zero is one that the adapter doesn't have.
        ranks = {"B": "rank", "D": "filter_rank"}
        if part in ranks and value.any():
            layer[ranks[part]] = int(value.shape[1])
    idle = not any(layer["rank"] or layer["filter_rank"] or layer.get("gain") for layer in layers.values())
    only = f" Only what it brings whole can matter: {some(saved)}." if saved else ""
    return {
        "kind": "adapter file",
        "path": str(file.path),
        "bytes": file.bytes,
        "dtype": ", ".join(sorted({str(value.dtype) for value in file.values.values()})),
        "adapter": asdict(file.origin.adapter),
        "dora": any(layer.get("gain") for layer in layers.values()),
        "base_sha256": file.origin.base_sha256,
        "model_sha256": file.origin.model_sha256,
        "parameters": sum(int(value.size) for value in file.values.values()),
        "layers": [{"module": name, **ranks} for name, ranks in sorted(layers.items())],
        "saved": saved,
        "warnings": [f"this adapter changes no layer: every B and D in it is zero.{only}"] if idle else [],
    }


def _model_facts(folder: Path, model: Path | None, verify: bool) -> dict[str, Any]:
    manifest = read_manifest(folder / MANIFEST)
    expected = manifest.model.sha256
    models = [model] if model is not None else sorted(folder.glob("*.onnx"))
    if not models:
        raise UserError(f"{folder} has a {MANIFEST} but no .onnx file: the export is incomplete. Export it again.")
    hashes = {path: file_sha256(path) for path in models}
    model = next((path for path in models if hashes[path] == expected), models[0])
    data = manifest.model.files or [f"{model.name}.data"]
    files = {path.name: path.stat().st_size for path in (model, *map(folder.joinpath, data)) if path.is_file()}
    if verify:
        _verify(folder, model, hashes[model], manifest)
    warnings = []
    if hashes[model] != expected:
        warnings.append(
            f"{model.name} is not the file that {MANIFEST} describes: it was changed or replaced after the export, so "
            "what is said here may not hold for it."
        )
    lost = [name for name in data if name not in files]
    warnings += [f"{name} is missing: the weights lie in it, so the model can't be run without it." for name in lost]
    try:
        if not lost:
            check_files(folder, manifest)
    except UserError as error:
        warnings.append(str(error))
    library = _library_facts(manifest, folder, warnings)
    if manifest.parity is None:
        warnings.append("parity was not checked on export (--no-check): run loratrf-parity.")
    return {
        "kind": "model",
        "path": str(model),
        "bytes": sum(files.values()),
        "files": files,
        "verified": verify,
        **manifest.to_dict(),
        "export": manifest.summary,
        "keep_float": list(manifest.keep_float),
        "swappable": _swappable_facts(manifest, folder),
        "library": library,
        "operators": manifest.operators,
        "custom_operators": [] if manifest.portable else sorted(set(manifest.operators) - {"merged"}),
        "warnings": warnings,
    }


def _verify(folder: Path, model: Path, sha256: str, manifest: Manifest) -> None:
    """UserError where a byte of graph or weights differs from the export, or nobody wrote down what they were."""
    if sha256 != manifest.model.sha256:
        raise UserError(
            f"{model} is not the file that {MANIFEST} describes: its sha256 is {sha256[:12]}, expected "
            f"{manifest.model.sha256[:12]}. It was changed or replaced after the export. Copy the folder again, or "
            "export the model again."
        )
    if not manifest.model.files:
        raise UserError(
            f"{folder / MANIFEST} has no hashes of the weights: loratrf-deploy {manifest.loratrf_deploy}, which wrote "
            "it, kept none. Export the model again to have them verified."
        )
    check_files(folder, manifest, whole=True)


def _library_facts(manifest: Manifest, folder: Path, warnings: list[str]) -> dict[str, Any] | None:
    """The native library that a language model's folder registers, if any: is it the exported one, and ours here?"""
    if not (folder / CONFIG_FILE).is_file():
        return None
    names = libraries(read_config(folder))
    if not names:
        return None
    name = names[0]
    try:
        own = file_sha256(folder / name)
        installed = own == file_sha256(library_path())
    except UserError:
        own, installed = None, False
    exported = own is not None and own == manifest.library_sha256
    if len(names) > 1 or not installed:
        warnings.append(
            f"{CONFIG_FILE} names the native library {', '.join(names)}, which is not the one installed here"
            + (" (it is the one that was exported)" if exported else " and not what was exported")
            + ": loratrf-generate puts the installed one in its place, onnxruntime-genai itself would load it."
        )
    return {"file": name, "sha256": own, "exported": exported, "installed": installed}


def _answers(swappable: Swappable) -> dict[str, dict[str, Any]]:
    """By adapter of a model of several tasks, or of one: which, what its labels are called, and where its answer is."""
    return {
        name: {
            "task": adapter.task,
            "labels": adapter.labels and list(adapter.labels),
            "outputs": list(part.outputs.values()) if (part := swappable.tasks.get(adapter.task or "")) else None,
        }
        for name, adapter in swappable.adapters.items()
        if adapter.task
    }


def _swappable_facts(manifest: Manifest, folder: Path) -> dict[str, Any] | None:
    """What the model takes at run time, and the adapter files beside it that were made for it; None: not swappable."""
    if manifest.swappable is None:
        return None
    files: list[str] = []
    others: list[str] = []
    largest = largest_file(manifest.swappable.weights)

    def check_size(size: int) -> None:
        if size > largest:
            raise UserError(f"{size} bytes")

    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            file = read_adapter_file(path, check_size)
            fits = file.origin.model_sha256 == manifest.model.sha256
        except UserError:
            fits = False
        (files if fits else others).append(path.name)
    return {
        "default": manifest.swappable.default,
        "weights": len(manifest.swappable.weights),
        "gains": sum(weight.part == "gain" for weight in manifest.swappable.weights),
        "offsets": sum(weight.part == "offset" for weight in manifest.swappable.weights),
        "slots": manifest.swappable.slots,
        "answers": _answers(manifest.swappable),
        "files": files,
        "other_files": others,
    }
