"""loratrf-generate: try an exported causal language model out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..genai.generate import generate_tokens, load_model
from .parity import positive
from .shared import command

__all__ = ["count", "main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-generate --model DIR --prompt TEXT: prints the text as it is made. Exit 0 done, 2 the input is at fault.

    The text goes to stdout, the speed to stderr.
    """
    args = _parser().parse_args(argv)
    model = load_model(args.model.parent if args.model.suffix == ".onnx" else args.model)
    import onnxruntime_genai as og  # load_model says it where it is missing

    tokenizer = og.Tokenizer(model)
    prompt = tokenizer.encode(args.prompt)
    if not len(prompt):
        raise UserError("--prompt is empty: the model needs at least one token to go on from.")
    stream = tokenizer.create_stream()
    search = {}
    if args.temperature is not None:
        search = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
        if args.seed is not None:
            search["random_seed"] = args.seed
    begin, first, made = time.perf_counter(), 0.0, 0
    print(args.prompt, end="", flush=True)
    for token in generate_tokens(model, prompt, args.max_new_tokens, **search):
        print(stream.decode(token), end="", flush=True)
        made += 1
        first = first or time.perf_counter()
    print()
    seconds = time.perf_counter() - first
    speed = f", then {(made - 1) / seconds:.1f} tokens/s" if made > 1 else ""
    print(f"{made} tokens; first after {1e3 * (first - begin):.0f} ms{speed}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loratrf-generate", description="Generate text with a causal language model that loratrf-export wrote."
    )
    parser.add_argument("--model", required=True, type=Path, help="the exported folder, or the model.onnx in it")
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--max-new-tokens", type=count, default=128, help="at most (default: 128)")
    parser.add_argument("--temperature", type=positive, help="sample instead of taking the likeliest token")
    parser.add_argument("--top-p", type=positive, default=1.0, help="sample among the likeliest (default: 1, all)")
    parser.add_argument("--seed", type=int, help="of sampling")
    return parser


def count(text: str) -> int:
    """A number over zero, of an option."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number over zero")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
