"""Builds the shared libraries with CMake, for `pip install .` and `pip install -e .`; the rest is pyproject.toml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake run makes both libraries; setuptools decides where they go (beside the sources if editable)."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = (Path(self.build_temp) / "cmake").resolve()
        output.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build)),
            f"-DLORATRF_OUTPUT={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)

    def copy_extensions_to_source(self) -> None:
        """An editable install: setuptools knows of the Python module only, the custom-op library stands beside it."""
        super().copy_extensions_to_source()
        name = "libloratrf_ort.so"
        shutil.copy2(Path(self.build_lib) / "loratrf_deploy" / name, ROOT / "loratrf_deploy" / name)


class Wheel(bdist_wheel):
    """Puts a software bill of materials into the wheel (PEP 770): what others' code its libraries carry inside."""

    libraries_inside = False

    def run(self) -> None:
        self.libraries_inside = True  # an editable install's wheel, which doesn't come this way, has none
        super().run()

    def write_wheelfile(self, wheelfile_base: str, *args: str, **options: str) -> None:
        super().write_wheelfile(wheelfile_base, *args, **options)
        if not self.libraries_inside:
            return
        build = Path(self.get_finalized_command("build_ext").build_temp) / "cmake"
        inside = dict(line.split() for line in (build / "components.txt").read_text().splitlines())
        folder = Path(wheelfile_base) / "sboms"
        folder.mkdir(exist_ok=True)
        (folder / "loratrf-deploy.cdx.json").write_text(json.dumps(self.materials(inside), indent=2) + "\n")

    def materials(self, inside: dict[str, str]) -> dict[str, object]:
        """CycloneDX 1.6: the package, and `inside` (name -> version): linked in, or compiled in from headers."""
        name, version = self.distribution.get_name(), self.distribution.get_version()
        package = {"type": "library", "bom-ref": name, "name": name, "version": version}
        licenses = {
            "libstdc++": {"expression": "GPL-3.0-or-later WITH GCC-exception-3.1"},
            "libgcc": {"expression": "GPL-3.0-or-later WITH GCC-exception-3.1"},
            "pybind11": {"license": {"id": "BSD-3-Clause"}},
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
    ext_modules=[Extension("loratrf_deploy._kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
