"""Dense checkpoints in PyTorch, and which are refused."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from configurations import ARCHITECTURES, VOCAB_SIZE
from converted import change_json, change_tensors
from hostile_config import NESTED, NOT_NEEDED
from reference import Reference
from vptq_converter import architectures
from vptq_converter.convert import convert

from vptq_runtime import FileError, OptionError, OutOfMemoryError, Runtime, VPTQError, _native
from vptq_runtime.evaluate import DenseModel, dense_checkpoint

TOKENS = np.random.default_rng(0).integers(VOCAB_SIZE, size=300).tolist()


def write_dense(directory: Path, architecture: str) -> Path:
    """A random dense checkpoint."""
    write_checkpoint(directory, ARCHITECTURES[architecture], {})
    change_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense") / "checkpoint", "llama")


@pytest.mark.parametrize("architecture", ["llama", "llama3-new-spelling", "mistral-window", "qwen2-window"])
def test_pieces_are_the_logits_of_the_whole(architecture: str, tmp_path: Path) -> None:
    """Beyond a sliding window, too."""
    source = write_checkpoint(tmp_path / "source", ARCHITECTURES[architecture], {})
    whole = Reference(source).logits(TOKENS)
    model = DenseModel(write_dense(tmp_path / "dense", architecture))
    assert model.n_vocab == VOCAB_SIZE
    for first in (0, 1, 200, 299):
        pieces = list(model.logits_in_pieces(TOKENS, first=first))
        assert all(len(piece) % 128 == 0 for piece in pieces[:-1])
        logits = np.concatenate(pieces)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, whole[first:], rtol=0, atol=2e-4)


def test_it_reads_texts_as_the_runtime_does(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "dense.gguf")
    with Runtime(tmp_path / "dense.gguf", device="cpu") as runtime:
        for text in ("", "the quick brown fox\n", "\N{SNOWMAN}"):
            assert DenseModel(dense).tokenize(text) == runtime.tokenize(text)


def test_dtype(dense: Path) -> None:
    exact = np.concatenate(list(DenseModel(dense).logits_in_pieces(TOKENS)))
    rounded = np.concatenate(list(DenseModel(dense, dtype="bfloat16").logits_in_pieces(TOKENS)))
    assert rounded.dtype == np.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.1


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def set_config(**values: Any) -> Callable[[Path], object]:
    return lambda directory: change_json(directory / "config.json", lambda config: config.update(values))


def set_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], object]:
    return lambda directory: change_tensors(directory, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("config.json"), r"config\.json: cannot be read: No such file"),
        (remove("model.safetensors"), r"found no model\.safetensors"),
        (remove("tokenizer.json"), r"tokenizer\.json: cannot be read: No such file"),
        (lambda d: (d / "model.safetensors").write_bytes(b"PK\3\4"), "not a whole safetensors file"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json: content: found"),
        (set_config(quantization_config={"quant_method": "gptq"}), "expected dense weights"),
        (set_config(architectures=["GPT2LMHeadModel"]), "'GPT2LMHeadModel' is not supported"),
        (set_config(rope_parameters=NESTED), "transformers cannot load it: RecursionError"),
        (set_config(architectures="LlamaForCausalLM"), "architectures: found 'LlamaForCausalLM', expected"),
        (set_config(rms_norm_eps="small"), "transformers cannot load it: .*rms_norm_eps"),
        (set_config(num_attention_heads=0), "transformers cannot load it: ZeroDivisionError"),
        # Sizes that would fill the memory, or take for ever, if a model were made of them.
        (set_config(num_hidden_layers=10**9), "num_hidden_layers: found 1000000000, expected 2"),
        (set_config(num_hidden_layers=None), "num_hidden_layers: found None, expected 2"),
        (set_config(hidden_size=10**7), r"found \(.*100\), expected \(.*10000000\)"),
        (set_config(intermediate_size=10**12), r"mlp\.\w+\.weight: found \(.*\), expected .*1000000000000"),
        (set_config(vocab_size=10**12), r"weight: found \(\d+, 100\), expected \(1000000000000, 100\)"),
        (set_config(head_dim=10**8), r"self_attn\.\w+\.weight: found .*, expected .*00000000"),
        (
            set_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
            r"tensor model\.layers\.1\.mlp\.up_proj\.weight: found none, expected \(\d+, 100\)",
        ),
        (set_tensors(lambda t: t.pop("model.embed_tokens.weight")), r"found no matrix model\.embed_tokens"),
        (set_tensors(lambda t: t.update(extra=torch.ones(1))), r"tensor extra: found \(1,\), expected none"),
        (
            set_tensors(lambda t: t.update({"model.norm.weight": torch.ones(100, dtype=torch.int8)})),
            r"model\.norm\.weight: found I8, expected F16 or BF16 or F32",
        ),
        (
            set_config(tie_word_embeddings=True),
            r"lm_head\.weight: found other values than those of model\.embed_tokens\.weight",
        ),
        (
            set_tensors(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
            r"model\.norm\.weight: found \(3,\), expected \(100,\)",
        ),
    ],
)
def test_refused(dense: Path, tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    directory = shutil.copytree(dense, tmp_path / "changed")
    change(directory)
    with pytest.raises(VPTQError) as error:
        DenseModel(directory)
    assert str(error.value).startswith(str(directory))
    assert re.search(message, str(error.value))


@pytest.mark.parametrize(("key", "value"), NOT_NEEDED.items())
def test_keys_that_the_forward_pass_does_not_need(
    key: str, value: Any, dense: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are not looked at, whatever they say: architectures alone says which model it is."""
    expected = np.concatenate(list(DenseModel(dense).logits_in_pieces(TOKENS[:8])))
    directory = shutil.copytree(dense, tmp_path / "changed")
    set_config(**{key: value})(directory)
    capfd.readouterr()
    found = np.concatenate(list(DenseModel(directory).logits_in_pieces(TOKENS[:8])))
    np.testing.assert_array_equal(found, expected)
    assert capfd.readouterr().err == ""


def test_tied(dense: Path, tmp_path: Path) -> None:
    """With a second copy of the embedding as the output matrix, and without."""
    directory = shutil.copytree(dense, tmp_path / "tied")
    set_config(tie_word_embeddings=True)(directory)
    change_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    twice = np.concatenate(list(DenseModel(directory).logits_in_pieces(TOKENS[:8])))
    change_tensors(directory, lambda t: t.pop("lm_head.weight"))
    once = np.concatenate(list(DenseModel(directory).logits_in_pieces(TOKENS[:8])))
    np.testing.assert_array_equal(once, twice)
    assert np.abs(once - np.concatenate(list(DenseModel(dense).logits_in_pieces(TOKENS[:8])))).max() > 0.1


def test_shards(tmp_path: Path) -> None:
    """Of an index; one that leads out of the directory, or to no file, is refused."""
    whole = write_checkpoint(tmp_path / "whole", ARCHITECTURES["llama"], {})
    directory = write_checkpoint(tmp_path / "shards", ARCHITECTURES["llama"], {}, shards=3)
    change_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    logits = np.concatenate(list(DenseModel(directory).logits_in_pieces(TOKENS)))
    np.testing.assert_allclose(logits, Reference(whole).logits(TOKENS), rtol=0, atol=2e-4)
    for name, message in (
        ("../whole/model.safetensors", "found '../whole/model.safetensors', expected the name of a file"),
        ("..", "found something that is not a regular file"),
        ("nowhere.safetensors", r"nowhere\.safetensors: not a whole safetensors file: No such file"),
    ):
        index = directory / "model.safetensors.index.json"
        change_json(index, lambda values, name=name: values["weight_map"].update({"lm_head.weight": name}))
        with pytest.raises(FileError, match=message):
            DenseModel(directory)


def test_a_pipe_for_a_file(dense: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        directory = shutil.copytree(dense, tmp_path / name)
        (directory / name).unlink()
        os.mkfifo(directory / name)
        with pytest.raises(FileError, match=f"{name}: found something that is not a regular file"):
            DenseModel(directory)


def test_it_knows_what_the_converter_knows() -> None:
    assert set(dense_checkpoint.ARCHITECTURES) == set(architectures.ARCHITECTURES)


def test_code_in_a_checkpoint_is_not_run(dense: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(dense, tmp_path / "changed")
    (directory / "evil.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    classes = {"AutoConfig": "evil.LlamaConfig", "AutoModelForCausalLM": "evil.LlamaForCausalLM"}
    set_config(auto_map=classes)(directory)
    DenseModel(directory)
    assert not (directory / "evil.py.ran").exists()


def test_nan_weights(dense: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(dense, tmp_path / "changed")
    change_tensors(directory, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(torch.nan))
    with pytest.raises(VPTQError, match=f"{directory}: the logits are not finite"):
        list(DenseModel(directory).logits_in_pieces(TOKENS))


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(VPTQError, match="nowhere: found no directory, expected that of a dense checkpoint"):
        DenseModel(tmp_path / "nowhere")


def test_options_out_of_range(dense: Path) -> None:
    for option, value in (("device", "tpu"), ("dtype", "int8"), ("n_threads", 0)):
        with pytest.raises(OptionError, match=f"{option}: found {value!r}, expected"):
            DenseModel(dense, **{option: value})


def test_tokens_that_it_has_not(dense: Path) -> None:
    model = DenseModel(dense)
    for tokens, first, message in (
        ([], 0, "tokens: found none"),
        ([0, VOCAB_SIZE], 0, rf"tokens\[1\]: found {VOCAB_SIZE}"),
        ([-1], 0, r"tokens\[0\]: found -1"),
        ([0, 1], 2, "first: found 2"),
    ):
        with pytest.raises(OptionError, match=f"{message}, expected"):
            list(model.logits_in_pieces(tokens, first=first))


def test_too_little_memory(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "available_memory", lambda: 500_000)
    with pytest.raises(OutOfMemoryError, match=r"its weights take 0\.00 GiB, 0\.00 GiB are available"):
        DenseModel(dense)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["GPU", "CPU"],
)
def test_memory_that_ends_while_computing(
    error: RuntimeError, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DenseModel(dense)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(model, "_model", fail)
    monkeypatch.setattr(model._transformers, "DynamicCache", lambda config: None)
    monkeypatch.setattr(fail, "config", None, raising=False)
    with pytest.raises(OutOfMemoryError, match=f"{dense}: no memory to compute it: .*memory"):
        list(model.logits_in_pieces(TOKENS))


def test_without_pytorch(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "transformers"):
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, name, None)
            expected = re.escape('pip install "vptq-runtime[quantize]"')
            with pytest.raises(VPTQError, match=f"found no {name} .*{expected}"):
                DenseModel(dense)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(dense: Path) -> None:
    with pytest.raises(VPTQError, match="device cuda: PyTorch finds no GPU"):
        DenseModel(dense, device="cuda")
