"""loratrf-config: where a C++ program, or its CMake, finds the operators' library and header."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..ops.library import library_path
from .shared import Parser, command, print_json

__all__ = ["main"]

_PACKAGE = Path(__file__).parents[1]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-config --library | --include | --cmakedir: exit 0 printed, 2 the library isn't built, or not for here."""
    parser = Parser("loratrf-config", "Print where a C++ program finds the operators: docs/cpp.md.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--library", action="store_true", help="path of the custom-op library")
    which.add_argument("--include", action="store_true", help="folder of loratrf.h")
    which.add_argument(
        "--cmakedir", action="store_true", help="folder for CMake: -Dloratrf_DIR=$(loratrf-config --cmakedir)"
    )
    args = parser.parse_args(argv)
    library = library_path()
    places = {"library": library, "include": _PACKAGE / "include", "cmakedir": _PACKAGE / "cmake"}
    (name,) = (name for name in places if getattr(args, name))
    if args.json:
        print_json({name: str(places[name])})
    else:
        print(places[name])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
