"""The C++ kit: find_package(loratrf) from the package and from a prefix, and examples/cpp against PyTorch.

The encoder wants ONNX Runtime's own headers; LORATRF_ORT_INCLUDE names their folder where that isn't
/usr/include/onnxruntime (Debian 13: libonnxruntime-dev). The libraries are those of Python's wheels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from loratrf_deploy import __version__, read_adapter
from loratrf_deploy.export import convert_adapter
from loratrf_deploy.pytorch.oracle import load_reference, run_torch

ROOT = Path(__file__).parent.parent
KIT = ROOT / "loratrf_deploy"
IDS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]

pytestmark = pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or compiler here")

# Without a header of ONNX Runtime's: the library is loaded, and does as ONNX Runtime asks it, which here is nothing.
PROGRAM = """
#include <loratrf.h>
#include <cstdio>
#include <cstdint>
struct OrtApiBase { const void* (*GetApi)(uint32_t); const char* (*GetVersionString)(); };
int main() {
  const auto refuse = [](uint32_t version) -> const void* { std::printf("asked for %u\\n", version); return nullptr; };
  const OrtApiBase base{refuse, nullptr};
  OrtStatus* status = RegisterCustomOps(nullptr, &base);
  std::printf("%s\\n", status ? "status" : "null");
}
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, folder: Path, *options: str) -> Path:
    run("cmake", "-S", source, "-B", folder, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror", *options)
    run("cmake", "--build", folder)
    return folder


@pytest.fixture(scope="module")
def cmakedir() -> str:
    return run(sys.executable, "-m", "loratrf_deploy.cli.config", "--cmakedir").strip()


def with_program(folder: Path, version: str) -> Path:
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(app LANGUAGES CXX)\nset(CMAKE_CXX_STANDARD 17)\n"
        f"find_package(loratrf {version} REQUIRED)\nadd_executable(app app.cc)\n"
        "target_link_libraries(app PRIVATE loratrf::loratrf)\n"
    )
    (folder / "app.cc").write_text(PROGRAM)
    return folder


def test_a_program_links_what_the_package_has(tmp_path: Path, cmakedir: str) -> None:
    made = build(with_program(tmp_path, __version__), tmp_path / "build", f"-Dloratrf_DIR={cmakedir}")
    assert re.match(r"asked for \d+\n", run(made / "app"))
    with_program(tmp_path, "99")
    refused = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "other", f"-Dloratrf_DIR={cmakedir}"], capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert f"version: {__version__}" in refused.stderr
    (tmp_path / "copied").mkdir()
    shutil.copytree(KIT / "cmake", tmp_path / "copied" / "cmake")
    with_program(tmp_path, "")
    refused = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "third", f"-Dloratrf_DIR={tmp_path / 'copied' / 'cmake'}"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0
    assert "the library isn't built" in refused.stderr


@pytest.mark.slow
def test_a_program_links_what_cmake_installs(tmp_path: Path) -> None:
    run("cmake", "-S", ROOT, "-B", tmp_path / "kernels", f"-DLORATRF_OUTPUT={tmp_path / 'out'}")
    run("cmake", "--build", tmp_path / "kernels", "--parallel", "2")
    run("cmake", "--install", tmp_path / "kernels", "--prefix", tmp_path / "prefix")
    shutil.move(tmp_path / "prefix", tmp_path / "moved")  # it may go anywhere
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "app").mkdir()
    made = build(
        with_program(tmp_path / "app", __version__), tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'moved'}"
    )
    assert re.match(r"asked for \d+\n", run(made / "app"))
    assert (tmp_path / "moved" / "share" / "doc" / "loratrf_deploy" / "LICENSE").is_file()


def test_the_commands_answers(tmp_path: Path) -> None:
    ask = (sys.executable, "-m", "loratrf_deploy.cli.config")
    assert Path(run(*ask, "--library").strip()).is_file()
    assert (Path(run(*ask, "--include").strip()) / "loratrf.h").is_file()
    assert json.loads(run(*ask, "--cmakedir", "--json")) == {"cmakedir": str(KIT / "cmake")}


def library_of(folder: Path, package: str, pattern: str, name: str) -> Path:
    """A folder whose lib/ has the library of a wheel, by the names that the linker and the loader ask for."""
    (found,) = Path(package).glob(pattern)
    (folder / "lib").mkdir(parents=True)
    for link in (name, f"{name}.1"):
        (folder / "lib" / link).symlink_to(found)
    return folder


@pytest.fixture(scope="module")
def headers() -> Path:
    folders = [Path(os.environ.get("LORATRF_ORT_INCLUDE", "/usr/include/onnxruntime")), Path("/usr/local/include")]
    found = next((folder for folder in folders if (folder / "onnxruntime_cxx_api.h").is_file()), None)
    if found is None:
        pytest.skip(
            "onnxruntime_cxx_api.h is not installed (Debian 13: libonnxruntime-dev), LORATRF_ORT_INCLUDE names none"
        )
    return found


@pytest.mark.consumer("C++", "merged, separate", "swapped")
def test_the_encoder_computes_what_pytorch_does(
    make_export: Callable, make_tiny: Callable, headers: Path, cmakedir: str, tmp_path: Path
) -> None:
    ort = library_of(
        tmp_path / "ort", str(Path(onnxruntime.__file__).parent / "capi"), "libonnxruntime.so.*", "libonnxruntime.so"
    )
    (ort / "include").symlink_to(headers)
    made = build(ROOT / "examples" / "cpp", tmp_path / "build", f"-Dloratrf_DIR={cmakedir}", f"-DONNXRUNTIME={ort}")
    exported = make_export("bert", "text-classification", "loratrf", swappable="adapter")
    _, other = make_tiny("bert", "text-classification", "lora", r=2, seed=9)
    convert_adapter(other, exported.model, tmp_path / "other.onnx_adapter")
    text = "\n".join(" ".join(map(str, row)) for row in IDS)
    said = run(made / "encoder", exported.model, tmp_path / "other.onnx_adapter", input=text).splitlines()
    first, second = (np.array([line.split() for line in rows], float) for rows in (said[:2], said[3:]))
    assert said[2] == str(tmp_path / "other.onnx_adapter")
    width = max(map(len, IDS))
    inputs = {
        "input_ids": np.array([row + [0] * (width - len(row)) for row in IDS]),
        "attention_mask": np.array([[1] * len(row) + [0] * (width - len(row)) for row in IDS]),
        "token_type_ids": np.zeros((2, width), np.int64),
    }
    for got, adapter in ((first, exported.adapter), (second, other)):
        right = run_torch(load_reference(read_adapter(adapter), exported.base), inputs)["logits"]
        assert np.abs(got - right).max() / np.abs(right).max() < 1e-5
    separate = make_export("bert", "text-classification", "loratrf", mode="separate")
    again = run(made / "encoder", separate.model, input=text).splitlines()
    assert np.abs(np.array([line.split() for line in again], float) - first).max() < 1e-5
    alone = tmp_path / "alone" / "model.onnx"
    alone.parent.mkdir()
    shutil.copy(separate.model, alone)
    for arguments, given, words in (
        ([tmp_path / "none.onnx"], text, "no model at"),
        ([separate.model], "", "no token ids on stdin"),
        ([separate.model], "5 x", "line 1 is not token ids"),
        ([alone], text, "model.onnx.data, the model's weights, is missing: keep the files of an export together"),
    ):
        refused = subprocess.run([made / "encoder", *arguments], input=given, capture_output=True, text=True)
        assert refused.returncode == 1
        assert words in refused.stderr


@pytest.mark.consumer("C++", "generates")
def test_the_generator_says_what_python_says(make_llm: Callable, cmakedir: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    from loratrf_deploy import GenerationSession
    from loratrf_deploy.export import ExportOptions, export_adapter

    library = library_of(
        tmp_path / "genai", str(Path(genai.__file__).parent), "libonnxruntime-genai.so", "libonnxruntime-genai.so"
    )
    ort = library_of(
        tmp_path / "ort", str(Path(onnxruntime.__file__).parent / "capi"), "libonnxruntime.so.*", "libonnxruntime.so"
    )
    made = build(ROOT / "examples" / "cpp", tmp_path / "build", f"-Dloratrf_DIR={cmakedir}", f"-DGENAI={library}")
    base, adapter = make_llm("llama", "loratrf")
    export_adapter(
        adapter, tmp_path / "llm" / "model.onnx", ExportOptions(base_model=base, swappable="base", check=False)
    )
    file = next((tmp_path / "llm").glob("*.onnx_adapter"))
    session = GenerationSession(tmp_path / "llm")
    session.load("it", file)
    environment = os.environ | {"LD_LIBRARY_PATH": f"{ort / 'lib'}:{library / 'lib'}"}
    for given, name in (("", None), (str(file), "it")):
        said = run(made / "generate", tmp_path / "llm", "a b c", given, 12, env=environment)
        assert said == "".join(session.stream("a b c", adapter=name, max_new_tokens=12)) + "\n"
    refused = subprocess.run([made / "generate", tmp_path / "no", "a"], capture_output=True, text=True, env=environment)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
