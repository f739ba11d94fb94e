"""loratrf-serve under load: throughput and latency by clients and adapters, and what the server itself costs.

    python benchmarks/bench_serve.py [--seconds 5] [--clients 1 32] [--adapters 1 64] [--keep FOLDER] [--out FILE]

MiniLM with LoRATRF adapters in one model of --adapters, real sentences' lengths (8 to 24 tokens), one text a request.
Closed loop: each client sends its next request when it has an answer. Against it the same server with batches of one,
and ONNX Runtime by itself: the merged model of one adapter in batches of 32, without HTTP. Open loop: requests come at
random times, at half of the closed loop's rate, and latency counts from then. The server's own cost is what a lone
client waits for longer than a run takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import common
import numpy as np

from loratrf_deploy import AdapterSession, create_session
from loratrf_deploy.export import ExportOptions, export_adapter, export_grouped
from loratrf_deploy.pytorch.quiet import quiet
from minilm import base_path

WORDS = (
    *("the", "film", "was", "long", "and", "quiet", ",", "with", "a", "cast", "that", "never", "lets", "go", "of"),
    *("what", "it", "has", "to", "say", "about", "rain"),
)


def main() -> None:
    parser = common.parser(__doc__, keep=None, out=None)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each figure")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 64])
    args = common.parse(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        if not (folder / "adapters").is_dir():
            with quiet():
                make(folder, max(args.adapters))
        result = measure(folder, args)
    common.save(args.out, result)


def make(folder: Path, adapters: int) -> None:
    """The model of two adapters, files for as many, and the merged model of one."""
    base = common.make_base(folder / "base", "minilm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_path() / name, base)
    given = {name: common.make_adapter(base, folder / name, "loratrf") for name in ("first", "second")}
    export_grouped(given, folder / "model" / "model.onnx", ExportOptions(base_model=base, check=False))
    export_adapter(given["first"], folder / "merged" / "model.onnx", ExportOptions(base_model=base, check=False))
    (folder / "adapters").mkdir()
    for number in range(adapters):
        shutil.copy(folder / "model" / "first.onnx_adapter", folder / "adapters" / f"a{number}.onnx_adapter")


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for batch in (32, 1):
        with server(folder, batch) as url:
            for adapters in args.adapters:
                asyncio.run(closed(url, adapters, 8, 1.0))  # adapters are read, and all is warm
                for clients in args.clients:
                    rows.append({"batch": batch, "adapters": adapters, "clients": clients})
                    rows[-1] |= asyncio.run(closed(url, adapters, clients, args.seconds))
            if batch > 1:
                rate = rows[-1]["per_second"] / 2
                rows.append({"batch": batch, "adapters": adapters, "clients": f"{rate:.0f}/s"})
                rows[-1] |= asyncio.run(open_loop(url, adapters, rate, args.seconds))
    columns = ["batch of at most", "adapters", "clients", "requests/s", "p50 ms", "p99 ms"]
    print(common.table(columns, ([show(value) for value in row.values()] for row in rows)))
    alone = run_alone(folder)
    print(
        f"\nONNX Runtime alone: {alone['run_ms']:.2f} ms a text, {alone['merged_per_second']:.0f} texts/s merged, by 32"
    )
    return {"rows": rows, **alone}


def show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def server(folder: Path, batch: int) -> Iterator[str]:
    command = [sys.executable, "-m", "loratrf_deploy.cli.serve", "--model", str(folder / "model"), "--port", "0"]
    command += ["--json", "--adapters-dir", str(folder / "adapters"), "--max-batch", str(batch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            said += process.stdout.readline()
        try:
            yield json.loads(said)["url"]
        finally:
            process.terminate()


class Client:
    """A connection that stays, without what a client's library costs."""

    def __init__(self, url: str):
        self._port = urlsplit(url).port

    async def __aenter__(self) -> Client:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(self, rng: random.Random, adapters: int) -> None:
        text = " ".join(rng.choices(WORDS, k=rng.randint(6, 22)))
        body = json.dumps({"model": f"a{rng.randrange(adapters)}", "input": text}).encode()
        head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self._writer.write(f"{head}\r\n\r\n".encode() + body)
        status, *lines = (await self._reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
        answer = await self._reader.readexactly(length)
        assert b" 200 " in status, answer


async def closed(url: str, adapters: int, clients: int, seconds: float) -> dict[str, float]:
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def work(seed: int) -> None:
        rng = random.Random(seed)
        async with Client(url) as client:
            while (begin := time.perf_counter()) < end:
                await client.ask(rng, adapters)
                times.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    await asyncio.gather(*map(work, range(clients)))
    return figures(times, time.perf_counter() - begin)


async def open_loop(url: str, adapters: int, rate: float, seconds: float) -> dict[str, float]:
    times: list[float] = []
    rng, free, tasks = random.Random(0), list[Client](), list[asyncio.Task[None]]()

    async def one() -> None:
        begin = time.perf_counter()
        client = free.pop() if free else await Client(url).__aenter__()
        await client.ask(rng, adapters)
        free.append(client)
        times.append(time.perf_counter() - begin)

    begin = due = time.perf_counter()
    while due < begin + seconds:
        tasks.append(asyncio.ensure_future(one()))
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
    await asyncio.gather(*tasks)
    return figures(times, time.perf_counter() - begin)


def figures(times: list[float], seconds: float) -> dict[str, float]:
    p50, p99 = (1e3 * float(np.percentile(times, share)) for share in (50, 99))
    return {"per_second": len(times) / seconds, "p50": p50, "p99": p99}


def run_alone(folder: Path) -> dict[str, float]:
    """Milliseconds of a run of one text under an adapter, and texts a second of the merged model."""
    session = AdapterSession(folder / "model" / "model.onnx")
    session.load("a", folder / "adapters" / "a0.onnx_adapter")
    merged = create_session(folder / "merged" / "model.onnx")

    def feeds(rows: int) -> dict[str, Any]:
        ids = np.random.default_rng(0).integers(1000, 2000, (rows, 16))
        return {
            name: ids if name == "input_ids" else np.full_like(ids, name == "attention_mask") for name in session_inputs
        }

    session_inputs = [value.name for value in session.inputs]
    one, many = feeds(1), feeds(32)
    runs = [common.timed(lambda: session.run(one, adapters=["a"])) for _ in range(60)]
    batches = [common.timed(lambda: merged.run(None, many)) for _ in range(12)]
    return {
        "run_ms": 1e3 * statistics.median(runs[10:]),
        "merged_per_second": 32 / statistics.median(batches[2:]),
    }


if __name__ == "__main__":
    main()
