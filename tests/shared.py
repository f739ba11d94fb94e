"""What several test files do alike: damage a folder, run Python without frameworks, ask from many threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

IDS = {
    "input_ids": np.arange(5, 17).reshape(2, 6),
    "attention_mask": np.array([[1] * 6, [1] * 4 + [0] * 2]),
    "token_type_ids": np.zeros((2, 6), np.int64),
}
"""Inputs of a tiny BERT: two rows, one of them padded."""
PEERS = dict(peer.partition("=")[::2] for peer in os.environ.get("LORATRF_PEERS", "").split())
"""Pythons of environments of their own, by what is installed there: LORATRF_PEERS="openvino=PYTHON ..."."""
FRAMEWORKS = ("torch", "transformers", "peft", "onnx", "onnx_ir")


def error(a: Any, b: Any) -> float:
    """Largest difference over the largest of `b`."""
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(read_json(path) | fields))


def edit_tensors(file: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray] | None]) -> None:
    """Rewrites a safetensors file with what `change` returns of its tensors, or does to them."""
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, {"format": "pt"})


def run_python(code: str, *arguments: object, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own, in which importing one of `without` fails."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without}))\n"
    command = [sys.executable, "-c", blocked + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def ask_while(churn: Callable[[int], None], ask: Callable[[int], None], threads: int = 8) -> None:
    """ask(number) in as many threads at once, while another one calls churn(0), churn(1), ... until they are done."""
    stop = threading.Event()

    def churn_on() -> None:
        turn = 0
        while not stop.is_set():
            churn(turn)
            turn += 1

    with ThreadPoolExecutor(threads + 1) as pool:
        churner = pool.submit(churn_on)
        try:
            list(pool.map(ask, range(threads)))
        finally:
            stop.set()
        churner.result()
