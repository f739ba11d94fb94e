"""Fuzzes what strangers send: adapter folders, .onnx_adapter files with their manifests, graphs of our operators.

    python tests/fuzz/run.py adapters|adapter-files|graphs [--cases 3000] [--first 0] [--jobs 1] [--limit 5]
                                                            [--keep FOLDER]

Every case is a seed: `--first SEED --cases 1` repeats one. Cases run in processes of their own with a time limit and
a limit of memory, so that a crash or a hang is found and named too. Exits 1 where a case was a finding.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

MEMORY = 8 << 30
"""Bytes of address space that a case's process may take beyond what it has at the start."""
AT_ONCE = 1000
"""Cases of one process."""


def fuzz(
    target: str, cases: int, first: int = 0, jobs: int = 1, limit: float = 5, keep: Path | None = None
) -> tuple[collections.Counter[str], list[str]]:
    """({"accepted": n, "refused": n, "found": n}, what was found) of `cases` seeds from `first` on.

    A case may take `limit` seconds. Samples are made in `keep`, or taken from there.
    """
    from targets import TARGETS

    with contextlib.ExitStack() as stack:
        samples = keep or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "samples"
        if not samples.is_dir():
            TARGETS[target].prepare(samples)
        ranges = [(start, min(start + AT_ONCE, first + cases)) for start in range(first, first + cases, AT_ONCE)]
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(lambda span: _chunk(target, samples, limit, *span), ranges))
    counts: collections.Counter[str] = collections.Counter()
    found: list[str] = []
    for outcomes, findings in results:
        counts.update(outcomes)
        found += findings
    return counts, found


def _chunk(target: str, samples: Path, limit: float, start: int, stop: int) -> tuple[list[str], list[str]]:
    """Outcomes of the seeds from `start` to `stop`; a process that dies is named and followed by another one."""
    outcomes: list[str] = []
    found: list[str] = []
    while start + len(outcomes) < stop:
        seed = start + len(outcomes)
        command = [
            sys.executable,
            HERE / "run.py",
            target,
            "--worker",
            samples,
            "--first",
            seed,
            "--cases",
            stop - seed,
        ]
        command += ["--limit", limit]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        outcomes += [line.partition(" ")[0] for line in lines]
        found += [line.partition(" ")[2].replace("\\n", "\n") for line in lines if line.startswith("found")]
        if done.returncode:
            outcomes.append("found")
            died = f"{target} seed {start + len(outcomes) - 1}: the process ended with {done.returncode}\n"
            found.append(died + done.stderr[-3000:])
    return outcomes, found


def work(target: str, samples: Path, limit: float, first: int, cases: int) -> None:
    """A process's cases: a line for each on stdout."""
    from targets import TARGETS

    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # ONNX Runtime prints when it refuses a model
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    faulthandler.dump_traceback_later(10 * limit, exit=True)
    _warm_up(target, samples, scratch)
    faulthandler.cancel_dump_traceback_later()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    try:
        for seed in range(first, first + cases):
            faulthandler.dump_traceback_later(limit, exit=True)
            try:
                outcome = TARGETS[target].case(samples, Random(seed), scratch)
            except BaseException:  # SystemExit and KeyboardInterrupt are findings too
                outcome = "found " + f"{target} seed {seed}: {traceback.format_exc()}".replace("\n", "\\n")
            faulthandler.cancel_dump_traceback_later()
            said.write(outcome + "\n")
            for path in scratch.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _warm_up(target: str, samples: Path, scratch: Path) -> None:
    """Imports and sessions that the first case would be charged with."""
    from targets import TARGETS

    if target == "adapters":
        import peft.tuners.tuners_utils  # noqa: F401
    for seed in range(3):
        with contextlib.suppress(Exception):
            TARGETS[target].case(samples, Random(-1 - seed), scratch)
        shutil.rmtree(scratch)
        scratch.mkdir()


def main() -> int:
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=5, help="seconds of a case")
    parser.add_argument("--keep", type=Path, help="folder of the samples, made once")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.target, args.worker, args.limit, args.first, args.cases)
        return 0
    counts, found = fuzz(args.target, args.cases, args.first, args.jobs, args.limit, args.keep)
    print("\n".join(found))
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
