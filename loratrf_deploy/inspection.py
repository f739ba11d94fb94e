"""What is in an adapter folder or an exported model, read without torch, transformers and onnx."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .adapter import Adapter, LayerAdapter, read_adapter
from .errors import UserError

__all__ = ["MANIFEST", "file_sha256", "inspect_path", "read_manifest"]

MANIFEST = "loratrf.json"
_ADAPTER_CONFIG = "adapter_config.json"


def inspect_path(path: str | Path) -> dict[str, Any]:
    """JSON-ready facts about an adapter folder, a model.onnx or the folder of one; "kind" says which it is.

    Raises UserError where there is neither, or what is there is damaged.
    """
    path = Path(path)
    if path.is_dir() and (path / _ADAPTER_CONFIG).exists():
        return _adapter_facts(read_adapter(path))
    if path.is_dir() and (path / MANIFEST).is_file():
        return _model_facts(path, None)
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
        raise UserError(f"Nothing at {path}. Expected an adapter folder, an exported model.onnx or its folder.")
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


def _model_facts(folder: Path, model: Path | None) -> dict[str, Any]:
    manifest = read_manifest(folder / MANIFEST)
    expected = (manifest.get("model") or {}).get("sha256")
    models = [model] if model is not None else sorted(folder.glob("*.onnx"))
    if not models:
        raise UserError(f"{folder} has a {MANIFEST} but no .onnx file: the export is incomplete. Export it again.")
    hashes = {path: file_sha256(path) for path in models}
    model = next((path for path in models if hashes[path] == expected), models[0])
    data = model.with_name(f"{model.name}.data")
    files = {path.name: path.stat().st_size for path in (model, data) if path.is_file()}
    warnings = []
    if expected is not None and hashes[model] != expected:
        warnings.append(
            f"{model.name} is not the file that {MANIFEST} describes: it was changed or replaced after the export, so "
            "what is said here may not hold for it."
        )
    if not data.is_file():
        warnings.append(f"{data.name} is missing: the weights lie in it, so the model can't be run without it.")
    if manifest.get("parity") is None:
        warnings.append("parity was not checked on export (--no-check): run loratrf-parity.")
    operators: dict[str, int] = {}
    for layer in manifest["layers"]:
        operators[layer["op"]] = operators.get(layer["op"], 0) + 1
    return {
        "kind": "model",
        "path": str(model),
        "bytes": sum(files.values()),
        "files": files,
        **{key: manifest.get(key) for key in _MANIFEST_FIELDS},
        "operators": operators,
        "standard_operators_only": all(op == "merged" for op in operators),
        "warnings": warnings,
    }


_MANIFEST_FIELDS = {
    "loratrf_deploy": str,
    "mode": str,
    "task": str,
    "dtype": str,
    "opset": int,
    "versions": dict,
    "adapter": dict,
    "base": dict,
    "layers": list,
    "parity": (dict, type(None)),
}
"""Fields of a manifest that are shown, and the JSON types they may have."""


def read_manifest(path: Path) -> dict[str, Any]:
    """What an export wrote to loratrf.json at `path`, its fields' types checked. Raises UserError."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({error}). Export the model again with loratrf-export.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != 1:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise UserError(
            f"{path} has the format {found!r}, and this version of loratrf-deploy reads 1. Update loratrf-deploy, or "
            "export the model again."
        )
    wrong = [name for name, kind in _MANIFEST_FIELDS.items() if not isinstance(manifest.get(name), kind)]  # type: ignore[arg-type]
    rows = manifest["layers"] if "layers" not in wrong else []
    if not all(isinstance(row, dict) and isinstance(row.get("module"), str) and _is_op(row.get("op")) for row in rows):
        wrong.append("layers")
    if not isinstance(manifest.get("model"), dict | None):
        wrong.append("model")
    checks = (manifest.get("parity") or {}).get("checks", []) if "parity" not in wrong else []
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        wrong.append("parity")
    if wrong:
        raise UserError(
            f"{path} is damaged: {', '.join(wrong)} missing or not what loratrf-export writes. Export the model again."
        )
    return manifest


def _is_op(value: Any) -> bool:
    from .schemas import OPS

    return isinstance(value, str) and value in {*OPS, "merged"}


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal. Raises UserError where it can't be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"Can't read {path}: {error.strerror or error}.") from error
    return digest.hexdigest()
