"""loratrf-bench: what exported models cost on this machine: latency, memory, size, side by side."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..bench.deployments import Deployment, Setting, deployments, model_file, peak_megabytes
from ..bench.rounds import Figures, cpu_name, measure
from ..errors import UserError
from ..formats.manifest import MANIFEST, read_manifest
from ..reports.bars import bars
from ..reports.formats import check_report_path, write_aside
from ..runtime.session import PROVIDERS
from .shared import (
    Parser,
    command,
    count,
    named_paths,
    plain,
    print_json,
    print_table,
    progress,
    require_extra,
    stdout_console,
)

__all__ = ["main"]


@dataclass(frozen=True)
class _Model:
    """Of an export: its name here, its file, how it was made, megabytes on disk and in memory, seconds to open it."""

    name: str
    file: Path
    made: str
    megabytes: float
    opens_s: float
    peak_mb: float | None


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-bench --model DIR ...: exit 0 done, 2 the input is at fault."""
    args = _parser().parse_args(argv)
    require_extra("cpu")
    if args.svg is not None:
        check_report_path(args.svg, (".svg",))
    adapters = named_paths(args.adapter, "--adapter")
    setting = Setting(args.threads, args.tokens, args.library, args.device)
    files = [model_file(path) for path in args.model]
    with progress() as step:
        models, timed = _open(files, adapters, setting, max(args.batch), max(args.sequence), step)
        figures: list[Figures] = []
        for batch in args.batch:
            for sequence in args.sequence:
                step(f"timing {batch} x {sequence}")
                figures += measure(timed, batch, sequence, args.rounds, args.tokens)
    facts = _facts(args)
    if args.svg is not None:
        write_aside(bars(figures, str(facts["machine"])), args.svg)
    if args.json:
        print_json(
            {**facts, "models": [asdict(model) for model in models], "figures": [asdict(row) for row in figures]}
        )
    else:
        _show(facts, models, figures)
    return 0


def _open(
    files: Sequence[Path],
    adapters: dict[str, Path],
    setting: Setting,
    batch: int,
    sequence: int,
    step: Callable[[str], None],
) -> tuple[list[_Model], list[Deployment]]:
    models: list[_Model] = []
    timed: list[Deployment] = []
    for name, file in zip(_names(files), files, strict=True):
        step(f"opening {file}")
        begin = time.perf_counter()
        own = deployments(name, file, adapters, setting)
        seconds = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in file.parent.glob("*.onnx*") if path.is_file()) / 1e6
        peak = peak_megabytes(file, adapters, setting, batch, sequence)
        manifest = file.with_name(MANIFEST)
        made = "not by loratrf-export"
        if manifest.is_file():
            described = read_manifest(manifest)
            made = ("swappable, " if described.swappable and described.swappable.file else "") + described.summary
        models.append(_Model(name, file, made, size, seconds, peak))
        timed += own
    if len({one.generates for one in timed}) > 1:
        raise UserError("Some of these models generate texts and others don't: time each kind by itself.")
    return models, timed


def _names(files: Sequence[Path]) -> list[str]:
    """What tells them apart: the folders' names; where these are equal, the paths."""
    short = [file.resolve().parent.name for file in files]
    return short if len(set(short)) == len(short) else [str(file) for file in files]


def _facts(args: argparse.Namespace) -> dict[str, str | int]:
    import onnxruntime

    threads = args.threads or os.cpu_count() or 1
    machine = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {"machine": machine, "onnxruntime": onnxruntime.__version__, "rounds": args.rounds, "device": args.device}


def _show(facts: dict[str, str | int], models: Sequence[_Model], figures: Sequence[Figures]) -> None:
    console = stdout_console()
    console.print(
        plain(
            f"{facts['machine']}; onnxruntime {facts['onnxruntime']}, {facts['device']}; {facts['rounds']} rounds, "
            "in turns; ratios are medians of the rounds' own, to the first"
        )
    )
    head = ("model", "export", "MB", "opens, s", "peak MB")
    rows = [
        (
            one.name,
            one.made,
            f"{one.megabytes:.1f}",
            f"{one.opens_s:.2f}",
            "-" if one.peak_mb is None else f"{one.peak_mb:.0f}",
        )
        for one in models
    ]
    print_table(head, rows, left=2)
    for batch, sequence in dict.fromkeys((row.batch, row.sequence) for row in figures):
        shown = [row for row in figures if (row.batch, row.sequence) == (batch, sequence)]
        columns = (f"{batch} x {sequence}", "", "p50 ms", "p99 ms", "ratio", "per second")
        print_table(columns, [_cells(row) for row in shown], left=2)


_UNITS = {"run": "rows", "prompt": "tokens", "token": "tokens"}


def _cells(row: Figures) -> tuple[str, ...]:
    times = (f"{row.p50_ms:.3g}", f"{row.p99_ms:.3g}", f"{row.ratio:.3f}")
    return (row.deployment, row.part, *times, f"{row.per_second:.3g} {_UNITS[row.part]}")


def _parser() -> Parser:
    parser = Parser(
        "loratrf-bench",
        "Time exported models side by side on this machine: of every one the base and its adapters, at every batch and "
        "length; a run of an encoder, the prompt and each further token of a language model.",
    )
    parser.add_argument(
        "--model",
        required=True,
        nargs="+",
        type=Path,
        help="exported folders, or the model.onnx in them; the first is what the others are held against",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="an .onnx_adapter, for models that take them; repeatable (default: those that it was exported with)",
    )
    parser.add_argument("--batch", nargs="+", type=count, default=[1, 8], help="rows (default: 1 8)")
    parser.add_argument(
        "--sequence",
        nargs="+",
        type=count,
        default=[16, 128],
        help="tokens of a row, or frames of sound (default: 16 128)",
    )
    parser.add_argument("--tokens", type=count, default=16, help="new tokens of a text (default: 16)")
    parser.add_argument("--rounds", type=count, default=30, help="of every shape (default: 30)")
    parser.add_argument("--threads", type=count, default=0, help="of a run (default: as many as the CPU has cores)")
    parser.add_argument("--device", choices=PROVIDERS, default="cpu", help="of encoders (default: cpu)")
    parser.add_argument(
        "--library",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="our custom-op library; without it, the operators run by their definitions in the file",
    )
    parser.add_argument("--svg", metavar="FILE", type=Path, help="the latencies as a picture")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
