"""Fixtures: base models, adapters and exports on disk, each made once per session and only when a test asks."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network


class Exported(NamedTuple):
    """An adapter, its base and the model exported from them."""

    base: Path
    adapter: Path
    model: Path


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, called once for the same arguments."""
    made: dict[str, Any] = {}

    def remembered(*arguments: Any, **options: Any) -> Any:
        key = repr((arguments, sorted(options.items())))
        if key not in made:
            made[key] = make(*arguments, **options)
        return made[key]

    return remembered


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """make_tiny(family, task, kind, **adapter options) -> (base, adapter), folders to read only."""
    import tiny

    bases = once(lambda family, task: tiny.make_base(tmp_path_factory.mktemp("base") / family, family, task))
    adapters = once(
        lambda base, kind, **options: tiny.make_adapter(
            base, tmp_path_factory.mktemp("adapter") / kind, kind=kind, **options
        )
    )

    def make(family: str = "bert", task: str = "text-classification", kind: str = "loratrf", **options: Any):
        base = bases(family, task)
        return base, adapters(base, kind, **options)

    return make


@pytest.fixture(scope="session")
def make_export(make_tiny: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory):
    """make_export(family, task, kind, mode=, swappable=, dtype=, **adapter options) -> Exported, not checked."""
    from loratrf_deploy.export import ExportOptions, export_adapter

    @once
    def export(adapter: Path, base: Path, **how: Any) -> Path:
        out = tmp_path_factory.mktemp("export") / "model.onnx"
        export_adapter(adapter, out, ExportOptions(base_model=base, check=False, **how))
        return out

    def make(
        *which: str, mode: str = "separate", swappable: str | None = None, dtype: str = "float32", **options: Any
    ) -> Exported:
        base, adapter = make_tiny(*which, **options)
        return Exported(base, adapter, export(adapter, base, mode=mode, swappable=swappable, dtype=dtype))

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        kernels = importlib.import_module("loratrf_deploy._kernels")
        metafunc.parametrize("isa", kernels.isas(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU has, in force for the test."""
    from loratrf_deploy import _kernels

    _kernels.set_isa(request.param)
    yield request.param
    _kernels.set_isa("")


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
def make_llm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """make_llm(family, kind, sizes=..., **adapter options) -> (base, adapter), folders to read only."""
    import tiny_llm

    bases = once(lambda family, **sizes: tiny_llm.make_base(tmp_path_factory.mktemp("llm") / family, family, **sizes))
    adapters = once(
        lambda base, kind, **options: tiny_llm.make_adapter(
            base, tmp_path_factory.mktemp("llm-adapter") / kind, kind, **options
        )
    )

    def make(family: str = "llama", kind: str = "loratrf", sizes: dict[str, Any] | None = None, **options: Any):
        base = bases(family, **(sizes or {}))
        return base, adapters(base, kind, **options)

    return make


@pytest.fixture(scope="session")
def exported(
    make_llm: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """exported(kind, **export options) -> model.onnx of tiny LLaMA, unchecked, to read only."""
    from loratrf_deploy.export import ExportOptions, export_adapter

    @once
    def make(kind: str = "loratrf", **options: Any) -> Path:
        base, adapter = make_llm("llama", kind)
        out = tmp_path_factory.mktemp("genai") / "model.onnx"
        export_adapter(adapter, out, ExportOptions(base_model=base, check=False, **options))
        return out

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
