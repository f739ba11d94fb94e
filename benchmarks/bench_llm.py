"""Times a language model in int4 on the CPU: adapters merged, constant, swapped, one a row, and other engines.

    python benchmarks/bench_llm.py [--base FOLDER | --layers 4 --vocabulary 128256] [--ranks 8 ...] [--batches 1 4 16]
                                   [--peers llama.cpp=PYTHON openvino=PYTHON] [--runs 3] [--rounds 4] [--threads 2]
                                   [--clock wall|cpu] [--keep FOLDER] [--out bench.json]

`--base` is a folder of a LLaMA. Without, it is LLaMA-3.2-1B's dimensions (hidden 2048, ffn 8192, 32 heads, 8 key/value
heads, 128256 tokens, tied) with random weights and `--layers` layers. Adapters are random, R = F on all linear layers.
Prefill is 128 tokens, of all rows of a batch together; decode is the next 32, 8, 4 of each of 1, 4, 16 rows.

Each deployment has a process of its own, which peers.py is; all start anew for every one of `--runs`, because where
weights come to lie in memory is worth some per cent and stays so for a process. In a round they run one after another,
in a random order; a figure is the median over rounds of the ratio to "no adapter" in the same round, or to whom a table
says. `--clock cpu` counts CPU time, which a busy machine disturbs far less (it needs --threads 1).

Swappable models and peers hold as many adapters as the largest batch has rows, and take another one in every round,
through onnxruntime-genai's Adapters: the swap is part of the prefill. "mixed LoRA, N adapters" is a model with N slots
whose rows take them in turn. A peer runs "N adapters" as peers.py says, one adapter's rows after another's; whether it
can have them in one batch is tried, and printed. `--peers` names the Python of each one's environment.

The last table is the error in the logits: against the same int4 base with the exact adapter, computed in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from peers import PEERS, Process, mixed_rows

from loratrf_deploy.export import ExportOptions, convert_adapter, export_adapter, export_grouped
from loratrf_deploy.export.genai import build
from loratrf_deploy.genai.generate import CONFIG_FILE
from loratrf_deploy.parity.onnx_runs import run_session, session_in_memory
from loratrf_deploy.parity.quantised import exact_arithmetic
from loratrf_deploy.pytorch.quiet import quiet

PREFILL, DECODE = 128, 32
"""Tokens, shared out among the rows."""
REFERENCE = "no adapter"
OWN = "the builder's own LoRA"
Times = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Contestant:
    """A row of the tables: who answers (one of the commands), and under which of the adapters that it holds.

    A batch is `shared` of the `held` adapters, others in every round; 0 is none.
    """

    command: str
    held: int = 1
    shared: int = 0

    def adapters(self, rows: int, round_: int) -> list[int]:
        return [(round_ + row % self.shared) % self.held if self.shared else -1 for row in range(rows)]


@dataclass(frozen=True)
class Field:
    """Who is compared: models of ours (name -> model.onnx), commands (name -> Process's arguments), and rows."""

    models: dict[str, Path]
    commands: dict[str, tuple[str, list[object]]]
    contestants: dict[str, Contestant]


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        base = args.base or folder / "base"
        if not base.is_dir():
            common.make_llama(base, args.layers, args.vocabulary)
        results = [one_rank(folder, base, rank, args) for rank in args.ranks]
    common.save(args.out, results)


def arguments() -> argparse.Namespace:
    sizes = {"layers": 4, "vocabulary": 128256}
    parser = common.parser(__doc__, **sizes, rounds=4, threads=os.cpu_count(), clock="wall", keep=None, out=None)
    parser.add_argument("--base", type=Path, help="folder of a LLaMA, in place of one of random weights")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8], help="R = F, one table each")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="rows, and numbers of adapters")
    parser.add_argument("--runs", type=int, default=3, help="processes of so many rounds")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(PEERS)}")
    args = common.parse(parser)
    args.peers = dict(peer.partition("=")[::2] for peer in args.peers)
    for name, python in args.peers.items():
        if name not in PEERS or not os.access(python, os.X_OK):
            parser.error(
                f"--peers has {name}={python}, expected NAME=PYTHON, NAME one of {', '.join(PEERS)}, PYTHON a program "
                "of its environment. peers.py says how these are made."
            )
    if args.base and not (args.base / "config.json").is_file():
        parser.error(f"--base {args.base} has no config.json. Expected a LLaMA's folder, as save_pretrained writes it.")
    return args


def one_rank(folder: Path, base: Path, rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints."""
    with quiet():
        field = field_of(folder, base, rank, args)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    times, versions = measure(field, args.batches, args.runs, args.rounds, vocabulary)
    result = {
        "model": described(base, args.base is None),
        "adapter": f"R = F = {rank} on all linear layers",
        "machine": f"{common.cpu_name()}, {args.threads} thread{'s' * (args.threads > 1)}, {args.clock} clock",
        "versions": ", ".join([f"onnxruntime {ort.__version__}", *versions]),
        "rounds": f"{args.runs} x {args.rounds} rounds",
        "times": times,
        "errors": logit_errors(field.models, vocabulary),
        "rows": tried_rows(field, args.peers),
    }
    print("; ".join(str(result[name]) for name in ("model", "adapter", "machine", "versions", "rounds")), end="\n\n")
    print(timing_table(times, args.batches), end="\n\n")
    print(pair_table(times, args.batches), end="\n\n")
    swaps = {name: own for name, parts in times.items() if (own := parts.get(f"swap {min(args.batches)}"))}
    print("swap:", ", ".join(f"{name} {1e6 * statistics.median(own):.0f} us" for name, own in swaps.items()))
    for name, words in result["rows"].items():
        print(f"rows under adapters of their own in one batch, {name}: {words}")
    columns = ["LoRA, error in the logits", "int4 weights, float32 arithmetic", "as shipped (int8 activations)"]
    errors = ([name, *(f"{value:.2e}" for value in row.values())] for name, row in result["errors"].items())
    print(f"\n{common.table(columns, errors)}\n", flush=True)
    return result


def described(base: Path, random: bool) -> str:
    config = json.loads((base / "config.json").read_text())
    name = "LLaMA-3.2-1B's dimensions, random" if random else base.name
    sizes = f"{config['num_hidden_layers']} layers, {config['hidden_size']} wide, {config['vocab_size']} tokens"
    return f"{name}: {sizes}, int4"


# Who is compared.


def field_of(folder: Path, base: Path, rank: int, args: argparse.Namespace) -> Field:
    top = max(args.batches)
    adapters = {kind: made_adapters(folder, base, kind, rank, top) for kind in ("lora", "loratrf")}
    models = exported(folder, base, rank, adapters, args.batches)
    commands: dict[str, tuple[str, list[object]]] = {}
    contestants = {}
    common_options = ["--threads", args.threads, "--clock", args.clock]
    for name, model in models.items():
        set_threads(model.parent, args.threads)
        files = [model.parent / f"{number}.onnx_adapter" for number in range(top)] if "swappable" in name else []
        engine = "genai-rows" if "mixed" in name else "genai"
        commands[name] = sys.executable, [engine, model.parent, *files, *common_options]
        contestants[name] = Contestant(name, top, 1) if files else Contestant(name)
    for count in args.batches:
        contestants[mixed(count)] = Contestant(mixed(count), count, count)
    contestants["mixed LoRA, no row adapted"] = Contestant(mixed(top))
    for peer, python in args.peers.items():
        for name, own in (("no adapter", []), ("LoRA", adapters["lora"])):
            command = [peer, base, *own, "--folder", folder / "peers", *common_options]
            commands[f"{peer}, {name}"] = python, command
            contestants[f"{peer}, {name}"] = Contestant(f"{peer}, {name}", top, 1 if own else 0)
        for count in sorted({*args.batches} - {1}):
            contestants[f"{peer}, {count} adapters"] = Contestant(f"{peer}, LoRA", top, count)
    return Field(models, commands, contestants)


def mixed(count: int) -> str:
    return f"mixed LoRA, {count} adapter{'s' * (count > 1)}"


def made_adapters(folder: Path, base: Path, kind: str, rank: int, count: int) -> list[Path]:
    paths = [folder / f"{kind}-{rank}-{number}" for number in range(count)]
    for number, path in enumerate(paths):
        if path.is_dir():
            continue
        if number == 0:
            common.make_adapter(base, path, kind, rank)
        else:
            common.vary_adapter(paths[0], path, number)
    return paths


def exported(
    folder: Path, base: Path, rank: int, adapters: dict[str, list[Path]], counts: Sequence[int]
) -> dict[str, Path]:
    """name -> model.onnx, REFERENCE first; swappable ones have their adapters beside them, by number."""
    options: dict[str, Any] = {"base_model": base, "quantize": "int4", "bundle_library": True, "check": False}
    models = {REFERENCE: folder / "bare" / "model.onnx"}
    if not models[REFERENCE].is_file():
        build(base, models[REFERENCE], "int4", "cpu", {})
    for kind, label, modes in (
        ("lora", "LoRA", ("merged", "separate", "swappable")),
        ("loratrf", "LoRATRF", ("separate", "swappable")),
    ):
        for mode in modes:
            how: dict[str, Any] = {"swappable": "base"} if mode == "swappable" else {"mode": mode}
            model = models[f"{mode} {label}"] = folder / f"{kind}-{rank}-{mode}" / "model.onnx"
            if not model.is_file():
                export_adapter(adapters[kind][0], model, ExportOptions(**options, **how))
            for number, adapter in enumerate(adapters[kind] if mode == "swappable" else []):
                file = model.parent / f"{number}.onnx_adapter"
                if not file.is_file():
                    convert_adapter(adapter, model, file, base_model=base)
    for count in counts:
        model = models[mixed(count)] = folder / f"mixed-{rank}-{count}" / "model.onnx"
        if not model.is_file():
            export_grouped({path.name: path for path in adapters["lora"][:count]}, model, ExportOptions(**options))
    models[OWN] = folder / f"own-{rank}" / "model.onnx"
    if not models[OWN].is_file():
        build(base, models[OWN], "int4", "cpu", {"adapter_path": str(adapters["lora"][0])})
    return models


def set_threads(folder: Path, threads: int) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=4))


# Time.


def measure(field: Field, batches: Sequence[int], runs: int, rounds: int, vocabulary: int) -> tuple[Times, list[str]]:
    """Seconds by contestant, "part rows" and round, parts as peers.py names them; and the engines' versions."""
    times: Times = {name: {} for name in field.contestants}
    draw = np.random.default_rng(0)
    prompts = {rows: draw.integers(3, vocabulary, (rows, max(1, PREFILL // rows))).tolist() for rows in batches}
    versions: set[str] = set()
    for run in range(runs):
        processes: dict[str, Process] = {}
        try:
            for name in common.shuffled(field.commands, run):
                processes[name] = Process(*field.commands[name])
            versions |= {process.version for process in processes.values()}
            for round_ in range(rounds + 1):  # the first one is short and doesn't count
                for rows in batches:
                    steps = max(4, DECODE // rows) if round_ else 1
                    for name in common.shuffled(field.contestants, f"{run} {round_} {rows}"):
                        own = field.contestants[name]
                        if name.partition(", ")[0] in PEERS and own.shared > rows:
                            continue  # the same as with fewer adapters
                        answer = processes[own.command].ask(prompts[rows], steps, own.adapters(rows, round_))
                        for part in ("prefill", "decode", "swap"):
                            if round_ and answer[part] is not None:
                                times[name].setdefault(f"{part} {rows}", []).append(answer[part])
        finally:
            for process in processes.values():
                process.close()
    return times, sorted(versions)


def tried_rows(field: Field, peers: Sequence[str]) -> dict[str, str]:
    """What two rows of one batch get that ask for an adapter each, or for one and none."""
    ours = [name for name, own in field.contestants.items() if own.shared > 1 and name == own.command][-1:]
    tried = {}
    for name in [*ours, *(f"{peer}, LoRA" for peer in peers)]:
        process = Process(*field.commands[name])
        try:
            for words, pair in (("two adapters", (0, 1)), ("one and none", (0, -1))):
                tried[f"{name}, {words}"] = mixed_rows(process.ask, list(range(5, 13)), pair)
        finally:
            process.close()
    return tried


def timing_table(times: Times, batches: Sequence[int]) -> str:
    """Milliseconds of REFERENCE, and everybody's ratio to it."""
    parts = [f"{part} {rows}" for rows in batches for part in ("prefill", "decode")]
    columns = [f"{part} x {max(1, PREFILL // int(part.split()[1]))}" if "prefill" in part else part for part in parts]
    rows = common.parts(times, REFERENCE)
    cells = [[f"{REFERENCE}, ms", *(f"{rows[REFERENCE][f'{part}_ms']:.2f}" for part in parts)]]
    for name, row in rows.items():
        if name != REFERENCE:
            cells.append([name, *(f"{row[f'{part}_ratio']:.3f}" if f"{part}_ratio" in row else "" for part in parts)])
    return common.table(["deployment", *columns], cells)


def pair_table(times: Times, batches: Sequence[int]) -> str:
    """The median and the quartiles of the rounds' ratios of those that a reader compares."""
    parts = [f"{part} {rows}" for rows in batches for part in ("prefill", "decode")]
    cells = []
    for name, over in pairs(times, batches):
        row = []
        for part in parts:
            both = times[name].get(part), times[over].get(part)
            row.append(spread(*both) if all(both) else "")
        cells.append([f"{name} / {over}", *row])
    return common.table(["one over another", *parts], cells)


def pairs(names: Times, batches: Sequence[int]) -> Iterator[tuple[str, str]]:
    several = sorted({*batches} - {1})
    for kind in ("LoRA", "LoRATRF"):
        yield f"swappable {kind}", f"separate {kind}"
    for count in sorted(batches):
        yield mixed(count), "separate LoRA"
    yield "separate LoRA", OWN
    for peer in PEERS:
        if f"{peer}, LoRA" in names:
            yield f"{peer}, LoRA", f"{peer}, no adapter"
            yield REFERENCE, f"{peer}, no adapter"
            yield "swappable LoRA", f"{peer}, LoRA"
            for count in several:
                yield mixed(count), f"{peer}, {count} adapters"


def spread(times: Sequence[float], reference: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


def logit_errors(models: dict[str, Path], vocabulary: int) -> dict[str, dict[str, float]]:
    """max|a-b| / max|b| of the logits, b: our separate LoRA without the library, in float32 arithmetic."""
    ids = np.random.default_rng(1).integers(0, min(vocabulary, 1000), (1, 32))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    def logits(name: str, *, exact: bool, library: bool) -> Any:
        graph = ir.load(models[name])
        width = json.loads((models[name].parent / CONFIG_FILE).read_text())["model"]["decoder"]["head_size"]
        for value in graph.graph.inputs:
            if value.name.startswith("past_key_values."):
                value.shape = ir.Shape([*value.shape[:-1], width])
        if exact:
            exact_arithmetic(graph)
        return run_session(session_in_memory(graph, models[name], library=library), batch, ["logits"])["logits"]

    expected = logits("separate LoRA", exact=True, library=False)
    rows = {}
    for name in ("separate LoRA", OWN):
        rows[name] = {
            kind: float(np.abs(logits(name, exact=exact, library=True) - expected).max() / np.abs(expected).max())
            for kind, exact in (("exact", True), ("shipped", False))
        }
    return rows


if __name__ == "__main__":
    main()
