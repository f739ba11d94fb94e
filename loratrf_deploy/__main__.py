"""python -m loratrf_deploy: the commands that the package installs, one line each. Needs no extra."""

from __future__ import annotations

from collections.abc import Sequence

from .cli.shared import Parser, command, print_json

COMMANDS = {
    "loratrf-export": "adapter and base model to ONNX, proven against PyTorch before anything is written",
    "loratrf-parity": "whether an exported model computes what PyTorch computes, and the layer that drifts if not",
    "loratrf-generate": "text from an exported language model",
    "loratrf-perplexity": "what a deployment of a language model costs in quality",
    "loratrf-inspect": "what is in an adapter or an exported model",
    "loratrf-bench": "what exported models cost on this machine, side by side",
    "loratrf-config": "where a C++ program finds the operators",
    "loratrf-serve": "an exported model over HTTP, each request under the adapter that it names",
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit 0 listed, 2 for any argument but --version, --json and --help."""
    parser = Parser("loratrf-deploy", "List the commands that loratrf-deploy installs.")
    parser.prog = "python -m loratrf_deploy"  # what --version prints is the package's name
    args = parser.parse_args(argv)
    if args.json:
        print_json(COMMANDS)
    else:
        for name, what in COMMANDS.items():
            print(f"{name:<20}{what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
