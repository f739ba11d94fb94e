"""The wheels that go to a package index: built by ziglang for each system, and run as far as emulators carry them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from loratrf_deploy.ops import library
from operators import cpu_has

ROOT = Path(__file__).parent.parent
LIBRARIES = {
    "manylinux_2_28_x86_64": ("libloratrf_ort.so", "Linux x86_64"),
    "manylinux_2_28_aarch64": ("libloratrf_ort.so", "Linux aarch64"),
    "win_amd64": ("loratrf_ort.dll", "Windows x86_64"),
    "macosx_11_0_arm64": ("libloratrf_ort.dylib", "macOS aarch64"),
}
RUNNERS = {
    "manylinux_2_28_x86_64": [],
    # Debian: apt-get install qemu-user g++-aarch64-linux-gnu (for its C library); wine64
    "manylinux_2_28_aarch64": ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"],
    "win_amd64": ["wine64"],
}
"""What runs a program of a platform here; nothing runs macOS's."""
# A minute each, and three more where ziglang hasn't compiled its C++ library for the platform before.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_platform_that_is_none() -> None:
    environment = os.environ | {"LORATRF_WHEEL": "manylinux_2_17_x86_64"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "LORATRF_WHEEL is 'manylinux_2_17_x86_64', expected manylinux_2_28_x86_64, " in done.stderr


@pytest.fixture(scope="module", params=LIBRARIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(platform, its wheel), from the source distribution."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed: the extra `wheels`")
    folder = tmp_path_factory.mktemp("wheels")
    code = f"import setuptools.build_meta as backend; print(backend.build_sdist({str(folder)!r}))"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--wheel-dir", folder, folder / made.stdout.splitlines()[-1]],
        env=os.environ | {"LORATRF_WHEEL": request.param},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return request.param, path


def test_a_wheel_holds_its_systems_library_alone(built: tuple[str, Path], tmp_path: Path) -> None:
    name, wheel = built
    assert re.fullmatch(rf"loratrf_deploy-[\d.]+-py3-none-{name}\.whl", wheel.name)
    file, system = LIBRARIES[name]
    with zipfile.ZipFile(wheel) as archive:
        libraries = [entry for entry in archive.namelist() if entry.endswith((".so", ".dll", ".dylib", ".pyd", ".a"))]
        assert libraries == [f"loratrf_deploy/{file}"]
        assert library._target(Path(archive.extract(libraries[0], tmp_path))) == system
    assert wheel.stat().st_size < 1_500_000


def test_an_old_systems_libraries_will_do(built: tuple[str, Path]) -> None:
    name, wheel = built
    if not name.startswith("manylinux"):
        pytest.skip("auditwheel knows Linux")
    if importlib.util.find_spec("auditwheel") is None:
        pytest.skip("auditwheel is not installed: the extra `wheels`")
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True, check=True
    )
    found = re.search(r'consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"manylinux_2_(\d+)_', shown.stdout)
    assert found, shown.stdout
    assert int(found[1]) <= 28


def test_its_library_computes(built: tuple[str, Path], tmp_path: Path) -> None:
    name, wheel = built
    runner = RUNNERS.get(name)
    if runner is None:
        pytest.skip(f"nothing here runs {name}: built, never run")
    if runner and not shutil.which(runner[0]):
        pytest.skip(f"{runner[0]} is not installed: {name} is built and not run")
    target = {"win_amd64": "x86_64-windows-gnu"}.get(name, f"{name.removeprefix('manylinux_2_28_')}-linux-gnu.2.28")
    program = tmp_path / "selftest.exe"
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", "-O1", "-w"]
    subprocess.run([*compiler, str(ROOT / "tests" / "library_selftest.cc"), "-o", str(program)], check=True)
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(f"loratrf_deploy/{LIBRARIES[name][0]}", tmp_path)
    done = subprocess.run([*runner, str(program), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout
    if not runner and (expected := cpu_has()) is not None:
        code = "import ctypes, sys; run = ctypes.CDLL(sys.argv[1]).loratrf_isa; run.restype = ctypes.c_char_p;"
        code += "print([name for name in ('baseline', 'avx2', 'avx512') if run(name.encode())])"
        found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == str(expected)
