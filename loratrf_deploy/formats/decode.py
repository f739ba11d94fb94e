"""Parsed JSON as frozen dataclasses: the one place that decides what a file of ours may hold."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

__all__ = ["decode"]

T = TypeVar("T")


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """`value` as `kind`: a dataclass of scalars, Literals, unions, dicts by str, tuples and dataclasses.

    Fields that `kind` doesn't know are ignored, those with a default may be absent. Raises ValueError naming the field
    (`where` is its path so far), also for what a dataclass's own __post_init__ refuses with a ValueError.
    """
    return cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None and types.NoneType in args else _first(args, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _dataclass(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(args[0], entry, f"{where}[{number}]") for number, entry in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _decode(args[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if kind is Any or (origin is Literal and isinstance(value, str) and value in args):
        return value
    if isinstance(kind, type) and type(value) in ((int, float) if kind is float else (kind,)):
        return value
    raise ValueError(_wrong(where))


def _first(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """As the first of `kinds` that takes it; the last one's complaint is the one to hear."""
    for kind in kinds[:-1]:
        try:
            return _decode(kind, value, where)
        except ValueError as error:
            if dataclasses.is_dataclass(kind) and isinstance(value, dict):
                raise error
    return _decode(kinds[-1], value, where)


def _dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, given = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        path = f"{where}.{field.name}".lstrip(".")
        if field.name in value:
            given[field.name] = _decode(hints[field.name], value[field.name], path)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(_wrong(path))
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(_wrong(where)) from error


def _wrong(where: str) -> str:
    return f"{where or 'its content'} is missing or not what loratrf-export writes"
