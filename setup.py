"""Builds the library with CMake, for `pip install .`, `pip install -e .` and wheels; the rest is pyproject.toml.

    pip wheel --no-deps .                                           for this machine, with its compiler
    LORATRF_WHEEL=manylinux_2_28_x86_64 pip wheel --no-deps .       for any Linux since 2018, with PyPI's ziglang

What else LORATRF_WHEEL may be: PLATFORMS below. CMAKE_ARGS goes to CMake: -DLORATRF_CUDA=ON builds the GPU's kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PLATFORMS = {
    "manylinux_2_28_x86_64": "x86_64-linux-gnu.2.28",
    "manylinux_2_28_aarch64": "aarch64-linux-gnu.2.28",
    "win_amd64": "x86_64-windows-gnu",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
}
"""A wheel's platform -> what zig compiles for it (cmake/zig.cmake)."""
PLATFORM = os.environ.get("LORATRF_WHEEL", "")
if PLATFORM and PLATFORM not in PLATFORMS:
    sys.exit(f"error: LORATRF_WHEEL is {PLATFORM!r}, expected {', '.join(PLATFORMS)}, or nothing for this machine.")


class Build(build):
    def finalize_options(self) -> None:
        if PLATFORM:
            self.build_base = str(Path(self.build_base, PLATFORM))  # a wheel takes all that is built there
        super().finalize_options()


class CMakeBuild(build_ext):
    """CMake makes the library; setuptools decides where it goes (beside the sources if editable)."""

    def get_ext_filename(self, fullname: str) -> str:
        """No module of one Python's, but a library for all of them."""
        system = (PLATFORM or sysconfig.get_platform()).split("_")[0].split("-")[0]
        file = {"win": "loratrf_ort.dll", "macosx": "libloratrf_ort.dylib"}.get(system, "libloratrf_ort.so")
        return str(Path(*fullname.split(".")[:-1], file))

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = (Path(self.build_temp) / "cmake").resolve()
        output.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DLORATRF_OUTPUT={output}"]
        if PLATFORM:
            configure += [f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'zig.cmake'}"]
            configure += [f"-DLORATRF_ZIG_PYTHON={sys.executable}", f"-DLORATRF_TARGET={PLATFORMS[PLATFORM]}"]
        elif self.editable_mode:
            configure += ["-DLORATRF_LANES16=ON"]  # the tests'
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run([*configure, *os.environ.get("CMAKE_ARGS", "").split()], check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel"], check=True)


class Wheel(bdist_wheel):
    """Puts a software bill of materials into the wheel (PEP 770): what others' code its library carries inside."""

    libraries_inside = False

    def run(self) -> None:
        self.libraries_inside = True  # an editable install's wheel, which doesn't come this way, has none
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Of any Python: nothing in the wheel is compiled for one."""
        return "py3", "none", PLATFORM or super().get_tag()[2]

    def write_wheelfile(self, wheelfile_base: str, *args: str, **options: str) -> None:
        super().write_wheelfile(wheelfile_base, *args, **options)
        if not self.libraries_inside:
            return
        folder = Path(self.get_finalized_command("build_ext").build_temp) / "cmake"
        inside = dict(line.split() for line in (folder / "components.txt").read_text().splitlines())
        bills = Path(wheelfile_base) / "sboms"
        bills.mkdir(exist_ok=True)
        (bills / "loratrf-deploy.cdx.json").write_text(json.dumps(self.materials(inside), indent=2) + "\n")

    def materials(self, inside: dict[str, str]) -> dict[str, object]:
        """CycloneDX 1.6: the package, and `inside` (name -> version): linked in, or compiled in from headers."""
        name, version = self.distribution.get_name(), self.distribution.get_version()
        package = {"type": "library", "bom-ref": name, "name": name, "version": version}
        licenses = {
            "libstdc++": {"expression": "GPL-3.0-or-later WITH GCC-exception-3.1"},
            "libgcc": {"expression": "GPL-3.0-or-later WITH GCC-exception-3.1"},
            "libc++": {"expression": "Apache-2.0 WITH LLVM-exception"},
            "compiler-rt": {"expression": "Apache-2.0 WITH LLVM-exception"},
            "mingw-w64": {"expression": "ZPL-2.1"},
            "cudart": {"license": {"name": "NVIDIA CUDA Toolkit EULA"}},
        }
        components = [
            {"type": "library", "bom-ref": part, "name": part, "version": number, "licenses": [licenses[part]]}
            for part, number in inside.items()
        ]
        return {
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {"component": {**package, "purl": f"pkg:pypi/{name}@{version}"}},
            "components": components,
            "dependencies": [{"ref": name, "dependsOn": list(inside)}, *({"ref": part} for part in inside)],
        }


setup(
    ext_modules=[Extension("loratrf_deploy.loratrf_ort", sources=[])],
    setup_requires=["ziglang>=0.17"] if PLATFORM else [],
    cmdclass={"build": Build, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
