"""What an installed package is: light enough to run models without torch, and complete."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import platform
import re
import runpy
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib

from loratrf_deploy.__main__ import COMMANDS
from loratrf_deploy.cli.shared import EXTRAS
from loratrf_deploy.errors import UserError
from loratrf_deploy.ops import library
from loratrf_deploy.version import __version__

ROOT = Path(__file__).parent.parent

CHILD = """
import sys
for name in ("torch", "transformers", "peft", "onnx"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is importable: the test's environment is not the cpu extra alone")
import numpy as np
from loratrf_deploy import create_session
from loratrf_deploy.cli.inspect import main
ids = np.arange(10, dtype=np.int64).reshape(2, 5)
feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
with_library = create_session(sys.argv[1]).run(None, feeds)[0]
without = create_session(sys.argv[1], library=False).run(None, feeds)[0]
assert with_library.shape == (2, 3) and np.abs(with_library - without).max() < 1e-5
sys.exit(main([sys.argv[1]]))
"""


def closure(requirements: list[str]) -> set[str]:
    """The installed distributions that `requirements` pull in, themselves included, by their own metadata."""
    from packaging.requirements import Requirement

    names: set[str] = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        requirement = queue.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in names:
            continue
        names.add(name)
        for text in metadata.requires(requirement.name) or []:
            inner = Requirement(text)
            if inner.marker is None or inner.marker.evaluate({"extra": ""}):
                queue.append(inner)
    return names


def _distribution(folder: Path) -> None:
    code = f"import setuptools.build_meta as backend; print(backend.build_sdist({str(folder)!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    source = folder / made.stdout.splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    built = subprocess.run([*pip, "--wheel-dir", folder, source], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


@pytest.fixture(scope="module")
def wheel(made_once: Callable[..., Path]) -> Path:
    """What a package index is sent, built as others build it: the source distribution, and a wheel from that alone.

    Once for all processes: two at a time would be in each other's way, in the repository's own folder.
    """
    (path,) = made_once(_distribution).glob("*.whl")
    return path


@pytest.fixture(scope="module")
def cpu_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds what `pip install 'loratrf-deploy[cpu]'` would and nothing else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path_factory.mktemp("cpu-extra")
    for name in closure([*project["dependencies"], *project["optional-dependencies"]["cpu"]]):
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or [] if ".." not in path.parts}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and source.name != "__pycache__":
                (folder / top).symlink_to(source)
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_running_and_inspecting_need_the_cpu_extra_alone(make_export: Callable, cpu_only: Path) -> None:
    exported = make_export("bert", "text-classification", "loratrf", mode="separate")
    # -I -S: no environment variables, no working directory, no site-packages but ours.
    code = f"import sys; sys.path.insert(0, {str(cpu_only)!r})\n{CHILD}"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(exported.model)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "LoraTrf" in result.stdout


def test_importing_the_package_stays_light() -> None:
    heavy = ["torch", "transformers", "onnxruntime", "rich"]
    code = f"import loratrf_deploy, sys; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_command_is_installed_and_helps() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(COMMANDS) == {entry.name for entry in metadata.distribution("loratrf-deploy").entry_points}
    assert set(COMMANDS) == set(project["scripts"])
    for name in COMMANDS:
        result = subprocess.run([Path(sys.executable).with_name(name), "--help"], capture_output=True, text=True)
        assert result.returncode == 0
        assert result.stdout.startswith(f"usage: {name}")


def without_extras(module: str, *arguments: str, absent: str = "cpu export genai") -> subprocess.CompletedProcess[str]:
    """A command where the modules of the extras `absent` are missing."""
    names = [name for extra in absent.split() for name in EXTRAS[extra]]
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({names}));"
        f"sys.argv = {['-m', *arguments]}; runpy.run_module({module!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_package_lists_its_commands() -> None:
    listed = without_extras("loratrf_deploy")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(COMMANDS)
    assert all(what in listed.stdout for what in COMMANDS.values())
    assert json.loads(without_extras("loratrf_deploy", "--json").stdout) == COMMANDS
    assert without_extras("loratrf_deploy", "--version").stdout == f"loratrf-deploy {__version__}\n"
    slip = without_extras("loratrf_deploy", "export")
    assert slip.stderr == "error: unrecognized arguments: export (see python -m loratrf_deploy --help)\n"
    assert slip.returncode == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_version_and_slips_need_no_extra(name: str) -> None:
    module = f"loratrf_deploy.cli.{name.removeprefix('loratrf-')}"
    version = without_extras(module, "--version")
    assert (version.returncode, version.stdout, version.stderr) == (0, f"{name} {__version__}\n", "")
    helped = without_extras(module, "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--json" in helped.stdout
    slip = without_extras(module)
    assert (slip.returncode, slip.stdout) == (2, "")
    wants = r"(the following arguments are required: .*|one of the arguments .* is required)"
    assert re.fullmatch(rf"error: {wants} \(see {name} --help\)\n", slip.stderr)


@pytest.mark.parametrize(
    ("command", "absent", "extras"),
    [
        ("export --adapter a --out m.onnx", "cpu export", "cpu,export"),
        ("export --adapter a --out m.onnx", "export", "export"),
        ("export --adapter a --out m.onnx --no-check", "cpu export", "export"),
        ("export --adapters x=a y=b --out m.onnx", "export", "export"),
        ("parity --model m.onnx --adapter a", "cpu export", "cpu,export"),
        ("parity --model m.onnx --adapter a", "cpu", "cpu"),
        ("perplexity --text t --adapter a --model m.onnx", "export", "export"),
        ("generate --model m.onnx --prompt x", "genai", "genai"),
        ("serve --model m", "serve", "serve"),
    ],
)
def test_a_missing_extra_is_a_paragraph_with_pips_line(command: str, absent: str, extras: str) -> None:
    name, *arguments = command.split()
    result = without_extras(f"loratrf_deploy.cli.{name}", *arguments, "--json", absent=absent)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: This needs ")
    assert result.stderr.count("\n") == 1
    assert f"`pip install 'loratrf-deploy[{extras}]'`" in result.stderr
    assert all(module in result.stderr for extra in extras.split(",") for module in EXTRAS[extra])


def test_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        assert list(modules) == [re.split("[>=]", text)[0].replace("-", "_") for text in extras[extra]]


def test_the_wheel_says_what_its_libraries_carry(cpu_only: Path) -> None:
    (bill,) = cpu_only.glob("loratrf_deploy-*.dist-info/sboms/loratrf-deploy.cdx.json")
    bill = json.loads(bill.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["purl"] == f"pkg:pypi/loratrf-deploy@{__version__}"
    parts = {part["name"]: part["version"] for part in bill["components"]}
    compiler = subprocess.run(["c++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    assert parts == {"libstdc++": compiler, "libgcc": compiler}
    assert all(part["licenses"] for part in bill["components"])


def test_every_part_of_the_libraries_has_its_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    import setuptools

    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    command = given["cmdclass"]["bdist_wheel"](setuptools.Distribution({"name": "loratrf-deploy", "version": "9.8"}))
    names = re.findall(r"([\w+-]+) (?:zig-)?\$\{\w*version\}\\n", (ROOT / "CMakeLists.txt").read_text(), re.IGNORECASE)
    assert names == ["libc++", "compiler-rt", "mingw-w64", "libstdc++", "libgcc", "cudart"]
    bill = command.materials(dict.fromkeys(names, "1.0"))
    assert [part["name"] for part in bill["components"] if part["licenses"]] == names


def test_one_wheel_serves_every_python(wheel: Path, cpu_only: Path) -> None:
    assert re.fullmatch(r"loratrf_deploy-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    assert [path.name for path in (cpu_only / "loratrf_deploy").rglob("*.so")] == ["libloratrf_ort.so"]


def header(system: str, machine: int) -> bytes:
    """The first bytes of a library, as each system's format lays them out."""
    if system == "Linux":
        return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, machine, 1)
    if system == "macOS":
        return struct.pack("<III", 0xFEEDFACF, machine, 0)
    return b"MZ" + bytes(58) + struct.pack("<I4sH", 64, b"PE\0\0", machine)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header("Linux", 183), "is built for Linux aarch64, and this Python runs on Linux x86_64"),
        (header("Linux", 243), "is built for Linux riscv64"),
        (header("Windows", 0x8664), "is built for Windows x86_64"),
        (header("macOS", 0x0100000C), "is built for macOS aarch64"),
        (header("Linux", 183)[:18], "is built for no system: it is cut short"),
        (b"<html>", "is built for no system that we know"),
    ],
    ids=["aarch64", "riscv64", "Windows", "macOS", "cut short", "no library"],
)
def test_a_library_for_another_machine(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the words are those of Linux on x86-64")
    monkeypatch.setattr(library, "_PATH", tmp_path / "libloratrf_ort.so")
    (tmp_path / "libloratrf_ort.so").write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        library.library_path()
    assert "Install the wheel for Linux x86_64 (`pip install --force-reinstall loratrf-deploy`)" in str(error.value)
    assert "library=False" in str(error.value)


def test_another_systems_library_beside_the_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    monkeypatch.setattr(library, "_PATH", tmp_path / "libloratrf_ort.so")
    (tmp_path / "loratrf_ort.dll").write_bytes(header("Windows", 0x8664))
    with pytest.raises(UserError, match=r"does not exist \(loratrf_ort\.dll is there, for Windows x86_64\)\. Install"):
        library.library_path()


def test_the_wheel_has_what_is_no_module(cpu_only: Path) -> None:
    package = ROOT / "loratrf_deploy"
    for pattern in ("include/*", "cmake/*", "serving/*.html", "py.typed"):
        there = {path.relative_to(package) for path in package.glob(pattern) if path.is_file()}
        assert there
        assert all((cpu_only / "loratrf_deploy" / path).is_file() for path in there)


def test_the_wheel_has_the_licence(cpu_only: Path) -> None:
    (licence,) = cpu_only.glob("loratrf_deploy-*.dist-info/licenses/LICENSE")
    assert "Apache License" in licence.read_text()


def test_public_names() -> None:
    import loratrf_deploy
    import loratrf_deploy.export

    assert sorted(loratrf_deploy.__all__) == [
        "Adapter",
        "AdapterInfo",
        "AdapterSession",
        "Answer",
        "ExportOptions",
        "GenerationSession",
        "LayerAdapter",
        "StagedSession",
        "UserError",
        "__version__",
        "check_parity",
        "create_session",
        "export_adapter",
        "library_path",
        "read_adapter",
    ]
    assert loratrf_deploy.__version__ == metadata.version("loratrf-deploy")
    assert sorted(loratrf_deploy.export.__all__) == [
        "ExportOptions",
        "ExportResult",
        "ParityFailed",
        "convert_adapter",
        "convert_adapters",
        "export_adapter",
        "export_grouped",
    ]
    for module in (loratrf_deploy, loratrf_deploy.export):
        assert all(hasattr(module, name) for name in module.__all__)
