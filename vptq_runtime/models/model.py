"""From what a model is named by to the path of its GGUF file."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vptq_runtime.errors import FileError, VPTQError
from vptq_runtime.models import cache, conversion, disk, hub
from vptq_runtime.models.cache import Entry
from vptq_runtime.models.hub import HubError, Snapshot
from vptq_runtime.models.source import Repo, is_checkpoint

if TYPE_CHECKING:
    from vptq_runtime import _native

Tell = Callable[[str], object]


def model_file(source: str, tell: Tell) -> str:
    """The GGUF file of a model: source itself, or what the cache has of it.

    source: a GGUF file; a checkpoint's directory (or its .safetensors file or index.json); owner/model or
        owner/model@revision on the hub. What the cache has not yet is downloaded and converted.
    tell: gets a line about what takes its time, and about what is not as it was asked for.

    Raises FileError, UnsupportedError, OptionError.
    """
    path = Path(source)
    try:
        if is_checkpoint(path):
            return _of_checkpoint(path, tell)
        repo = Repo.parse(source)
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle, a directory closed to us
        raise FileError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return source if repo is None else str(_of_repo(repo, tell).file)


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


def _of_repo(repo: Repo, tell: Tell) -> Entry:
    if (entry := cache.of_commit(repo)) is not None:  # it never changes: nobody is to be asked
        return entry.mark_used()
    try:
        snapshot = hub.snapshot(repo)
    except HubError as error:
        if (entry := cache.newest(repo)) is None:
            raise
        tell(f"{repo}: the hub did not give it: {error.reason}")
        tell(f"{repo}: the model that was made on {entry.made[:10]} is taken, {entry.name}")
        return entry.mark_used()
    key = cache.repo_key(repo, snapshot.commit)
    if (entry := cache.find(key)) is None:
        snapshot.check()
        with cache.making(key, str(repo), tell) as part:
            if part is not None:
                _make_of_repo(snapshot, part, tell)
        entry = _made(key, str(repo))
    return entry.mark_used(None if repo.commit else repo.revision)


def _made(key: str, name: str) -> Entry:
    entry = cache.find(key)
    if entry is None:
        raise FileError(f"{name}: has gone from the cache while it was made ready, expected it there")
    return entry


def _make_of_repo(snapshot: Snapshot, part: Path, tell: Tell) -> None:
    repo, entry = snapshot.repo, part / "entry"
    if snapshot.gguf is not None:
        files = {snapshot.gguf: snapshot.sizes[snapshot.gguf]}
        directory = _download(snapshot, files, part / "checkpoint", 0, tell)
        _check_gguf(directory / snapshot.gguf, part, repo)
        if directory == part / "checkpoint":
            (directory / snapshot.gguf).replace(entry / cache.MODEL)
        else:  # it is Hugging Face's: one copy of it is enough
            (entry / cache.MODEL).symlink_to((directory / snapshot.gguf).resolve())
        _write(entry, repo.id, snapshot.commit)
        return
    files = snapshot.checkpoint
    _check_config(snapshot, part)
    converted = conversion.file_bytes(files)
    directory = _download(snapshot, files, part / "checkpoint", converted, tell)
    disk.check_free(part, [("the converted file", converted)], str(repo))
    _convert(directory, entry / cache.MODEL, repo.name, str(repo), tell)
    _write(entry, repo.id, snapshot.commit)


def _check_config(snapshot: Snapshot, part: Path) -> None:
    """Looks at the config before the weights are downloaded."""
    repo, size = snapshot.repo, snapshot.sizes.get("config.json")
    if size is None:
        raise FileError(f"{repo}: found no config.json, expected one beside the .safetensors files")
    directory = hub.cached(snapshot, {"config.json": size}) or part / "checkpoint"
    if directory == part / "checkpoint":
        hub.download(snapshot, {"config.json": size}, directory, lambda line: None)
    try:
        conversion.check_config(directory / "config.json", str(repo), repo.id)
    except VPTQError:
        shutil.rmtree(part / "checkpoint", ignore_errors=True)
        raise


def _download(snapshot: Snapshot, files: dict[str, int], directory: Path, then: int, tell: Tell) -> Path:
    """The directory that has the files: Hugging Face's cache, if they are there, or this one, in the end.

    then: bytes that are needed on the disk afterwards.
    """
    if (there := hub.cached(snapshot, files)) is not None:
        return there
    missing = {name: size for name, size in files.items() if not (directory / name).is_file()}
    n_bytes = sum(missing.values())
    disk.check_free(directory, [("the download", n_bytes), ("the converted file", then)], str(snapshot.repo))
    if missing:
        tell(f"{snapshot.repo}: downloading {disk.size(n_bytes)} into {cache.root()}")
    try:
        hub.download(snapshot, missing, directory, tell)
    except (KeyboardInterrupt, HubError):
        if any((directory / name).is_file() and name.endswith(".safetensors") for name in files):
            tell(f"{snapshot.repo}: the files that are whole stay: the same command goes on from them")
        else:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory


def _check_gguf(file: Path, part: Path, repo: Repo) -> None:
    """Refuses a GGUF file that is not one of ours, and does not keep what was downloaded of it."""
    from vptq_runtime import _native

    try:
        _native.Model(str(file))
    except VPTQError as error:
        shutil.rmtree(part / "checkpoint", ignore_errors=True)
        raise type(error)(f"{repo}: {str(error).replace(str(file), file.name)}") from error


def _convert(source: Path, target: Path, name: str, shown: str, tell: Tell) -> None:
    tell(f"{shown}: converting into {cache.root()}")
    try:
        conversion.convert(source, target, name)
    except VPTQError as error:
        if source.parent.name.endswith(cache.PART):  # what was downloaded stays
            remedy = f"vptq-models rm {shlex.quote(source.parent.name)}"
            raise type(error)(f"{error} (for a new download: {remedy})") from error
        raise


def _write(directory: Path, source: str, commit: str | None) -> None:
    n_bytes = (directory / cache.MODEL).stat().st_size
    Entry(directory, source, commit, n_bytes, made=cache.now(), used=cache.now()).write()


def _of_checkpoint(path: Path, tell: Tell) -> str:
    path = path.resolve()
    directory = path if path.is_dir() else path.parent
    if (file := _only_gguf(path)) is not None:
        return str(file)
    state = _state(path, directory)
    key = cache.directory_key(directory, state)
    if (entry := cache.find(key)) is None:
        conversion.check_checkpoint(path, shlex.quote(str(directory)))
        with cache.making(key, str(path), tell) as part:
            if part is not None:
                target = part / "entry" / cache.MODEL
                sizes = {file.name: file.stat().st_size for file in _files(directory)}
                disk.check_free(part, [("the converted file", conversion.file_bytes(sizes))], str(path))
                _convert(path, target, directory.name, str(path), tell)
                if _state(path, directory) != state:
                    raise FileError(
                        f"{path}: has changed while it was converted, expected it to stay as it is"
                    )
                _write(part / "entry", os.fsencode(path).decode(errors="replace"), None)
        entry = _made(key, str(path))
        for old in cache.entries():  # of what the directory held before: nobody can ask for it any more
            if old.source == entry.source and old.commit is None and old.directory != entry.directory:
                cache.remove(old)
    return str(entry.mark_used().file)


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
