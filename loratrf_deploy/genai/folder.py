"""A stranger's folder for ONNX Runtime GenAI, which loads native code and opens files as genai_config.json says."""

from __future__ import annotations

import contextlib
import filecmp
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..adapters.json_text import parse_json
from ..errors import UserError, some
from ..files import check_kinds, read_regular, readable, stays_inside
from ..onnx_file import check_external_data
from ..ops.library import is_built, library_path

__all__ = [
    "CONFIG_FILE",
    "cache_window",
    "decoder_config",
    "libraries",
    "read_config",
    "safe_folder",
    "takes_uneven_rows",
]

CONFIG_FILE = "genai_config.json"

_THREE_AXES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Begins what onnxruntime-genai calls models that count positions along time, height and width."""

_LIBRARY = "custom_ops_library"
_SESSION_OPTIONS = frozenset(
    (
        *("log_id", "log_severity_level", "log_verbosity_level", "intra_op_num_threads", "inter_op_num_threads"),
        *("enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level", "provider_options", _LIBRARY),
        *("session.intra_op.allow_spinning", "session.inter_op.allow_spinning", "session.set_denormal_as_zero"),
        *("session.disable_prepacking", "session.use_env_allocators", "ep.cuda.fpa_intb_gemm"),
        *("session.use_device_allocator_for_initializers", "optimization.disable_specified_optimizers"),
    )
)
"""Those that neither open a file nor load one; enable_profiling writes one wherever it says, and unknown keys become
entries of ONNX Runtime's own configuration."""
_PROVIDERS = {"cpu": frozenset[str](), "cuda": frozenset(("device_id", "enable_cuda_graph", "use_tf32"))}
"""Execution providers, and options of theirs. Others load libraries, and some are addresses in memory."""


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's genai_config.json. Raises UserError where there is none that can be read."""
    path = folder / CONFIG_FILE
    try:
        raw = read_regular(path)
    except UserError as error:
        raise UserError(
            f"{folder} has no {CONFIG_FILE} that can be read ({error}) Expected a folder that loratrf-export wrote for "
            "a causal language model."
        ) from error
    try:
        config = parse_json(raw, strict=True)
        _check_shape(config)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}). Export the model again with loratrf-export.") from error
    return config


def decoder_config(model: Path) -> dict[str, Any] | None:
    """The genai_config.json beside `model`, None where it is no decoder that onnxruntime-genai loads."""
    if not (model.parent / CONFIG_FILE).is_file():
        return None
    config = read_config(model.parent)
    return config if config["model"]["decoder"].get("filename") == model.name else None


def takes_uneven_rows(config: Any) -> bool:
    """Whether rows of several lengths run in one batch.

    The cache of a convolution (LFM2) would hold their padding, one as wide as a sliding window refuses them, and
    positions along three axes (Qwen-VL) go on behind it.
    """
    three_axes = any(str(kind).startswith(_THREE_AXES) for kind in _values(config, "type"))
    return not three_axes and not _values(config, "past_conv_names") and not cache_window(config)


def cache_window(config: Any) -> int:
    """How long a cache must be at least: that of a sliding window, which other exporters' caches are as wide as."""
    windows = [own.get("window_size") for own in _values(config, "sliding_window") if isinstance(own, dict)]
    return max([window for window in windows if type(window) is int and 0 < window < 2**31], default=0)


def libraries(config: Any) -> list[str]:
    """The native libraries that a genai_config.json names, in any of its parts."""
    found = [options[_LIBRARY] for options in _values(config, "session_options") if _LIBRARY in options]
    return list(dict.fromkeys(map(str, found)))


@contextlib.contextmanager
def safe_folder(folder: Path, *, trust_library: bool = False) -> Iterator[Path]:
    """Yields `folder`, or a copy made of links, for onnxruntime-genai to open; the copy is there only within.

    1. With `trust_library` it is the folder as it is.
    2. Else a genai_config.json that opens files outside of the folder, writes any, or loads what we don't know, is a
       UserError.
    3. Where it names a library that isn't byte by byte ours, a copy names ours instead, or none where ours isn't built:
       operators then run by their definitions in the file.
    """
    config = read_config(folder)
    check_kinds(folder)
    if trust_library:
        yield folder
        return
    if problems := _problems(config):
        raise UserError(
            f"{folder / CONFIG_FILE} has {some(problems)}, which no export writes: onnxruntime-genai could open files "
            "elsewhere, write them, or load native code. Take it out; or, if the folder is your own, open it as it is: "
            "--trust-library (trust_library=True)."
        )
    for model in folder.glob("*.onnx"):
        check_external_data(model)
    ours = library_path() if is_built() else None
    if all(_is_ours(folder / name, ours) for name in libraries(config)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="loratrf-") as name:
        copy = Path(name)
        _link(folder, copy, config, ours)
        yield copy


def _link(folder: Path, copy: Path, config: dict[str, Any], ours: Path | None) -> None:
    """Fills `copy` with links to what is in `folder`, `ours` in the place of its libraries."""
    named = libraries(config)
    with readable(folder):
        for entry in folder.iterdir():
            if entry.name not in (CONFIG_FILE, *named, ours.name if ours else ""):
                (copy / entry.name).symlink_to(entry.absolute())
    if ours is not None:
        shutil.copy(ours, copy)  # onnxruntime-genai loads none through a link
    for options in _values(config, "session_options"):
        if options.pop(_LIBRARY, None) is not None and ours is not None:
            options[_LIBRARY] = ours.name
    (copy / CONFIG_FILE).write_text(json.dumps(config))


def _is_ours(file: Path, ours: Path | None) -> bool:
    return ours is not None and file.is_file() and not file.is_symlink() and filecmp.cmp(file, ours, shallow=False)


def _problems(config: dict[str, Any]) -> list[str]:
    """What of a genai_config.json could reach beyond the folder, in words."""
    problems = []
    for options in _values(config, "session_options"):
        problems += [f"the session option {name}" for name in options if name not in _SESSION_OPTIONS]
        for providers in options.get("provider_options", []):
            for provider, own in providers.items() if isinstance(providers, dict) else [(str(providers), {})]:
                known = _PROVIDERS.get(provider.lower().removesuffix("executionprovider"))
                if known is None or not isinstance(own, dict) or set(own) - known:
                    problems.append(f"options of the execution provider {provider}")
    problems += [f"run_options {options!r}" for options in _values(config, "run_options") if options]
    for name, value in _pairs(config):
        if re.search("file|dir|path|library", name) and isinstance(value, str) and not stays_inside(value):
            problems.append(f"{name} {value!r}")
    return problems


def _check_shape(config: Any) -> None:
    """What is read of it here and by others has the type that it should. Raises ValueError, KeyError or TypeError."""
    model = config["model"]
    for options in [model["decoder"]["session_options"], *_values(config, "session_options")]:
        if not isinstance(options, dict) or not isinstance(options.get("provider_options", []), list):
            raise TypeError("its session_options are not what loratrf-export writes")
    for name in ("context_length", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        value = model.get(name, 0)
        tokens = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if not all(token is None or (type(token) is int and -(2**31) <= token < 2**31) for token in tokens):
            raise ValueError(f"its {name} is {str(value)[:80]}, expected a whole number")


def _values(value: Any, name: str) -> list[Any]:
    """Every value that stands under `name` in `value`, at any depth."""
    return [own for key, own in _pairs(value) if key == name]


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, own in value.items():
            yield name, own
            yield from _pairs(own)
    elif isinstance(value, list):
        for own in value:
            yield from _pairs(own)
