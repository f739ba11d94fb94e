"""Strangers' files, opened so that nothing waits (a FIFO) and nothing is read that a link brings in from elsewhere."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePath

from .errors import UserError

__all__ = [
    *("check_entries", "check_kinds", "check_regular", "open_regular", "read_regular", "readable", "realpath"),
    *("stays_inside",),
]

_TEMPLATES = "additional_chat_templates"
"""A folder of texts that transformers reads beside the tokenizer's own files."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@contextlib.contextmanager
def readable(path: str | Path, *, missing: bool = False) -> Iterator[None]:
    """What the system has against `path` within becomes a UserError: no permission, links in a circle, a long name.

    With `missing`, that there is nothing stays a FileNotFoundError.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if missing and isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"Can't read {path}: {error.strerror or error}.") from error
    except ValueError as error:  # a NUL in it
        raise UserError(f"Can't read {path}: {error}.") from error


def open_regular(path: str | Path, folder: Path | None = None) -> BufferedReader:
    """The regular file `path`, for reading; where it is of a stranger's `folder`, none that a link takes out of it.

    Raises UserError for anything else: a FIFO would keep us waiting, a device has no end.
    """
    with readable(path):
        _check_kind(path, os.stat(path))
        if folder is not None:
            _check_inside(path, _root(folder))
        # Between the two it may have become a FIFO: then opening it doesn't wait, and the second look finds it.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
        try:
            _check_kind(path, os.fstat(file.fileno()))
        except UserError:
            file.close()
            raise
    return file


def read_regular(path: str | Path, folder: Path | None = None, longest: int = 1 << 26) -> bytes:
    """All bytes of the regular file `path`, at most `longest`, opened as `open_regular` does. Raises UserError."""
    with open_regular(path, folder) as file, readable(path):
        raw = file.read(longest + 1)
    if len(raw) > longest:
        raise UserError(f"{path} has more than {longest} bytes, which is more than is read. Is it the right file?")
    return raw


def check_regular(path: Path, folder: Path) -> None:
    """UserError where `path` is there, but no regular file of `folder`."""
    with contextlib.suppress(FileNotFoundError), readable(path, missing=True):
        _check_kind(path, os.stat(path))
        _check_inside(path, _root(folder))


def check_entries(folder: Path) -> None:
    """UserError where a file of `folder` is none, or a link out of it: before others read it, and copy what is in it.

    A link of base weights may lead anywhere: large files are shared that way, and nothing of them is copied as text.
    """
    root = _root(folder)
    for name in check_kinds(folder):
        if name == _TEMPLATES or not ((folder / name).is_dir() or name.endswith(_WEIGHTS)):
            _check_inside(folder / name, root)
    if (folder / _TEMPLATES).is_dir():
        for name in check_kinds(folder / _TEMPLATES):
            _check_inside(folder / _TEMPLATES / name, root)


def check_kinds(folder: Path) -> list[str]:
    """The names of what is in `folder`. UserError where something there has no end, or makes who opens it wait."""
    names = []
    with readable(folder), os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat()
            except FileNotFoundError:  # a link to nowhere, which nobody can read
                continue
            if not (stat.S_ISDIR(status.st_mode) or stat.S_ISSOCK(status.st_mode)):
                _check_kind(entry.path, status)
            names.append(entry.name)
    return names


def stays_inside(name: str) -> bool:
    """Whether the path `name`, which a stranger's file has for another, can't leave its folder but by a link."""
    path = PurePath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def realpath(path: str | Path) -> Path:
    """`path` without links; a circle of them is left as it is, where Path.resolve raises."""
    return Path(os.path.realpath(path))


def _check_kind(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise UserError(f"{path} is {kind}, expected a regular file. Fetch or save it again.")


def _check_inside(path: str | Path, roots: tuple[Path, ...]) -> None:
    real = realpath(path)
    if not any(real.is_relative_to(root) for root in roots):
        raise UserError(
            f"{path} leads to {real}, outside of its folder. Such links are not followed: what is read through them "
            "could end up in an export. If it is yours, put a copy of the file in the link's place."
        )


def _root(folder: Path) -> tuple[Path, ...]:
    """Where a file of `folder` may really lie: in it; in a hub's cache, among the blobs of its model.

    models--NAME/snapshots/REVISION/FILE is a link to models--NAME/blobs/..., and that may be one to the blobs that all
    models of the cache share.
    """
    real = realpath(folder)
    for inner in (real, *real.parents):
        if inner.parent.name == "snapshots" and (model := inner.parent.parent).name.startswith("models--"):
            return real, model / "blobs", model.parent / "blobs"
    return (real,)
