"""A repository of the hub: found in the cache, or downloaded and converted into it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from vptq_runtime.errors import FileError, VPTQError
from vptq_runtime.models import cache, conversion, disk, hub
from vptq_runtime.models.cache import Tell
from vptq_runtime.models.hub import HubError, Snapshot
from vptq_runtime.models.source import Repo

CHECKPOINT = "checkpoint"  # where the download lies meanwhile
WEIGHTS = (".safetensors", ".gguf")


def repository_file(repo: Repo, tell: Tell) -> Path:
    """The GGUF file of a repository at its revision.

    The hub is asked what the revision is now, unless that is a commit; where it does not say so, the newest
    model that is there for that name is taken. Raises FileError, UnsupportedError.
    """
    if (entry := cache.of_commit(repo)) is not None:
        return entry.mark_used().file
    try:
        snapshot = hub.snapshot(repo)
    except HubError as error:
        if (entry := cache.newest(repo)) is None:
            raise
        tell(f"{repo}: the hub did not give it: {error.reason}")
        tell(f"{repo}: the model that was made on {entry.made[:10]} is taken, {entry.name}")
        return entry.mark_used().file
    key = cache.repo_key(repo, snapshot.commit)
    if (entry := cache.find(key)) is None:
        snapshot.check()
        with cache.making(key, str(repo), tell) as part:
            if part is not None:
                _make(snapshot, part, tell)
        entry = cache.made(key, str(repo))
    return entry.mark_used(None if repo.commit else repo.revision).file


def _make(snapshot: Snapshot, part: Path, tell: Tell) -> None:
    """Fills part / "entry". If anything goes wrong, downloaded weights stay there, those that are whole."""
    download = part / CHECKPOINT
    try:
        (_take_gguf if snapshot.gguf else _take_checkpoint)(snapshot, download, part / "entry", tell)
    except BaseException as error:
        if not any(path.suffix in WEIGHTS for path in download.glob("*")):
            shutil.rmtree(download, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt | HubError):
            tell(f"{snapshot.repo}: what is downloaded and whole stays: the same command goes on from there")
        raise


def _take_checkpoint(snapshot: Snapshot, download: Path, entry: Path, tell: Tell) -> None:
    name, files = str(snapshot.repo), snapshot.checkpoint
    if "config.json" not in files:
        raise FileError(f"{name}: found no config.json, expected one beside the .safetensors files")
    # Before the weights, which are thousands of times as large.
    config = _download(snapshot, {"config.json": files["config.json"]}, download, tell) / "config.json"
    conversion.check_config(config, name, snapshot.repo.id)
    converted = {"the converted file": conversion.file_bytes(files)}
    directory = _download(snapshot, files, download, tell, converted)
    disk.check_free(entry, converted, name)
    tell(f"{name}: converting into {cache.root()}")
    try:
        conversion.convert(directory, entry / cache.MODEL, snapshot.repo.name)
    except VPTQError as error:
        if directory != download:
            raise
        remedy = f"vptq-models rm {shlex.quote(download.parent.name)}"
        raise type(error)(f"{error} (for a new download: {remedy})") from error
    cache.write_entry(entry, snapshot.repo.id, snapshot.commit)


def _take_gguf(snapshot: Snapshot, download: Path, entry: Path, tell: Tell) -> None:
    from vptq_runtime import _native

    assert snapshot.gguf is not None
    files = {snapshot.gguf: snapshot.sizes[snapshot.gguf]}
    file = _download(snapshot, files, download, tell) / snapshot.gguf
    try:
        _native.Model(str(file))  # one of llama.cpp's is refused
    except VPTQError as error:
        shutil.rmtree(download, ignore_errors=True)
        raise type(error)(f"{snapshot.repo}: {str(error).replace(str(file), file.name)}") from error
    if file.parent == download:
        file.replace(entry / cache.MODEL)
    else:  # it is in Hugging Face's cache: one copy is enough
        (entry / cache.MODEL).symlink_to(file.resolve())
    cache.write_entry(entry, snapshot.repo.id, snapshot.commit)


def _download(
    snapshot: Snapshot, files: dict[str, int], directory: Path, tell: Tell, then: dict[str, int] | None = None
) -> Path:
    """The directory that has the files: Hugging Face's own, if they are all there, or the one given, in the
    end. then: what the disk is needed for afterwards, and the bytes."""
    if (there := hub.cached(snapshot, files)) is not None:
        return there
    missing = {name: size for name, size in files.items() if not (directory / name).is_file()}
    n_bytes = sum(missing.values())
    disk.check_free(directory, {"the download": n_bytes} | (then or {}), str(snapshot.repo))
    if any(name.endswith(WEIGHTS) for name in missing):
        tell(f"{snapshot.repo}: downloading {disk.size(n_bytes)} into {cache.root()}")
    hub.download(snapshot, missing, directory, tell)
    return directory
