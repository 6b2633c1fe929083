"""The key-value pairs of a model file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vptq_runtime import _native


class Metadata(Mapping[str, Any]):
    """A model file's key-value pairs, read only; arrays are lists.

    Each value is made when it is asked for: the lists of a large tokenizer would take 60 MB. Whoever holds
    this also keeps the file mapped.
    """

    def __init__(self, model: _native.Model) -> None:
        self._model = model
        self._keys = dict.fromkeys(model.metadata_keys())

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return self._model.metadata_value(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
