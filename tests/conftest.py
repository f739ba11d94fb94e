"""Fixtures: base models, adapters and exports on disk, each made once per session and only when a test asks."""

from __future__ import annotations

import importlib
import os
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


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """make_tiny(family, task, kind, **adapter options) -> (base, adapter), folders to read only."""
    import tiny

    made: dict[Any, Path] = {}

    def make(family: str = "bert", task: str = "text-classification", kind: str = "loratrf", **options: Any):
        base_key, adapter_key = (family, task), (family, task, kind, repr(sorted(options.items())))
        if base_key not in made:
            made[base_key] = tiny.make_base(tmp_path_factory.mktemp("base") / family, family, task)
        if adapter_key not in made:
            folder = tmp_path_factory.mktemp("adapter") / kind
            made[adapter_key] = tiny.make_adapter(made[base_key], folder, kind=kind, **options)
        return made[base_key], made[adapter_key]

    return make


@pytest.fixture(scope="session")
def make_export(make_tiny: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory):
    """make_export(family, task, kind, mode=, swappable=, dtype=, **adapter options) -> Exported, not checked."""
    from loratrf_deploy.export import ExportOptions, export_adapter

    made: dict[Any, Exported] = {}

    def make(
        family: str = "bert",
        task: str = "text-classification",
        kind: str = "loratrf",
        *,
        mode: str = "separate",
        swappable: str | None = None,
        dtype: str = "float32",
        **options: Any,
    ) -> Exported:
        key = (family, task, kind, mode, swappable, dtype, repr(sorted(options.items())))
        if key not in made:
            base, adapter = make_tiny(family, task, kind, **options)
            out = tmp_path_factory.mktemp("export") / "model.onnx"
            export_adapter(
                adapter, out, ExportOptions(base_model=base, mode=mode, swappable=swappable, dtype=dtype, check=False)
            )
            made[key] = Exported(base, adapter, out)
        return made[key]

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

    made: dict[str, Path] = {}

    def make(family: str = "llama", kind: str = "loratrf", sizes: dict[str, Any] | None = None, **options: Any):
        base_key, key = repr((family, sizes)), repr((family, sizes, kind, options))
        if base_key not in made:
            made[base_key] = tiny_llm.make_base(tmp_path_factory.mktemp("llm") / family, family, **(sizes or {}))
        if key not in made:
            folder = tmp_path_factory.mktemp("llm-adapter") / kind
            made[key] = tiny_llm.make_adapter(made[base_key], folder, kind, **options)
        return made[base_key], made[key]

    return make


@pytest.fixture(scope="session")
def exported(
    make_llm: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """exported(kind, **export options) -> model.onnx of tiny LLaMA, unchecked, to read only."""
    from loratrf_deploy.export import ExportOptions, export_adapter

    made: dict[str, Path] = {}

    def make(kind: str = "loratrf", **options: Any) -> Path:
        key = repr((kind, sorted(options.items())))
        if key not in made:
            base, adapter = make_llm("llama", kind)
            out = tmp_path_factory.mktemp("genai") / "model.onnx"
            export_adapter(adapter, out, ExportOptions(base_model=base, check=False, **options))
            made[key] = out
        return made[key]

    return make
