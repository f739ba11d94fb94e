"""Builds the shared libraries with CMake, for `pip install .` and `pip install -e .`; the rest is pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
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


setup(ext_modules=[Extension("loratrf_deploy._kernels", sources=[])], cmdclass={"build_ext": CMakeBuild})
