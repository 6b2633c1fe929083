"""From what a model is named by to the path of its GGUF file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vptq_runtime.errors import FileError
from vptq_runtime.models import cache
from vptq_runtime.models.cache import Tell
from vptq_runtime.models.checkpoint import checkpoint_file
from vptq_runtime.models.repository import repository_file
from vptq_runtime.models.source import Repo, is_checkpoint

if TYPE_CHECKING:
    from vptq_runtime import _native


def model_file(source: str, tell: Tell) -> str:
    """The GGUF file of a model: source itself, or what the cache has of it.

    source: a GGUF file; a checkpoint's directory (or its .safetensors file or index.json); owner/model or
        owner/model@revision on the hub. What the cache has not yet is downloaded and converted.
    tell: gets a line about what takes its time, and about what is not as it was asked for.

    Raises FileError, UnsupportedError, OptionError.
    """
    if not source:  # to pathlib that is where we are
        return source
    path = Path(source)
    try:
        if is_checkpoint(path):
            return str(checkpoint_file(path, tell))
        repo = Repo.parse(source)
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle, a directory closed to us
        raise FileError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return source if repo is None else str(repository_file(repo, tell))


def open_model(file: str) -> _native.Model:
    """The model in a GGUF file; an error about one in the cache says how to make it anew."""
    from vptq_runtime import _native

    try:
        return _native.Model(file)
    except FileError as error:
        entry = Path(file).parent
        if entry.parent != cache.root():
            raise
        remedy = f"vptq-models rm {shlex.quote(entry.name)}"
        raise FileError(f"{error} (it is made anew after {remedy})") from error
