"""Parity of your own model as tests in your own CI:

    python -m loratrf_deploy.parity_suite --model model.onnx --adapter PATH [--base-model PATH] [--inputs FILE.jsonl]

runs pytest on this module, and takes pytest's options too (-v, --junitxml=out.xml). Spelled out, it is

    pytest -p loratrf_deploy.parity_suite --pyargs loratrf_deploy.parity_suite --noconftest --model ... --adapter ...

It is a plugin for that run only: no other pytest run in the environment loads it or sees its options.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .cli.parity import run
from .cli.shared import positive
from .errors import UserError, one_line
from .parity.result import VARIANTS
from .reports.formats import check_report_path, write_report
from .reports.rows import reasons

if TYPE_CHECKING:
    from .parity.result import ParityReport

__all__: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of loratrf-parity."""
    group = parser.getgroup("loratrf-parity", "parity of an exported model with PyTorch")
    group.addoption("--model", type=Path, help="exported model, such as model.onnx")
    group.addoption("--adapter", type=Path, help="adapter directory that it was exported from")
    group.addoption("--base-model", help="folder or hub name of the base model (default: what the adapter names)")
    group.addoption("--inputs", type=Path, help="JSON lines of texts or arrays (default: random batches)")
    group.addoption("--trust-remote-code", action="store_true", help="run Python that base model and tokenizer bring")
    group.addoption("--tolerance", type=positive, help="largest relative error (default: by dtype of the weights)")
    group.addoption("--report", action="append", type=Path, default=[], help=".json, .md, .html or .xml; repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Refuses to start without a model and its adapter."""
    if config.getoption("--model") is None or config.getoption("--adapter") is None:
        raise pytest.UsageError("loratrf_deploy.parity_suite needs --model model.onnx and --adapter PATH.")
    try:
        for path in config.getoption("--report"):
            check_report_path(path)
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session")
def parity(pytestconfig: pytest.Config) -> ParityReport:
    """The comparison, made once."""
    names = ("--model", "--adapter", "--base-model", "--inputs", "--tolerance")
    try:
        trusted = pytestconfig.getoption("--trust-remote-code")
        report = run(*(pytestconfig.getoption(name) for name in names), trust_remote_code=trusted)
        for path in pytestconfig.getoption("--report"):
            write_report(report, path)
    except UserError as error:
        pytest.fail(str(error), pytrace=False)
    return report


@pytest.mark.parametrize("variant", VARIANTS)
def test_parity(parity: ParityReport, variant: str) -> None:
    """with and without library: max|onnx - torch| / max|torch| <= tolerance; base-off: the adapter has an effect;
    no adapter: a swappable model's default is what its manifest says; quantised: its weights are the base's own."""
    checks = [check for check in parity.checks if check.variant == variant]
    if not checks:
        pytest.skip(f"{variant}: this model has no such comparison")
    lines = "\n".join(line for line in reasons(parity) if line.startswith(f"{variant},"))
    if any(check.status == "failed" for check in checks):
        pytest.fail(f"{lines}\n{one_line(parity.verdict)}", pytrace=False)
    if not all(check.status == "passed" for check in checks):
        pytest.skip(lines)


if __name__ == "__main__":
    module = "loratrf_deploy.parity_suite"
    # The caller's own conftest.py may well have a --model of its own, and pytest refuses two.
    raise SystemExit(pytest.main(["-p", module, "--pyargs", module, "--noconftest", *sys.argv[1:]]))
