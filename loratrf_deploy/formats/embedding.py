"""How a sentence's embedding is made of its tokens', and what sentence-transformers' files say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..adapters.json_text import parse_json
from ..errors import UserError, cut, one_line
from ..files import read_regular, stays_inside

__all__ = ["MODULES_FILE", "POOLINGS", "SENTENCE_EMBEDDING", "Embedding", "Pooling", "read_modules"]

Pooling = Literal["mean", "cls", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
SENTENCE_EMBEDDING = "sentence_embedding"
"""The graph output (batch, W) float32, called as sentence-transformers calls it."""

MODULES_FILE = "modules.json"
_LONGEST = 1 << 20
_MODES: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""A flag for each mode, as sentence-transformers wrote them before version 6 -> the mode."""


@dataclass(frozen=True)
class Embedding:
    """e = cut(pool(h, mask)), with `normalize` e / max(‖e‖, 1e-12); h (S,H) are one row's tokens.

    `pooling` "mean" is Σ mask·h / max(Σ mask, 1), "cls" and "last" are h of the first and of the last token that isn't
    padding, on whichever side that is; a row of nothing but padding is zero. `dimensions` are those that are kept, from
    the first on; None keeps all H.
    """

    pooling: Pooling
    normalize: bool = False
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(str(self.dimensions))

    @property
    def summary(self) -> str:
        """On part of a line: mean pooling, 256 dimensions, normalised."""
        size = f"{self.dimensions} dimensions" if self.dimensions is not None else ""
        return ", ".join(filter(None, [f"{self.pooling} pooling", size, "normalised" if self.normalize else ""]))


def read_modules(folder: Path, fetch: Callable[[str], object] = lambda name: None) -> Embedding:
    """What the modules.json in `folder` says: a Transformer, a Pooling and perhaps a Normalize, in this order.

    `fetch` is told which further file is about to be read. Raises UserError for anything else: another module or mode
    makes other embeddings.
    """
    path = folder / MODULES_FILE
    modules = _parse(path, folder)
    if not (isinstance(modules, list) and all(map(_is_module, modules))):
        raise _refused(path, f"it is {_shown(modules)}, expected a list of modules, each with a type and a path")
    names = [_name(module["type"]) for module in modules]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]):
        found = [module["type"].removeprefix("sentence_transformers.") for module in modules]
        raise _refused(path, f"its modules are {_shown(found)}, expected Transformer, Pooling and perhaps Normalize")
    for module in modules[1:]:
        if not stays_inside(module["path"]):
            raise _refused(path, f"it has a module at {_shown(module['path'])}, expected a folder beside it")

    def settings(module: dict[str, Any]) -> Path:
        fetch(f"{module['path']}/config.json")
        return folder / module["path"] / "config.json"

    embedding = Embedding(_pooling(settings(modules[1]), folder))
    if len(modules) > 2:
        _check_normalize(settings(modules[2]), folder)
        embedding = replace(embedding, normalize=True)
    return embedding


def _is_module(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("type", "path"))


def _name(kind: str) -> str:
    """The class of a module of sentence-transformers' own, which has moved between its folders; "" for another's."""
    return kind.rpartition(".")[2] if kind.startswith("sentence_transformers.") else ""


def _pooling(path: Path, folder: Path) -> Pooling:
    config = _object(path, folder)
    modes = config.get("pooling_mode")
    if modes is None:
        # Of a file that has none of the flags, sentence-transformers takes the mean.
        flags = {mode: config.get(flag, False) for flag, mode in _OLD_MODES.items()}
        if odd := [value for value in flags.values() if not isinstance(value, bool)]:
            raise _refused(path, f"a pooling_mode_... is {_shown(odd[0])}, expected true or false")
        modes = [mode for mode, on in flags.items() if on] or ["mean"]
    if isinstance(modes, list) and len(modes) == 1:
        modes = modes[0]
    if not (isinstance(modes, str) and modes in _MODES):
        raise _refused(path, f"it pools by {_shown(modes)}, expected one of {', '.join(_MODES)}")
    if config.get("include_prompt", True) is not True:
        raise _refused(path, "its include_prompt is not true: the tokens of a prompt would have to be told from others")
    return _MODES[modes]


def _check_normalize(path: Path, folder: Path) -> None:
    """UserError where the settings, which only newer versions write, are to normalise something else."""
    if path.exists():
        config = _object(path, folder)
        for key in ("module_input_name", "module_output_name"):
            if config.get(key) not in (None, SENTENCE_EMBEDDING):
                raise _refused(path, f"{key} is {_shown(config[key])}, expected {SENTENCE_EMBEDDING}")


def _object(path: Path, folder: Path) -> dict[str, Any]:
    config = _parse(path, folder)
    if not isinstance(config, dict):
        raise _refused(path, f"it holds {_shown(config)}, expected an object of settings")
    return config


def _parse(path: Path, folder: Path) -> Any:
    raw = read_regular(path, folder, _LONGEST)
    try:
        return parse_json(raw, strict=True)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"it is not valid JSON ({error})") from error


def _refused(path: Path, why: str) -> UserError:
    return UserError(
        f"--pooling auto can't follow {path}: {why}. If the embedding is one token's or their mean all the same, say "
        f"which: --pooling {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]}, with --normalize for unit length."
    )


def _shown(value: Any) -> str:
    return cut(one_line(json.dumps(value, ensure_ascii=False)), 200)
