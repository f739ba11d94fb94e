"""A stranger's folder for ONNX Runtime GenAI: its native code isn't loaded, its configuration opens nothing outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratrf_deploy import GenerationSession, UserError, library_path
from loratrf_deploy.cli.generate import main
from loratrf_deploy.genai.folder import CONFIG_FILE, safe_folder
from loratrf_deploy.genai.generate import generate_tokens, load_model
from loratrf_deploy.ops import library
from shared import edit_json, read_json

NATIVE = """#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(MARKER, "w")); }
"""
PROMPT = [5, 6, 7]


def tokens(folder: Path) -> list[int]:
    return list(generate_tokens(load_model(folder), PROMPT, 8, stop=False))


@pytest.fixture
def folder(exported: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a language model's folder with our library in it."""
    return Path(shutil.copytree(exported(mode="separate", bundle_library=True).parent, tmp_path / "copy"))


def native(file: Path, marker: Path) -> None:
    """A library that writes `marker` when it is loaded."""
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C compiler to make a stranger's library with")
    command = [compiler, "-xc", "-", "-shared", "-fPIC", f'-DMARKER="{marker}"', "-o", str(file)]
    subprocess.run(command, input=NATIVE, text=True, check=True)


def config_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = read_json(folder / CONFIG_FILE)
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def test_a_folder_s_own_library_is_not_loaded(folder, exported, tmp_path, capsys) -> None:
    marker = tmp_path / "marker"
    expected = tokens(exported(mode="separate", bundle_library=True).parent)
    native(folder / "libloratrf_ort.so", marker)
    assert tokens(folder) == expected
    GenerationSession(folder).generate(["rain"], max_new_tokens=2)
    assert main(["--model", str(folder), "--prompt", "rain", "--max-new-tokens", "2"]) == 0
    assert not marker.exists()
    capsys.readouterr()
    # It is ours that runs: ONNX Runtime has loaded it from the copy.
    with safe_folder(folder) as opened:
        assert opened != folder
        assert (opened / "libloratrf_ort.so").read_bytes() == library_path().read_bytes()
    assert not opened.exists()
    # The folder's own is one that the flag has loaded: it is no library of operators, so that is all it does.
    assert main(["--model", str(folder), "--prompt", "rain", "--trust-library"]) == 2
    assert "RegisterCustomOps" in capsys.readouterr().err
    assert marker.exists()


def test_it_runs_with_our_library(folder) -> None:
    """In a process of its own, whose memory map says what was loaded."""
    (folder / "libloratrf_ort.so").write_bytes(b"no library")
    code = (
        "import sys; from loratrf_deploy.genai.generate import load_model; model = load_model(sys.argv[1]);"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libloratrf' in line or '(deleted)' in line})"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "libloratrf_ort.so" in done.stdout or "deleted" in done.stdout
    assert str(folder) not in done.stdout


@pytest.mark.parametrize("missing", ["folder's", "ours"])
def test_a_library_that_is_missing(missing, folder, exported, monkeypatch) -> None:
    """Without the folder's ours takes its place; without ours the operators run by their definitions."""
    expected = tokens(exported(mode="separate", bundle_library=True).parent)
    if missing == "ours":
        monkeypatch.setattr("loratrf_deploy.genai.folder.is_built", lambda: False)
    else:
        (folder / "libloratrf_ort.so").unlink()
    with safe_folder(folder) as opened:
        options = read_json(opened / CONFIG_FILE)["model"]["decoder"]["session_options"]
        assert options.get("custom_ops_library") == (None if missing == "ours" else "libloratrf_ort.so")
        assert (opened / "libloratrf_ort.so").exists() == (missing != "ours")
    assert tokens(folder) == expected


def test_our_own_folder_is_opened_as_it_is(folder) -> None:
    with safe_folder(folder) as opened:
        assert opened == folder


def test_a_link_to_our_library_is_not_taken_for_it(folder) -> None:
    (folder / "libloratrf_ort.so").unlink()
    (folder / "libloratrf_ort.so").symlink_to(library_path())
    with safe_folder(folder) as opened:
        assert opened != folder
    tokens(folder)


Options = dict[str, Any]


def session_options(**options: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["model"]["decoder"]["session_options"].update(options)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a file written": (session_options(enable_profiling="/tmp/profile"), "the session option enable_profiling"),
    "a folder elsewhere": (
        session_options(**{"session.model_external_initializers_file_folder_path": "/etc"}),
        "session.model_external_initializers_file_folder_path",
    ),
    "a provider's library": (
        session_options(provider_options=[{"QNN": {"backend_path": "x.so"}}]),
        "options of the execution provider QNN",
    ),
    "an address": (
        session_options(provider_options=[{"cuda": {"gpu_external_alloc": "1234"}}]),
        "options of the execution provider cuda",
    ),
    "a provider that is no object": (session_options(provider_options=["QNN"]), "execution provider QNN"),
    "a model elsewhere": (lambda config: config["model"]["decoder"].update(filename="../model.onnx"), "filename"),
    "an absolute path": (lambda config: config["model"]["decoder"].update(filename="/model.onnx"), "filename"),
    "another part": (
        lambda config: config["model"].update(vision={"filename": "../x.onnx"}),
        "filename '../x.onnx'",
    ),
    "shared data": (
        lambda config: config["model"]["decoder"].update(shared_initializers=[{"data_file": "/etc/passwd"}]),
        "data_file '/etc/passwd'",
    ),
    "a tokenizer elsewhere": (lambda config: config["model"].update(tokenizer_dir=".."), "tokenizer_dir"),
    "a library elsewhere": (session_options(custom_ops_library="../x.so"), "custom_ops_library '../x.so'"),
    "a run's options": (
        lambda config: config["model"]["decoder"].update(run_options={"enable_profiling": "/tmp/x"}),
        "run_options",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_configuration_that_reaches_further(what, folder, tmp_path) -> None:
    change, words = HOSTILE[what]
    config_of(folder, change)
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        GenerationSession(folder)
    assert "--trust-library" in str(caught.value)


def test_profiling_writes_nothing(folder, tmp_path, capsys) -> None:
    """onnxruntime-genai itself would write PREFIX_<time>.json."""
    config_of(folder, session_options(enable_profiling=str(tmp_path / "profile")))
    assert main(["--model", str(folder), "--prompt", "rain", "--max-new-tokens", "2"]) == 2
    assert not list(tmp_path.glob("profile*"))
    assert main(["--model", str(folder), "--prompt", "rain", "--max-new-tokens", "2", "--trust-library"]) == 0
    assert list(tmp_path.glob("profile*"))


DAMAGED: dict[str, Callable[[str], str]] = {
    # Of two, Python sees the last one and onnxruntime-genai both.
    "options twice": lambda text: text.replace(
        '"session_options"', '"session_options": {"custom_ops_library": "evil.so"}, "session_options"', 1
    ),
    "nested without end": lambda text: "[" * 100_000,
    "options a list": lambda text: text.replace('"session_options": {', '"session_options": [{', 1).replace(
        "},", "}],", 1
    ),
    "a list": lambda text: "[]",
    "a token too large": lambda text: text.replace('"pad_token_id": 2', '"pad_token_id": 1e300'),
    "tokens of lists": lambda text: text.replace('"eos_token_id": 1', '"eos_token_id": [[1]]'),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_configuration(what, folder) -> None:
    text = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(DAMAGED[what](text))
    assert (folder / CONFIG_FILE).read_text() != text
    with pytest.raises(UserError, match=f"{CONFIG_FILE} is damaged"):
        GenerationSession(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json", CONFIG_FILE])
def test_a_fifo_in_the_folder_makes_nobody_wait(name, folder) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=r"is a FIFO|is missing"):
        GenerationSession(folder)
    with pytest.raises(UserError, match="is a FIFO"):
        load_model(folder)


def test_inspect_says_whose_library_it_is(folder, capsys) -> None:
    from loratrf_deploy.cli.inspect import main as inspect

    def shown() -> tuple[dict[str, Any], str]:
        assert inspect([str(folder), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert inspect([str(folder)]) == 0
        return facts, capsys.readouterr().out

    capsys.readouterr()
    facts, text = shown()
    assert (facts["library"]["exported"], facts["library"]["installed"]) == (True, True)
    assert "library  libloratrf_ort.so in the folder, the one that was exported, installed here too" in text
    assert facts["library_sha256"] == facts["library"]["sha256"]
    (folder / "libloratrf_ort.so").write_bytes(b"another")
    facts, text = shown()
    assert (facts["library"]["exported"], facts["library"]["installed"]) == (False, False)
    assert "not the one installed here and not what was exported" in " ".join(facts["warnings"])
    # A stranger writes loratrf.json too: its hash is no ground to load the library.
    edit_json(folder / "loratrf.json", library_sha256=facts["library"]["sha256"])
    facts, _ = shown()
    assert facts["library"]["exported"]
    with safe_folder(folder) as opened:
        assert opened != folder


def test_the_library_is_where_it_was() -> None:
    from loratrf_deploy.runtime import session

    assert session.library_path is library.library_path
