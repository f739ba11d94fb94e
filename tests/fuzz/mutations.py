"""Seeded damage to what strangers send: JSON, safetensors files, bytes, folders. The same `rng`, the same damage."""

from __future__ import annotations

import copy
import json
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["spoil_bytes", "spoil_folder", "spoil_json", "spoil_safetensors"]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    65,
    1025,
    2**31,
    2**40,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e39,
    1e-320,
    float("nan"),
    float("inf"),
)
_TEXTS = (
    *(
        "",
        "query",
        ".*",
        "all-linear",
        "(.*)*x",
        "(a|aa)+$",
        "(?i)query",
        r"\1",
        "(",
        "[^.]*",
        "LORA",
        "LORATRF",
        "base",
    ),
    *(
        "a" * 300,
        "../../etc/passwd",
        "nul\0",
        "\x1b]52;c;aGk=\x07",
        "\ud800",
        "🜁",
        "<b>",
        "none",
        "float32",
        "CAUSAL_LM",
    ),
)
_ODD: tuple[Any, ...] = (
    *_NUMBERS,
    *_TEXTS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    ["query"],
    [3],
    {"a": 1},
    {".*": 3},
)


_DEEP = "nested deep"
"""Stands for lists in lists, which Python's own JSON wouldn't write."""


def spoil_json(value: Any, rng: Random) -> Any:
    """`value` with one to three spots changed: replaced, removed, doubled, nested or swapped with another."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = list(_spots(value))
        if not spots:
            return copy.deepcopy(rng.choice(_ODD))
        holder, key = rng.choice(spots)
        what = rng.randrange(6)
        if what == 0:
            del holder[key]
        elif what == 1:
            other_holder, other_key = rng.choice(spots)
            holder[key] = copy.deepcopy(other_holder[other_key])
        elif what == 2 and isinstance(holder, dict):
            holder[rng.choice(_TEXTS)] = holder.pop(key)
        elif what == 3 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((-1, 1, 2**32))
        elif what == 4 and rng.random() < 0.1:
            holder[key] = _DEEP
        else:
            holder[key] = copy.deepcopy(rng.choice(_ODD))
    return value


def _spots(value: Any) -> Any:
    """(container, key) of everything below `value`."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _spots(value[key])


def dump_json(value: Any) -> bytes:
    """`value` as JSON, lone surrogates and numbers that JSON lacks included."""
    text = json.dumps(value).encode("utf-8", "surrogatepass")
    return text.replace(json.dumps(_DEEP).encode(), b"[" * 5000 + b"]" * 5000)


def spoil_bytes(raw: bytes, rng: Random) -> bytes:
    """`raw` with some bits flipped, cut, filled, repeated or moved."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        start = rng.randrange(len(data))
        length = min(len(data) - start, rng.choice((1, 2, 4, 8, 64, 1000)))
        what = rng.randrange(6)
        if what == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[start:]
        elif what == 2:
            data[start : start + length] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]) * length
        elif what == 3:
            data[start:start] = data[start : start + length]
        elif what == 4:
            del data[start : start + length]
        else:
            size = rng.choice("BHIQ")
            number = struct.pack(
                f"<{size}", rng.choice((0, 1, 2**7, 2**8 - 1)) << rng.choice((0, 8 * struct.calcsize(size) - 8))
            )
            data[start : start + len(number)] = number
    return bytes(data)


def spoil_safetensors(raw: bytes, rng: Random) -> bytes:
    """A safetensors file whose header is changed as JSON, its length told truly or not; or the bytes themselves."""
    if rng.random() < 0.25:
        return spoil_bytes(raw, rng)
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    if rng.random() < 0.5:
        _spoil_tensor(header, rng)
    else:
        header = spoil_json(header, rng)
    text = dump_json(header)
    stated = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) - 1, 2**32, 2**63, 2**64 - 1))
    return struct.pack("<Q", stated) + text + raw[8 + length :]


def _spoil_tensor(header: dict[str, Any], rng: Random) -> None:
    """Damage that keeps the file whole: a tensor renamed, dropped with its bytes left, reshaped, of another type."""
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, what = header[name], rng.randrange(5)
    if what == 0:
        header[rng.choice((name.replace("query", "key"), name + ".x", name[3:], name.replace("0", "7"), "x"))] = (
            header.pop(name)
        )
    elif what == 1:
        entry["shape"] = entry["shape"][::-1]
    elif what == 2:
        entry["shape"] = rng.choice(([1] * 65, [*entry["shape"], 1], [1, *entry["shape"]], [0], [2**40, 2**20]))
    elif what == 3:
        entry["dtype"] = rng.choice(("F16", "BF16", "I32", "I64", "F64", "F8_E4M3", "BOOL", "U8", "C64", "?"))
    else:
        other = rng.choice([other for other in header if other != "__metadata__"])
        header[name], header[other] = header[other], header[name]


def spoil_folder(folder: Path, rng: Random) -> None:
    """An adapter folder, damaged in place: its config, its weights, or its files as files."""
    config, weights = folder / CONFIG, folder / WEIGHTS
    what = rng.random()
    if what < 0.45:
        config.write_bytes(dump_json(spoil_json(json.loads(config.read_bytes()), rng)))
    elif what < 0.5:
        config.write_bytes(spoil_bytes(config.read_bytes(), rng))
    elif what < 0.9:
        weights.write_bytes(spoil_safetensors(weights.read_bytes(), rng))
    else:
        _spoil_file(rng.choice((config, weights)), rng)


def _spoil_file(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    path.unlink()
    what = rng.randrange(7)
    if what == 0:
        path.mkdir()
    elif what == 1:
        path.symlink_to(path)
    elif what == 2:
        path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "../outside.bin", "nowhere")))
    elif what == 3:
        os.mkfifo(path)
    elif what == 4:
        path.write_bytes(b"")
    elif what == 5:
        path.write_bytes(content[:8])
        os.truncate(path, 8 << 30)  # sparse: eight gigabytes that take no room
