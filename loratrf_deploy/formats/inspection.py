"""What is in an adapter folder or an exported model, read without torch, transformers and onnx."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, LayerAdapter, read_adapter
from ..errors import UserError
from .adapter_file import SUFFIX, AdapterFile, read_adapter_file
from .manifest import MANIFEST, Manifest, file_sha256, read_manifest
from .swappable import LAYER_PARTS

__all__ = ["inspect_path"]

_ADAPTER_CONFIG = "adapter_config.json"


def inspect_path(path: str | Path) -> dict[str, Any]:
    """JSON-ready facts about an adapter folder, an .onnx_adapter, a model.onnx or the folder of one; "kind" says which.

    Raises UserError where there is neither, or what is there is damaged.
    """
    path = Path(path)
    if path.is_dir() and (path / _ADAPTER_CONFIG).exists():
        return _adapter_facts(read_adapter(path))
    if path.is_dir() and (path / MANIFEST).is_file():
        return _model_facts(path, None)
    if path.is_file() and path.suffix == SUFFIX:
        return _adapter_file_facts(read_adapter_file(path))
    if path.is_file() and path.suffix == ".onnx":
        if not (path.parent / MANIFEST).is_file():
            raise UserError(
                f"{path} has no {MANIFEST} beside it, which says what is in an exported model. Expected a model that "
                "loratrf-export wrote, in its folder."
            )
        return _model_facts(path.parent, path)
    if path.is_file() and path.name in (MANIFEST, _ADAPTER_CONFIG, "adapter_model.safetensors"):
        return inspect_path(path.parent)
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
    }


def _adapter_file_facts(file: AdapterFile) -> dict[str, Any]:
    layers: dict[str, dict[str, Any]] = {}
    saved: dict[str, int] = {}
    suffixes = {f".{suffix}": part for part, suffix in LAYER_PARTS.items()}
    for name, value in file.values.items():
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        if suffix is None:
            saved[name] = int(value.size)
            continue
        layer = layers.setdefault(name.removesuffix(suffix), {"rank": 0, "filter_rank": 0})
        # A half that is all zero is one that the adapter doesn't have.
        ranks = {"B": "rank", "D": "filter_rank"}
        if (part := suffixes[suffix]) in ranks and value.any():
            layer[ranks[part]] = int(value.shape[1])
    return {
        "kind": "adapter file",
        "path": str(file.path),
        "bytes": file.bytes,
        "dtype": ", ".join(sorted({str(value.dtype) for value in file.values.values()})),
        "adapter": asdict(file.origin.adapter),
        "base_sha256": file.origin.base_sha256,
        "model_sha256": file.origin.model_sha256,
        "parameters": sum(int(value.size) for value in file.values.values()),
        "layers": [{"module": name, **ranks} for name, ranks in sorted(layers.items())],
        "saved": saved,
    }


def _model_facts(folder: Path, model: Path | None) -> dict[str, Any]:
    manifest = read_manifest(folder / MANIFEST)
    expected = manifest.model.sha256
    models = [model] if model is not None else sorted(folder.glob("*.onnx"))
    if not models:
        raise UserError(f"{folder} has a {MANIFEST} but no .onnx file: the export is incomplete. Export it again.")
    hashes = {path: file_sha256(path) for path in models}
    model = next((path for path in models if hashes[path] == expected), models[0])
    data = model.with_name(f"{model.name}.data")
    files = {path.name: path.stat().st_size for path in (model, data) if path.is_file()}
    warnings = []
    if hashes[model] != expected:
        warnings.append(
            f"{model.name} is not the file that {MANIFEST} describes: it was changed or replaced after the export, so "
            "what is said here may not hold for it."
        )
    if not data.is_file():
        warnings.append(f"{data.name} is missing: the weights lie in it, so the model can't be run without it.")
    if manifest.parity is None:
        warnings.append("parity was not checked on export (--no-check): run loratrf-parity.")
    return {
        "kind": "model",
        "path": str(model),
        "bytes": sum(files.values()),
        "files": files,
        **manifest.to_dict(),
        "export": manifest.summary,
        "swappable": _swappable_facts(manifest, folder),
        "operators": manifest.operators,
        "custom_operators": sorted(set(manifest.operators) - {"merged"}),
        "warnings": warnings,
    }


def _swappable_facts(manifest: Manifest, folder: Path) -> dict[str, Any] | None:
    """What the model takes at run time, and the adapter files beside it that were made for it; None: not swappable."""
    if manifest.swappable is None:
        return None
    files: list[str] = []
    others: list[str] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            fits = read_adapter_file(path).origin.model_sha256 == manifest.model.sha256
        except UserError:
            fits = False
        (files if fits else others).append(path.name)
    return {
        "default": manifest.swappable.default,
        "weights": len(manifest.swappable.weights),
        "slots": manifest.swappable.slots,
        "files": files,
        "other_files": others,
    }
