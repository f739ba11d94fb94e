"""The demo's data: JSON lines of four GLUE tasks, and their metrics. Numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratrf_deploy import UserError

TASKS = {"sst2": "accuracy", "mrpc": "accuracy", "rte": "accuracy", "cola": "matthews"}
"""Task -> the metric that its scores are compared by."""

DATA = Path(__file__).parents[2] / "shared" / "data"
MAX_LENGTH = 128


def read(data: Path, task: str, split: str) -> list[dict[str, Any]]:
    """Rows of data/task/split.jsonl: `sentence`, or `sentence1` and `sentence2`, and `label`."""
    file = data / task / f"{split}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"No data at {file}. Pass --data FOLDER, where FOLDER/{task}/{split}.jsonl holds one JSON object a line "
            "with sentence (or sentence1 and sentence2) and label."
        ) from error
    return [json.loads(line) for line in lines]


def texts(row: dict[str, Any]) -> tuple[str, ...]:
    """One sentence, or the pair."""
    return (row["sentence"],) if "sentence" in row else (row["sentence1"], row["sentence2"])


def scores(predicted: NDArray, labels: NDArray) -> dict[str, float]:
    """accuracy, F1 of label 1, and Matthews' correlation, of two arrays of 0 and 1."""
    hit = float((predicted == labels).mean())
    tp, tn = int((predicted & labels).sum()), int(((1 - predicted) & (1 - labels)).sum())
    fp, fn = int((predicted & (1 - labels)).sum()), int(((1 - predicted) & labels).sum())
    spread = np.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": hit,
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
        "matthews": (tp * tn - fp * fn) / spread if spread else 0.0,
    }
