"""loratrf-generate: try an exported causal language model out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..genai.generate import generate_tokens, load_model
from .shared import Parser, command, count, positive, print_json, require_extra

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-generate --model DIR --prompt TEXT: prints the text as it is made. Exit 0 done, 2 the input is at fault.

    The text goes to stdout, the speed to stderr; --json has both, when all is done.
    """
    args = _parser().parse_args(argv)
    require_extra("genai")
    model = load_model(args.model.parent if args.model.suffix == ".onnx" else args.model)
    import onnxruntime_genai as og

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
    begin, times, pieces = time.perf_counter(), [], [args.prompt]
    if not args.json:
        print(args.prompt, end="", flush=True)
    for token in generate_tokens(model, prompt, args.max_new_tokens, **search):
        times.append(time.perf_counter() - begin)
        pieces.append(stream.decode(token))
        if not args.json:
            print(pieces[-1], end="", flush=True)
    made, first, last = len(times), times[0], times[-1]
    if args.json:
        print_json({"text": "".join(pieces), "tokens": made, "first_token_seconds": first, "seconds": last})
        return 0
    print()
    speed = f", then {(made - 1) / (last - first):.1f} tokens/s" if made > 1 else ""
    print(f"{made} tokens; first after {1e3 * first:.0f} ms{speed}", file=sys.stderr)
    return 0


def _parser() -> Parser:
    parser = Parser("loratrf-generate", "Generate text with a causal language model that loratrf-export wrote.")
    parser.add_argument("--model", required=True, type=Path, help="the exported folder, or the model.onnx in it")
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--max-new-tokens", type=count, default=128, help="at most (default: 128)")
    parser.add_argument("--temperature", type=positive, help="sample instead of taking the likeliest token")
    parser.add_argument("--top-p", type=positive, default=1.0, help="sample among the likeliest (default: 1, all)")
    parser.add_argument("--seed", type=int, help="of sampling")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
