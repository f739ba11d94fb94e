"""Swapping adapters at run time: what a swap, a load and an adapter's memory cost, and many adapters against one.

    python benchmarks/bench_adapters.py [--part swap residents mixed] [--model bert-base|minilm] [--kind lora|loratrf]
                                        [--rounds 30] [--resident 1024] [--soak SECONDS] [--out bench.json]

The adapter has R = 8 (and F = 8) on query and value. What is compared runs in one process, one call each per round, in
a random order; a ratio is the median of the rounds' own ratios. Memory is the growth of the process's RSS. With --soak
it does one thing only: 32 threads ask 100 adapters, each answer is checked, and adapters come and go meanwhile.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnxruntime as ort
from common import interleaved, ratio, timed

from loratrf_deploy import AdapterSession, create_session
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.formats.adapter_file import read_adapter_file, write_adapter_file
from loratrf_deploy.pytorch.quiet import quiet

PARTS = ("swap", "residents", "mixed")
FILES = 16
"""Different adapter files; more adapters than that are further copies in memory."""


def main() -> None:
    parser = common.parser(__doc__, model="bert-base", kind="lora", rounds=30, out=None)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--resident", type=int, default=1024, help="the largest number of resident adapters")
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.model, args.kind, args.rounds)
        rows = bench.soak(args.soak) if args.soak else bench.measure(args.part, args.resident)
    machine = f"{common.cpu_name()}, {os.cpu_count()} threads; ORT {ort.__version__}"
    head = f"{args.model}, {args.kind} R = 8 on query and value; {machine}"
    print(f"{head}; {args.rounds} rounds\n\n{common.table(['what', 'value'], rows.items())}")
    common.save(args.out, {"setting": head, "rows": rows})


class Bench:
    """The exports and adapter files that are measured, made in `folder`."""

    def __init__(self, folder: Path, model: str, kind: str, rounds: int):
        self.rounds = rounds
        paths = [folder / name / "model.onnx" for name in ("swappable", "constant", "grouped")]
        self.swappable, self.constant, self.grouped = paths
        with quiet():
            self.base = base = common.make_base(folder / "base", model)
            self.adapter = adapter = common.make_adapter(base, folder / "adapter", kind)
            options: dict[str, Any] = {"base_model": base, "mode": "separate", "check": False}
            export_adapter(adapter, self.swappable, ExportOptions(swappable="base", **options))
            export_adapter(adapter, self.constant, ExportOptions(**options))
        self.files = variants(self.swappable.with_name("adapter.onnx_adapter"))
        self.size = self.files[0].stat().st_size

    def open(self) -> AdapterSession:
        return AdapterSession(self.swappable)

    def measure(self, parts: Sequence[str], resident: int) -> dict[str, str]:
        """The figures of `parts`, worded."""
        rows: dict[str, str] = {"adapter file, MB": f"{self.size / 1e6:.2f}"}
        if "swap" in parts:
            rows |= self.loading() | self.swapping() | self.against_constant() | self.other_ways()
        if "residents" in parts:
            rows |= self.residents(resident)
        if "mixed" in parts:
            rows |= self.mixed()
        return rows

    def loading(self) -> dict[str, str]:
        session, ours, theirs = self.open(), [], []
        for turn in range(self.rounds + 2):
            file = self.files[turn % FILES]
            ours.append(timed(lambda file=file, turn=turn: session.load(str(turn), file)))
            theirs.append(timed(lambda file=file: ort.LoraAdapter().Load(str(file))))
        return {
            "load, ms (median)": milliseconds(ours[2:]),
            "load with ONNX Runtime's LoraAdapter (maps the file, checks no hashes), ms": milliseconds(theirs[2:]),
        }

    def swapping(self) -> dict[str, str]:
        """A run with another adapter than the run before, less one with the same; one token, so that little else is."""
        session, ids = self.open(), inputs(1, 1)
        session.load("a", self.files[0])
        session.load("b", self.files[1])
        for name in "abab":
            session.run(ids, adapter=name)
        swaps, firsts, halves = [], [], []
        for turn in range(4 * self.rounds):
            here, there = "ab"[turn % 2], "ba"[turn % 2]
            session.run(ids, adapter=here)
            same = timed(lambda here=here: session.run(ids, adapter=here))
            swaps.append(timed(lambda there=there: session.run(ids, adapter=there)) - same)
            session.run(ids, adapter=there)
            same = timed(lambda there=there: session.run(ids, adapter=there))
            halves.append(timed(lambda there=there: session.run(ids, adapter=there, scale=0.5)) - same)
            session.load("new", self.files[turn % FILES], replace=True)
            session.run(ids, adapter=there)
            same = timed(lambda there=there: session.run(ids, adapter=there))
            firsts.append(timed(lambda: session.run(ids, adapter="new")) - same)
        inside = Stopwatch(session._session)
        for name in "ab":
            session._residents.resident(name)._session = inside  # type: ignore[assignment]
        around: dict[str, list[float]] = {"same": [], "swap": []}
        for turn in range(8 * self.rounds):
            whole = timed(lambda turn=turn: session.run(ids, adapter="ab"[turn // 2 % 2]))
            around["same" if turn % 2 else "swap"].append(whole - inside.seconds)
        return {
            "swap to a resident adapter, ms more than a run with the same (median; quartiles)": spread(swaps),
            "all that AdapterSession does around ONNX Runtime's run, ms: swap; same adapter": (
                f"{milliseconds(around['swap'])}; {milliseconds(around['same'])}"
            ),
            "first run of a loaded adapter, ms more": spread(firsts),
            "scale 0.5, ms more": spread(halves),
        }

    def against_constant(self) -> dict[str, str]:
        """Weights as inputs, packed in every run, against the same weights as constants, packed once."""
        session, constant = self.open(), create_session(self.constant)
        session.load("a", self.files[0])
        rows = {}
        for batch, sequence in ((1, 1), (1, 16), (1, 128), (8, 128)):
            ids = inputs(batch, sequence)
            calls = {
                "constant": lambda ids=ids: constant.run(None, ids),
                "swappable": lambda ids=ids: session.run(ids, adapter="a"),
            }
            times = interleaved(calls, self.rounds if batch == 1 else max(self.rounds // 3, 5))
            rows[f"run-time weights against constants, {batch} x {sequence} (ratio; constant, ms)"] = (
                f"{ratio(times['swappable'], times['constant']):.3f}; {milliseconds(times['constant'])}"
            )
        return rows

    def residents(self, most: int) -> dict[str, str]:
        """One resident adapter against many, in two sessions that take turns; memory as they come."""
        one, many, ids = self.open(), self.open(), inputs(1, 16)
        one.load("0", self.files[0])
        one.run(ids, adapter="0")
        many.run(ids, adapter=None)
        rows, before, loaded, count = {}, rss(), 0, 1
        rng = random.Random(0)
        while count <= most:
            for number in range(loaded, count):
                many.load(str(number), self.files[number % FILES])
                many.run(ids, adapter=str(number))
            loaded = count
            calls = {
                "one": lambda: one.run(ids, adapter="0"),
                "many": lambda count=count: many.run(ids, adapter=str(rng.randrange(count))),
            }
            times = interleaved(calls, self.rounds)
            memory = (rss() - before) / count / self.size
            rows[f"{count} resident, each run another, 1 x 16: time against one; RSS per adapter / its file"] = (
                f"{ratio(times['many'], times['one']):.3f}; {memory:.2f}"
            )
            count *= 4
        return rows

    def other_ways(self) -> dict[str, str]:
        """One session per adapter, and ONNX Runtime's LoraAdapter on the same swappable model."""
        ids, ours = inputs(1, 16), self.open()
        before = rss()
        apart = [create_session(self.constant) for _ in range(4)]
        for session in apart:
            session.run(None, ids)
        memory = (rss() - before) / len(apart)
        plain, actives = create_session(self.swappable), []
        for number in range(4):
            ours.load(str(number), self.files[number])
            active, options = ort.LoraAdapter(), ort.RunOptions()
            active.Load(str(self.files[number]))
            options.add_active_adapter(active)
            actives.append((active, options))
        turn = iter(range(10**9))
        calls = {
            "AdapterSession": lambda: ours.run(ids, adapter=str(next(turn) % 4)),
            "one session per adapter": lambda: apart[next(turn) % 4].run(None, ids),
            "ONNX Runtime's LoraAdapter": lambda: plain.run(None, ids, actives[next(turn) % 4][1]),
        }
        times = interleaved(calls, self.rounds)
        mine = times.pop("AdapterSession")
        rows = {
            f"{name} / AdapterSession, 4 adapters in turn, 1 x 16": f"{ratio(t, mine):.3f}" for name, t in times.items()
        }
        return rows | {"RSS of a session per adapter, MB each": f"{memory / 1e6:.0f}"}

    def mixed(self, batch: int = 64, sequence: int = 16) -> dict[str, str]:
        """A batch whose rows name 1, 8 or 64 adapters, here and in PEFT."""
        with quiet():
            export_grouped({"first": self.adapter}, self.grouped, ExportOptions(base_model=self.base, check=False))
            files = variants(self.grouped.with_name("first.onnx_adapter"))
            eager = peft_batches(self.base, self.adapter, batch)
        session, ids = AdapterSession(self.grouped), inputs(batch, sequence)
        for number in range(batch):
            session.load(str(number), files[number % FILES])
        calls: dict[str, Callable[[], Any]] = {}
        for count in (1, 8, 64):
            # Rows of one adapter stand together, as a server sorts them.
            names = [str(row * count // batch) for row in range(batch)]
            calls[f"{count} adapters"] = lambda names=names: session.run(ids, adapters=names)
            calls[f"PEFT, {count} adapters"] = lambda names=names: eager(ids, names)
        swappable = self.open()
        swappable.load("a", self.files[0])
        calls["swappable model, one adapter"] = lambda: swappable.run(ids, adapter="a")
        times = interleaved(calls, max(self.rounds // 3, 5))
        first = times.pop("1 adapters")
        what = f"{batch} rows x {sequence}"
        rows = {f"{what}, {name} / 1 adapter": f"{ratio(other, first):.3f}" for name, other in times.items()}
        return {f"{what}, 1 adapter, ms": milliseconds(first)} | rows

    def soak(self, seconds: float, threads: int = 32, adapters: int = 100) -> dict[str, str]:
        """`threads` ask `adapters` adapters for `seconds`; every answer is held against that adapter's own."""
        session, ids = self.open(), inputs(1, 8)
        for number in range(adapters):
            session.load(str(number), self.files[number % FILES])
        expected = [session.run(ids, adapter=str(number)) for number in range(FILES)]
        (output,) = expected[0]
        answers = np.stack([answer[output] for answer in expected])
        gap = min(np.abs(answers[a] - answers[b]).max() for a in range(FILES) for b in range(a))
        faults: list[str] = []
        counts = [0] * threads
        end = time.monotonic() + seconds

        def ask(thread: int) -> None:
            rng = random.Random(thread)
            while time.monotonic() < end:
                number = rng.randrange(adapters)
                try:
                    answer = session.run(ids, adapter=str(number))[output]
                    if np.abs(answer - answers[number % FILES]).max() > gap / 10:
                        faults.append(f"wrong answer for {number}")
                    if rng.random() < 0.02:
                        session.load(f"{thread}", self.files[thread % FILES], replace=True)
                except Exception as error:
                    faults.append(repr(error))
                counts[thread] += 1

        def start() -> list[threading.Thread]:
            return [threading.Thread(target=ask, args=(thread,)) for thread in range(threads)]

        workers, memory = start(), []
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            time.sleep(max(seconds / 20, 0.5))
            memory.append(rss() / 1e6)
        for worker in workers:
            worker.join()
        third = max(len(memory) // 3, 1)
        return {
            f"{threads} threads, {adapters} adapters, {seconds:.0f} s: answers": f"{sum(counts)}",
            "errors and wrong answers": f"{len(faults)} {faults[:3] if faults else ''}".strip(),
            "smallest difference between two adapters' answers": f"{gap:.1e}",
            "RSS, MB: after the first third; at the end": f"{memory[third - 1]:.0f}; {memory[-1]:.0f}",
        }


def variants(file: Path) -> list[Path]:
    """FILES adapters of other values, beside the adapter `file` and for the same model."""
    first, rng = read_adapter_file(file), np.random.default_rng(0)
    files = [file.with_name(f"{number}.onnx_adapter") for number in range(FILES)]
    for path in files:
        values = {name: (value * rng.uniform(0.2, 3)).astype(value.dtype) for name, value in first.values.items()}
        write_adapter_file(path, values, first.origin)
    return files


def peft_batches(base: Path, adapter: Path, count: int) -> Callable[[dict[str, np.ndarray], list[str]], Any]:
    """PEFT's own mixed batches, adapter_names, with `count` adapters; PyTorch eager."""
    import peft
    import torch
    import transformers

    network = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(network, str(adapter), adapter_name="0").eval()
    for number in range(1, count):
        model.load_adapter(str(adapter), adapter_name=str(number))

    def run(ids: dict[str, np.ndarray], names: list[str]) -> Any:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(value) for name, value in ids.items()}, adapter_names=names)

    return run


class Stopwatch:
    """A session that notes how long ONNX Runtime's own run took."""

    def __init__(self, session: ort.InferenceSession):
        self._session, self.seconds = session, 0.0

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        self.seconds = timed(lambda: self._session.run_with_iobinding(binding))


def inputs(batch: int, sequence: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * sequence)
    ids = rng.integers(1000, 20000, (batch, sequence))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def milliseconds(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):.3f}"


def spread(times: list[float]) -> str:
    low, middle, high = (1e3 * value for value in statistics.quantiles(times, n=4))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def rss() -> int:
    """Resident bytes of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
