"""The cache of converted models: a directory for each, whole or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vptq_runtime.errors import FileError
from vptq_runtime.models.source import Repo
from vptq_runtime.text_file import read_json

Tell = Callable[[str], object]  # gets a line for people
VERSION = 1  # of what an entry is: one of another version is made anew
MODEL, ENTRY, PART, LOCKS = "model.gguf", "entry.json", ".part", "locks"


def root() -> Path:
    """VPTQ_CACHE, or vptq-runtime in XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("VPTQ_CACHE"):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "vptq-runtime"
    except RuntimeError:
        raise FileError("found no home directory, expected VPTQ_CACHE to name one for the cache") from None


def repo_key(repo: Repo, commit: str) -> str:
    """Of a repository's commit; no two have the same, as their names have no --."""
    return f"{repo.id.replace('/', '--')}--{commit}"


def directory_key(path: Path, state: str) -> str:
    """Of a checkpoint's directory; state: what tells its files from others."""
    name = re.sub(r"[^\w.]", "_", path.name, flags=re.ASCII)[:64]
    return f"{name}--{hashlib.sha256(state.encode(errors='surrogateescape')).hexdigest()[:16]}"


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Entry:
    """A model in the cache."""

    directory: Path
    source: str  # owner/name, or a path
    commit: str | None  # of a repository
    n_bytes: int  # of the file
    made: str  # when, as ISO 8601 has it
    used: str  # when last
    refs: dict[str, str] = field(default_factory=dict)  # revisions that meant this commit, and when last

    @property
    def file(self) -> Path:
        return self.directory / MODEL

    @property
    def name(self) -> str:
        """As `vptq-models rm` takes it."""
        return self.source if self.commit is None else f"{self.source}@{self.commit[:12]}"

    def is_of(self, source: str, commit: str) -> bool:
        """Whether it is of that repository and of a commit that begins so."""
        return self.source == source and self.commit is not None and self.commit.startswith(commit)

    @classmethod
    def read(cls, directory: Path) -> Entry:
        """Raises FileError where it is damaged: what it says cannot be read, or its file has another size."""
        values = read_json(directory / ENTRY)
        expected: dict[str, Any] = {
            "source": str, "commit": str | None, "n_bytes": int, "made": str, "used": str, "refs": dict,
        }  # fmt: skip
        whole = (
            isinstance(values, dict)
            and values.get("version") == VERSION
            and all(name in values and isinstance(values[name], kind) for name, kind in expected.items())
            and all(isinstance(when, str) for when in values["refs"].values())
        )
        if not whole:
            raise FileError(f"{directory / ENTRY}: found no entry of version {VERSION}")
        entry = cls(directory, **{name: values[name] for name in expected})
        try:
            found = entry.file.stat().st_size
        except OSError:
            found = None
        if found != entry.n_bytes:
            raise FileError(f"{entry.file}: found {found} bytes, expected {entry.n_bytes}")
        return entry

    def write(self) -> None:
        values = {name: value for name, value in asdict(self).items() if name != "directory"}
        temporary = self.directory / f".{ENTRY}.{secrets.token_hex(4)}"
        try:
            temporary.write_text(json.dumps(values | {"version": VERSION}, indent=2), encoding="utf-8")
            temporary.replace(self.directory / ENTRY)
        finally:
            temporary.unlink(missing_ok=True)

    def mark_used(self, ref: str | None = None) -> Entry:
        """Remembers that it is used now, and that a revision means it, unless the cache can only be read."""
        used = replace(self, used=now(), refs=self.refs | ({} if ref is None else {ref: now()}))
        with contextlib.suppress(OSError):
            used.write()
        return used


@dataclass(frozen=True)
class Part:
    """What is in the cache and is no model: a download that has not ended, or a damaged entry."""

    directory: Path
    state: str  # "unfinished", "in work", or what is damaged

    @property
    def source(self) -> str:
        """What its directory's name tells of it."""
        name, _, last = self.directory.name.removesuffix(PART).rpartition("--")
        return name.replace("--", "/") if len(last) == 40 else name

    @property
    def name(self) -> str:
        return self.directory.name


def find(key: str) -> Entry | None:
    """The entry of that key, if it is whole."""
    try:
        return Entry.read(root() / key)
    except FileError:
        return None


def of_commit(repo: Repo) -> Entry | None:
    """The entry of the commit that a repository's revision is, or the one that begins so."""
    if repo.commit is None:
        return None
    found = [entry for entry in entries() if entry.is_of(repo.id, repo.commit)]
    return found[0] if len(found) == 1 else None


def made(key: str, name: str) -> Entry:
    """The entry that has just been made; raises FileError."""
    entry = find(key)
    if entry is None:
        raise FileError(f"{name}: has gone from the cache while it was made ready, expected it there")
    return entry


def newest(repo: Repo) -> Entry | None:
    """Of a repository's entries the last one that its revision meant; without a revision, the last one."""
    mine = [entry for entry in entries() if entry.source == repo.id and entry.commit is not None]
    known = [entry for entry in mine if repo.revision in entry.refs]
    if known:
        return max(known, key=lambda entry: entry.refs[repo.revision])
    return max(mine, key=lambda entry: entry.made, default=None) if not repo.is_named else None


def entries() -> list[Entry]:
    return [item for item in contents() if isinstance(item, Entry)]


def contents() -> list[Entry | Part]:
    """All that is there, by name."""
    found: list[Entry | Part] = []
    try:
        directories = sorted(path for path in root().iterdir() if "--" in path.name and path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileError(f"{root()}: cannot be read: {error.strerror}") from error
    for directory in directories:
        if directory.name.endswith(PART):
            found.append(Part(directory, "in work" if is_locked(directory) else "unfinished"))
            continue
        try:
            found.append(Entry.read(directory))
        except FileError as error:
            found.append(Part(directory, f"damaged: {error}"))
    return found


def write_entry(directory: Path, source: str, commit: str | None) -> None:
    """Says what the model in a directory is: the last thing that an entry needs."""
    n_bytes = (directory / MODEL).stat().st_size
    Entry(directory, source, commit, n_bytes, made=now(), used=now()).write()


def remove(item: Entry | Part) -> None:
    """Removes it; a process that runs it keeps its file until it ends. Raises FileError."""
    try:
        with _locked(_key(item.directory), wait=False):
            shutil.rmtree(item.directory)
    except FileNotFoundError:
        pass  # somebody else has
    except OSError as error:
        raise FileError(f"{item.directory}: cannot be removed: {error.strerror or error}") from error


@contextlib.contextmanager
def making(key: str, name: str, tell: Tell) -> Iterator[Path | None]:
    """Lends a directory in which to make an entry, to one process at a time; None where another one has made
    it meanwhile. What an earlier one has left there is still there.

    In it a directory `entry` becomes the cache's entry at the end, all at once, and the rest goes. If
    anything goes wrong, `entry` goes and the rest stays.
    """
    part = root() / f"{key}{PART}"
    try:
        with _locked(key, wait=True, tell=lambda: tell(f"{name}: another process makes it ready: waiting")):
            if find(key) is not None:
                yield None
                return
            if (root() / key).exists():
                tell(f"{name}: what the cache has of it is damaged, and made anew")
                shutil.rmtree(root() / key)
            entry = part / "entry"
            shutil.rmtree(entry, ignore_errors=True)
            entry.mkdir(parents=True)
            try:
                yield part
                entry.replace(root() / key)
                shutil.rmtree(part, ignore_errors=True)
            finally:
                shutil.rmtree(entry, ignore_errors=True)
                with contextlib.suppress(OSError):
                    part.rmdir()  # unless a download is in it
    except OSError as error:
        raise FileError(
            f"{error.filename or root()}: cannot be written: {error.strerror or error}: "
            "VPTQ_CACHE names another place for the cache"
        ) from error


def is_locked(directory: Path) -> bool:
    """Whether a process makes that entry now."""
    try:
        with _locked(_key(directory), wait=False):
            return False
    except FileError:
        return True
    except OSError:
        return False  # it cannot be written to, so nobody does


def _key(directory: Path) -> str:
    return directory.name.removesuffix(PART)


@contextlib.contextmanager
def _locked(key: str, *, wait: bool, tell: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Holds the lock of a key; raises FileError where another process does and there is no waiting."""
    from filelock import FileLock, Timeout

    (root() / LOCKS).mkdir(parents=True, exist_ok=True)
    lock = FileLock(root() / LOCKS / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise FileError(f"{key}: another process makes it ready, expected none") from None
        tell()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
