"""A fixed set of seeds of each fuzzer; `python tests/fuzz/run.py` takes any number of others."""

from __future__ import annotations

import numpy as np
import pytest

import mutations
import targets
from run import fuzz

CASES = 3000


@pytest.mark.parametrize("target", targets.TARGETS)
def test_fuzz(target):
    counts, found = fuzz(target, CASES)
    assert not found, f"{len(found)} of {CASES}; the first:\n{found[0]}"
    # Both ways out are taken: a fuzzer whose samples are all refused tests nothing behind the door.
    assert counts["refused"] > CASES / 3
    assert counts["accepted"] > CASES / 10


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        ("raise ZeroDivisionError", "ZeroDivisionError"),
        ("import os; os.abort()", "the process ended with -6"),
        ("import time; time.sleep(60)", "Timeout"),
        ("return 'accepted' if rng.random() < 2 else ''", None),
    ],
)
def test_the_fuzzer_finds(fault, finding, tmp_path, monkeypatch):
    # A target that misbehaves, in the processes too.
    broken = f"import targets\ndef case(folder, rng, scratch):\n    {fault}\n"
    broken += "targets.TARGETS['graphs'] = targets.Target(targets.prepare_graphs, case)\n"
    (tmp_path / "sitecustomize.py").write_text(broken)
    here = targets.__file__.rpartition("/")[0]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{here}")
    counts, found = fuzz("graphs", 1, limit=0.5, keep=tmp_path / "samples")
    assert bool(found) == (finding is not None)
    assert finding is None or finding in found[0]
    assert sum(counts.values()) == 1


def test_the_same_seed_is_the_same_damage(tmp_path):
    from random import Random

    value = {"r": 4, "names": ["query", "value"], "deep": {"a": [1, {"b": None}]}}
    spoiled = [mutations.dump_json(mutations.spoil_json(value, Random(seed))) for seed in range(200)]
    assert spoiled == [mutations.dump_json(mutations.spoil_json(value, Random(seed))) for seed in range(200)]
    assert len(set(spoiled)) > 100
    raw = np.arange(256, dtype=np.uint8).tobytes()
    assert mutations.spoil_bytes(raw, Random(3)) == mutations.spoil_bytes(raw, Random(3)) != raw
