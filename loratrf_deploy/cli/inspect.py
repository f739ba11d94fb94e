"""loratrf-inspect: what is in an adapter or an exported model, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import some
from ..formats.inspection import inspect_path
from ..parity.result import LIBRARY
from .shared import Parser, command, print_json, print_rows, print_table, print_warnings

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-inspect PATH: exit 0 shown, 2 PATH is no adapter and no exported model, is damaged, or fails --verify."""
    args = _parser().parse_args(argv)
    facts = inspect_path(args.path, verify=args.verify)
    if args.json:
        print_json(facts)
    else:
        {"adapter": _show_adapter, "adapter file": _show_adapter_file, "model": _show_model}[facts["kind"]](facts)
        print_warnings(facts["warnings"])
    return 0


def _parser() -> Parser:
    parser = Parser(
        "loratrf-inspect",
        "Show what is in an adapter or an exported model: layers, ranks, filters, parameters, size, and "
        "what a merged export would fold.",
    )
    parser.add_argument(
        "path",
        type=Path,
        help="adapter (folder, ORG/NAME[@REVISION] or .onnx_adapter), or exported model.onnx or its folder",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="hold every byte of a model's graph and weights against the hashes of its export, not samples alone",
    )
    return parser


def _show_adapter(facts: dict[str, Any]) -> None:
    saved, biases = facts["modules_to_save"], facts["biases"]
    rows = {
        "adapter": f"{facts['path']} ({_size(facts['bytes'])}, {facts['dtype']})",
        "type": ", ".join(filter(None, (_kind(facts, dora=facts["dora"]), facts["task_type"]))),
        "base": facts["base_model"] or "not named",
        "layers": f"{len(facts['layers'])} adapted, {facts['parameters']:,} parameters",
        "gains": _magnitude_sentence(facts["magnitudes"]),
        "filter": facts["filter_input"] and f"reads the {_READS[facts['filter_input']]} output",
        "saved": ", ".join(f"{name} ({count:,})" for name, count in saved.items()),
        "biases": f"{len(biases)} trained ({sum(biases.values()):,})" if biases else None,
        "merged": _merge_sentence(facts),
    }
    print_rows(rows)
    if facts["layers"]:
        head = ("layer", "rank", "filter rank", "in -> out", "parameters", "merged export")
        print_table(head, ([*_cells(layer), f"{layer['parameters']:,}", layer["merged"]] for layer in facts["layers"]))


def _show_adapter_file(facts: dict[str, Any]) -> None:
    adapter = facts["adapter"]
    rows = {
        "file": f"{facts['path']} ({_size(facts['bytes'])}, {facts['dtype']})",
        "adapter": _named(adapter, dora=facts["dora"]),
        "base": f"sha256 {str(facts['base_sha256'])[:12]}",
        "task": _task_sentence(adapter) if adapter.get("task") else None,
        "made for": f"the export whose model.onnx has sha256 {facts['model_sha256'][:12]}",
        "layers": f"{len(facts['layers'])} in the model, {facts['parameters']:,} values; ranks 0 are zeros",
        "gains": _gain_sentence(*(sum(bool(layer.get(part)) for layer in facts["layers"]) for part in _GAINS)),
        "saved": ", ".join(f"{name} ({count:,})" for name, count in facts["saved"].items()),
    }
    print_rows(rows)
    print_table(("layer", "rank", "filter rank"), (_cells(layer)[:3] for layer in facts["layers"]))


def _adapter_sentence(facts: dict[str, Any]) -> str:
    adapter, slots = facts["adapter"], (facts["swappable"] or {}).get("slots")
    if slots:
        return "one per batch row, by slot: " + ", ".join(f"{slot} {name}" for name, slot in slots.items())
    return _named(adapter, dora=adapter.get("dora", False))


def _named(adapter: dict[str, Any], *, dora: bool) -> str:
    return f"{adapter.get('name')} ({_kind(adapter, dora=dora)}, sha256 {str(adapter.get('sha256'))[:12]})"


def _kind(adapter: dict[str, Any], *, dora: bool) -> str | None:
    """The PEFT kind; PEFT calls a DoRA a LORA."""
    return "DoRA" if dora else adapter.get("peft_type")


_GAINS = ("gain", "offset")


def _gain_sentence(gains: int, offsets: int) -> str | None:
    """Of a DoRA's, which rescale and shift the outputs of the base's layers."""
    return f"lora_gain in {gains} layers, lora_offset in {offsets} (DoRA)" if gains else None


def _magnitude_sentence(layers: int) -> str | None:
    return f"lora_magnitude_vector in {layers} layers; an export makes gains and offsets of it" if layers else None


def _task_sentence(facts: dict[str, Any]) -> str:
    """text-classification (ham, spam), in logits."""
    labels = f" ({some(facts['labels'])})" if facts.get("labels") else ""
    outputs = f", in {', '.join(facts['outputs'])}" if facts.get("outputs") else ""
    return f"{facts['task']}{labels}{outputs}"


def _answers_sentence(facts: dict[str, Any] | None) -> str | None:
    if facts is None:
        return None
    slots = facts["slots"]
    return "; ".join(f"{slots.get(name)} {name}: {_task_sentence(own)}" for name, own in facts["answers"].items())


def _swappable_sentence(facts: dict[str, Any] | None) -> str | None:
    if facts is None:
        return None
    if facts["slots"]:
        return f"{facts['weights']} run-time weights with a dimension of slots, whose defaults are these adapters'"
    names = ", ".join(facts["files"]) or "none"
    others = f"; not made for it: {', '.join(facts['other_files'])}" if facts["other_files"] else ""
    default = "no default" if facts["default"] == "required" else f"default {facts['default']}"
    return f"{facts['weights']} run-time weights, {default}; adapters beside it: {names}{others}"


def _library_sentence(library: dict[str, Any] | None) -> str | None:
    if library is None:
        return None
    exported = "the one that was exported" if library["exported"] else "not the one that was exported"
    return f"{library['file']} in the folder, {exported}{', installed here too' if library['installed'] else ''}"


_READS = {"adapted": "adapted", "base": "base layer's"}


def _merge_sentence(facts: dict[str, Any]) -> str:
    if facts["not_separable"]:
        return f"only merged, through PEFT's own merge: {facts['not_separable']}"
    words = {
        "folds": "fold exactly",
        "keeps TaskFilter": "keep a TaskFilter (a filter depends on the token and never folds)",
        "keeps LoraTrf": "keep all of LoraTrf (the filter reads the base layer's output)",
    }
    return "; ".join(f"{count} {words[outcome]}" for outcome, count in facts["merge"].items())


def _show_model(facts: dict[str, Any]) -> None:
    base, parity = facts["base"], facts["parity"]
    versions = {"loratrf-deploy": facts["loratrf_deploy"]} | facts["versions"]
    operators = ", ".join(f"{count} {op}" for op, count in facts["operators"].items())
    rows = {
        "model": f"{facts['path']} ({_size(facts['bytes'])} with weights)",
        "export": facts["export"],
        "float32": some(facts["keep_float"]) if facts["keep_float"] else None,
        "made by": ", ".join(f"{name} {value}" for name, value in versions.items()),
        "adapter": _adapter_sentence(facts),
        "answers": _answers_sentence(facts["swappable"]),
        "base": f"{base.get('name')} (sha256 {str(base.get('sha256'))[:12]})",
        "layers": f"{len(facts['layers'])} adapted ({operators or 'none'})",
        "swaps": _swappable_sentence(facts["swappable"]),
        "gains": _gain_sentence(*((facts["swappable"] or {}).get(f"{part}s", 0) for part in _GAINS)),
        "runs": "with the custom-op library or without it, on the definitions in the file"
        if facts["custom_operators"]
        else "without the custom-op library: ONNX's and ONNX Runtime's own operators alone",
        "library": _library_sentence(facts["library"]),
        "parity": _parity_sentence(parity),
        "files": "verified: every byte is as it was exported" if facts["verified"] else None,
    }
    print_rows(rows)
    head = ("layer", "operator", "rank", "filter rank", "in -> out")
    print_table(head, (_cells(layer, layer["op"]) for layer in facts["layers"]), left=2)


def _parity_sentence(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "not checked"
    errors = [
        check["relative"]
        for check in parity.get("checks", [])
        if isinstance(check.get("relative"), int | float) and check.get("variant") in LIBRARY
    ]
    largest = f", largest relative error {max(errors):.2e} (tolerance {parity.get('tolerance')})" if errors else ""
    return ("holds" if parity.get("passed") else "failed") + largest


def _cells(layer: dict[str, Any], *more: str) -> list[str]:
    """A layer's name, `more`, its ranks and its sizes."""
    ranks = (str(layer.get(name) or "-") for name in ("rank", "filter_rank"))
    sizes = (str(layer.get(name) or "any") for name in ("in_features", "out_features"))
    return [layer["module"], *more, *ranks, " -> ".join(sizes)]


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


if __name__ == "__main__":
    raise SystemExit(main())
