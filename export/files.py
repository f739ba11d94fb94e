"""What an export writes: all files aside in one folder, moved into place at the end; and the manifest's hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import realpath
from ..formats.manifest import file_sha256
from .moving import check_foreign, make_aside, manifest_of, move, sweep

__all__ = ["base_sha256", "check_writable", "written_aside"]


@contextlib.contextmanager
def written_aside(out: Path, root: Path | None = None) -> Iterator[Path]:
    """Yields an empty folder beside out's folder; on success its files move into out's folder, as `move` says.

    With `root`, a folder above out's, they move there. On any exception, an interrupt included, what was written is
    removed and out's folder is as it was; what a kill leaves, the next export to this place removes. Raises UserError
    where `out` can't be written, the disk is full, or a file would take the place of one that no export wrote.
    """
    check_writable(out, out.suffix)
    inside = out.relative_to(root or out.parent)
    folder = realpath(root or out.parent)
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    if out.suffix == ".onnx":  # minutes before `move` finds it: every export of a model writes this one
        check_foreign(folder, {"config.json": None}, manifest_of(inside.as_posix()))
    # One that was killed while it moved its files may have made the folder.
    for place in {existing, folder.parent}:
        sweep(place)
    try:
        aside, remove = make_aside(existing)
    except OSError as error:
        raise UserError(_unwritable(out, error)) from error
    try:
        yield aside
        move(aside, folder / inside, folder)
    except Exception as error:
        if isinstance(error, UserError) or (refusal := _refusal(error)) is None:
            raise
        raise UserError(_unwritable(out, refusal)) from error
    finally:
        remove()


def check_writable(out: Path, suffix: str = ".onnx") -> None:
    """Raises UserError where `out` is no path with `suffix` that can be written to; cheap, so it can come first."""
    try:
        _check_writable(out, suffix)
        # A name that is too long, or a circle of links on the way, is no file yet, but not one to be written either.
        with contextlib.suppress(FileNotFoundError):
            os.stat(out)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a ValueError is a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out} can't be written: {reason}. Choose another name or folder.") from error


def _check_writable(out: Path, suffix: str) -> None:
    if out.is_dir():
        what = "the model's file name" if suffix == ".onnx" else "a file name"
        raise UserError(f"--out {out} is a folder. Expected {what}, for example --out {out}/model{suffix}.")
    if out.suffix != suffix:
        raise UserError(f"--out {out} doesn't end in {suffix}. Expected a file name such as --out {out}{suffix}.")
    folder = realpath(out.parent)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file, not a folder. Choose another output folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: no permission to write to {existing}. Choose a folder of your own.")


def base_sha256(folder: Path) -> str | None:
    """One sha256 over those of the folder's *.safetensors in name order; None where there are none (a hub name)."""
    files = sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else []
    if not files:
        return None
    return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()


_REFUSALS = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.EIO),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EEXIST, errno.EMFILE, errno.ENFILE),
    )
)


def _refusal(error: Exception) -> OSError | None:
    """What the system has against a file that was being written; None where something else is wrong.

    numpy reports a full disk without an errno, libraries in Rust do it in words.
    """
    if isinstance(error, OSError):
        return error if error.errno is None or error.errno in _REFUSALS else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
        return OSError(number, os.strerror(number)) if number in _REFUSALS else None
    return None


def _unwritable(out: Path, error: OSError) -> str:
    reason = error.strerror or error
    return f"--out {out} can't be written: {reason}. Nothing was left behind. Free some space or choose another folder."
