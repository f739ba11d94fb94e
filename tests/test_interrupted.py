"""Exports that are killed, interrupted, refused at the end, or end together: no folder of two, none half, none lost."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kills
import pytest
from kills import check_whole, fake_export

from loratrf_deploy.errors import UserError
from loratrf_deploy.export.files import written_aside
from loratrf_deploy.formats.manifest import MANIFEST
from shared import edit_json, read_json, run_python

TESTS = Path(__file__).parent


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{code}", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


HELD = """
from pathlib import Path
from kills import fake_export
from loratrf_deploy.export.files import written_aside
with written_aside(Path(sys.argv[1])) as aside:
    (aside / "model.onnx").write_bytes(bytes(1000))
    print(aside, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("folder", ["there", "new/one"])
def test_what_a_killed_export_left_goes_with_the_next_one(tmp_path: Path, folder: str) -> None:
    (tmp_path / "there").mkdir()
    out = tmp_path / folder / "model.onnx"
    killed, running = python(HELD, out), python(HELD, out)
    left, alive = Path(killed.stdout.readline().strip()), Path(running.stdout.readline().strip())
    killed.kill()
    killed.communicate()
    assert (left / "model.onnx").is_file()
    fake_export(out, "next")
    assert not left.exists()
    assert (alive / "model.onnx").is_file()  # its process is there
    running.communicate("\n")
    assert running.returncode == 0
    assert not list(tmp_path.rglob(".loratrf-export-*"))
    assert out.read_bytes() == bytes(1000)


def test_folders_that_are_no_exports_are_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("kept")
    (tmp_path / ".loratrf-export-link").symlink_to(elsewhere)
    (tmp_path / ".loratrf-export-file").write_text("kept")
    fake_export(tmp_path / "model.onnx", "new")
    assert (elsewhere / "file").read_text() == (tmp_path / ".loratrf-export-file").read_text() == "kept"


PAIR = """
from pathlib import Path
from kills import fake_export
print("ready", flush=True)
for line in sys.stdin:
    fake_export(Path(sys.argv[1]), f"{sys.argv[2]} {line.strip()}", tuple(sys.argv[3:]))
    print("done", flush=True)
"""


def test_exports_that_end_together_don_t_mix(tmp_path: Path) -> None:
    """50 pairs: the folder is wholly the one's or the other's, files that only one of them writes included."""
    out, winners = tmp_path / "model.onnx", set()
    shared = [f"file{number}" for number in range(20)]
    pair = [python(PAIR, out, "a", *shared, "only-a"), python(PAIR, out, "b", *shared, "only-b")]
    for process in pair:
        assert process.stdout.readline() == "ready\n", process.communicate()
    for turn in range(50):
        for process in pair:
            process.stdin.write(f"{turn}\n")
            process.stdin.flush()
        for process in pair:
            assert process.stdout.readline() == "done\n", process.communicate()
        check_whole(out)
        tags = {text.decode().rpartition(" ")[0] for name, text in contents(tmp_path).items() if name != MANIFEST}
        assert len(tags) == 1
        tag = tags.pop()
        assert tag in (f"a {turn}", f"b {turn}")
        assert read_json(tmp_path / MANIFEST)["task"] == tag
        winners.add(tag[0])
    for process in pair:
        assert process.communicate()[1] == ""


def test_an_export_waits_while_another_one_moves_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loratrf_deploy.export import moving

    fake_export(tmp_path / "model.onnx", "old")
    monkeypatch.setattr(moving, "_PATIENCE", 0.3)
    before = contents(tmp_path)
    with (
        moving._alone_in(tmp_path),
        pytest.raises(UserError, match=r"Another export has been moving its files into .* Wait until it is done"),
    ):
        fake_export(tmp_path / "model.onnx", "new")
    assert contents(tmp_path) == before
    fake_export(tmp_path / "model.onnx", "new")


@pytest.mark.parametrize("where", ["tokenizer.json", "model.onnx.data", "templates"])
def test_what_stands_in_the_way_is_found_before_anything_is_moved(tmp_path: Path, where: str) -> None:
    out = tmp_path / "out" / "model.onnx"
    fake_export(out, "old", ("config.json", "vocab.txt"))
    (out.parent / where).unlink(missing_ok=True)
    if where == "templates":
        (out.parent / where).write_text("a file where a folder is to go")
    else:
        (out.parent / where).mkdir()
    before = contents(out.parent)
    with pytest.raises(
        UserError, match=rf"{where} is (a|no) folder, and the export writes .* Nothing was changed"
    ) as error:
        fake_export(out, "new", ("config.json", "tokenizer.json", "templates/chat.jinja"))
    assert "\n" not in str(error.value)
    assert contents(out.parent) == before
    assert not list(tmp_path.rglob(".loratrf-export-*"))


def test_an_export_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "fr.onnx_adapter").write_text("converted")
    fake_export(out, "old", ("config.json", "vocab.txt", "templates/chat.jinja"))
    fake_export(out, "new", ("config.json", "tokenizer.json", "templates/chat.jinja"))
    check_whole(out)
    assert not (tmp_path / "vocab.txt").exists()
    fake_export(out, "newer", ("config.json", "vocab.txt"))
    assert sorted(contents(tmp_path)) == sorted(
        ["config.json", "fr.onnx_adapter", MANIFEST, "model.onnx", "model.onnx.data", "notes.txt", "vocab.txt"]
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_files_that_no_export_wrote_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    (tmp_path / "config.json").write_text("of the base model")
    with pytest.raises(UserError, match=r"holds config\.json, which no export wrote.* Choose another folder"):
        fake_export(out, "new")
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("of the adapter")
    with pytest.raises(UserError, match=r"holds tokenizer\.json, which no export wrote"):
        fake_export(out, "new")
    assert contents(tmp_path) == {"tokenizer.json": b"of the adapter"}
    (tmp_path / "tokenizer.json").write_text("new tokenizer.json")  # what the export writes, to the byte
    fake_export(out, "new")
    check_whole(out)


def test_files_that_were_changed_since_the_export_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    fake_export(out, "old")
    (tmp_path / "tokenizer.json").write_text("by hand")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds tokenizer\.json, which .* was changed since"):
        fake_export(out, "new")
    assert contents(tmp_path) == before
    edit_json(tmp_path / MANIFEST, companions=None)  # of an older version, which didn't say what it wrote
    fake_export(out, "new")
    check_whole(out)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"holds config\.json, which no export wrote"):
        fake_export(out, "newer")


@pytest.mark.parametrize("name", ["../victim", "link/victim", "/VICTIM"])
def test_a_manifest_names_no_files_elsewhere(tmp_path: Path, name: str) -> None:
    out, victim = tmp_path / "out" / "model.onnx", tmp_path / "victim"
    fake_export(out, "old")
    victim.write_text("kept")
    (out.parent / "link").symlink_to(tmp_path)
    name = name.replace("/VICTIM", str(victim))
    known = read_json(out.parent / MANIFEST)["companions"]
    edit_json(out.parent / MANIFEST, companions=known | {name: kills.file_sha256(victim)})
    try:
        fake_export(out, "new")
    except UserError as error:
        refused = str(error)
        assert name != "link/victim", refused
    assert victim.read_text() == "kept"


def test_converting_leaves_the_model_beside_it_alone(tmp_path: Path) -> None:
    fake_export(tmp_path / "model.onnx", "model")
    before = contents(tmp_path)
    for content in ("one", "two"):
        with written_aside(tmp_path / "fr.onnx_adapter") as aside:
            (aside / "fr.onnx_adapter").write_text(content)
        assert contents(tmp_path) == before | {"fr.onnx_adapter": content.encode()}


INTERRUPTED = """
import os, signal
from pathlib import Path
import kills
from loratrf_deploy.cli import export
from loratrf_deploy.export import moving
out, when, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
here = lambda *arguments: signal.raise_signal(number)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
def fake(adapter, out, options, **others):
    if when == "before":
        here()
    kills.fake_export(out, "new")
    if when == "after":
        here()
export.export_adapter, export._print_summary = fake, here if when == "printing" else lambda result: None
if when == "moving":
    real, moved = os.replace, []
    def replace(*arguments):
        real(*arguments)
        moved.append(arguments)
        if len(moved) == 2:
            here()
    os.replace = replace
    if number == 0:
        here = lambda: None
sys.exit(export.main(["--adapter", "a", "--out", str(out), "--no-check"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["before", "moving", "after", "printing"])
def test_an_interrupt_is_told_what_it_found(tmp_path: Path, when: str, number: int) -> None:
    out = tmp_path / "model.onnx"
    fake_export(out, "old")
    before = contents(tmp_path)
    done = run_python(f"sys.path.insert(0, {str(TESTS)!r})\n{INTERRUPTED}", out, when, int(number))
    assert done.returncode == 130, done.stderr
    if when == "before":
        assert done.stderr == "interrupted; nothing was written\n"
        assert contents(tmp_path) == before
    else:
        assert done.stderr == f"interrupted; {out} was written, and is complete\n"
        assert out.read_text() == "new model.onnx"
    check_whole(out)
    assert not list(tmp_path.glob(".*"))


def test_an_interrupt_of_another_command_says_no_more_than_it_knows(capsys: pytest.CaptureFixture) -> None:
    from loratrf_deploy.cli.shared import command

    @command
    def main(argv: object = None) -> int:
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr().err == "interrupted\n"


def run_kills(kind: str, seconds: float, folder: Path, *arguments: object) -> dict[str, int]:
    command = [sys.executable, TESTS / "kills.py", kind, "1000", seconds, folder, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kills_while_files_are_moved(tmp_path: Path) -> None:
    counts = run_kills("moves", 15, tmp_path)
    assert counts["killed"] > 0, counts


def test_kills_of_exports(make_tiny: Callable, tmp_path: Path) -> None:
    base, adapter = make_tiny()
    if not run_kills("export", 40, tmp_path, adapter, base)["killed"]:
        pytest.skip("this machine is too busy for an export that could be killed")


def test_kills_of_conversions(make_tiny: Callable, make_export: Callable, tmp_path: Path) -> None:
    exported = make_export(swappable="base")
    folder = Path(shutil.copytree(exported.model.parent, tmp_path / "out"))
    before = contents(folder)
    counts = run_kills("onto", 10, folder, make_tiny(kind="loratrf", r=7)[1], folder / "model.onnx")
    assert counts["killed"] > 0, counts
    after = contents(folder)
    assert after.pop("other.onnx_adapter")
    assert after == before


FORKED = """
import os, warnings
warnings.simplefilter("ignore")
from loratrf_deploy import AdapterSession
session = AdapterSession(sys.argv[1])
session.load("own", sys.argv[2])
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(list(session.adapters))
else:
    def load(): session.load("again", sys.argv[2])
    def unload(): session.unload("own")
    for use in (lambda: session.run({}, adapter=None), lambda: session.adapters, load, unload):
        try:
            use()
        except RuntimeError as error:
            print(error, flush=True)
    os._exit(0)
"""


@pytest.mark.timeout(60)
def test_a_session_is_of_one_process(make_export: Callable) -> None:
    exported = make_export(swappable="base")
    file = next(exported.model.parent.glob("*.onnx_adapter"))
    done = run_python(FORKED, exported.model, file)
    assert done.returncode == 0, done.stderr
    *said, own = done.stdout.splitlines()
    assert len(said) == 4
    assert all("This AdapterSession was made in process" in line and "after the fork" in line for line in said)
    assert own == "['own']"


def test_a_session_of_a_language_model_is_of_one_process_too() -> None:
    from loratrf_deploy.runtime.generation_session import GenerationSession
    from loratrf_deploy.runtime.session import OwnProcess

    session = object.__new__(GenerationSession)
    session._process = OwnProcess("GenerationSession")
    session._process._id = 0  # as if it were another one's
    uses: list[Callable[[], object]] = [
        lambda: session.adapters,
        lambda: session.load("fr", "fr.onnx_adapter"),
        lambda: session.unload("fr"),
        lambda: session.generate(["text"], adapter=None),
        lambda: session.generate_tokens([[1]], adapter=None),
        lambda: next(session.stream("text", adapter=None)),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"This GenerationSession was made in process 0 and is used in \d+"):
            use()


@pytest.mark.timeout(60)
def test_a_session_made_after_the_fork_works(make_export: Callable) -> None:
    exported = make_export(swappable="base")
    code = """
import os, numpy
from loratrf_deploy import AdapterSession
inputs = {name: numpy.ones((1, 4), numpy.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        os._exit(0 if AdapterSession(sys.argv[1]).run(inputs, adapter=None)["logits"].shape[0] == 1 else 1)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""
    done = run_python(code, exported.model)
    assert done.stdout.strip() == "[0, 0]", done.stderr
