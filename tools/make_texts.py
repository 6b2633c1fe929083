"""English texts to calibrate and to measure with, from Debian's packages: `python tools/make_texts.py TEXTS`.

calibration.txt  essays, manuals, an encyclopedia of computing, sayings
validation.txt   a dictionary of slang and a manual of computer security, to choose by
held_out.txt     stories and the myths of peoples about their sky: of another kind than the calibration's
reference.txt    Debian's reference manual, of a kind with the calibration's manuals

Packages are downloaded with `apt-get download` and unpacked, not installed. Texts are prose: paragraphs
without markup, listings or tables, in passages of some 3000 characters, drawn and shuffled by --seed. Each
text's packages, with their versions, and its SHA-256 stand in sources.json beside them; other versions make
other texts. Made on Debian 12 (bookworm), in November 2026: anarchism 15.3-3, debian-handbook 11.20220922,
gnome-user-docs 43.0-2, dict-foldoc 20230119-1, fortunes 1:1.99.1-7.3, jargon-text 4.4.7-4.1, harden-doc
3.19+nmu1, wesnoth-1.16-{dw,ei,httt,sotbe,thot,tsg,utbs} 1:1.16.9-1, stellarium-data 0.22.2-1 (246 MB),
debian-reference-en 2.100.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

PASSAGE = 3000  # characters; passages of a document end with the paragraph that passes them
SHORTEST = 40  # characters of a paragraph
MOST_MARKS = 0.25  # of a paragraph's characters that are neither letters nor spaces: more is no prose

Document = list[str]  # its paragraphs


class Paragraphs(HTMLParser):
    """The text of HTML's paragraphs, and of a Mallard page's."""

    HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "dt"})
    BLOCKS = HEADINGS | {"p", "li", "dd", "blockquote", "div", "td", "br", "desc"}
    LISTINGS = frozenset({"pre", "code", "screen", "synopsis", "table", "media"})
    SKIPPED = HEADINGS | LISTINGS | {"script", "style", "title", "head", "nav", "info"}

    def __init__(self) -> None:
        super().__init__()
        self.found: Document = []
        self._text = ""
        self._skipped: list[str] = []  # open elements whose text is left out

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self._end()
        if tag in self.SKIPPED and not (tag == "code" and self._text):  # code within a sentence is of it
            self._skipped.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            del self._skipped[self._skipped.index(tag) :]
        if tag in self.BLOCKS:
            self._end()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self._end()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._text += data

    def close(self) -> None:
        super().close()
        self._end()

    def _end(self) -> None:
        self.found.append(self._text)
        self._text = ""


def html(path: Path) -> Iterator[Document]:
    parser = Paragraphs()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    parser.close()
    yield parser.found


def foldoc(path: Path) -> Iterator[Document]:
    """A dictionary of dictd: headwords at the margin, their articles indented, cross-references in braces."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    for article in re.split(r"\n(?=\S)", text):
        headwords = [line for line in article.split("\n") if line and not line.startswith(" ")]
        body = "\n".join(line for line in article.split("\n") if line.startswith("   ") or not line)
        body = re.sub(r"\{\([^}]*\)\}|<[\w, ]+> |[{}]", "", body)  # addresses, subjects, marks of references
        paragraphs = [p for p in re.split(r"\n\s*\n", body) if not re.match(r"\s*[\[(]", p)]
        if headwords and paragraphs:
            yield [
                f"{headwords[0]}: {paragraphs[0].strip()}" if paragraphs[0].strip() else "",
                *paragraphs[1:],
            ]


def jargon(path: Path) -> Iterator[Document]:
    """An indented text whose articles begin with `:word: part of speech`, references in braces."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    yield [re.sub(r"[{}]", "", p) for p in re.split(r"\n\s*\n", text) if not p.lstrip().startswith(":")]


def fortunes(path: Path) -> Iterator[Document]:
    text = path.read_text(encoding="utf-8", errors="replace")
    yield [re.sub(r"\n\s+-- ", " -- ", saying) for saying in text.split("\n%\n")]


def wesnoth(path: Path) -> Iterator[Document]:
    """What is told and said in a scenario, in its order."""
    text = path.read_text(encoding="utf-8", errors="replace")
    said = re.findall(r'\b(?:message|story) *= *_ *"((?:[^"]|"")*)"', text)
    cleaned = [re.sub(r"<[^>]*>", "", line.replace('""', '"')) for line in said]
    yield [line for line in cleaned if "$" not in line and "^" not in line]


@dataclass(frozen=True)
class Source:
    package: str
    files: str  # a pattern under the package's root
    read: Callable[[Path], Iterator[Document]]
    most: int  # characters taken
    shortest: int = SHORTEST


SAYINGS = re.compile(
    "definitions|education|goedel|humorists|kids|law|literature|love|medicine|men-women|miscellaneous|news|"
    "paradoxum|people|pets|platitudes|politics|science|sports|wisdom|work"
)
CAMPAIGNS = ("dw", "ei", "httt", "sotbe", "thot", "tsg", "utbs")
TEXTS = {
    "calibration": [
        Source("anarchism", "usr/share/doc/anarchism/html/*.html", html, 1_800_000),
        Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", html, 900_000),
        Source("gnome-user-docs", "usr/share/help/C/*/*.page", html, 500_000),
        Source("dict-foldoc", "usr/share/dictd/foldoc.dict.dz", foldoc, 1_200_000),
        Source("fortunes", "usr/share/games/fortunes/*", fortunes, 600_000),
    ],
    "validation": [
        Source("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", jargon, 350_000),
        Source("harden-doc", "usr/share/doc/harden-doc/html/en-US/*.html", html, 200_000),
    ],
    "held_out": [
        *(
            Source(f"wesnoth-1.16-{name}", "**/scenarios/*.cfg", wesnoth, 120_000, shortest=12)
            for name in CAMPAIGNS
        ),
        Source("stellarium-data", "usr/share/stellarium/skycultures/*/description.en.utf8", html, 400_000),
    ],
    "reference": [
        Source("debian-reference-en", "usr/share/debian-reference/ch*.en.html", html, 600_000),
    ],
}


def prose(paragraph: str, shortest: int) -> str | None:
    """The paragraph on one line, or None where it is no English prose."""
    line = re.sub(r"\s*\[\d+\]", "", " ".join(paragraph.split()))  # footnotes' numbers
    if len(line) < shortest or not re.search(r"[.!?:;\"')\]]$", line):
        return None
    marks = sum(not (letter.isalpha() and letter.isascii()) and letter != " " for letter in line)
    return line if marks <= MOST_MARKS * len(line) else None


def passages(documents: Iterator[Document], shortest: int) -> Iterator[str]:
    for document in documents:
        passage: list[str] = []
        lines = [line for paragraph in document if (line := prose(paragraph, shortest))]
        for line in lines:
            passage.append(line)
            if sum(map(len, passage)) >= PASSAGE:
                yield "\n\n".join(passage)
                passage = []
        if passage:
            yield "\n\n".join(passage)


def unpacked(package: str, directory: Path) -> tuple[Path, str]:
    """Where the package's files are, and its version. Downloads it unless that was done before."""
    root = directory / package
    if not root.exists():
        directory.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", package], cwd=directory, check=True, stderr=subprocess.DEVNULL)
        unfinished = directory / f"unfinished-{package}"
        archive = next(directory.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive, unfinished], check=True)
        unfinished.replace(root)
    archive = next(directory.glob(f"{package}_*.deb"))
    field = ["dpkg-deb", "-f", str(archive), "Version"]
    return root, subprocess.run(field, check=True, capture_output=True, text=True).stdout.strip()


def of_source(source: Source, root: Path, chosen: random.Random) -> list[str]:
    files = sorted(path for path in root.glob(source.files) if path.is_file())
    if source.read is fortunes:
        files = [path for path in files if SAYINGS.fullmatch(path.name)]
    found = [text for path in files for text in passages(source.read(path), source.shortest)]
    found = list(dict.fromkeys(found))
    if not found:
        raise SystemExit(f"{source.package}: found no text in {source.files}")
    chosen.shuffle(found)
    taken, length = [], 0
    for passage in found:
        if length >= source.most:
            break
        taken.append(passage)
        length += len(passage) + 2
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the texts go")
    parser.add_argument("--packages", type=Path, help="where packages go (default: DIRECTORY/packages)")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    packages = asked.packages or asked.directory / "packages"
    asked.directory.mkdir(parents=True, exist_ok=True)
    written: dict[str, object] = {}
    for name, sources in TEXTS.items():
        chosen = random.Random(f"{asked.seed} {name}")
        taken: list[str] = []
        origins = {}
        for source in sources:
            root, version = unpacked(source.package, packages)
            text = of_source(source, root, chosen)
            origins[source.package] = {"version": version, "characters": sum(map(len, text))}
            taken += text
        chosen.shuffle(taken)
        whole = "\n\n".join(taken) + "\n"
        (asked.directory / f"{name}.txt").write_text(whole, encoding="utf-8")
        digest = hashlib.sha256(whole.encode()).hexdigest()
        written[name] = {"sha256": digest, "bytes": len(whole.encode()), "sources": origins}
        print(f"{name}.txt: {len(whole.encode()):,} bytes", file=sys.stderr)
    (asked.directory / "sources.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
