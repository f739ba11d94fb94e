"""loratrf-perplexity: which deployment of a language model loses how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..errors import one_line
from ..parity.perplexity import WINDOW, perplexities
from ..pytorch.quiet import quiet
from .shared import Parser, command, count, print_json, progress, require_extra, trust_remote_code_option

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-perplexity --text FILE --adapter PATH --model a/model.onnx ...: exit 0 done, 2 the input is at fault."""
    args = _parser().parse_args(argv)
    require_extra("cpu", "export")
    with progress() as step, quiet():
        rows = perplexities(
            args.text,
            args.adapter,
            args.model,
            args.base_model,
            window=args.window,
            trust_remote_code=args.trust_remote_code,
            step=step,
        )
    if args.json:
        print_json({"deployments": [dataclasses.asdict(row) for row in rows]})
        return 0
    width = max(len(row.name) for row in rows)
    print(f"{'deployment':<{width}}  {'perplexity':>12}  log(perplexity) - PyTorch's")
    for row in rows:
        print(f"{one_line(row.name):<{width}}  {row.perplexity:>12.4f}  {row.loss:>+27.6f}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "loratrf-perplexity",
        "Perplexity of exported causal language models on a text, beside PyTorch's with the adapter and "
        "without it: which deployment loses how much.",
    )
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text file")
    parser.add_argument("--adapter", required=True, type=Path, help="adapter folder, or ORG/NAME[@REVISION]")
    parser.add_argument("--base-model", help="folder or hub name of the base model (default: what the adapter names)")
    parser.add_argument("--model", required=True, action="append", type=Path, help="exported model.onnx; repeatable")
    trust_remote_code_option(parser)
    parser.add_argument("--window", type=count, default=WINDOW, help=f"tokens judged together (default: {WINDOW})")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
