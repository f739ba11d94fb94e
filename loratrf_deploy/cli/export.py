"""loratrf-export: the command line around `export_adapter`, `export_grouped` and `convert_adapter`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..export.grouped import export_grouped
from ..export.moving import was_written
from ..export.onto import Converted, convert_adapter, convert_adapters
from ..export.options import DEFAULTS, LAYOUTS, MODES, POOLING, QUANTIZATIONS, ExportOptions
from ..export.proven import ExportResult, ParityFailed
from ..export.single import export_adapter
from ..formats.stages import STAGES_FILE
from ..ops.dtypes import DTYPES
from ..reports.formats import print_report
from ..runtime.session import PROVIDERS
from .shared import (
    Parser,
    command,
    count,
    evaluate_option,
    named_paths,
    print_json,
    print_rows,
    print_warnings,
    progress,
    require_extra,
    trust_remote_code_option,
)

if TYPE_CHECKING:
    from ..parity.result import ParityReport

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-export --adapter PATH --out model.onnx: exit 0 exported and proven, 1 parity failed, 2 input at fault."""
    parser = _parser()
    args = parser.parse_args(argv)
    # A terminated export cleans up as an interrupted one does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _export(args)
    except KeyboardInterrupt as interrupt:
        done = f"{args.out} was written, and is complete" if was_written(args.out) else "nothing was written"
        raise KeyboardInterrupt(done) from interrupt


def _export(args: argparse.Namespace) -> int:
    """Exit codes as of `main`."""
    check, args.check = args.check, args.check is not False
    options = ExportOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(ExportOptions)})
    if args.evaluate is not None:
        _check_evaluate(args)
    if args.onto is not None:
        return _convert(args, options, check=bool(check))
    require_extra(*(["cpu"] if args.check else []), "export")
    try:
        with progress() as step:
            if args.adapters is not None:
                result = export_grouped(named_paths(args.adapters), args.out, options, step=step)
            else:
                result = export_adapter(args.adapter, args.out, options, step=step)
    except ParityFailed as failure:
        return _failed(failure, {"model": None, "parity": _parity_facts(failure.report, args.out)}, args)
    if args.json:
        parity = result.parity and _parity_facts(result.parity, args.out)
        print_json(vars(result) | {"manifest": result.manifest.to_dict(), "parity": parity})
    else:
        _print_summary(result)
    return 0


def _convert(args: argparse.Namespace, options: ExportOptions, *, check: bool) -> int:
    """--onto: exit codes as of `main`."""
    _check_onto(args, options)
    if check:
        require_extra("cpu", "export")
    how: dict[str, Any] = {"base_model": args.base_model, "trust_remote_code": args.trust_remote_code, "check": check}
    try:
        with progress() as step:
            if args.adapters is not None:
                made = convert_adapters(named_paths(args.adapters), args.onto, args.out, step=step, **how)
            else:
                made = [convert_adapter(args.adapter, args.onto, args.out, step=step, **how)]
    except ParityFailed as failure:
        return _failed(failure, {"file": None, "parity": failure.report.to_dict()}, args)
    if args.json:
        facts = [vars(one) | {"parity": one.parity and one.parity.to_dict()} for one in made]
        print_json({"adapters": facts} if args.adapters is not None else facts[0])
    else:
        for one in made:
            _print_converted(one, args.onto)
    return 0


def _failed(failure: ParityFailed, facts: dict[str, Any], args: argparse.Namespace) -> int:
    if args.json:
        print_json(facts)
    else:
        print_report(failure.report)
    coarse = args.onto is None and args.dtype != "float32"
    advice = (
        "Export it in float32 (--dtype float32), where errors of the weights' type can't hide others."
        if coarse
        else "Its layers are in the report, and the first that drifts is where to look: don't deploy this model."
    )
    print(f"error: {failure}: parity failed, so nothing was written. {advice}", file=sys.stderr)
    return 1


def _parity_facts(report: ParityReport, out: Path) -> dict[str, Any]:
    """The report as JSON has it; the model was still aside when it was proven."""
    return report.to_dict() | {"model": str(out)}


def _parser() -> Parser:
    parser = Parser(
        "loratrf-export",
        "Export a LoRA or LoRATRF adapter with its base model to ONNX, and prove that it computes what "
        "PyTorch computed.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", type=Path, help="adapter folder (PEFT's layout), or ORG/NAME[@REVISION] on the hub")
    which.add_argument(
        "--adapters",
        metavar="NAME=PATH",
        nargs="+",
        help="several adapters of one base in one model, in which every row of a batch names its own (grouped)",
    )
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
        "the model computes what the base does, or what this adapter does, or (required, for JavaScript) nothing",
    )
    parser.add_argument(
        "--onto",
        metavar="MODEL",
        type=Path,
        help="convert the adapter for this swappable model, which exists already: --out NAME.onnx_adapter; or several "
        "(--adapters NAME=PATH ...), --out being the folder that gets NAME.onnx_adapter of each",
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
    parser.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        default="none",
        help="of the base weights; adapters stay in full precision. int4 is for causal language models",
    )
    _add_engines(parser)
    _add_int8(parser)
    _add_embedding(parser)
    generating = parser.add_argument_group("causal language models (ONNX Runtime GenAI)")
    generating.add_argument(
        "--bundle-library",
        action="store_true",
        help="copy the custom-op library into the folder and register it in genai_config.json",
    )
    trust_remote_code_option(parser)
    evaluate_option(parser)
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="the proof of parity with PyTorch, before anything is written: every export has it but with --no-check, a "
        "conversion (--onto) with --check, which needs the base at hand",
    )
    return parser


def _add_engines(parser: Parser) -> None:
    parser.add_argument(
        "--portable",
        action="store_true",
        help="encoders of ONNX's own operators alone, for OpenVINO, WebGPU and other engines: without ONNX Runtime's "
        "fusions, and with the definitions of ours in their place",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="encoders as transformers.js's pipelines load them: --out FOLDER/onnx/model.onnx; config.json and "
        "tokenizer go into FOLDER",
    )


def _add_int8(parser: Parser) -> None:
    parser.add_argument(
        "--keep-float",
        nargs="+",
        metavar="PATTERN",
        default=(),
        help="with --quantize int8 of an encoder: layers that stay float32, such as '*.layer.0.*' (the proof names "
        "those that lose most)",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        metavar="PERCENT",
        help="with --quantize int8 and --evaluate FILE: keep the layers in float32 that cost most, as many as it takes "
        "for no more of the answers to change",
    )


def _add_embedding(parser: Parser) -> None:
    embedding = parser.add_argument_group("embedding models (task_type FEATURE_EXTRACTION)")
    embedding.add_argument(
        "--pooling",
        choices=POOLING,
        help="adds the output sentence_embedding, the tokens' mean, the first or the last of them; auto does what "
        "sentence-transformers' modules.json in the adapter's folder or the base's says",
    )
    embedding.add_argument(
        "--normalize", action="store_true", help="to length 1 (auto does it where modules.json says)"
    )
    embedding.add_argument(
        "--dimensions", type=count, metavar="N", help="keep the first N, before normalising: for Matryoshka models"
    )


def _check_evaluate(args: argparse.Namespace) -> None:
    """UserError where nothing would be evaluated."""
    if args.adapters is not None or args.onto is not None or not args.check:
        raise UserError(
            "--evaluate is part of the proof of one adapter's export: it goes with --adapter, and not with --onto or "
            "--no-check. loratrf-parity --evaluate does it later."
        )
    if not os.path.isfile(args.evaluate):
        raise UserError(f"No file to evaluate on at {args.evaluate}: expected JSON lines.")


def _check_onto(args: argparse.Namespace, options: ExportOptions) -> None:
    """UserError for options that would be ignored beside --onto."""
    own = ("base_model", "check", "trust_remote_code")
    if flag := options.given(field.name for field in dataclasses.fields(options) if field.name not in own):
        raise UserError(f"{flag} says how a model is made, and --onto takes {args.onto} as it is. Drop {flag}.")


def _print_converted(converted: Converted, model: Path) -> None:
    base = "the model's by its name: its weights are not here to be compared"
    rows = {
        "adapter": f"{converted.file} ({converted.bytes / 1e6:.1f} MB)",
        "model": f"{model}",
        "layers": f"{converted.layers} adapted of the model's {converted.model_layers}",
        "base": "the model's, by the hash of its weights" if converted.base_by == "hash" else base,
        "config": ""
        if converted.base_listed
        else "held against the model's own layers alone: its loratrf.json is of an "
        "older version, which doesn't list the base's",
        "parity": "" if converted.parity else "not checked: add --check, with the base at hand",
    }
    print_rows(rows)
    if converted.parity:
        print_report(converted.parity)
    print_warnings(converted.warnings)


def _swappable_row(result: ExportResult) -> dict[str, str]:
    swappable = result.manifest.swappable
    if swappable is None:
        return {}
    if names := swappable.slots:
        return {"slots": ", ".join(f"{slot} {name}" for name, slot in names.items()) + "; -1 is the base"}
    if swappable.default == "required":
        return {"swaps": f"{result.model.with_name(str(swappable.file))}; every run must name an adapter"}
    own = any(weight.default == "adapter" for weight in swappable.weights) and swappable.default == "base"
    default = f"the {swappable.default}'s" + (", with the adapter's head: the base has none" if own else "")
    return {"swaps": f"{result.model.with_name(str(swappable.file))}; without an adapter the output is {default}"}


def _print_summary(result: ExportResult) -> None:
    manifest = result.manifest
    kinds = ", ".join(f"{count} {op}" for op, count in manifest.operators.items()) or "none"
    weights = result.sizes[result.model.name] + sum(file.bytes for file in manifest.model.files.values())
    staged = STAGES_FILE in result.sizes
    rows = {
        "model": f"{result.model} ({weights / 1e6:.1f} MB with weights)",
        "mode": manifest.summary,
        **_swappable_row(result),
        "runs": "with loratrf-generate, or transformers' ExportedModel" if staged else "",
        "layers": f"{len(manifest.layers)} adapted ({kinds})",
        "time": f"{sum(result.seconds.values()):.1f} s",
        "parity": "" if result.parity else "not checked (--no-check)",
    }
    print_rows(rows)
    if result.parity:
        print_report(result.parity)
    print_warnings(result.warnings)


if __name__ == "__main__":
    raise SystemExit(main())
