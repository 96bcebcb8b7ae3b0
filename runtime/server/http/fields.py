"""Read a JSON object of a request field by field. A wrong type gives status 400 and names the field; null counts as
absent."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from ...errors import shown
from .errors import ApiError, invalid, unsupported

_LARGEST = 2**64


class Fields:
    """An object, and its path in the body ("" for the body itself)."""

    def __init__(self, value: object, path: str = "") -> None:
        """Raises: ApiError for what is not an object."""
        if not isinstance(value, Mapping):
            raise invalid(f"{path or 'the body'} must be a JSON object, found {shown(value)}", path or None)
        self.values: Mapping[str, Any] = value
        self.path = path

    def name(self, field: str) -> str:
        """The field's full path, for `param` of an error."""
        return f"{self.path}.{field}" if self.path else field

    def given(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def text(self, field: str) -> str | None:
        """A text. Raises: ApiError."""
        value = self.values.get(field)
        return value if value is None or isinstance(value, str) else self.refuse_type(field, "a text")

    def needed_text(self, field: str) -> str:
        """A required text. Raises: ApiError."""
        value = self.text(field)
        if value is None:
            raise invalid(f"{self.name(field)} is missing: give a text", self.name(field))
        return value

    def choice(self, field: str, options: Collection[str]) -> str | None:
        """A text that must be one of `options`. Raises: ApiError."""
        value = self.text(field)
        if value is not None and value not in options:
            raise invalid(
                f"{self.name(field)} must be {' or '.join(map(repr, options))}, found {shown(value)}",
                self.name(field),
                "invalid_value",
            )
        return value

    def flag(self, field: str) -> bool:
        """true or false; false if absent. Raises: ApiError."""
        value = self.values.get(field)
        return bool(value) if value is None or isinstance(value, bool) else self.refuse_type(field, "true or false")

    def whole(self, field: str, least: int = -_LARGEST, most: int = _LARGEST) -> int | None:
        """A whole number; 3.0 counts as one. Raises: ApiError."""
        value = self.number(field)
        if value is None:
            return None
        number = self.values[field]
        if value != int(value) or not least <= number <= most:
            limits = f"from {least} to {most}" if most < _LARGEST else f"of {least} or more"
            self.refuse_type(field, f"a whole number {limits}" if least > -_LARGEST else "a whole number")
        return int(number)

    def number(self, field: str) -> float | None:
        """A finite number. Raises: ApiError."""
        value = self.values.get(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
            self.refuse_type(field, "a number")
        return float(value) if math.isfinite(value) else self.refuse_type(field, "a number")

    def items(self, field: str) -> list[Any] | None:
        """A list. Raises: ApiError."""
        value = self.values.get(field)
        return value if value is None or isinstance(value, list) else self.refuse_type(field, "a list")

    def inner(self, field: str) -> Fields | None:
        """An object. Raises: ApiError."""
        value = self.values.get(field)
        return None if value is None else Fields(value, self.name(field))

    def refuse(self, remedies: Mapping[str, str]) -> None:
        """Raises: ApiError if a field asks for a feature that this server lacks. remedies: {field: what to do instead};
        false, null and empty values are accepted."""
        for field, remedy in remedies.items():
            if self.values.get(field):
                raise unsupported(self.name(field), remedy)

    def refuse_type(self, field: str, wanted: str) -> NoReturn:
        """Raises: ApiError."""
        raise invalid(f"{self.name(field)} must be {wanted}, found {shown(self.values.get(field))}", self.name(field))


def parse_json(data: bytes) -> Any:
    """Parse JSON in UTF-8. Raises: ApiError, also for NaN and infinity, which JSON does not have."""
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body is not JSON: {name} is not a number")
