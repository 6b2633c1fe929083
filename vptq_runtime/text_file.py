"""Small files of text: whoever wrote them is not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vptq_runtime.errors import FileError

MAX_BYTES = 1 << 28  # the largest tokenizer.json in use has about 2**25


def read_text(path: Path) -> str:
    """The text of a small UTF-8 file; raises FileError."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block, a device never end
            raise FileError(f"{path}: found something that is not a regular file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise FileError(f"{path}: {size} bytes, expected at most {MAX_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: byte {error.start} is not UTF-8") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds; raises FileError."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path) -> Any:
    """What the text of a JSON file holds, which errors call `path`; raises FileError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FileError(f"{path}: not valid JSON: {reason}") from error
