"""loratrf-serve for as long as one likes: many clients and adapters, loads, unloads, evictions; each answer is checked.

    python tests/soak_serve.py [--seconds 600] [--clients 32] [--adapters 100]

A tiny model of two adapters; their files under as many names, of which memory holds a twelfth. The right answers are
PEFT's. Prints one line; the exit code is 1 where an answer was wrong, lost, or an error.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import httpx
import numpy as np
from test_serve import MEMBERS, TEXTS, peft_answers

import tiny
from loratrf_deploy.export import ExportOptions, export_grouped
from serving import Served, serving

NAMES = ("spam", "topic")


def main() -> int:
    parser = argparse.ArgumentParser(description="A server under load, every answer checked.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = make(folder, args.adapters)
        sizes = [path.stat().st_size for path in (folder / "adapters").iterdir()]
        options = ["--adapters-dir", folder / "adapters", "--allow-loading", "--max-bytes", sum(sizes) // 12]
        with serving(folder / "model", *options) as server:
            return soak(server, expected, args)


def make(folder: Path, adapters: int) -> list[np.ndarray]:
    """The model, and a file for each adapter; PEFT's answers to TEXTS of the two that they are in turn."""
    base = tiny.make_base(folder / "base", "bert", "feature-extraction")
    made = {
        name: tiny.make_adapter(base, folder / name, "lora", for_task=MEMBERS[name][0], seed=seed, **MEMBERS[name][1])
        for seed, name in enumerate(NAMES, 1)
    }
    export_grouped(made, folder / "model" / "model.onnx", ExportOptions(base_model=base, check=False))
    (folder / "adapters").mkdir()
    for number in range(adapters):
        file = folder / "model" / f"{NAMES[number % 2]}.onnx_adapter"
        shutil.copy(file, folder / "adapters" / f"a{number}.onnx_adapter")
    return [peft_answers(base, made[name], MEMBERS[name][0], MEMBERS[name][1]["labels"]) for name in NAMES]


def soak(server: Served, expected: list[np.ndarray], args: argparse.Namespace) -> int:
    end = time.monotonic() + args.seconds
    answers, faults, loads, memory = Counter[int](), list[str](), Counter[int](), list[int]()

    def ask(number: int) -> None:
        choose = random.Random(number)
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end:
                adapter, text = choose.randrange(args.adapters), choose.randrange(len(TEXTS))
                body = {"model": f"a{adapter}", "input": TEXTS[text]}
                try:
                    response = client.post(f"{server.url}/classify", json=body)
                    found = np.array(response.json()["data"][0]["probs"])
                    right = expected[adapter % 2][text]
                    if found.shape != right.shape or np.abs(found - right).max() > 2e-6:
                        faults.append(f"a{adapter}: {found.tolist()}, expected {right.tolist()}")
                except Exception as error:  # lost, or no answer
                    faults.append(f"a{adapter}: {type(error).__name__}: {error}")
                answers[number] += 1

    def churn() -> None:
        with httpx.Client(timeout=60) as client:
            for turn in range(1_000_000_000):
                if time.monotonic() > end:
                    return
                file = f"a{turn % args.adapters}.onnx_adapter"
                body = {"lora_name": f"new{turn % 3}", "lora_path": file}
                loads[client.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code] += 1
                loads[client.post(f"{server.url}/v1/unload_lora_adapter", json=body).status_code] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(args.clients)]
    threads.append(threading.Thread(target=churn))
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
        memory.append(pages * os.sysconf("SC_PAGE_SIZE") // 2**20)
        time.sleep(args.seconds / 20)
    for thread in threads:
        thread.join()
    evictions = server.metric("loratrf_adapter_evictions_total")
    print(
        f"{sum(answers.values())} answers, {len(faults)} wrong or lost {faults[:3]}; loads and unloads by status "
        f"{dict(loads)}; {evictions:.0f} evictions; resident MB {memory}; exit code {server.stop()}"
    )
    return 1 if faults or set(loads) - {200} else 0


if __name__ == "__main__":
    raise SystemExit(main())
