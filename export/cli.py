"""loratrf-export: the command line around `export_adapter`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import command, progress
from ..errors import UserError
from ..runtime_weights import DEFAULTS
from ..session import PROVIDERS
from .exporter import DTYPES, MODES, ExportResult, ParityFailed, export_adapter
from .onto import Converted, convert_adapter

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-export --adapter PATH --out model.onnx: exit 0 exported and proven, 1 parity failed, 2 input at fault."""
    parser = _parser()
    args = parser.parse_args(argv)
    # A terminated export cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.onto is not None:
        for name in ("mode", "swappable", "dtype", "device", "opset", "check"):
            if getattr(args, name) != parser.get_default(name):
                flag = "--no-check" if name == "check" else f"--{name}"
                raise UserError(f"{flag} says how a model is made, and --onto takes {args.onto} as it is. Drop {flag}.")
        _print_converted(convert_adapter(args.adapter, args.onto, args.out, base_model=args.base_model), args.onto)
        return 0
    try:
        with progress() as step:
            result = export_adapter(
                args.adapter,
                args.out,
                base_model=args.base_model,
                mode=args.mode or ("separate" if args.swappable else "merged"),
                swappable=args.swappable,
                dtype=args.dtype,
                device=args.device,
                opset=args.opset,
                check=args.check,
                step=step,
            )
    except ParityFailed as failure:
        from ..report import print_report

        print_report(failure.report)
        print(
            f"error: {failure}: parity failed, so nothing was written. Write it anyway with --no-check.",
            file=sys.stderr,
        )
        return 1
    _print_summary(result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loratrf-export",
        description="Export a LoRA or LoRATRF adapter with its base model to ONNX, and prove that it computes what "
        "PyTorch computed.",
    )
    parser.add_argument("--adapter", required=True, type=Path, help="adapter directory (PEFT's layout)")
    parser.add_argument("--out", required=True, type=Path, help="the file to write; a model's folder gets others")
    parser.add_argument("--base-model", help="folder or hub name of the base model (default: what the adapter names)")
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="merged folds the adapter into the weights (task-aware filters stay operators); separate keeps it beside "
        "them (default: merged)",
    )
    parser.add_argument(
        "--swappable",
        choices=DEFAULTS,
        help="make the adapter's weights inputs of a separate model, so that adapters swap at run time; without one, "
        "the model computes what the base does, or what this adapter does",
    )
    parser.add_argument(
        "--onto",
        metavar="MODEL",
        type=Path,
        help="convert the adapter for this swappable model, which exists already: --out NAME.onnx_adapter",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and activations (default: float32)"
    )
    parser.add_argument(
        "--device",
        choices=PROVIDERS,
        default="cpu",
        help="where the model is to run: its fused operators are that device's, and parity is checked there (default: "
        "cpu); bfloat16 is for cuda",
    )
    parser.add_argument("--opset", type=int, help="ONNX opset, 18 to 23 (default: 20)")
    parser.add_argument("--no-check", dest="check", action="store_false", help="skip the parity check")
    return parser


def _print_converted(converted: Converted, model: Path) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    rows = {
        "adapter": f"{converted.file} ({converted.bytes / 1e6:.1f} MB)",
        "model": f"{model}",
        "layers": f"{converted.layers} adapted of the model's {converted.model_layers}",
        "base": "the model's, by the hash of its weights"
        if converted.base_by == "hash"
        else "the model's by its name: its weights are not here to be compared",
        "parity": f"not checked here: loratrf-parity --model {model} --adapter PATH",
    }
    for name, text in rows.items():
        console.print(f"[bold]{name:<8}[/bold] {escape(text)}")


def _swappable_row(result: ExportResult) -> dict[str, str]:
    facts = result.manifest.get("swappable")
    if facts is None:
        return {}
    own = any(weight["default"] == "adapter" for weight in facts["weights"]) and facts["default"] == "base"
    default = f"the {facts['default']}'s" + (", with the adapter's head: the base has none" if own else "")
    return {"swaps": f"{result.model.with_name(facts['file'])}; without an adapter the output is {default}"}


def _print_summary(result: ExportResult) -> None:
    from rich.console import Console
    from rich.markup import escape

    manifest, console = result.manifest, Console(highlight=False, soft_wrap=True)
    ops: dict[str, int] = {}
    for layer in manifest["layers"]:
        ops[layer["op"]] = ops.get(layer["op"], 0) + 1
    kinds = ", ".join(f"{count} {op}" for op, count in ops.items()) or "none"
    weights = sum(size for name, size in result.sizes.items() if name.startswith(result.model.name))
    rows = {
        "model": f"{result.model} ({weights / 1e6:.1f} MB with weights)",
        "mode": f"{manifest['mode']}, {manifest['dtype']}, opset {manifest['opset']}, {manifest['task']}",
        **_swappable_row(result),
        "layers": f"{len(manifest['layers'])} adapted ({kinds})",
        "time": f"{sum(result.seconds.values()):.1f} s",
    }
    for name, text in rows.items():
        console.print(f"[bold]{name:<8}[/bold] {escape(text)}")
    if result.parity is None:
        console.print(f"[bold]{'parity':<8}[/bold] not checked (--no-check)")
    else:
        from ..report import print_report

        print_report(result.parity)
