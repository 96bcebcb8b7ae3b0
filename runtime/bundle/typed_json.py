"""JSON to frozen dataclasses, strictly: a missing, unknown or wrongly typed key is an error that names the key."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar, Union

from ..errors import BundleCorruptError

# Metadata of fields that may be missing: they were added later, without a new schema version.
OPTIONAL = "optional"

T = TypeVar("T")


class StrictReader:
    """Reads values of one file. Raises: BundleCorruptError, which names the file and the key."""

    def __init__(self, file: str) -> None:
        """file: its name, for messages."""
        self._file = file

    def build(self, cls: type[T], data: Any, where: str) -> T:
        """Make the dataclass `cls` of a JSON object. where: the dotted path of the object, for messages."""
        if not isinstance(data, dict):
            raise self.mismatch(where or "the whole", "an object", data)
        hints = typing.get_type_hints(cls)
        for key in data:
            if key not in hints:
                raise BundleCorruptError(f"{self._file}: unknown key {_join(where, key)}")
        fields = dataclasses.fields(typing.cast("type[Any]", cls))
        for key in (item.name for item in fields if OPTIONAL not in item.metadata):
            if key not in data:
                raise BundleCorruptError(f"{self._file}: key {_join(where, key)} is missing")
        return cls(
            **{key: self._convert(hint, data[key], _join(where, key)) for key, hint in hints.items() if key in data}
        )

    def mismatch(self, where: str, expected: str, value: Any) -> BundleCorruptError:
        """The error for an unexpected value."""
        return BundleCorruptError(f"{self._file}: {where} must be {expected}, found {value!r:.80}")

    def _convert(self, hint: Any, value: Any, where: str) -> Any:  # noqa: PLR0911, one return for each kind of hint
        """Check one JSON value against a type hint of a dataclass, and turn lists into tuples."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            if value is None:
                return None
            return self._convert(next(item for item in arguments if item is not type(None)), value, where)
        if origin is tuple:
            if not isinstance(value, list):
                raise self.mismatch(where, "a list", value)
            return tuple(self._convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
        if origin is dict:
            if not isinstance(value, dict):
                raise self.mismatch(where, "an object", value)
            return {key: self._convert(arguments[1], item, _join(where, key)) for key, item in value.items()}
        if hint is Any:
            return value
        if origin is Literal:
            if value not in arguments:
                raise self.mismatch(where, " or ".join(map(repr, arguments)), value)
            return value
        if dataclasses.is_dataclass(hint):
            return self.build(typing.cast("type[Any]", hint), value, where)
        if not isinstance(value, hint) or isinstance(value, bool):
            raise self.mismatch(where, hint.__name__, value)
        return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
