"""Exports that are killed, and what they leave: `python tests/kills.py KIND TIMES SECONDS FOLDER [ARGUMENTS]`.

KIND is "moves" (files of no model, mostly killed while they are moved), "export ADAPTER BASE" or "onto ADAPTER MODEL".
Each is forked from a process that has imported everything, and killed at a random moment: TIMES times or for SECONDS,
whichever ends first, but three times. Prints how many were killed and how many ended first, as JSON; raises where one
left a model that isn't whole. tests/test_interrupted.py runs it for seconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from loratrf_deploy.export.files import written_aside
from loratrf_deploy.export.moving import companions
from loratrf_deploy.formats.manifest import (
    MANIFEST,
    AdapterPart,
    BaseId,
    Manifest,
    ModelId,
    check_files,
    file_sha256,
    read_manifest,
    write_manifest,
)


def fake_export(out: Path, tag: str, names: tuple[str, ...] = ("config.json", "tokenizer.json")) -> None:
    """Writes a folder as an export does, every file of which says `tag`, but without a model."""
    with written_aside(out) as aside:
        for name in (*names, f"{out.name}.data", out.name):
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).write_text(f"{tag} {name}")
        manifest = Manifest(
            *("0", "merged", tag, "float32", 20, {}),
            *(AdapterPart("adapted", 1), BaseId("base", None), ModelId.of(aside / out.name), ()),
            companions=companions(aside, out.name),
        )
        write_manifest(manifest, aside)


def check_whole(out: Path) -> None:
    """Raises where `out` is there, but a file beside it isn't the one that was exported with it."""
    manifest = read_manifest(out.with_name(MANIFEST)) if out.with_name(MANIFEST).is_file() else None
    if manifest is not None:
        for name, sha256 in (manifest.companions or {}).items():
            path = out.parent / name
            assert file_sha256(path) == sha256 if path.is_file() else not out.is_file(), name
    if out.is_file():
        assert manifest is not None
        assert manifest.model.sha256 == file_sha256(out)
        check_files(out.parent, manifest, whole=True)


def kill_at_random(run: Callable[[], None], longest: float, rng: random.Random) -> bool:
    """Whether `run`, in a process of its own, was killed before it ended."""
    child = os.fork()
    if not child:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        try:
            run()
        finally:
            os._exit(int(sys.exc_info()[0] is not None))
    time.sleep(rng.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or not os.WEXITSTATUS(status), "it failed by itself"
    return os.WIFSIGNALED(status)


def main(kind: str, times: str, seconds: str, where: str, *arguments: str) -> None:
    folder, rng, killed, ended = Path(where), random.Random(0), 0, 0
    turn = 0

    def moves() -> None:
        fake_export(folder / "model.onnx", str(turn), tuple(f"file{number}" for number in range(40)))

    def export() -> None:
        from loratrf_deploy.export import ExportOptions, export_adapter

        options = ExportOptions(base_model=arguments[1], mode=("merged", "separate")[turn % 2], check=False)
        export_adapter(arguments[0], folder / "model.onnx", options)

    def onto() -> None:
        from loratrf_deploy.export.onto import convert_adapter

        convert_adapter(arguments[0], arguments[1], folder / "other.onnx_adapter")

    run = {"moves": moves, "export": export, "onto": onto}[kind]
    run()  # imports what it needs
    begin = time.monotonic()
    run()
    longest, end = 1.1 * (time.monotonic() - begin), time.monotonic() + float(seconds)
    while killed + ended < int(times) and (time.monotonic() < end or killed + ended < 3):
        turn += 1
        if kill_at_random(run, longest, rng):
            killed += 1
        else:
            ended += 1
        if kind == "onto":
            from loratrf_deploy.formats.adapter_file import read_adapter_file

            read_adapter_file(folder / "other.onnx_adapter")
        else:
            check_whole(folder / "model.onnx")
    run()
    left = [path.name for path in folder.glob(".*")]
    assert not left, left
    print(json.dumps({"killed": killed, "ended": ended}))


if __name__ == "__main__":
    main(*sys.argv[1:])
