"""The Hugging Face hub: what a repository holds, and its files, by huggingface_hub."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vptq_runtime.errors import FileError, UnsupportedError, printable
from vptq_runtime.models import disk
from vptq_runtime.models.cache import Tell
from vptq_runtime.models.source import Repo

TIMEOUT_S = 10.0
LINE_S = 30.0  # between two lines of a download that no terminal shows
# Of a checkpoint; in folders, and under the other name, lie copies of the weights in other layouts.
PATTERNS = ("*.safetensors", "*.json", "*.jinja")
IGNORED_PATTERNS = ("*/*", "consolidated*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_NAME = re.compile(r"(?!\.)[\w.+-]{1,200}", re.ASCII)


class HubError(FileError):
    """The hub has not given what it was asked for, or could not be asked; reason: why."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason

    @classmethod
    def of(cls, repo: Repo, reason: str) -> HubError:
        return cls(f"{repo}: no such path here, and the hub did not give it: {reason}", reason)


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit."""

    repo: Repo
    commit: str
    sizes: Mapping[str, int]  # bytes, of the files at its top whose names are harmless
    others: tuple[str, ...] = ()  # its other files

    @property
    def checkpoint(self) -> dict[str, int]:
        """The files that a checkpoint is made of, with their bytes; empty where there are no weights."""
        weights = {
            name: size
            for name, size in self.sizes.items()
            if name.endswith(".safetensors") and not name.startswith("consolidated")
        }
        beside = {name: size for name, size in self.sizes.items() if name.endswith((".json", ".jinja"))}
        return beside | weights if weights else {}

    @property
    def gguf(self) -> str | None:
        """The one GGUF file that stands there instead of a checkpoint."""
        files = [name for name in self.sizes if name.endswith(".gguf")]
        return files[0] if len(files) == 1 and not self.checkpoint else None

    def check(self) -> None:
        """Raises UnsupportedError where there is neither, and says what there is instead."""
        if self.checkpoint or self.gguf:
            return
        names = (*self.sizes, *self.others)
        n_gguf = sum(name.endswith(".gguf") for name in names)
        pickles = [name for name in names if name.endswith(PICKLES)]
        if n_gguf:
            found = (
                f"{n_gguf} GGUF files and no checkpoint: download the one that you want, and give its path"
            )
        elif pickles:
            found = (
                f"its weights in pickle files only ({printable(pickles[0])}), which can run code when read"
            )
        else:
            found = "no weights at the top of the repository"
        raise UnsupportedError(
            f"{self.repo}: found {found}; expected .safetensors files with a config.json, or one GGUF file"
        )


def snapshot(repo: Repo) -> Snapshot:
    """What a repository holds now; raises HubError."""
    import huggingface_hub  # slow to import, and seldom needed

    try:
        info = huggingface_hub.HfApi().model_info(
            repo.id, revision=repo.revision, files_metadata=True, timeout=TIMEOUT_S
        )
    except Exception as error:  # the client's own, its HTTP library's, the system's: no common base
        raise HubError.of(repo, reason(error)) from error
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise HubError.of(repo, f"it says {str(info.sha)!r:.80} for its commit, expected 40 hex digits")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    harmless = {name: size for name, size in sizes.items() if _FILE_NAME.fullmatch(name)}
    return Snapshot(repo, info.sha, harmless, tuple(name for name in sizes if name not in harmless))


def cached(snapshot: Snapshot, files: Mapping[str, int]) -> Path | None:
    """The directory of Hugging Face's own cache that has all these files, whole; None without one."""
    import huggingface_hub

    for name, size in files.items():
        path = huggingface_hub.try_to_load_from_cache(snapshot.repo.id, name, revision=snapshot.commit)
        if not isinstance(path, str) or not Path(path).is_file() or Path(path).stat().st_size != size:
            return None
    return Path(path).parent if files else None  # type: ignore[arg-type]


def download_checkpoint(repo: Repo) -> Path:
    """A checkpoint's directory in Hugging Face's own cache; raises HubError."""
    import huggingface_hub

    try:
        directory = huggingface_hub.snapshot_download(
            repo.id,
            revision=repo.revision,
            allow_patterns=list(PATTERNS),
            ignore_patterns=list(IGNORED_PATTERNS),
        )
    except Exception as error:
        raise HubError.of(repo, reason(error)) from error
    return Path(directory)


def download(snapshot: Snapshot, files: Mapping[str, int], directory: Path, tell: Tell) -> None:
    """Downloads files into a directory, those of them that are not there yet, with huggingface_hub's bars.

    One after another, in this thread: so Ctrl-C ends it at once. A file is there when it is whole. Raises
    HubError.
    """
    import huggingface_hub

    with _lines(snapshot.repo, sum(files.values()), directory, tell):
        for name in files:
            try:
                huggingface_hub.hf_hub_download(
                    snapshot.repo.id, name, revision=snapshot.commit, local_dir=directory
                )
            except Exception as error:
                raise HubError.of(snapshot.repo, reason(error)) from error


@contextlib.contextmanager
def _lines(repo: Repo, total: int, directory: Path, tell: Tell) -> Iterator[None]:
    """Where no terminal shows a bar: a line now and then."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(LINE_S):
            tell(f"{repo}: {disk.size(disk.used_bytes(directory))} of {disk.size(total)} downloaded")

    if not sys.stderr.isatty():
        threading.Thread(target=report, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def reason(error: Exception) -> str:
    """What went wrong, in one sentence."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "it asks for a login (hf auth login) that has agreed to the model's terms"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return "no such repository, or a private one (hf auth login)"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    lines = str(error).strip().splitlines()  # the first is the cause, advice follows
    return lines[0].removeprefix("Got: ").strip() if lines else type(error).__name__
