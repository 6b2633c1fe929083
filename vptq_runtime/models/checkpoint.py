"""A checkpoint's directory: found in the cache as it is now, or converted into it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from vptq_runtime.errors import FileError
from vptq_runtime.models import cache, conversion, disk, hub
from vptq_runtime.models.cache import Tell


def checkpoint_file(path: Path, tell: Tell) -> Path:
    """The GGUF file of a directory, or of the .safetensors file or index.json in it.

    Raises FileError, UnsupportedError.
    """
    path = path.resolve()
    directory = path if path.is_dir() else path.parent
    if (file := _only_gguf(path)) is not None:
        return file
    state, source = _state(path, directory), os.fsencode(path).decode(errors="replace")
    key = cache.directory_key(directory, state)
    entry = cache.find(key)
    if entry is None:
        conversion.check_checkpoint(path, shlex.quote(str(directory)))
        with cache.making(key, source, tell) as part:
            if part is not None:
                target = part / "entry" / cache.MODEL
                sizes = {file.name: file.stat().st_size for file in _files(directory)}
                disk.check_free(part, {"the converted file": conversion.file_bytes(sizes)}, source)
                tell(f"{source}: converting into {cache.root()}")
                conversion.convert(path, target, directory.name)
                if _state(path, directory) != state:
                    raise FileError(
                        f"{source}: has changed while it was converted, expected it to stay as it is"
                    )
                cache.write_entry(part / "entry", source, None)
        entry = cache.made(key, source)
        _forget_others(entry)
    return entry.mark_used().file


def _forget_others(entry: cache.Entry) -> None:
    """Removes what was made of the directory when it held something else: nobody can ask for it any more."""
    for old in cache.entries():
        if old.source == entry.source and old.commit is None and old.directory != entry.directory:
            cache.remove(old)


def _only_gguf(path: Path) -> Path | None:
    """The one GGUF file of a directory that has no checkpoint."""
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _files(directory: Path) -> list[Path]:
    return sorted(path for pattern in hub.PATTERNS for path in directory.glob(pattern) if path.is_file())


def _state(path: Path, directory: Path) -> str:
    """The path, and each file's name, size and time of the last change: as long as these stay, so does the
    model."""
    files = [(file.name, file.stat()) for file in _files(directory)]
    return repr((str(path), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]))
