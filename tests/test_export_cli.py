"""loratrf-export as users meet it: what it prints, how it fails, and that a failed export leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loratrf_deploy.cli.export import main
from loratrf_deploy.cli.shared import print_json

EXPORT = [sys.executable, "-c", "import sys; from loratrf_deploy.cli.export import main; sys.exit(main())"]


@pytest.fixture
def adapter(make_tiny: Callable, tmp_path: Path) -> tuple[Path, Path]:
    """(base, adapter): the adapter a copy that a test may damage."""
    base, original = make_tiny("bert", "text-classification", "loratrf")
    return base, Path(shutil.copytree(original, tmp_path / "adapter"))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(capsys: pytest.CaptureFixture, base: Path, folder: Path, out: Path, *more: str) -> str:
    """Runs the export, which must be refused: exit code 2, one paragraph, nothing written. Returns the paragraph."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    capsys.readouterr()  # what fixtures printed
    code = main(["--adapter", str(folder), "--base-model", str(base), "--out", str(out), *more])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before
    return captured.err


def test_missing_adapter_folder(capsys, adapter, tmp_path) -> None:
    assert "nowhere" in refused(capsys, adapter[0], tmp_path / "nowhere", tmp_path / "model.onnx")


def test_truncated_weights(capsys, adapter, tmp_path) -> None:
    path = adapter[1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "adapter_model.safetensors" in refused(capsys, *adapter, tmp_path / "model.onnx")


def test_not_a_number_in_the_weights(capsys, adapter, tmp_path) -> None:
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    edit_tensors(adapter[1], lambda tensors: tensors[key].__setitem__((0, 0), np.nan))
    assert "layer.0.attention.self.query" in refused(capsys, *adapter, tmp_path / "model.onnx")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(capsys, adapter, tmp_path) -> None:
    (adapter[1] / "adapter_model.safetensors").rename(adapter[1] / "adapter_model.bin")
    message = refused(capsys, *adapter, tmp_path / "model.onnx")
    assert "adapter_model.bin" in message
    assert "save_file" in message or "save_pretrained" in message


def test_unknown_peft_type(capsys, adapter, tmp_path) -> None:
    edit_config(adapter[1], peft_type="MAGIC")
    assert "MAGIC" in refused(capsys, *adapter, tmp_path / "model.onnx")


def test_adapter_of_a_wider_base(capsys, make_tiny, adapter, tmp_path) -> None:
    import tiny

    other = tiny.make_base(tmp_path / "wide", "bert", hidden_size=48)
    message = refused(capsys, other, adapter[1], tmp_path / "model.onnx")
    assert "attention.self.query" in message
    assert "48" in message
    assert "32" in message


def test_adapter_of_another_architecture(capsys, make_tiny, adapter, tmp_path) -> None:
    other, _ = make_tiny("distilbert", "text-classification", "lora")
    assert "attention.self.query" in refused(capsys, other, adapter[1], tmp_path / "model.onnx")


def test_adapter_that_applies_only_in_part(capsys, adapter, tmp_path) -> None:
    prefix = "base_model.model.bert.encoder.layer.1.attention.self.value."

    def drop(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    edit_tensors(adapter[1], drop)
    message = refused(capsys, *adapter, tmp_path / "model.onnx")
    assert "bert.encoder.layer.1.attention.self.value" in message


def test_base_without_the_head_that_the_task_needs(capsys, make_tiny, adapter, tmp_path) -> None:
    base, folder = make_tiny("bert", "feature-extraction", "loratrf")
    folder = Path(shutil.copytree(folder, tmp_path / "headless"))
    edit_config(folder, task_type="TOKEN_CLS")
    prefixed = {}
    tensors = load_file(folder / "adapter_model.safetensors")
    for key, value in tensors.items():
        prefixed[key.replace("base_model.model.", "base_model.model.bert.")] = value
    save_file(prefixed, folder / "adapter_model.safetensors")
    message = refused(capsys, base, folder, tmp_path / "model.onnx")
    assert "classifier.weight" in message
    assert "modules_to_save" in message


def test_base_that_is_not_there(capsys, adapter, tmp_path) -> None:
    assert "no-such-base" in refused(capsys, tmp_path / "no-such-base", adapter[1], tmp_path / "model.onnx")
    edit_config(adapter[1], base_model_name_or_path="nobody/no-such-model")
    code = main(["--adapter", str(adapter[1]), "--out", str(tmp_path / "model.onnx")])
    message = capsys.readouterr().err
    assert code == 2
    assert "nobody/no-such-model" in message
    assert "--base-model" in message


def test_what_only_merges_is_refused_in_separate_mode_with_the_advice_to_merge(capsys, make_tiny, tmp_path) -> None:
    tokens = {"word_embeddings": [1, 2]}
    base, folder = make_tiny("bert", "text-classification", "lora", trainable_token_indices=tokens)
    message = refused(capsys, base, folder, tmp_path / "model.onnx", "--mode", "separate")
    assert "trainable_token_indices" in message
    assert "--mode merged" in message


def test_initialisation_that_nobody_can_restore(capsys, make_tiny, tmp_path) -> None:
    base, original = make_tiny("bert", "text-classification", "lora")
    folder = Path(shutil.copytree(original, tmp_path / "ga"))
    edit_config(folder, init_lora_weights="lora_ga")
    message = refused(capsys, base, folder, tmp_path / "model.onnx")
    assert "lora_ga" in message
    assert "path_initial_model_for_weight_conversion" in message


def test_rank_over_the_limit(capsys, make_tiny, tmp_path) -> None:
    base, folder = make_tiny("bert", "text-classification", "lora", r=1025, target_modules=["query"])
    message = refused(capsys, base, folder, tmp_path / "model.onnx", "--mode", "separate")
    assert "1024" in message
    assert "--mode merged" in message


def test_task_that_this_version_does_not_export(capsys, adapter, tmp_path) -> None:
    edit_config(adapter[1], task_type="MASKED_LM")
    assert "MASKED_LM" in refused(capsys, *adapter, tmp_path / "model.onnx")


@pytest.mark.parametrize("out", ["folder", "model.txt", "file.txt/model.onnx"])
def test_output_path_that_cannot_be(capsys, adapter, tmp_path, out) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("")
    assert "--out" in refused(capsys, *adapter, tmp_path / out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_without_permission(capsys, adapter, tmp_path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "permission" in refused(capsys, *adapter, tmp_path / "locked" / "model.onnx")


@pytest.mark.parametrize("opset", ["17", "99"])
def test_opset_out_of_range(capsys, adapter, tmp_path, opset) -> None:
    assert "18 to 23" in refused(capsys, *adapter, tmp_path / "model.onnx", "--opset", opset)


def test_disk_full_in_the_middle(adapter, tmp_path) -> None:
    """A limit on file sizes fails the write of the weights as a full disk does."""
    base, folder = adapter
    out = tmp_path / "out" / "model.onnx"
    result = subprocess.run(
        [*EXPORT, "--adapter", folder, "--base-model", base, "--out", out, "--no-check"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Nothing was left behind" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_in_the_middle(adapter, tmp_path, how) -> None:
    base, folder = adapter
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_bytes(b"an older export")
    command = [*EXPORT, "--adapter", folder, "--base-model", base, "--out", tmp_path / "out" / "model.onnx"]
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores SIGINT, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    # The first file in the folder of what is being written: the parity check is still to come.
    while not list((tmp_path / "out").glob(".loratrf-export-*/*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(how)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.decode() == "interrupted; nothing was written\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"an older export"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("--adapter a", "the following arguments are required: --out"),
        ("--out x", "one of the arguments --adapter --adapters is required"),
        ("--adapter a --adapters b=b --out x", "argument --adapters: not allowed with argument --adapter"),
        ("--adapter a --out x --bogus", "unrecognized arguments: --bogus"),
        ("--adapter a --out x --grouped", "unrecognized arguments: --grouped"),
        ("--adapter a --out x --opset new", "argument --opset: invalid int value: 'new'"),
        ("--adapter a --out x --mode\todd", "unrecognized arguments: --mode odd"),
        ("--adapter a --out x --mode odd", "argument --mode: invalid choice: 'odd'"),
        ("--adapter a --out x \x1b[31m", "unrecognized arguments: ?[31m"),
    ],
)
def test_a_slip_is_one_line(capsys, arguments, what) -> None:
    assert main(arguments.split(" ")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {what}")
    assert err.endswith(" (see loratrf-export --help)\n")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def on_a_terminal(code: str) -> str:
    """What a script writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", buffering=0) as file:  # EIO: the script ended
        while chunk := file.read(1 << 16):
            shown += chunk
    assert process.wait() == 0
    return shown.decode()


def test_progress_shows_what_is_done_and_for_how_long() -> None:
    code = (
        "import time; from loratrf_deploy.cli.shared import progress\n"
        "with progress() as step:\n step('reading [bold]a\\x1b[31m'); time.sleep(1.3); step('writing')\n"
    )
    shown = on_a_terminal(code)
    assert "0:00:01 reading [bold]a?[31m" in re.sub("\x1b\\[[0-9;]*m", "", shown)
    assert "writing" in shown


def test_a_piped_export_prints_the_summary_and_nothing_else(adapter, tmp_path) -> None:
    base, folder = adapter
    out = tmp_path / "new" / "folder" / "model.onnx"
    result = subprocess.run(
        [*EXPORT, "--adapter", folder, "--base-model", base, "--out", out], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for word in (str(out), "merged", "4 adapted", "TaskFilter", "Parity holds", "top-1"):
        assert word in result.stdout
    manifest = json.loads((out.parent / "loratrf.json").read_text())
    assert manifest["parity"]["passed"] is True
    assert [layer["op"] for layer in manifest["layers"]] == ["TaskFilter"] * 4
    again = subprocess.run(
        [*EXPORT, "--adapter", folder, "--base-model", base, "--out", out, "--mode", "separate", "--no-check"],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stderr
    assert "parity   not checked" in again.stdout
    assert json.loads((out.parent / "loratrf.json").read_text())["mode"] == "separate"
    assert not list(out.parent.glob(".*"))


def test_json_of_an_export(adapter, tmp_path) -> None:
    base, folder = adapter
    out = tmp_path / "out" / "model.onnx"
    command = [*EXPORT, "--adapter", folder, "--base-model", base, "--out", out, "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    facts = json.loads(result.stdout)
    assert facts["model"] == facts["parity"]["model"] == str(out)
    assert facts["manifest"] == json.loads((out.parent / "loratrf.json").read_text())
    assert facts["sizes"] == {path.name: path.stat().st_size for path in out.parent.iterdir()}
    assert facts["parity"]["passed"] is True
    # The proof's own steps are shown, and its time is one stage.
    assert "checking parity with PyTorch" in facts["seconds"]
    assert not [stage for stage in facts["seconds"] if "comparing layers" in stage]


@pytest.mark.parametrize("several", [False, True], ids=["adapter", "adapters"])
def test_a_failed_proof_writes_nothing(several, capsys, adapter, tmp_path, monkeypatch) -> None:
    from loratrf_deploy import parity
    from loratrf_deploy.cli import export

    steps: list[str] = []
    monkeypatch.setattr(export, "progress", lambda: contextlib.nullcontext(steps.append))
    monkeypatch.setitem(parity.TOLERANCES, "float32", 1e-12)
    base, folder = adapter
    which = ["--adapters", f"a={folder}"] if several else ["--adapter", str(folder)]
    out = tmp_path / "out" / "model.onnx"
    capsys.readouterr()
    assert main([*which, "--base-model", str(base), "--out", str(out), *(["--json"] if several else [])]) == 1
    shown, error = capsys.readouterr()
    assert "nothing was written" in error
    if several:
        report = json.loads(shown)["parity"]
        assert (report["passed"], report["model"]) == (False, str(out))
    else:
        assert "Parity failed" in shown
    assert not out.parent.exists()
    assert not list(tmp_path.glob(".loratrf-export-*"))
    proof = steps[steps.index("checking parity with PyTorch") :]
    assert any(step.endswith("running ONNX Runtime with library") for step in proof)


def test_json_has_no_numbers_that_json_lacks(capsys) -> None:
    print_json({"a": [math.nan, {"b": -math.inf}], "c": Path("x/y"), "d": 1.5})
    assert json.loads(capsys.readouterr().out) == {"a": ["nan", {"b": "-inf"}], "c": "x/y", "d": 1.5}


def test_a_reader_that_went_away() -> None:
    """What is short waits in Python's buffer until the end."""
    ours, theirs = os.pipe()
    os.close(ours)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "loratrf_deploy"]
    result = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(theirs)
    assert (result.returncode, result.stderr) == (141, "")
