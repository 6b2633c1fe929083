"""Runtime: generate, chat, and everything around them, on a small random model."""

import _thread
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configurations import BOS, EOS_IDS, VOCAB_SIZE
from converted import keys

from vptq_runtime import (
    FileError,
    Generation,
    OptionError,
    OutOfMemoryError,
    Runtime,
    UnsupportedError,
)

ChangedModel = Callable[[dict[str, dict[str, Any]]], Path]

PROMPTS = ["the quick brown fox", "", "a model", "jumps over the lazy dog " * 20, "é"]


def test_properties(runtime: Runtime, model: Path) -> None:
    assert runtime.device.startswith("cpu")
    assert (runtime.n_ctx, runtime.n_vocab) == (1024, VOCAB_SIZE)
    assert runtime.metadata["general.architecture"] == "llama"
    with pytest.raises(TypeError):
        runtime.metadata["general.architecture"] = "gpt"  # type: ignore[index]
    in_file = {name: value for name, value in keys(model).items() if not name.startswith("GGUF.")}
    assert dict(runtime.metadata) == in_file and len(runtime.metadata) == len(in_file)
    assert "general.nothing" not in runtime.metadata
    with pytest.raises(KeyError):
        runtime.metadata["general.nothing"]
    with Runtime(os.fspath(model), n_ctx=100, n_threads=1, kv_type="f32") as other:
        assert (other.n_ctx, other.n_ctx_train) == (100, 1024)
    with Runtime(model, n_ctx=0) as other:
        assert other.n_ctx == 1024


def test_repr(model: Path) -> None:
    with Runtime(model, n_ctx=50) as runtime:
        assert repr(runtime) == f"<Runtime '{model}' on {runtime.device}, n_ctx 50>"
    assert repr(runtime) == f"<Runtime '{model}' closed>"


def test_tokenize(runtime: Runtime) -> None:
    tokens = runtime.tokenize("the fox 🙂")
    assert tokens == [BOS, *runtime.tokenize("the fox 🙂", add_special=False)]
    assert runtime.detokenize(tokens) == "the fox 🙂"
    assert runtime.detokenize([]) == ""


def test_generation(runtime: Runtime) -> None:
    generation = runtime.generate("the quick", max_tokens=20, temperature=0)
    assert len(generation.tokens) == 20
    assert generation.finish_reason == "length"
    assert generation.text == runtime.detokenize(generation.tokens)
    timings = generation.timings
    assert timings.decode_tokens == 19
    assert min(timings.load_s, timings.prompt_s, timings.decode_s) > 0
    assert (
        runtime.generate(runtime.tokenize("the quick"), max_tokens=20, temperature=0).tokens
        == generation.tokens
    )


def test_greedy_takes_the_largest_logit(runtime: Runtime) -> None:
    prompt = runtime.tokenize("jumps over the lazy dog " * 20)  # in more than one chunk
    tokens = runtime.generate(prompt, max_tokens=5, temperature=0).tokens
    logits = runtime.logits(prompt + tokens)
    assert logits.shape == (len(prompt) + 5, VOCAB_SIZE)
    assert logits.dtype == np.float32
    assert logits[len(prompt) - 1 : -1].argmax(axis=1).tolist() == tokens


def test_the_seed_decides(runtime: Runtime) -> None:
    def tokens(seed: int | None) -> list[int]:
        return runtime.generate(
            "a", max_tokens=30, temperature=1.5, top_k=0, top_p=1, min_p=0, seed=seed
        ).tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)


def test_streamed_pieces_are_the_text(runtime: Runtime) -> None:
    whole = runtime.generate("the quick", max_tokens=100, temperature=1.5, top_k=0, seed=7, stop="lazy")
    stream = runtime.generate(
        "the quick", max_tokens=100, temperature=1.5, top_k=0, seed=7, stop="lazy", stream=True
    )
    with pytest.raises(OptionError, match="has not come to its end"):
        _ = stream.generation
    pieces = list(stream)
    assert len(pieces) > 20
    assert all(pieces)
    assert "".join(pieces) == whole.text == stream.generation.text
    assert stream.generation.tokens == whole.tokens


def test_a_closed_stream_has_what_there_is(runtime: Runtime) -> None:
    whole = runtime.generate("the quick", max_tokens=20, temperature=0)
    stream = runtime.generate("the quick", max_tokens=20, temperature=0, stream=True)
    stream.close()
    assert stream.generation.finish_reason is None
    assert stream.generation.tokens == whole.tokens[: len(stream.generation.tokens)]
    with runtime.generate("the quick", max_tokens=1000, temperature=0, stream=True) as stream:
        pieces = [next(stream) for _ in range(3)]
    generation = stream.generation  # it has gone on while it was read
    assert generation.text.startswith("".join(pieces)) and generation.finish_reason is None
    assert generation.tokens[:20] == whole.tokens[: len(generation.tokens)]
    assert generation.timings.decode_tokens == len(generation.tokens) - 1
    assert generation.timings.decode_s > 0


def places(runtime: Runtime) -> tuple[int, int]:
    """Requests that have a place in the context, and blocks of the KV cache that somebody needs."""
    stats = runtime.stats()
    return stats.n_running, stats.kv_blocks - stats.kv_blocks_free


def test_a_closed_stream_frees_its_place(runtime: Runtime) -> None:
    stream = runtime.generate("a", stream=True, max_tokens=None)
    next(stream)
    assert places(runtime)[0] == 1
    stream.close()
    assert places(runtime) == (0, 0)
    assert list(stream) == []
    with runtime.generate("a", stream=True, max_tokens=None) as stream:
        next(stream)
    assert places(runtime) == (0, 0)
    stream = runtime.generate("a", stream=True, max_tokens=None)
    next(stream)
    ended = stream._request.mailbox
    del stream
    assert ended.wait(30)
    assert places(runtime) == (0, 0)


def test_streams_take_turns(runtime: Runtime) -> None:
    def text(prompt: str) -> str:
        return runtime.generate(prompt, max_tokens=30, temperature=0).text

    streams = [runtime.generate(prompt, max_tokens=30, temperature=0, stream=True) for prompt in ("a", "the")]
    pieces: list[list[str]] = [[], []]
    for _ in range(30):
        for stream, got in zip(streams, pieces, strict=True):
            got.extend([next(stream, "")])
    assert ["".join(got) for got in pieces] == [text("a"), text("the")]


def test_batch_is_each_alone(runtime: Runtime) -> None:
    batch = runtime.generate(PROMPTS, max_tokens=40, temperature=0)
    for prompt, generation in zip(PROMPTS, batch, strict=True):
        alone = runtime.generate(prompt, max_tokens=40, temperature=0)
        assert (generation.text, generation.tokens) == (alone.text, alone.tokens)
        n_fed = generation.timings.prompt_tokens
        assert n_fed + generation.n_cached == max(len(runtime.tokenize(prompt)), 1)


def test_batch_larger_than_a_native_batch(runtime: Runtime) -> None:
    prompts = [[BOS, 10 + n % 300] for n in range(runtime._n_batch + 5)]
    batch = runtime.generate(prompts, max_tokens=3, temperature=0)
    assert len(batch) == len(prompts)
    for n in (0, runtime._n_batch - 1, runtime._n_batch, len(prompts) - 1):
        assert batch[n].tokens == runtime.generate(prompts[n], max_tokens=3, temperature=0).tokens


def test_prompts_of_a_batch_have_seeds_of_their_own(runtime: Runtime) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5, "top_k": 0, "seed": 3}
    first, second = runtime.generate(["a", "a"], **options)
    assert first.tokens != second.tokens
    assert [first.tokens, second.tokens] == [g.tokens for g in runtime.generate(["a", "a"], **options)]


@pytest.mark.parametrize("place", range(3))
def test_every_end_token_ends(runtime: Runtime, changed_model: ChangedModel, place: int) -> None:
    tokens = runtime.generate("the quick", max_tokens=12, temperature=0).tokens
    end = tokens[8]
    ids = list(EOS_IDS)
    ids[place] = end
    with Runtime(changed_model({"generation_config.json": {"eos_token_id": ids}})) as changed:
        generation = changed.generate("the quick", max_tokens=12, temperature=0)
        both = changed.generate(["the quick", "a"], max_tokens=12, temperature=0)
        streamed = "".join(changed.generate("the quick", max_tokens=12, temperature=0, stream=True))
    assert generation.tokens == tokens[: tokens.index(end)]
    assert generation.finish_reason == "stop"
    assert both[0].tokens == generation.tokens  # ended while the other went on
    assert len(both[1].tokens) > len(both[0].tokens)
    assert streamed == generation.text


def test_stop_strings(runtime: Runtime) -> None:
    text = runtime.generate("fox", max_tokens=60, temperature=0).text
    stop = text[20:23]
    generation = runtime.generate("fox", max_tokens=60, temperature=0, stop=["never", stop])
    assert generation.text == text[: text.index(stop)]
    assert generation.finish_reason == "stop"
    assert len(generation.tokens) < 60
    assert (
        "".join(runtime.generate("fox", max_tokens=60, temperature=0, stop=stop, stream=True))
        == generation.text
    )


def test_the_context_is_the_limit(model: Path) -> None:
    with Runtime(model, n_ctx=50) as runtime:
        generation = runtime.generate([BOS] * 40, max_tokens=None, temperature=0)
        assert (len(generation.tokens), generation.finish_reason) == (10, "length")
        assert len(runtime.generate([BOS] * 49, max_tokens=128).tokens) == 1
        for length in (50, 51, 5000):
            with pytest.raises(OptionError, match=f"found {length} tokens, expected at most 49: n_ctx is 50"):
                runtime.generate([BOS] * length)
            with pytest.raises(OptionError, match=f"found {length} tokens"):
                runtime.generate([BOS] * length, stream=True)
        assert runtime.logits([BOS] * 50).shape == (50, VOCAB_SIZE)
        with pytest.raises(OptionError, match="found 51 tokens, expected 1 to n_ctx = 50"):
            runtime.logits([BOS] * 51)


def test_a_text_that_cannot_fit_is_not_tokenized(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "tokenize", lambda *arguments: pytest.fail("tokenized"))
        with pytest.raises(
            OptionError, match="prompt: found 65537 characters, expected at most 65536: n_ctx is 1024"
        ):
            runtime.generate("a" * (1024 * 64 + 1))
    with pytest.raises(OptionError, match=r"prompt: found \d+ tokens, expected at most 1023"):
        runtime.generate("a" * 1024 * 64)


def test_no_memory_for_the_context(model: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="n_ctx"):
        Runtime(model, n_ctx=2**31 - 1)


def test_empty_prompts(runtime: Runtime, changed_model: ChangedModel) -> None:
    assert runtime.generate("", temperature=0).tokens == runtime.generate([BOS], temperature=0).tokens
    assert runtime.generate([], temperature=0).tokens == runtime.generate([BOS], temperature=0).tokens
    path = changed_model(
        {
            "config.json": {"bos_token_id": None},
            "generation_config.json": {"bos_token_id": None},
            "tokenizer_config.json": {"bos_token": None},
            "tokenizer.json": {"post_processor": None},
        }
    )
    with Runtime(path) as without_bos:
        assert without_bos.generate("a", max_tokens=1).tokens
        for empty in ("", []):
            with pytest.raises(OptionError, match="found no tokens"):
                without_bos.generate(empty)


@pytest.mark.parametrize(
    "prompt",
    [
        "a\ud800",
        [VOCAB_SIZE],
        [-1],
        [1.0],
        [True],
        [2**70],
        None,
        5,
        b"a",
        {"a": 1},
        ["a", None],
        ["a", ["b"]],
        [[[1]]],
        ["a", 1],
        np.array([1, 2]),
    ],
    ids=repr,
)
def test_bad_prompts(runtime: Runtime, prompt: Any) -> None:
    with pytest.raises(OptionError, match=r"^prompt(\[0\])?: found .*, expected") as error:
        runtime.generate(prompt)
    assert "\n" not in str(error.value)


def test_other_bad_arguments(runtime: Runtime) -> None:
    for call in (
        lambda: runtime.generate(["a", "b"], stream=True),  # type: ignore[call-overload]
        lambda: runtime.tokenize(5),  # type: ignore[arg-type]
        lambda: runtime.tokenize("\udfff"),
        lambda: runtime.detokenize([VOCAB_SIZE]),
        lambda: runtime.detokenize("a"),  # type: ignore[arg-type]
        lambda: runtime.logits([]),
        lambda: runtime.logits([-1]),
        lambda: runtime.generate("a", temperature=float("nan")),
    ):
        with pytest.raises(OptionError, match=r"found .*, expected"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"n_ctx": -1},
        {"n_ctx": 2**31},
        {"n_ctx": 1.5},
        {"n_threads": 0},
        {"n_threads": 10**9},
        {"kv_type": "f64"},
        {"kv_type": None},
        {"precision": "f16"},
        {"kv_tokens": 0},
        {"kv_tokens": 1000, "n_ctx": 1001},
        {"cache": "some"},
        {"cache": None},
        {"parallel": 0},
        {"parallel": 2000},
        {"queue": -1},
        {"gpu_layers": -1},
        {"gpu_layers": "all"},
        {"gpu_layers": 3, "device": "cpu"},
        {"device": "tpu"},
        {"device": None},
        {"device": "\udc80"},
        {"path": None},
        {"path": ""},
        {"path": "a\0b"},
        {"path": "a\udc80"},
    ],
    ids=repr,
)
def test_bad_options(model: Path, options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises((OptionError, UnsupportedError), match=name):
        Runtime(**{"path": model} | options)


def test_no_model_there(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(FileError, match=str(path)):
            Runtime(path)


def test_closed(model: Path) -> None:
    runtime = Runtime(model)
    stream = runtime.generate("a", stream=True, max_tokens=None)
    waiting = runtime.submit("b", max_tokens=None)
    next(stream)
    runtime.close()
    runtime.close()
    for call in (
        lambda: runtime.generate("a"),
        lambda: runtime.generate(["a", "b"]),
        lambda: runtime.generate("a", stream=True),
        lambda: runtime.submit("a"),
        lambda: runtime.chat([{"role": "user", "content": "a"}]),
        lambda: runtime.logits([BOS]),
        lambda: list(stream),
        stream.result,
        waiting.result,
        lambda: runtime.metadata,
        lambda: runtime.bos_token,
    ):
        with pytest.raises(OptionError, match="Runtime is closed"):
            call()
    assert runtime.stats().n_running == 0
    with pytest.raises(RuntimeError), Runtime(model) as runtime:
        raise RuntimeError
    with pytest.raises(OptionError, match="Runtime is closed"):
        runtime.generate("a")


def test_nobody_has_it_any_more(model: Path) -> None:
    """Its thread ends with it; a stream still needs it."""
    runtime = Runtime(model)
    stream = runtime.generate("a", stream=True, max_tokens=20, temperature=0)
    thread = runtime._engine._thread
    assert thread is not None
    del runtime
    assert len(stream.result().tokens) == 20
    assert thread.is_alive()
    del stream
    gc.collect()
    assert not thread.is_alive()


def test_ctrl_c_leaves_the_runtime_usable(model: Path) -> None:
    with Runtime(model, n_ctx=500_000) as runtime:
        before = runtime.generate("the quick", max_tokens=20, temperature=0).tokens
        for prompt in ("a", [20] * 300_000, ["a", "b", "c"]):  # decoding; the prompt is fed; several
            opened = threading.Event()
            threading.Thread(target=interrupt_when_open, args=(runtime, opened)).start()
            with pytest.raises(KeyboardInterrupt):
                try:
                    runtime.generate(prompt, max_tokens=None, temperature=0)
                finally:
                    opened.set()
            assert places(runtime) == (0, 0)
        assert runtime.generate("the quick", max_tokens=20, temperature=0).tokens == before


def interrupt_when_open(runtime: Runtime, ended: threading.Event) -> None:
    """Sends SIGINT once a request has been at work for a moment, that is, in the middle of a call."""
    while not ended.is_set() and places(runtime)[1] < 2:
        time.sleep(0.001)
    _thread.interrupt_main()


def test_threads_share_a_runtime(runtime: Runtime) -> None:
    prompts = ["a", "the", "fox", "dog"]
    alone = [runtime.generate(prompt, max_tokens=40, temperature=0).tokens for prompt in prompts]
    results: dict[str, Generation] = {}

    def generate(prompt: str) -> None:
        results[prompt] = runtime.generate(prompt, max_tokens=40, temperature=0)

    threads = [threading.Thread(target=generate, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[prompt].tokens for prompt in prompts] == alone


def test_chat_is_the_template_continued(runtime: Runtime) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the fox"}]
    prompt = "<|bos|>system: Be kind.<|end_of_turn|>\nuser: the fox<|end_of_turn|>\nassistant: "
    tokens = runtime.tokenize(prompt, add_special=False)
    assert runtime.chat_tokens(messages) == tokens
    assert tokens.count(BOS) == 1
    reply = runtime.chat(messages, max_tokens=20, temperature=0)
    assert reply.tokens == runtime.generate(tokens, max_tokens=20, temperature=0).tokens
    assert "".join(runtime.chat(messages, max_tokens=20, temperature=0, stream=True)) == reply.text


def test_chat_without_a_template(changed_model: ChangedModel) -> None:
    path = changed_model({"tokenizer_config.json": {"chat_template": None}})
    with Runtime(path) as runtime:
        with pytest.raises(UnsupportedError, match=r"the model has no chat template .* use generate"):
            runtime.chat([{"role": "user", "content": "a"}])
        assert runtime.generate("a", max_tokens=2).tokens
