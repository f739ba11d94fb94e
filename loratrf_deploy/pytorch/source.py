"""Where a base model comes from, and why it can't be had: moved, pickled, in few bits, or with Python of its own."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.adapter import Adapter
from ..adapters.json_text import parse_json
from ..errors import UserError, some
from ..files import check_entries, read_regular, stays_inside

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["OWN_MODEL", "Source", "find_source", "hub_has", "needs_trust"]

OWN_MODEL = (
    " Its config.json names Python of its own (auto_map), which may be the model that is meant: it is run with "
    "--trust-remote-code alone."
)

_CONVERT = (
    "import glob, torch, safetensors.torch as s; t = {}; [t.update(torch.load(f, map_location='cpu', "
    "weights_only=True)) for f in glob.glob('pytorch_model*.bin')]; s.save_file({k: v.clone().contiguous() for k, v in "
    "t.items()}, 'model.safetensors', {'format': 'pt'})"
)
_FEW_BITS = re.compile(
    r"([-_.](unsloth|bnb|gptq|awq|hqq|eetq|quanto|nf4|fp4|fp8|w4a16|w8a8|int[48]|[48]-?bits?|\d{2,}g))+$",
    re.IGNORECASE,
)
"""What names of checkpoints in few bits end in, behind that of the model that they were made from."""
_REPACKERS = ("thebloke", "hugging-quants", "casperhansen", "solidrust")
"""Who has models of others in few bits alone: the original has the same name, and another owner."""
_FULL = ("mxfp4",)
"""Ways of few bits that transformers itself turns into 16 when it loads them: nothing else of such models exists."""


@dataclass(frozen=True)
class Source:
    """A folder or a hub name, at a `revision` of it where one is asked for. `said_by` is where the name stands."""

    name: str
    said_by: str
    revision: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """What transformers' from_pretrained functions are told beside the name."""
        return {} if self.revision is None else {"revision": self.revision}

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name} (revision {self.revision})"

    def check_weights(self, config: PreTrainedConfig) -> None:
        """UserError for a base in few bits: the adapter can't be put on the weights that they were made from."""
        settings = getattr(config, "quantization_config", None)
        if settings is None:
            return
        values = settings if isinstance(settings, dict) else settings.to_dict()
        method = str(values.get("quant_method") or ("bitsandbytes" if values.get("load_in_4bit") else "unknown"))
        if method not in _FULL:
            raise UserError(
                f"The base model {self} ({self.said_by}) has its weights in few bits alone (quantization_config: "
                f"{method}), and an export takes those that they were made from, in 16 or 32 bits. {self._original()}"
            )

    def not_found(self, error: Exception) -> str:
        """The paragraph where there is no config.json to be had."""
        from huggingface_hub import constants

        if os.path.isdir(self.name):
            return f"The base model folder {self.name} has no usable config.json: {error}"
        where = f"The base model {self} ({self.said_by}) was not found: "
        remedy = "Pass the folder that holds it: --base-model PATH."
        if os.path.isabs(self.name) or self.name.startswith((".", "~")) or self.name.count("/") > 1:
            return f"{where}there is no folder {os.path.abspath(self.name)} on this machine. If it moved, p{remedy[1:]}"
        hub = "which is offline (HF_HUB_OFFLINE), nor" if constants.HF_HUB_OFFLINE else "nor"
        where += f"it is neither a folder here ({os.path.abspath(self.name)}), nor to be had from the hub, {hub} "
        where += f"in its local cache ({constants.HF_HUB_CACHE}). "
        return where + (
            f"By its name it has weights in few bits alone. {self._original()}" if self._guess() else remedy
        )

    def not_loaded(self, config: PreTrainedConfig, task: str, error: Exception) -> str:
        """The paragraph where there is a config.json, and transformers makes no model for `task` of it."""
        if text := needs_trust(f"base model {self.name}", error) or self._no_such_task(config, task, error):
            return text
        if not os.path.isdir(self.name) and hub_has(self.name, _PICKLES, self.revision):
            return (
                f"The base model {self} has pickled weights alone, which can run code when they are opened, so "
                f"they are refused. Fetch it, `hf download {self.name} --local-dir FOLDER`, convert them once, in that "
                f'folder: python -c "{_CONVERT}"; and pass it: --base-model FOLDER'
            )
        return (
            f"The base model {self} can't be loaded for {task}: {error} Expected a folder or hub name with config.json "
            "and safetensors weights of a model that transformers knows."
        )

    def _original(self) -> str:
        guess = self._guess()
        return f"Pass the original: --base-model {f'{guess} (a guess from the name)' if guess else 'PATH'}."

    def _guess(self) -> str | None:
        """The name of what a checkpoint in few bits was made from, None where its own doesn't tell."""
        name = _FEW_BITS.sub("", self.name)
        if name == self.name or os.path.isabs(name):
            return None
        owner, _, rest = name.rpartition("/")
        return f"OWNER/{rest}" if owner.lower() in _REPACKERS else name

    def _no_such_task(self, config: PreTrainedConfig, task: str, error: Exception) -> str | None:
        """Where transformers knows the model and has no class of it for `task`: its own words are all other classes."""
        if "Unrecognized configuration class" not in str(error):
            return None
        classes = some(list(map(str, config.architectures or []))) or "of no class that its config.json names"
        return (
            f"The base model {self} is of the type {config.model_type} ({classes}), of which transformers has no model "
            f"for {task}, the task of this adapter. If the base is another one, pass it: --base-model PATH."
        )


def find_source(adapter: Adapter, base_model: str | Path | None) -> Source:
    """Where the base is: `base_model`, a folder or a hub name, or what the adapter names, at its revision.

    Raises UserError where that can't be a base: none at all, no folder, links out of it, pickled weights alone.
    """
    said_by = "--base-model" if base_model is not None else "the adapter's base_model_name_or_path"
    name = str(base_model or adapter.base_model or "")
    if not name:
        raise UserError(
            f"The adapter {adapter.path} doesn't say which base model it was trained on (base_model_name_or_path is "
            "empty). Pass it: --base-model PATH."
        )
    check_entries(adapter.path)  # its tokenizer is read later
    if os.path.isdir(name):
        check_entries(Path(name))
        _check_shards(Path(name))
        _check_pickles(Path(name))
        return Source(name, said_by)
    if os.path.exists(name):
        raise UserError(f"The base model {name} is not a folder: expected one with config.json and model.safetensors.")
    # Of another model than the adapter's own, its revision says nothing.
    revision = adapter.config.get("revision") if name == adapter.base_model else None
    return Source(name, said_by, revision or None)


_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def _check_pickles(folder: Path) -> None:
    if any(folder.glob("*.safetensors")) or not any(folder.glob("pytorch_model*.bin")):
        return
    raise UserError(
        f"The base model {folder} has pickled weights alone (pytorch_model.bin), which can run code when they are "
        f'opened, so they are refused. Convert them once, in that folder: python -c "{_CONVERT}"'
    )


def hub_has(name: str, files: Iterable[str], revision: str | None) -> bool:
    """Whether the hub, or its cache here, has one of `files` under `name`."""
    from transformers.utils import cached_file

    for file in files:
        with contextlib.suppress(Exception):  # no such name, no such file: errors come in many classes
            if cached_file(name, file, revision=revision):
                return True
    return False


def _check_shards(folder: Path) -> None:
    """UserError where an index of the checkpoint in `folder` names weights elsewhere: those of another model here."""
    for index in folder.glob("*.index.json"):
        try:
            names = {str(name) for name in parse_json(read_regular(index, folder))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # transformers says what is wrong with it
        if outside := [name for name in names if not stays_inside(name)]:
            raise UserError(
                f"{index} has weights in {some(outside)}, expected files in its own folder. Fetch the base model again."
            )


def needs_trust(what: str, error: Exception) -> str | None:
    """The paragraph where transformers refused for want of trust_remote_code, None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        f"The {what} brings Python of its own (auto_map), which is not run: it could do anything that you can. Take a "
        "base and an adapter that need none; or, if you know who wrote it and have read it, add --trust-remote-code "
        "(trust_remote_code=True), which runs what the base model and the tokenizer bring."
    )
