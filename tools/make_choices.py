"""Multiple-choice items of a text, for `vptq-perplexity --multiple-choice`.

    python tools/make_choices.py TEXT OUT.jsonl --items 400

The context is a paragraph of TEXT without its last sentence; the choices are that sentence, which is right,
and the last sentences of three other paragraphs: of those at most --near paragraphs away, so that the subject
alone does not tell, the three whose lengths are most like it. Which paragraphs, and in which order choices
stand, is drawn.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vptq_runtime.checks import check_int
from vptq_runtime.commands import command
from vptq_runtime.errors import OptionError

N_CHOICES = 4
SENTENCE = (40, 240)  # characters of a choice
CONTEXT = (100, 1200)  # and of a context
END = re.compile(r"(?<=[.!?])[^\w\s]*\s+(?=[^\w\s]?[A-Z])")  # of a sentence, quotation marks included


def parted(paragraph: str) -> tuple[str, str] | None:
    """A paragraph's context and its last sentence; None where it has no such."""
    ends = [match.end() for match in END.finditer(paragraph)]
    if not ends:
        return None
    context, sentence = paragraph[: ends[-1]].rstrip(), paragraph[ends[-1] :].strip()
    fits = SENTENCE[0] <= len(sentence) <= SENTENCE[1] and CONTEXT[0] <= len(context) <= CONTEXT[1]
    return (context, sentence) if fits else None


def items(text: str, n_items: int, near: int, seed: int) -> list[dict[str, object]]:
    """Items as their JSON has them; raises OptionError where the text has too few paragraphs."""
    paragraphs = dict.fromkeys(" ".join(each.split()) for each in text.split("\n\n"))
    parts = [part for each in paragraphs if (part := parted(each)) is not None]
    if len(parts) < max(n_items, N_CHOICES):
        found = f"{len(parts)} paragraphs of two sentences or more"
        raise OptionError(f"TEXT: found {found}, expected at least {max(n_items, N_CHOICES)}")
    chosen = random.Random(seed)
    made = []
    for index in sorted(chosen.sample(range(len(parts)), n_items)):
        context, right = parts[index]
        around = [part[1] for n, part in enumerate(parts) if 0 < abs(n - index) <= near and part[1] != right]
        around = list(dict.fromkeys(around))
        around.sort(key=lambda sentence: abs(len(sentence) - len(right)))
        choices = [right, *around[: N_CHOICES - 1]]
        chosen.shuffle(choices)
        joined = [f" {choice}" for choice in choices]
        made.append({"context": context, "choices": joined, "answer": choices.index(right)})
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", metavar="TEXT", type=Path)
    parser.add_argument("out", metavar="OUT.jsonl", type=Path)
    parser.add_argument("--items", metavar="N", type=int, default=400)
    parser.add_argument("--near", metavar="N", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seed", metavar="N", type=int, default=1)
    return command.run("make_choices", lambda: make(parser.parse_args(argv)))


def make(arguments: argparse.Namespace) -> None:
    check_int("--items", arguments.items, 1)
    check_int("--near", arguments.near, N_CHOICES - 1)
    made = items(command.read_text(str(arguments.text)), arguments.items, arguments.near, arguments.seed)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in made)
    arguments.out.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
