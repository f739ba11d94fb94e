"""Fixtures: base models, adapters and exports on disk, each made once per session and only when a test asks."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network


class Exported(NamedTuple):
    """An adapter, its base and the model exported from them."""

    base: Path
    adapter: Path
    model: Path

    @property
    def folder(self) -> Path:
        return self.model.parent


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made_once(make, *arguments, **options): the folder that `make(folder, ...)` filled, once for all processes."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)

    def once(make: Callable[..., None], *arguments: Any, **options: Any) -> Path:
        key = repr((make.__module__, make.__qualname__, arguments, sorted(options.items())))
        folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
        with FileLock(folder.with_suffix(".lock")):
            if not folder.with_suffix(".made").exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a try that failed
                folder.mkdir()
                make(folder, *arguments, **options)
                folder.with_suffix(".made").touch()
        return folder

    return once


def _tiny_base(folder: Path, family: str, task: str) -> None:
    import tiny

    tiny.make_base(folder / family, family, task)


def _tiny_adapter(folder: Path, base: Path, kind: str, **options: Any) -> None:
    import tiny

    tiny.make_adapter(base, folder / kind, kind=kind, **options)


def _export(folder: Path, adapter: Path, base: Path, **how: Any) -> None:
    from loratrf_deploy.export import ExportOptions, export_adapter

    export_adapter(adapter, folder / "model.onnx", ExportOptions(base_model=base, check=False, **how))


def _llm_base(folder: Path, family: str, **sizes: Any) -> None:
    import tiny_llm

    tiny_llm.make_base(folder / family, family, **sizes)


def _llm_adapter(folder: Path, base: Path, kind: str, **options: Any) -> None:
    import tiny_llm

    tiny_llm.make_adapter(base, folder / kind, kind, **options)


@pytest.fixture(scope="session")
def make_tiny(made_once: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """make_tiny(family, task, kind, **adapter options) -> (base, adapter), folders to read only."""

    def make(family: str = "bert", task: str = "text-classification", kind: str = "loratrf", **options: Any):
        base = made_once(_tiny_base, family, task) / family
        return base, made_once(_tiny_adapter, base, kind, **options) / kind

    return make


@pytest.fixture(scope="session")
def make_export(make_tiny: Callable[..., tuple[Path, Path]], made_once: Callable[..., Path]):
    """make_export(family, task, kind, mode=, swappable=, dtype=, **adapter options) -> Exported, not checked."""

    def make(
        *which: str, mode: str = "separate", swappable: str | None = None, dtype: str = "float32", **options: Any
    ) -> Exported:
        base, adapter = make_tiny(*which, **options)
        made = made_once(_export, adapter, base, mode=mode, swappable=swappable, dtype=dtype)
        return Exported(base, adapter, made / "model.onnx")

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        kernels = importlib.import_module("operators").built_kernels()
        metafunc.parametrize("isa", kernels.isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU has, in force for the test."""
    from loratrf_deploy.ops import kernels

    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa("")


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A device with memory of its own, as AdapterSession sees a GPU; the shapes of the arrays copied there."""
    import onnxruntime

    from loratrf_deploy.runtime import adapter_session

    real, copied = onnxruntime.OrtValue.ortvalue_from_numpy, []

    def ortvalue_from_numpy(array: Any, device: str = "cpu") -> Any:
        if device != "cuda":
            return real(array, device)
        copied.append(array.shape)
        return real(array.copy())  # what is written to the array later doesn't arrive

    monkeypatch.setitem(adapter_session._DEVICES, "CPUExecutionProvider", "cuda")
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", ortvalue_from_numpy)
    return copied


@pytest.fixture(scope="session")
def make_llm(made_once: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """make_llm(family, kind, sizes=..., **adapter options) -> (base, adapter), folders to read only."""

    def make(family: str = "llama", kind: str = "loratrf", sizes: dict[str, Any] | None = None, **options: Any):
        base = made_once(_llm_base, family, **(sizes or {})) / family
        return base, made_once(_llm_adapter, base, kind, **options) / kind

    return make


@pytest.fixture(scope="session")
def exported(make_llm: Callable[..., tuple[Path, Path]], made_once: Callable[..., Path]) -> Callable[..., Path]:
    """exported(kind, **export options) -> model.onnx of tiny LLaMA, unchecked, to read only."""

    def make(kind: str = "loratrf", **options: Any) -> Path:
        base, adapter = make_llm("llama", kind)
        return made_once(_export, adapter, base, **options) / "model.onnx"

    return make


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """hub(folder, name, revision): puts a copy of `folder` into a cache of the hub's, the only one that is seen."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(folder: Path, name: str, revision: str = "main") -> Path:
        model = cache / f"models--{name.replace('/', '--')}"
        commit = f"{len(list(model.glob('refs/*'))) + 1:040x}"
        (model / "refs").mkdir(parents=True, exist_ok=True)
        (model / "refs" / revision).write_text(commit)
        return Path(shutil.copytree(folder, model / "snapshots" / commit))

    return put


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """refused(out, *arguments): loratrf-export ends with 2 and one paragraph, which is returned; it writes nothing."""
    from loratrf_deploy.cli.export import main

    def check(out: Path, *arguments: object) -> str:
        before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
        capsys.readouterr()  # what fixtures printed
        code = main([*map(str, arguments), "--out", str(out)])
        shown = capsys.readouterr()
        assert (code, shown.out) == (2, ""), shown
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        assert (sorted(out.parent.iterdir()) if out.parent.is_dir() else None) == before
        return shown.err

    return check


def _staged_base(folder: Path, family: str) -> None:
    import tiny_stages

    tiny_stages.make_base(folder / family, family)


def _staged_adapter(folder: Path, base: Path, kind: str, **options: Any) -> None:
    import tiny_stages

    tiny_stages.make_adapter(base, folder / kind, kind, **options)


def _prove(folder: Path, adapter: Path, base: Path, mode: Any) -> None:
    from loratrf_deploy.export import ExportOptions, export_adapter

    export_adapter(adapter, folder / "model.onnx", ExportOptions(base_model=base, mode=mode))


@pytest.fixture(scope="session")
def make_staged(made_once: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """make_staged(family, kind, **adapter options) -> (base, adapter), folders to read only."""

    def make(family: str = "gpt2", kind: str = "lora", **options: Any):
        base = made_once(_staged_base, family) / family
        return base, made_once(_staged_adapter, base, kind, **options) / kind

    return make


@pytest.fixture(scope="session")
def staged(make_staged: Callable[..., tuple[Path, Path]], made_once: Callable[..., Path]) -> Callable[..., Exported]:
    """staged(family, kind, mode, **adapter options): exported and proven, once; to read only."""

    def make(family: str = "gpt2", kind: str = "lora", mode: str = "separate", **options: Any) -> Exported:
        base, adapter = make_staged(family, kind, **options)
        return Exported(base, adapter, made_once(_prove, adapter, base, mode) / "model.onnx")

    return make


def _vlm_base(folder: Path, family: str) -> None:
    import tiny_vlm

    tiny_vlm.make_base(folder / family, family)


def _vlm_adapter(folder: Path, base: Path, kind: str, **options: Any) -> None:
    import tiny_vlm

    tiny_vlm.make_adapter(base, folder / kind, kind, **options)


@pytest.fixture(scope="session")
def make_vlm(made_once: Callable[..., Path]) -> Callable[..., tuple[Path, Path]]:
    """make_vlm(family, kind, **adapter options) -> (base, adapter), folders to read only."""

    def make(family: str = "gemma3", kind: str = "lora", **options: Any) -> tuple[Path, Path]:
        base = made_once(_vlm_base, family) / family
        return base, made_once(_vlm_adapter, base, kind, **options) / kind

    return make
