"""What a model is named by: a repository of the hub, a checkpoint's directory, or a GGUF file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vptq_runtime.errors import OptionError

DEFAULT_REVISION = "main"
_PART = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w-])?"
_REPO = re.compile(rf"({_PART}/{_PART})(?:@(.*))?", re.ASCII | re.DOTALL)
_REVISION = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")  # its beginning is enough
_FILE_ENDINGS = (".gguf", ".safetensors", ".json")  # what ends so and is not there is a file that is missing
_CHECKPOINT_ENDINGS = (".safetensors", "index.json")


@dataclass(frozen=True)
class Repo:
    """A repository of the hub, at a branch, a tag or a commit."""

    id: str  # owner/name
    revision: str = DEFAULT_REVISION
    is_named: bool = False  # whether the revision was given

    @classmethod
    def parse(cls, text: str) -> Repo | None:
        """owner/name or owner/name@revision; None for what is a path here, or cannot be a repository.

        Raises OptionError for a revision that there cannot be.
        """
        match = _REPO.fullmatch(text)
        if match is None or "--" in match[1] or ".." in match[1] or match[1].endswith(_FILE_ENDINGS):
            return None
        if Path(text).exists():
            return None
        if match[2] is None:
            return cls(match[1])
        if not _REVISION.fullmatch(match[2]) or ".." in match[2]:
            raise OptionError(
                f"{match[1]}: found revision {match[2]!r:.80}, expected a branch, tag or commit"
            )
        return cls(match[1], match[2], is_named=True)

    @property
    def name(self) -> str:
        """Without its owner."""
        return self.id.partition("/")[2]

    @property
    def commit(self) -> str | None:
        """The commit that the revision is, or its beginning; None for a branch or a tag."""
        return self.revision if _COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.is_named else self.id


def is_checkpoint(path: Path) -> bool:
    """Whether a path that is there is to be converted: a directory, or the file that a checkpoint begins
    with."""
    return path.is_dir() or (path.is_file() and path.name.endswith(_CHECKPOINT_ENDINGS))
