"""Multiple choice: which continuation of a context a model finds most likely, as lm-eval scores it."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vptq_runtime.checks import shown
from vptq_runtime.errors import FileError, OptionError
from vptq_runtime.evaluate.scoring import Estimate, LanguageModel, log_probabilities
from vptq_runtime.text_file import read_text

MAX_CHOICES = 256


class TextModel(LanguageModel, Protocol):
    """A model with its tokenizer: a Runtime, or a DenseModel."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with BOS where the tokenizer adds it."""


@dataclass(frozen=True)
class Item:
    """choices: texts that may follow the context, joined to it as they are, spaces included; the one at the
    index `answer` is right."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Choices:
    """What a model makes of items, or of the first ones of them.

    log_likelihoods: for each item float64 (n_choices,), the sum over a choice's tokens of log p in nats,
    given the context and the tokens before.
    """

    items: Sequence[Item]
    log_likelihoods: Sequence[NDArray[np.float64]]

    def chosen(self, *, normalised: bool) -> NDArray[np.int64]:
        """(n_items,): the likeliest choice of each; normalised: by log-likelihood a character.

        As lm-eval's acc and acc_norm: a choice's characters are those behind the space that it begins with.
        """
        values = [
            scores / [max(1, len(choice.lstrip())) for choice in item.choices] if normalised else scores
            for item, scores in zip(self.items, self.log_likelihoods, strict=True)
        ]
        return np.array([int(each.argmax()) for each in values])

    def right(self, *, normalised: bool) -> NDArray[np.bool_]:
        """(n_items,): whether that is the answer."""
        answers = np.array([item.answer for item in self.items])
        right: NDArray[np.bool_] = self.chosen(normalised=normalised) == answers
        return right

    def accuracy(self, *, normalised: bool) -> Estimate:
        """Share of the items that are answered right; the error takes items as independent."""
        return Estimate.of_mean(self.right(normalised=normalised), np.arange(len(self.items)))

    def accuracy_difference(self, reference: Choices, *, normalised: bool) -> Estimate:
        """This accuracy less another model's on the same items: the error is that of the differences."""
        ours, theirs = (each.right(normalised=normalised).astype(np.float64) for each in (self, reference))
        return Estimate.of_mean(ours - theirs, np.arange(len(self.items)))

    def agreement(self, reference: Choices, *, normalised: bool) -> Estimate:
        """Share of the items where another model chooses the same."""
        chosen = [each.chosen(normalised=normalised) for each in (self, reference)]
        return Estimate.of_mean(np.equal(*chosen), np.arange(len(self.items)))


def read_items(path: Path) -> list[Item]:
    """Of a file with a JSON object in each line: context, choices (texts), answer (an index).

    Other keys are ignored. Raises FileError, which names the line.
    """
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            raise FileError(f"{where}: not valid JSON") from None
        if not isinstance(content, dict):
            raise FileError(f"{where}: found {shown(content)}, expected an object")
        items.append(_item(where, content))
    if not items:
        raise FileError(f"{path}: found no items, expected at least one")
    return items


def running_choices(model: TextModel, items: Sequence[Item]) -> Iterator[Choices]:
    """What the model makes of the first item, of the first two, ... of all.

    Raises OptionError for an item with more tokens than the context, and for a choice without a token of its
    own.
    """
    scores: list[NDArray[np.float64]] = []
    for n, item in enumerate(items, 1):
        try:
            scores.append(np.array([_log_likelihood(model, item.context, choice) for choice in item.choices]))
        except OptionError as error:
            raise OptionError(f"item {n}: {error}") from error
        yield Choices(items[:n], tuple(scores))


def choices(model: TextModel, items: Sequence[Item]) -> Choices:
    """What the model makes of all items; OptionError as of `running_choices`, and where there are none."""
    if not items:
        raise OptionError("items: found none, expected at least one")
    return deque(running_choices(model, items), maxlen=1)[0]


def _log_likelihood(model: TextModel, context: str, choice: str) -> float:
    """Sum of log p of the tokens by which the text is longer than its context, in nats.

    Spaces at the end of the context count as the choice's, since tokens begin with a space: lm-eval does so.
    """
    before = model.tokenize(context.rstrip()) if context.rstrip() else model.tokenize(context)
    whole = model.tokenize(context + choice)
    first = max(1, len(before))  # a token with nothing before it has no prediction
    if len(whole) <= first:
        raise OptionError(f"choices: found {shown(choice)}, expected a text of at least one token more")
    found = 0.0
    for targets, (log_p,) in log_probabilities([model], whole, first):
        found += float(log_p[np.arange(len(targets)), targets].sum())
    return found


def _item(where: str, content: Mapping[str, object]) -> Item:
    context, texts, answer = (content.get(name) for name in ("context", "choices", "answer"))
    if not isinstance(context, str) or not context:
        raise FileError(f"{where}: context: found {shown(context)}, expected a text")
    if not isinstance(texts, list) or not 2 <= len(texts) <= MAX_CHOICES:
        raise FileError(f"{where}: choices: found {shown(texts)}, expected 2 to {MAX_CHOICES} texts")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise FileError(f"{where}: choices: found {shown(text)}, expected a text")
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise FileError(f"{where}: answer: found {shown(answer)}, expected 0 to {len(texts) - 1}")
    return Item(context, tuple(texts), answer)
