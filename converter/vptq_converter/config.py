"""JSON files of a checkpoint, read with checks: whoever wrote them is not trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vptq_runtime.errors import FileError, printable
from vptq_runtime.text_file import read_json

MAX_INTEGER = 2**31 - 1  # of any count or length in a config: GGUF stores them as u32, readers often as int


class Section:
    """One JSON object; every access says what it expects, every error says where it looked."""

    def __init__(self, path: Path, values: Any, where: str = "") -> None:
        self.path = path
        self.where = where
        if not isinstance(values, dict):
            raise self.error("", values, "an object")
        self.values: dict[str, Any] = values

    @classmethod
    def read(cls, path: Path) -> Section:
        """The object that a JSON file holds; raises FileError."""
        return cls(path, read_json(path))

    def error(self, key: str, found: Any, expected: str) -> FileError:
        name = f"{self.where}.{key}" if self.where and key else self.where or key
        text = repr(found)
        text = text if len(text) <= 80 else text[:77] + "..."
        return FileError(f"{self.path}: {printable(name) or 'content'}: found {text}, expected {expected}")

    def missing(self, key: str, expected: str) -> FileError:
        return FileError(
            f"{self.path}: {self.where + '.' if self.where else ''}{key} is missing, expected {expected}"
        )

    def integer(self, key: str, *, minimum: int = 1, default: int | None = None) -> int:
        """The integer at key; without a default it must be there. null counts as absent."""
        expected = f"an integer from {minimum} to {MAX_INTEGER}"
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.missing(key, expected)
            return default
        if type(value) is not int or not minimum <= value <= MAX_INTEGER:
            raise self.error(key, value, expected)
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """The positive finite number at key; without a default it must be there."""
        expected = "a positive finite number"
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.missing(key, expected)
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, value, expected)
        if not 2.0**-126 <= value <= 3.4e38:  # must fit a float32
            raise self.error(key, value, expected)
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def section(self, key: str) -> Section:
        """The object at key; an empty one where it is absent or null."""
        value = self.values.get(key)
        where = f"{self.where}.{key}" if self.where else key
        return Section(self.path, {} if value is None else value, where)
