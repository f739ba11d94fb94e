"""loratrf.json, which says what is in the exported model beside it: read and checked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..ops.schemas import OPS

__all__ = ["MANIFEST", "MANIFEST_FIELDS", "export_line", "file_sha256", "read_manifest"]

MANIFEST = "loratrf.json"
MANIFEST_FIELDS = {
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
    wrong = [name for name, kind in MANIFEST_FIELDS.items() if not isinstance(manifest.get(name), kind)]  # type: ignore[arg-type]
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


def export_line(manifest: dict[str, Any]) -> str:
    """How a model was exported, on one line: mode, quantisation where there is one, type, opset, task."""
    quantize = manifest.get("quantize") or "none"
    quantized = "" if quantize == "none" else f"{quantize} weights, "
    return f"{manifest['mode']}, {quantized}{manifest['dtype']}, opset {manifest['opset']}, {manifest['task']}"


def _is_op(value: Any) -> bool:
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
