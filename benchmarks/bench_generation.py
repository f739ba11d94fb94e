"""Soaks a GenerationSession: many threads and adapters, every answer checked; and weighs resident adapters.

    python benchmarks/bench_generation.py [--seconds 60] [--adapters 20] [--resident 100] [--threads 32] [--out FILE]

A layer of LLaMA-3.2-1B's dimensions in int4, LoRA of rank 2 to 6 on all linear layers. Threads ask for 8 greedy tokens
after three prompts of different lengths, under one adapter a call, then one a row, while one thread replaces adapters
all the time; each answer must be what the prompt gets alone. Memory is what `--resident` loads of one file add to the
process, over the size of the files.
"""

from __future__ import annotations

import gc
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common

from loratrf_deploy import GenerationSession
from loratrf_deploy.export import ExportOptions, convert_adapter, export_adapter, export_grouped
from loratrf_deploy.pytorch.quiet import quiet

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21]]
TOKENS = 8


def main() -> None:
    parser = common.parser(__doc__, threads=32, out=None)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each soak")
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--resident", type=int, default=100)
    args = common.parse(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with quiet():
            calls, rows = models(folder, args.adapters)
        result = {
            "one adapter a call": soak(calls, args.seconds, args.threads, mixed=False),
            "one adapter a row": soak(rows, args.seconds, args.threads, mixed=True),
            "memory of resident adapters, over their files'": memory(calls, args.resident),
        }
    common.save(args.out, result)
    for what, found in result.items():
        print(f"{what}: {found}")


def models(folder: Path, count: int) -> tuple[Path, Path]:
    """The folders of a swappable and of a mixed model, with `count` converted adapters in each."""
    base = folder / "base"
    common.make_llama(base, 1, 2000)
    adapters = [folder / f"adapter-{number}" for number in range(count)]
    for number, path in enumerate(adapters):
        common.make_adapter(base, path, "lora", 2 + number % 5)
    options: dict[str, Any] = {"base_model": base, "quantize": "int4", "bundle_library": True, "check": False}
    calls, rows = folder / "calls" / "model.onnx", folder / "rows" / "model.onnx"
    export_adapter(adapters[0], calls, ExportOptions(swappable="base", **options))
    export_grouped({"first": adapters[0], "second": adapters[1]}, rows, ExportOptions(**options))
    for model in (calls, rows):
        for number, path in enumerate(adapters):
            convert_adapter(path, model, model.parent / f"a{number}.onnx_adapter", base_model=base)
    return calls.parent, rows.parent


def soak(folder: Path, seconds: float, threads: int, *, mixed: bool) -> dict[str, int]:
    """Number of answers in `seconds`, and of those that weren't what the prompt gets alone."""
    session = GenerationSession(folder)
    files = {path.stem: path for path in sorted(folder.glob("a*.onnx_adapter"))}
    for name, path in files.items():
        session.load(name, path)
    names = [None, *files]
    right = {
        name: [session.generate_tokens([row], adapter=name, max_new_tokens=TOKENS)[0] for row in PROMPTS]
        for name in names
    }
    end = time.monotonic() + seconds
    answers, wrong = [0] * threads, [0] * threads

    def work(number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < end:
            which = [choose.choice(names) for _ in PROMPTS] if mixed else [choose.choice(names)] * len(PROMPTS)
            how: dict[str, Any] = {"adapters": which} if mixed else {"adapter": which[0]}
            made = session.generate_tokens(PROMPTS, max_new_tokens=TOKENS, **how)
            answers[number] += len(made)
            wrong[number] += sum(row != right[name][at] for at, (row, name) in enumerate(zip(made, which, strict=True)))

    def replace() -> None:
        choose = random.Random(-1)
        while time.monotonic() < end:
            name = choose.choice(list(files))
            session.load(name, files[name], replace=True)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in [*workers, threading.Thread(target=replace)]:
        worker.start()
    for worker in workers:
        worker.join()
    return {"answers": sum(answers), "wrong": sum(wrong)}


def memory(folder: Path, count: int) -> float:
    """What `count` loads of one adapter add to the process's resident memory, over the size of as many files."""
    session, file = GenerationSession(folder), folder / "a4.onnx_adapter"
    session.load("first", file)
    session.generate_tokens(PROMPTS, adapter="first", max_new_tokens=TOKENS)
    gc.collect()
    before = resident()
    for number in range(count):
        session.load(f"more {number}", file)
    gc.collect()
    return round((resident() - before) / (count * file.stat().st_size), 3)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
