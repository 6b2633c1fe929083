"""What is fed as one batch, whose logits it gives, and the tokens that are drawn from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from feeding import all_logits, prefill, step
from gpu import need_gpu
from numpy.typing import NDArray
from tiny_gguf import N_VOCAB, write_tiny

from vptq_runtime import _native
from vptq_runtime.errors import OptionError

GREEDY: dict[str, Any] = dict(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, seed=0)
TOKENS = np.random.default_rng(0).integers(N_VOCAB, size=100).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> _native.Model:
    return _native.Model(str(write_tiny(tmp_path_factory.mktemp("feeds") / "model.gguf", n_layer=2)))


@pytest.fixture
def context(model: _native.Model, device: str) -> _native.Context:
    return _native.Context(model, device=device, n_ctx=200, n_threads=2, kv_type="f32")


def greedy() -> _native.Sampler:
    return _native.Sampler(**GREEDY)


def test_bad_batches(context: _native.Context) -> None:
    sequence = context.new_sequence()
    n_batch = context.n_batch
    cases: list[tuple[tuple[Any, ...], str]] = [
        (([sequence], [[N_VOCAB]]), f"token {N_VOCAB}, expected 0 to {N_VOCAB - 1}"),
        (([sequence], [[-1]]), "token -1, expected 0 to"),
        (([sequence], [[]]), "no tokens for sequence"),
        (([], []), "a batch of no sequences, expected at least one"),
        (([sequence, sequence], [[1], [1]]), "stands twice in one batch"),
        (([99], [[1]]), "sequence 99 does not exist"),
        (([sequence], [[1], [2]]), "2 token lists, expected one a sequence: 1"),
        (([sequence], [[1]], [True, True]), "2 prompts, expected one a sequence: 1"),
        (([sequence], [[1]], [], ["all"] * 3), "3 wants, expected one a sequence: 1"),
        (([sequence], [[1]], [], ["first"]), r"wants\[0\]: found 'first', expected none, last or all"),
        (([sequence], [[1]], [], [], [None] * 2), "2 samplers, expected one a sequence: 1"),
        (
            ([sequence], [[1] * (n_batch + 1)]),
            f"a batch of {n_batch + 1} tokens or more, expected at most {n_batch}",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(OptionError, match=message):
            context.forward(*arguments)
    assert (context.length(sequence), context.blocks(sequence)) == (0, [])


def test_whose_logits_are_wanted(context: _native.Context) -> None:
    """Prompts come first in the batch, wherever they stand among the feeds."""
    parts = (TOKENS[:9], TOKENS[9:12], TOKENS[20:21], TOKENS[30:50], TOKENS[50:55])
    whole = [
        all_logits(context, context.new_sequence(), tokens, prompt)
        for tokens, prompt in zip(parts, (False, True, False, True, True), strict=True)
    ]
    sequences = [context.new_sequence() for _ in parts]
    context.forward(
        sequences, parts, [False, True, False, True, True], ["last", "none", "all", "all", "last"]
    )
    assert [context.length(sequence) for sequence in sequences] == [9, 3, 1, 20, 5]
    found = [context.logits(feed) for feed in range(5)]
    for logits, expected in zip(
        found, (whole[0][-1:], whole[1][:0], whole[2], whole[3], whole[4][-1:]), strict=True
    ):
        assert logits.dtype == np.float32
        assert np.array_equal(logits, expected)


def test_the_last_ones_are_wanted_of_generated_tokens(context: _native.Context) -> None:
    expected = [all_logits(context, context.new_sequence(), tokens, False)[-1:] for tokens in ([3, 4], [5])]
    context.forward([context.new_sequence(), context.new_sequence()], [[3, 4], [5]])
    assert all(np.array_equal(context.logits(feed), expected[feed]) for feed in range(2))


def test_the_arrays_are_views_that_last(context: _native.Context) -> None:
    sequence = context.new_sequence()
    first = all_logits(context, sequence, TOKENS[:10])
    again = context.logits(0)
    assert np.shares_memory(first, again)
    copy = first.copy()
    second = all_logits(context, sequence, TOKENS[10:20])
    assert np.array_equal(first, copy) and not np.shares_memory(first, second)
    del first, again, second
    context.free_sequence(sequence)
    kept = all_logits(context, context.new_sequence(), TOKENS[:10])
    del context
    assert np.array_equal(kept, copy)


def test_only_of_the_last_batch(context: _native.Context) -> None:
    for ask in (lambda: context.logits(0), lambda: context.sample([]), lambda: context.log_probs(0, [], 0)):
        with pytest.raises(OptionError, match=r"^no batch has come to its end$"):
            ask()
    sequence = context.new_sequence()
    prefill(context, [sequence], [[1]])
    assert context.logits(0).shape == (0, N_VOCAB)
    for feed in (-1, 1):
        with pytest.raises(OptionError, match=f"^feed {feed}, expected 0 to 0$"):
            context.logits(feed)
    with pytest.raises(OptionError):
        prefill(context, [sequence], [[N_VOCAB]])
    assert context.logits(0).shape == (0, N_VOCAB)  # what was refused has changed nothing


class TestSample:
    def test_each_feeds_next_token(self, context: _native.Context) -> None:
        parts = (TOKENS[:9], TOKENS[9:12])
        expected = [
            int(all_logits(context, context.new_sequence(), part, False)[-1].argmax()) for part in parts
        ]
        sequences = [context.new_sequence() for _ in parts]
        assert step(context, sequences, parts, [greedy(), greedy()]) == expected
        assert [context.length(sequence) for sequence in sequences] == [9, 3]
        context.forward([sequences[0]], [[1]])
        assert context.sample([None]) == [[]]

    @pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
    def test_as_from_the_logits(self, context: _native.Context, told: bool) -> None:
        """Whether forward() is told who will draw, so that a GPU brings only candidates, or not."""
        options: list[dict[str, Any]] = [
            {"temperature": 1.0, "top_k": 10, "seed": 3, "repeat_penalty": 1.2},
            {
                "temperature": 2.0,
                "top_k": 5,
                "seed": 4,
                "presence_penalty": 1.0,
                "logit_bias": {7: 3.0, 99: 9.0},
            },
            {"frequency_penalty": 0.5, "min_tokens": 20, "end_tokens": [1, 2, 3, 4, 5]},
        ]
        samplers, twins = ([_native.Sampler(**GREEDY | o) for o in options] for _ in range(2))
        sequences, others = ([context.new_sequence() for _ in options] for _ in range(2))
        fed = [[1], [5, 9], [7]]
        for n in range(30):
            prompts = [n == 0 and len(feed) > 1 for feed in fed]  # another order in the batch
            context.forward(others, fed, prompts)
            expected = [[twin.sample(context.logits(i)[0])] for i, twin in enumerate(twins)]
            context.forward(sequences, fed, prompts, samplers=samplers if told else [])
            assert context.sample(samplers) == expected
            fed = expected

    def test_masks(self, context: _native.Context) -> None:
        n_words = (N_VOCAB + 31) // 32
        masks = np.zeros((3, n_words), np.int32)
        masks[:, 0] = [1 << 5, 1 << 6, 1 << 9]
        sequences = [context.new_sequence() for _ in range(3)]
        context.forward(sequences, [[1, 5, 6], [1], [2, 3]], [], ["all", "last", "last"])
        free = context.sample([greedy(), greedy(), greedy()])
        found = context.sample([greedy(), None, greedy()], [masks, None, None])
        assert found == [[5, 6, 9], [], free[2]]
        assert context.sample([greedy()] * 3, [masks, masks[:1], None])[1] == [5]

    @pytest.mark.parametrize("shape", [(1, 2), (2, 1), (4, 2), (0, 0), (2, 3), (0, 2)])
    def test_masks_of_another_shape(self, context: _native.Context, shape: tuple[int, int]) -> None:
        context.forward([context.new_sequence()], [[1, 5]], [], ["all"])
        with pytest.raises(OptionError, match=r"found (shape \(|a mask of )\d.* expected "):
            context.sample([greedy()], [np.full(shape, -1, np.int32)])

    def test_what_does_not_fit(self, context: _native.Context) -> None:
        sequences = [context.new_sequence() for _ in range(2)]
        context.forward(sequences, [[1], [2]], [], ["last", "none"])
        with pytest.raises(OptionError, match=r"^1 samplers, expected one a feed: 2$"):
            context.sample([None])
        with pytest.raises(OptionError, match=r"^1 masks, expected one a feed: 2$"):
            context.sample([None, None], [None])
        with pytest.raises(
            OptionError, match=r"^feed 1: found a sampler, expected none: no logits of it were"
        ):
            context.sample([None, greedy()])

    def test_an_error_leaves_samplers_as_they_were(self, context: _native.Context) -> None:
        sequences = [context.new_sequence() for _ in range(3)]
        context.forward(sequences, [[1], [2], [3]])
        options = GREEDY | {"temperature": 1.0, "presence_penalty": 1.0, "seed": 9}
        samplers = [_native.Sampler(**options) for _ in range(3)]
        nothing = np.zeros((1, (N_VOCAB + 31) // 32), np.int32)
        with pytest.raises(OptionError, match="found no token to draw from"):
            context.sample(samplers, [None, None, nothing])
        assert [sampler.n_generated for sampler in samplers] == [0, 0, 0]
        assert [sampler.adjusted_tokens for sampler in samplers] == [[], [], []]
        expected = context.sample([_native.Sampler(**options) for _ in range(3)])
        assert context.sample(samplers) == expected

    def test_for_its_samplers_only(self, context: _native.Context) -> None:
        """On every device, although only a GPU then lacks the others' logits."""
        sampler, sequence = greedy(), context.new_sequence()
        context.forward([sequence], [[1]], samplers=[sampler])
        mask = np.full((1, (N_VOCAB + 31) // 32), -1, np.int32)
        for ask in (
            lambda: context.logits(0),
            lambda: context.log_probs(0, [1], 1),
            lambda: context.sample([sampler], [mask]),
        ):
            with pytest.raises(OptionError, match=r"^the batch's logits are for its samplers only"):
                ask()
        assert len(context.sample([sampler])[0]) == 1
        context.forward([sequence, context.new_sequence()], [[1], [1]], samplers=[sampler, None])
        assert context.logits(0).shape == (1, N_VOCAB)

    @pytest.mark.gpu
    def test_another_sampler(self, model: _native.Model) -> None:
        """One that needs what has not been brought is refused, not served with something else."""
        need_gpu()
        context = _native.Context(model, device="cuda", n_ctx=200, n_threads=2, kv_type="f32")
        sequence, sampler = context.new_sequence(), _native.Sampler(**GREEDY | {"repeat_penalty": 1.1})
        sampler.accept([1, 2])
        context.forward([sequence], [[1]], samplers=[sampler])
        for other in (
            _native.Sampler(**GREEDY | {"top_k": 30, "temperature": 1.0}),
            _native.Sampler(**GREEDY | {"temperature": 1.0}),
            _native.Sampler(**GREEDY | {"logit_bias": {3: 1.0}}),
        ):
            with pytest.raises(
                OptionError, match=r"^feed 0: expected its sampler as it was when the feed came$"
            ):
                context.sample([other])
        context.sample([greedy()])  # needs less
        sampler.accept([3])
        with pytest.raises(OptionError, match="as it was"):
            context.sample([sampler])


SPECULATIVE: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "top_k": 5, "seed": 1},
    {"temperature": 1.0, "seed": 2},
    {
        "temperature": 1.0,
        "top_k": 8,
        "seed": 3,
        "repeat_penalty": 1.3,
        "frequency_penalty": 0.3,
        "min_tokens": 9,
    }
    | {"end_tokens": [1, 2, 3], "logit_bias": {4: 1.0}},
]


class TestDrafts:
    """What is drawn with drafts is what is drawn without."""

    @staticmethod
    def one_by_one(context: _native.Context, options: dict[str, Any], n: int) -> list[int]:
        sampler, sequence, tokens = _native.Sampler(**GREEDY | options), context.new_sequence(), [1]
        sampler.accept([1])
        for _ in range(n):
            tokens += step(context, [sequence], [tokens[-1:]], [sampler])
        context.free_sequence(sequence)
        return tokens[1:]

    @pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
    @pytest.mark.parametrize("options", SPECULATIVE)
    def test_right_and_wrong_ones(
        self, context: _native.Context, options: dict[str, Any], told: bool
    ) -> None:
        n = 40
        expected = self.one_by_one(context, options, n)
        rng = np.random.default_rng(0)
        sampler, sequence, tokens = _native.Sampler(**GREEDY | options), context.new_sequence(), [1]
        sampler.accept([1])
        drawn_at_once = []
        while len(tokens) <= n:
            drafts = expected[len(tokens) - 1 :][: int(rng.integers(4))]
            n_right = int(rng.integers(len(drafts) + 1))
            drafts = drafts[:n_right] + [(token + 1) % N_VOCAB for token in drafts[n_right:]]
            context.forward([sequence], [[tokens[-1], *drafts]], [], ["all"], [sampler] if told else [])
            (drawn,) = context.sample([sampler])
            assert len(drawn) == n_right + 1
            context.truncate(sequence, context.length(sequence) - (len(drafts) - n_right))
            tokens += drawn
            drawn_at_once.append(len(drawn))
            assert context.length(sequence) == len(tokens) - 1
            assert sampler.n_generated == len(tokens) - 1
        assert tokens[1 : n + 1] == expected
        assert {1, 2} <= set(drawn_at_once)

    def test_beside_others(self, context: _native.Context) -> None:
        """One with drafts, one without, and a prompt whose logits nobody wants."""
        expected = [self.one_by_one(context, options, 4) for options in SPECULATIVE[:2]]
        samplers = [_native.Sampler(**GREEDY | options) for options in SPECULATIVE[:2]]
        for sampler in samplers:
            sampler.accept([1])
        sequences = [context.new_sequence() for _ in range(3)]
        context.forward(
            sequences,
            [[1, *expected[0][:3]], [1], [4, 5, 6]],
            [False, False, True],
            ["all", "last", "none"],
            [*samplers, None],
        )
        assert context.sample([*samplers, None]) == [expected[0][:4], expected[1][:1], []]


def test_rows_of(context: _native.Context) -> None:
    """A prompt's logits, a piece at a time, are those of the whole."""

    def pieces(*lengths: int) -> NDArray[np.float32]:
        sequence, out, at = context.new_sequence(), [], 0
        for length in lengths:
            out.append(all_logits(context, sequence, TOKENS[at : at + length]))
            at += length
        return np.concatenate(out)

    assert np.array_equal(pieces(70), pieces(1, 32, 31, 6))


def test_sequence_types(context: _native.Context) -> None:
    """Lists, tuples, and any other sequences of numbers."""
    sequences: Sequence[int] = (context.new_sequence(),)
    context.forward(sequences, ((1, 2),), (True,), ("all",), (None,))
    assert context.logits(0).shape == (2, N_VOCAB)
