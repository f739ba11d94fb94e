"""The end of an export: its files move into place, alone in the folder, over nothing that is not an export's.

A lock (flock) on a folder is gone with the process that held it, however that ended. Where a system or a file system
has none, exports still work, but two at once into one folder can mix, and what a killed one left stays.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Any

from ..errors import UserError, some
from ..files import realpath
from ..formats.adapter_file import SUFFIX
from ..formats.manifest import MANIFEST, file_sha256, read_manifest

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["check_foreign", "companions", "make_aside", "manifest_of", "move", "sweep", "was_written"]

_PREFIX = ".loratrf-export-"
_PATIENCE = 60.0
"""Seconds. Moving takes milliseconds."""

_WRITTEN: set[Path] = set()


def was_written(out: Path) -> bool:
    """Whether this process has moved what belongs to `out` into place."""
    return _real(out) in _WRITTEN


def make_aside(place: Path) -> tuple[Path, Callable[[], None]]:
    """An empty folder in `place` that `sweep` leaves alone, and what removes it. Raises OSError."""
    while True:
        aside = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        # Until it is locked, it looks to another export like one that was left behind.
        with contextlib.suppress(FileNotFoundError):
            held = _lock(aside, wait=True)
            if aside.is_dir():
                return aside, functools.partial(_remove, aside, held)
            _remove(aside, held)


def sweep(place: Path) -> None:
    """Removes from `place` what exports that were killed left there: folders of this user's that no process holds."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        for entry in sorted(Path(place).glob(f"{_PREFIX}*")):
            status = entry.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            held = _lock(entry, wait=False)
            if held is not None:
                _remove(entry, held)


def move(aside: Path, out: Path, root: Path | None = None) -> None:
    """Moves the files in `aside` into `root`, which it makes: the manifest first, `out`, in `root` or below, last.

    What an earlier export wrote there goes. One export at a time, and an interrupt waits until the last file is moved.
    A kill in between leaves no `out` rather than one that doesn't fit its weights. Raises UserError, before anything is
    changed, where a file would take the place of what is no export's; OSError.
    """
    folder = root or out.parent
    model = out.relative_to(folder).as_posix()
    described = manifest_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    names = _names(aside)
    with _alone_in(folder):
        _check_kinds(folder, names)
        earlier = _owned(folder / described) if described in names else None
        new: dict[str, Path | None] = {name: aside / name for name in names if not _is_ours(name, model)}
        check_foreign(folder, new, described)
        with _uninterrupted():
            if len(names) > 1:  # one file alone takes the old one's place at once
                out.unlink(missing_ok=True)
            # Before the manifest that says so: what lies there is an earlier export's at every moment, or this one's.
            for name, sha256 in (earlier or {}).items():
                path = folder / name
                inside = realpath(path.parent).is_relative_to(realpath(folder))
                if inside and path.is_file() and file_sha256(path) == sha256:
                    path.unlink()
            for name in sorted(names, key=lambda name: (name == model, name != described)):
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(aside / name, folder / name)
            _WRITTEN.add(_real(out))


def companions(folder: Path, model: str) -> dict[str, str]:
    """name -> sha256 of the files in `folder` that others might write too: config.json, the tokenizer's, ..."""
    return {name: file_sha256(folder / name) for name in _names(folder) if not _is_ours(name, model)}


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def manifest_of(model: str) -> str:
    """The name of loratrf.json beside a model that is called `model` in its export's folder."""
    return PurePosixPath(model).with_name(MANIFEST).as_posix()


def _owned(path: Path) -> dict[str, str] | None:
    """What the loratrf.json at `path` says of `companions`: {} where there is none, None of an older version."""
    try:
        return read_manifest(path).companions if path.is_file() else {}
    except UserError:
        return {}


def check_foreign(folder: Path, files: dict[str, Path | None], described: str = MANIFEST) -> None:
    """UserError where one of `files` would take the place of what no export wrote, or what was changed since.

    Each by its name in `folder`, with where it is now; None for one that isn't made yet. `described` is the name of
    loratrf.json there.
    """
    earlier = _owned(folder / described)
    if earlier is None:
        return
    foreign = []
    for name, new in files.items():
        path = folder / name
        if path.is_file():
            sha256 = file_sha256(path)
            if sha256 != earlier.get(name) and (new is None or sha256 != file_sha256(new)):
                foreign.append(name)
    if foreign:
        raise UserError(
            f"{folder} holds {some(foreign)}, which no export wrote, or which was changed since: an export writes "
            "files of these names. Choose another folder with --out, or move these files away."
        )


def _real(out: Path) -> Path:
    return realpath(out.parent) / out.name


def _is_ours(name: str, model: str) -> bool:
    """Files that are named after the model, and those that nobody else writes."""
    return (
        name in (manifest_of(model), model) or name.startswith((f"{model}.", f"{model}_data")) or name.endswith(SUFFIX)
    )


def _check_kinds(folder: Path, names: list[str]) -> None:
    """UserError where something that is no file stands where one is to go: a folder called tokenizer.json."""
    for name in names:
        path = folder / name
        while path != folder:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                mode = path.lstat().st_mode
                wanted = stat.S_ISREG(mode) or stat.S_ISLNK(mode) if path == folder / name else stat.S_ISDIR(mode)
                if not wanted:
                    kind = "a folder" if stat.S_ISDIR(mode) else "no folder" if path != folder / name else "no file"
                    raise UserError(
                        f"{path} is {kind}, and the export writes {name}. Move it away, or choose another folder with "
                        "--out. Nothing was changed."
                    )
            path = path.parent


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While no other export moves files into `folder`. UserError where one does for a minute."""
    held, end = None, time.monotonic() + _PATIENCE
    while fcntl is not None and (held := _lock(folder, wait=False)) is None:
        if time.monotonic() > end:
            raise UserError(
                f"Another export has been moving its files into {folder} for {_PATIENCE:.0f} s. Wait until it is done, "
                "or end it."
            )
        time.sleep(0.02)
    try:
        yield
    finally:
        if held is not None and held >= 0:
            os.close(held)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that holds `folder` for this process; None where another one does, -1 where there are no locks."""
    if fcntl is None:
        return -1
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(held)
        return None
    except OSError:  # a network file system's
        os.close(held)
        return -1
    return held


def _remove(folder: Path, held: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if held is not None and held >= 0:
        os.close(held)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM that come within are acted upon at its end. Other threads than the main one get none."""
    came: list[int] = []
    own: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            if callable(handler):
                own[signum] = handler
                signal.signal(signum, lambda signum, frame: came.append(signum))
    try:
        yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
    if came:
        own[came[0]](came[0], None)
