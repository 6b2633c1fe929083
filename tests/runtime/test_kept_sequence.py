"""A prompt that begins as the one before: in float32 the same text as from an empty cache, and less work."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from configurations import BOS

from vptq_runtime import Runtime
from vptq_runtime.kept_sequence import KeptSequence

LONG = [BOS, *range(20, 220)]  # more than one native batch
OPTIONS: dict[str, Any] = {"max_tokens": 20, "temperature": 0}


@pytest.fixture
def runtime(model: Path) -> Iterator[Runtime]:
    """One that no other test has used."""
    with Runtime(model, device="cpu", precision="f32") as runtime:
        yield runtime


@pytest.fixture
def fresh(model: Path) -> Any:
    """New tokens of a prompt from an empty cache."""

    def tokens(prompt: list[int]) -> list[int]:
        with Runtime(model, device="cpu", precision="f32") as runtime:
            return runtime.generate(prompt, **OPTIONS).tokens

    return tokens


def test_a_conversation_feeds_what_is_new(runtime: Runtime, fresh: Any) -> None:
    prompt = LONG
    first = runtime.generate(prompt, **OPTIONS)
    assert first.timings.prompt_tokens == len(prompt)
    for _ in range(3):
        prompt = [*prompt, *runtime.generate(prompt, **OPTIONS).tokens, 30, 31, 32]
        turn = runtime.generate(prompt, **OPTIONS)
        assert turn.timings.prompt_tokens == 4  # the last token that was sampled has not been fed, either
        assert turn.tokens == fresh(prompt)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 127, 128, 129, len(LONG) - 1, len(LONG)])
def test_any_common_prefix(runtime: Runtime, fresh: Any, n: int) -> None:
    runtime.generate(LONG, **OPTIONS)
    other = [*LONG[:n], *(221 + i for i in range(40))]
    generation = runtime.generate(other, **OPTIONS)
    assert generation.tokens == fresh(other)
    assert generation.timings.prompt_tokens == 40


def test_the_same_prompt_and_its_beginning(runtime: Runtime, fresh: Any) -> None:
    runtime.generate(LONG, **OPTIONS)
    for prompt in (LONG, LONG[:50], LONG[:1]):
        generation = runtime.generate(prompt, **OPTIONS)
        assert (generation.tokens, generation.timings.prompt_tokens) == (fresh(prompt), 1)


def test_streams_beside_one_another(runtime: Runtime, fresh: Any) -> None:
    """One has the kept sequence, the other one of its own; the one that ends last is kept."""
    runtime.generate(LONG, **OPTIONS)
    streams = [runtime.generate(LONG, stream=True, **OPTIONS) for _ in range(2)]
    while any([next(stream, None) is not None for stream in streams]):
        pass
    assert [stream.generation.tokens for stream in streams] == [fresh(LONG)] * 2
    assert [stream.generation.timings.prompt_tokens for stream in streams] == [1, len(LONG)]
    assert runtime.generate([*LONG, 30], **OPTIONS).timings.prompt_tokens == 1


def test_after_a_closed_stream(runtime: Runtime, fresh: Any) -> None:
    with runtime.generate(LONG, stream=True, **OPTIONS) as stream:
        next(stream)
    again = runtime.generate([*LONG, 30], **OPTIONS)
    assert (again.tokens, again.timings.prompt_tokens) == (fresh([*LONG, 30]), 1)


def test_after_an_interrupt(runtime: Runtime, fresh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a step: the prompt's last chunk is not there. Behind one: its token is not known."""
    step = Runtime._step

    def before_it(self: Runtime, *arguments: Any) -> list[int]:
        raise KeyboardInterrupt

    def behind_it(self: Runtime, *arguments: Any) -> list[int]:
        step(self, *arguments)
        raise KeyboardInterrupt

    for interrupted, prompt_tokens in ((before_it, len(LONG) - runtime._n_batch), (behind_it, 1)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Runtime, "_step", interrupted)
            runtime.generate(LONG, **OPTIONS)
        generation = runtime.generate(LONG, **OPTIONS)
        assert (generation.tokens, generation.timings.prompt_tokens) == (fresh(LONG), prompt_tokens)


def test_batches_and_logits_leave_it_alone(runtime: Runtime, fresh: Any) -> None:
    runtime.generate(LONG, **OPTIONS)
    several = runtime.generate([LONG, LONG[:20]], **OPTIONS)
    assert [generation.tokens for generation in several] == [fresh(LONG), fresh(LONG[:20])]
    assert several[0].timings.prompt_tokens == len(LONG) + 20
    assert len(runtime.logits(LONG)) == len(LONG)
    assert runtime.generate(LONG, **OPTIONS).timings.prompt_tokens == 1


def test_chat_gains_by_itself(runtime: Runtime) -> None:
    messages = [{"role": "user", "content": "the quick brown fox"}]
    reply = runtime.chat(messages, **OPTIONS)
    messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "and the dog"}]
    fed = runtime.chat(messages, **OPTIONS).timings.prompt_tokens
    assert fed < len(runtime.chat_tokens(messages)) - reply.timings.prompt_tokens


class FakeContext:
    """Has blocks for one sequence only."""

    block_tokens = 32

    def __init__(self) -> None:
        self.sequences: set[int] = set()

    @property
    def n_free_blocks(self) -> int:
        return 0 if self.sequences else 1

    def new_sequence(self) -> int:
        assert not self.sequences
        self.sequences.add(0)
        return 0

    def free_sequence(self, sequence: int) -> None:
        self.sequences.remove(sequence)

    def length(self, sequence: int) -> int:
        return 2


def test_it_makes_room() -> None:
    context: Any = FakeContext()
    kept = KeptSequence()
    kept.keep(context, kept.new(context, 10), [1, 2, 3])
    kept.new(context, 10)  # in its place
    assert context.sequences == {0}
