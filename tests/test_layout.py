"""The house: which folder may import which, no circles, small functions, lists of public names that are true."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from operators import built_library

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    *("version", "errors", "files", "onnx_file", "ops", "adapters", "genai", "formats", "peft", "runtime"),
    *("serving", "pytorch", "bench", "parity", "reports", "export", "cli", "parity_suite", "__init__", "__main__"),
)
"""Folders of the package and modules beside them: each imports only what stands before it, and within itself."""
LINES = 80
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")])


def dotted(path: Path) -> str:
    """loratrf_deploy/ops/schemas.py -> ops.schemas; export/ lies beside the package, and belongs to it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "export" else parts[1:])


MODULES = {
    dotted(path): ast.parse(path.read_text())
    for path in sorted([*(ROOT / "loratrf_deploy").rglob("*.py"), *(ROOT / "export").glob("*.py")])
    if "export" not in path.relative_to(ROOT).parts[1:-1]
}


def imported(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every import from the package, those within functions and for type checking included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.split(".")[: -node.level]
            target = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{target}.{alias.name}".lstrip(".")
                yield (inner, "") if inner in MODULES or f"{inner}.__init__" in MODULES else (target, alias.name)


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports, packages as their __init__."""
    return {
        module: {target if target in MODULES else f"{target}.__init__" for target, name in imported(module, tree)}
        for module, tree in MODULES.items()
    }


def test_folders_import_only_what_stands_before_them() -> None:
    assert {module.partition(".")[0] for module in MODULES} == set(ORDER)
    for module, targets in graph().items():
        own = module.partition(".")[0]
        for target in targets:
            assert ORDER.index(target.partition(".")[0]) <= ORDER.index(own), f"{module} imports {target}"


def test_no_import_circle() -> None:
    TopologicalSorter(graph()).prepare()  # CycleError names the modules


def test_no_function_is_long() -> None:
    files = [path for folder in ("loratrf_deploy", "export", "benchmarks", "examples", "tests")
             for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    long = [
        f"{path.name}: {node.name} has {length} lines"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LINES
    ]
    assert not long


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_true(module: str) -> None:
    """What __all__ lists is there, and what others import from the module is listed."""
    name = f"loratrf_deploy.{module}".removesuffix(".__init__")
    if module in ("__main__", "parity_suite"):  # scripts
        return
    if module in ("ops.kernels", "ops.torch_ops"):
        built_library()
    public = getattr(importlib.import_module(name), "__all__", ())
    assert len(public) == len(set(public))
    assert all(hasattr(importlib.import_module(name), entry) for entry in public)
    used = {
        entry
        for other, tree in MODULES.items()
        for target, entry in imported(other, tree)
        if entry and target in (module, module.removesuffix(".__init__"))
    }
    assert used <= set(public), sorted(used - set(public))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_can_be_imported(script: Path) -> None:
    if script.stem == "bench_cuda":
        built_library()
    importlib.import_module(script.stem)


def test_scripts_share_what_is_public() -> None:
    """Imports within functions too, which importing a script doesn't run."""
    stems = {script.stem for script in SCRIPTS}
    for script in SCRIPTS:
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in stems:
                names = [alias.name for alias in node.names]
                assert not [name for name in names if name.startswith("_")], script.name
                assert all(hasattr(importlib.import_module(node.module), name) for name in names), script.name
