"""Writes docs/families.md: every family and task that the tests' own factories make, exported and proven in every mode.

    python tests/families.py                 # all of them
    python tests/families.py --only whisper  # those whose name has it; other rows stay as they are
    python tests/families.py --missing       # those that the page has no numbers of yet; how an interrupted run goes on
    python tests/families.py --names         # adds the names of those alone, which is all that the tests insist on

Each is a small random model with a random LoRA; the error is the largest relative one that the export's own proof wrote
into loratrf.json. What is refused has the first words of the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "families.md"
MODES: dict[str, dict[str, str]] = {
    "merged": {"mode": "merged"},
    "separate": {"mode": "separate"},
    "swappable": {"swappable": "base"},
}
UNTRIED = ["not measured yet"] * len(MODES)
_FAMILIES_OF = ("FAMILIES", "ANSWERS", "CAUSAL")
"""What modules tests/tiny_*.py call the families that their make_base and make_adapter know."""
_TASK_OF = {"tiny_llm": "text generation", "tiny_stages": "generation in stages", "tiny_vlm": "images and text"}
_HEAD = """\
# Families

Written by `python tests/families.py` from what the tests' factories make: small random models with a random LoRA, in
float32. A number is the largest relative error of the exported model, with the library and without, against PyTorch
with PEFT; the tolerance is 1e-5, of models that generate 1e-4. Where there is none, the refusal begins so. Other kinds
of adapters: [adapters.md](adapters.md#what-each-kind-can-do).

| family | task | merged | separate | swappable |
| --- | --- | --- | --- | --- |
"""

Make = Callable[[Path], tuple[Path, Path]]


def families() -> dict[tuple[str, str], Make]:
    """(family, task) -> what makes base and adapter of it in a folder; from every factory that the tests have."""
    return dict(sorted({**_encoders(), **_kinds(), **_generating()}.items()))


def _encoders() -> dict[tuple[str, str], Make]:
    import test_export

    import tiny

    def make(family: str, task: str, folder: Path) -> tuple[Path, Path]:
        base = tiny.make_base(folder / "base", family, task)
        return base, tiny.make_adapter(base, folder / "adapter")

    return {(family, task.replace("-", " ")): partial(make, family, task) for family, task in test_export.FAMILY_TASKS}


def _kinds() -> dict[tuple[str, str], Make]:
    import test_encoder_tasks
    import test_model_kinds

    def make(name: str, folder: Path) -> tuple[Path, Path]:
        test_encoder_tasks.make_kind(folder, name, "lora")
        return folder / "base", folder / "adapter"

    def make_plain(name: str, folder: Path) -> tuple[Path, Path]:
        *kind, _, _, _ = test_model_kinds.KINDS[name]
        base, adapter = test_model_kinds.make(folder, *kind, "lora")
        if name == "wavlm":
            test_model_kinds.leave_untrained(adapter, "q_proj")  # as training does: the forward passes over it
        return base, adapter

    found: dict[tuple[str, str], Make] = {}
    for name in test_encoder_tasks.KINDS:
        family, _, task = name.partition(", ")
        found[family, task] = partial(make, name)
    for name, (family, auto, *_) in test_model_kinds.KINDS.items():
        task = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in auto.partition("For")[2])
        found[family, task.strip()] = partial(make_plain, name)
    return found


def _generating() -> dict[tuple[str, str], Make]:
    import test_genai_bases

    import tiny_llm

    def make(module: Any, family: str, sizes: dict[str, Any], folder: Path) -> tuple[Path, Path]:
        base = module.make_base(folder / "base", family, **sizes)
        return base, module.make_adapter(base, folder / "adapter", "lora")

    found: dict[tuple[str, str], Make] = {}
    for path in sorted(TESTS.glob("tiny_*.py")):
        module = importlib.import_module(path.stem)
        names = [name for field in _FAMILIES_OF for name in getattr(module, field, ())]
        task = _TASK_OF.get(path.stem, path.stem.removeprefix("tiny_"))
        found |= {(name, task): partial(make, module, name, {}) for name in names}
    text = _TASK_OF["tiny_llm"]
    more = test_genai_bases.CACHES | test_genai_bases.MENDED
    found |= {(name, text): partial(make, tiny_llm, name, sizes) for name, sizes in more.items()}
    for name, sizes in tiny_llm.WINDOW.items():
        found[name, f"{text}, window"] = partial(make, tiny_llm, name, {"sliding_window": 16} | sizes)
    return found


def read_page() -> dict[tuple[str, str], list[str]]:
    """The page's rows: (family, task) -> a cell for each mode."""
    if not PAGE.is_file():
        return {}
    rows = [line.strip("|").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    return {(row[0].strip(), row[1].strip()): [cell.strip() for cell in row[2:]] for row in rows}


def write_page(rows: dict[tuple[str, str], list[str]]) -> None:
    """The page with these rows, sorted."""
    lines = [f"| {' | '.join([*key, *cells])} |\n" for key, cells in sorted(rows.items())]
    PAGE.write_text(_HEAD + "".join(lines))


def tried(base: Path, adapter: Path, out: Path, how: dict[str, str]) -> str:
    """The page's cell: the largest error of an export, or why there is none."""
    from loratrf_deploy import UserError
    from loratrf_deploy.export import ExportOptions, ParityFailed, export_adapter

    try:
        export_adapter(adapter, out, ExportOptions(base_model=base, **how))  # type: ignore[arg-type]
    except UserError as error:
        said = str(error).replace(str(adapter), "").replace(str(base), "").replace("|", "/")
        return " ".join(said.split()[:9]).rstrip(".,:;(") + " …"
    except ParityFailed:
        return "**parity fails**"
    checks = json.loads((out.parent / "loratrf.json").read_text())["parity"]["checks"]
    exact = [check for check in checks if check["variant"] in ("with library", "without library")]
    return f"{max(check['relative'] for check in exact if check.get('relative') is not None):.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose family or task has it")
    parser.add_argument("--missing", action="store_true", help="rows that the page has no numbers of yet")
    parser.add_argument("--names", action="store_true", help="add the names of such rows, and try nothing")
    options = parser.parse_args()
    known = families()
    write_page({key: read_page().get(key, UNTRIED) for key in known})
    for key, make in known.items() if not options.names else ():
        if options.only not in ", ".join(key) or (options.missing and read_page()[key] != UNTRIED):
            continue
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
            base, adapter = make(Path(name))
            cells = [tried(base, adapter, Path(name) / mode / "model.onnx", how) for mode, how in MODES.items()]
        write_page(read_page() | {key: cells})  # after each, so that several runs with --only go side by side
        print(", ".join(key), *cells, sep="  ", flush=True)
    return 0


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(TESTS))
    raise SystemExit(main())
