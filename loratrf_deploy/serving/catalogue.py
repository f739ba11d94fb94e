"""The adapters that requests may name: their files, read when a request first names one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ..errors import UserError
from ..files import realpath
from ..formats.adapter_file import SUFFIX
from ..runtime.residents import AdapterInfo
from .errors import ApiError, unknown_model

__all__ = ["UNUSABLE", "AdapterHolder", "Catalogue", "broken"]

_LONGEST_NAME = 200
UNUSABLE = "adapter_unusable"
"""The code of an adapter's failure."""


class AdapterHolder(Protocol):
    """What `AdapterSession` and `GenerationSession` have in common."""

    @property
    def adapters(self) -> dict[str, AdapterInfo]: ...

    @property
    def evictions(self) -> int: ...

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> None: ...

    def unload(self, name: str) -> None: ...


class Catalogue:
    """Names of adapters, and the one of the base, `base`; its coroutines are of one event loop.

    `given` are files by name, read here and now, so that one that doesn't fit ends the start; every NAME.onnx_adapter
    in `folder` is an adapter NAME too, one that is put there later included, and is read when it is first named. Raises
    UserError for files that don't fit.
    """

    def __init__(self, session: AdapterHolder, base: str, given: Mapping[str, Path], folder: Path | None):
        if folder is not None and not folder.is_dir():
            raise UserError(f"--adapters-dir {folder} is no folder. Expected one of {SUFFIX} files.")
        if base in given:
            raise UserError(
                f"--adapter names {base!r}, which is what the base is called. Choose another name, or --name."
            )
        self.base, self.session = base, session
        self._folder, self._loaded, self._gone = folder, set[str](), set[str]()
        self._turns: dict[str, asyncio.Lock] = {}
        for name, path in given.items():
            session.load(name, path)
            self._loaded.add(name)

    def names(self) -> list[str]:
        """All adapters that a request may name now, sorted."""
        found = set(self._loaded)
        if self._folder is not None:
            files = (entry.name for entry in os.scandir(self._folder) if entry.name.endswith(SUFFIX))
            stems = {name.removesuffix(SUFFIX) for name in files}
            found |= {name for name in stems - self._gone - {self.base} if self._in_folder(name) is not None}
        return sorted(found)

    def knows(self, name: str) -> bool:
        """Whether a request may name `name`, the base's included."""
        return name == self.base or name in self._loaded or self._listed(name) is not None

    def check(self, name: str) -> None:
        """404 unless a request may name `name`."""
        if not self.knows(name):
            raise unknown_model(name, [self.base, *self.names()])

    async def ready(self, name: str) -> str | None:
        """The adapter that the request's `name` stands for, read if it wasn't yet; None for the base.

        404 for a name that there is not, 500 for a file that can't be used.
        """
        if name == self.base:
            return None
        if name in self._loaded:
            return name
        path = self._listed(name)
        if path is None:
            raise unknown_model(name, [self.base, *self.names()])
        async with self._turn(name):
            if name not in self._loaded and name not in self._gone:
                try:
                    await asyncio.to_thread(self.session.load, name, path)
                except UserError as error:
                    raise broken(name, error) from error
                self._loaded.add(name)
        self.check(name)
        return name

    async def load(self, name: str, path: str, *, replace: bool) -> None:
        """Takes the file `path`, which must lie in the folder of adapters, as `name`. 400 where it can't."""
        if name == self.base or not _is_name(name):
            raise ApiError(
                400,
                f"lora_name is {name!r}: expected 1 to {_LONGEST_NAME} characters, no slash and no dot in front, and "
                f"not what the base is called, which is {self.base!r}.",
                "invalid_name",
                param="lora_name",
            )
        file = self._within(path)
        async with self._turn(name):
            try:
                await asyncio.to_thread(self.session.load, name, file, replace=replace)
            except UserError as error:
                if name in self._loaded and not replace:
                    raise ApiError(
                        400,
                        f"An adapter {name!r} is loaded already. Choose another name, unload it first, or send "
                        '"load_inplace": true to put the file in its place.',
                        "already_loaded",
                        param="lora_name",
                    ) from error
                raise ApiError(
                    400, f"{path!r} can't be loaded: {error}", "invalid_adapter", param="lora_path"
                ) from error
            self._loaded.add(name)
            self._gone.discard(name)

    async def unload(self, name: str) -> None:
        """Forgets `name`; requests that use it are answered still. 404 where there is none."""
        if name == self.base:
            raise ApiError(400, f"{name!r} is the base, which stays.", "invalid_name", param="lora_name")
        async with self._turn(name):
            self.check(name)
            if name in self._loaded:
                self._loaded.discard(name)
                self.session.unload(name)
            self._gone.add(name)

    def _turn(self, name: str) -> asyncio.Lock:
        """Who reads, loads and unloads one name does so one after the other."""
        if len(self._turns) > 10_000:  # of names that clients made up
            self._turns = {known: lock for known, lock in self._turns.items() if lock.locked()}
        return self._turns.setdefault(name, asyncio.Lock())

    def _listed(self, name: str) -> Path | None:
        return None if name in self._gone or name == self.base else self._in_folder(name)

    def _in_folder(self, name: str) -> Path | None:
        """NAME.onnx_adapter, a file that really lies in the folder."""
        if self._folder is None or not _is_name(name):
            return None
        path = self._folder / f"{name}{SUFFIX}"
        inside = os.path.isfile(path) and realpath(path).is_relative_to(realpath(self._folder))
        return path if inside else None

    def _within(self, path: str) -> Path:
        assert self._folder is not None  # the command line asks for both options
        root = realpath(self._folder)
        try:
            file = realpath(root / path)
        except ValueError:  # a NUL in it
            file = Path("/")
        if not file.is_relative_to(root) or not path.endswith(SUFFIX):
            raise ApiError(
                400,
                f"lora_path is {path!r}: expected a file {SUFFIX} within --adapters-dir, by its path from there.",
                "invalid_path",
                param="lora_path",
            )
        if not os.path.isfile(file):
            raise ApiError(400, f"lora_path is {path!r}: there is no such file.", "invalid_path", param="lora_path")
        return file


def broken(name: str | None, error: UserError) -> ApiError:
    """500: the client can't mend the adapter's file, or the model."""
    if name is None:
        return ApiError(500, f"The model fails: {error}", "model_failed")
    return ApiError(500, f"The adapter {name!r} can't be used: {error}", UNUSABLE, param="model")


def _is_name(name: str) -> bool:
    return 0 < len(name) <= _LONGEST_NAME and not name.startswith(".") and not set(name) & set("/\\\0")
