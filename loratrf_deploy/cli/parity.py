"""loratrf-parity: the command line around `check_parity` and `check_grouped_parity`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..ops.schemas import Device
from ..parity.grouped import check_grouped_parity
from ..parity.single import check_parity
from ..pytorch.quiet import quiet
from ..reports.formats import FORMATS, check_report_path, print_report, write_report
from ..runtime.session import PROVIDERS
from .shared import (
    Parser,
    command,
    evaluate_option,
    named_paths,
    positive,
    print_json,
    progress,
    require_extra,
    trust_remote_code_option,
)

if TYPE_CHECKING:
    from ..parity.result import ParityReport

__all__ = ["main", "run"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-parity --model model.onnx --adapter PATH: exit 0 parity holds, 1 it doesn't, 2 the input is at fault."""
    args = _parser().parse_args(argv)
    for path in args.report:
        check_report_path(path)
    with progress() as step:
        adapter = args.adapter if args.adapters is None else named_paths(args.adapters)
        report = run(
            args.model,
            adapter,
            args.base_model,
            args.inputs,
            args.tolerance,
            args.device,
            step,
            evaluate_on=args.evaluate,
            trust_remote_code=args.trust_remote_code,
        )
    for path in args.report:
        write_report(report, path)
    if args.json:
        print_json(report.to_dict())
    else:
        print_report(report)
    return 0 if report.passed else 1


def run(
    model: Path,
    adapter: Path | Mapping[str, Path],
    base_model: str | None = None,
    inputs: Path | None = None,
    tolerance: float | None = None,
    device: Device = "cpu",
    step: Callable[[str], None] = lambda text: None,
    *,
    evaluate_on: Path | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """`check_parity` on a file of inputs, quietly; `check_grouped_parity` for adapters by name.

    Raises UserError, also where the extras that it needs are not installed.
    """
    require_extra("cpu", "export")
    for what, path in (("model", model), ("inputs file", inputs), ("file to evaluate on", evaluate_on)):
        if path is not None and not os.path.isfile(path):
            raise UserError(f"No {what} at {path}.")
    with quiet():
        if isinstance(adapter, Mapping):
            if inputs is not None or evaluate_on is not None or device != "cpu":
                raise UserError(
                    "--inputs, --evaluate and --providers go with --adapter: several adapters are compared on random "
                    "batches, on the CPU. Leave them out."
                )
            return check_grouped_parity(
                model, adapter, base_model, tolerance=tolerance, trust_remote_code=trust_remote_code, step=step
            )
        return check_parity(
            model,
            adapter,
            base_model,
            inputs,
            evaluate_on=evaluate_on,
            tolerance=tolerance,
            device=device,
            trust_remote_code=trust_remote_code,
            step=step,
        )


def _parser() -> Parser:
    parser = Parser(
        "loratrf-parity",
        "Prove that an exported model computes what PyTorch computes, with the custom-op library and "
        "without it, and that the adapter has an effect. On failure names the first layer that drifts.",
    )
    parser.add_argument("--model", required=True, type=Path, help="exported model, such as model.onnx")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", type=Path, help="adapter that it was exported from: folder or ORG/NAME[@REVISION]")
    which.add_argument(
        "--adapters", metavar="NAME=PATH", nargs="+", help="those that a grouped model was exported from, by its names"
    )
    parser.add_argument("--base-model", help="folder or hub name of the base model (default: what the adapter names)")
    parser.add_argument(
        "--inputs",
        type=Path,
        help='JSON lines: texts ({"text": ...}, {"sentence1": ..., "sentence2": ...}, {"question": ..., "context": '
        '...}) or arrays by input name ({"input_ids": [...]}); default: random batches of several sizes',
    )
    evaluate_option(parser)
    parser.add_argument(
        "--report", action="append", default=[], type=Path, help=f"write a report ({', '.join(FORMATS)}); repeatable"
    )
    parser.add_argument(
        "--providers",
        dest="device",
        choices=PROVIDERS,
        default="cpu",
        help="where ONNX Runtime computes; PyTorch stays on the CPU (default: cpu)",
    )
    trust_remote_code_option(parser)
    parser.add_argument(
        "--tolerance",
        type=positive,
        help="largest relative error, max|a-b| / max|b| (default: 1e-5 for float32 weights, 1e-4 in language models, "
        "2e-3 for float16)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
