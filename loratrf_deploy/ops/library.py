"""Where the compiled operators are: the custom-op library that ONNX Runtime loads, and whether it is this system's."""

from __future__ import annotations

import platform
import struct
import sys
from pathlib import Path

from ..errors import UserError

__all__ = ["is_built", "library_path"]

_FOLDER = Path(__file__).parents[1]
_NAMES = {"win32": "loratrf_ort.dll", "darwin": "libloratrf_ort.dylib"}
_PATH = _FOLDER / _NAMES.get(sys.platform, "libloratrf_ort.so")

_SYSTEMS = {"win32": "Windows", "darwin": "macOS"}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Windows' and Apple's names; the others are Linux's."""
# The numbers by which a file's header names its machine.
_ELF = {0x3E: "x86_64", 0xB7: "aarch64", 0x03: "x86", 0x28: "arm", 0xF3: "riscv64", 0x15: "ppc64", 0x16: "s390x"}
_PE = {0x8664: "x86_64", 0xAA64: "aarch64", 0x14C: "x86"}
_MACH_O = {0x01000007: "x86_64", 0x0100000C: "aarch64"}


def is_built() -> bool:
    """Whether the custom-op library is there."""
    return _PATH.is_file()


def library_path() -> Path:
    """Path of the ONNX Runtime custom-op library: `SessionOptions.register_custom_ops_library(str(library_path()))`.

    Raises UserError where the package was installed without building it, or for another system or machine.
    """
    remedy = (
        f"Install the wheel for {_here()} (`pip install --force-reinstall loratrf-deploy`), or build it with `pip "
        "install .` from the repository (needs a C++17 compiler), or open the model without it (library=False): "
        "operators then run by their definitions in the file."
    )
    if not is_built():
        others = [_FOLDER / name for name in (*_NAMES.values(), "libloratrf_ort.so")]
        found = [f"{path.name} is there, for {_target(path)}" for path in others if path.is_file()]
        beside = f" ({', '.join(found)})" if found else ""
        raise UserError(f"The custom-op library is not built: {_PATH} does not exist{beside}. {remedy}")
    if (target := _target(_PATH)) != _here():
        raise UserError(f"{_PATH} is built for {target}, and this Python runs on {_here()}. {remedy}")
    return _PATH


def _here() -> str:
    machine = platform.machine().lower()
    return f"{_SYSTEMS.get(sys.platform, 'Linux')} {_MACHINES.get(machine, machine)}"


def _target(path: Path) -> str:
    """The system and machine in a library's header, as `_here` names them."""
    with path.open("rb") as file:
        head = file.read(4096)
    try:
        if head[:4] == b"\x7fELF":
            system, machine, names = "Linux", struct.unpack_from("<H", head, 18)[0], _ELF
        elif head[:2] == b"MZ":
            (start,) = struct.unpack_from("<I", head, 0x3C)
            system, machine, names = "Windows", struct.unpack_from("<H", head, start + 4)[0], _PE
        elif head[:4] == b"\xcf\xfa\xed\xfe":
            system, machine, names = "macOS", struct.unpack_from("<I", head, 4)[0], _MACH_O
        else:
            return f"no system that we know (it begins with {head[:4]!r})"
    except struct.error:
        return "no system: it is cut short"
    return f"{system} {names.get(machine, f'a machine of number {machine}')}"
