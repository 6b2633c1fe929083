"""Small tokenizers, with a token for each byte or letter, so that every split occurs; and a small model."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import read_tensors, write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS, EOS_IDS
from safetensors.torch import save_file
from tiny_bench import TINY
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from vptq_converter.convert import convert

from vptq_runtime import Runtime
from vptq_runtime.bench import machine
from vptq_runtime.bench.shapes import SHAPES

# Changes of a checkpoint's JSON files: file name -> entries to set.
Changes = Mapping[str, Mapping[str, Any]]


def byte_level_tokenizer() -> str:
    """As of Llama 3 and Qwen: 0 <s>, 1 </s>, 2 ... 257 one token for each byte, then a few words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"th": ("t", "h"), "the": ("th", "e"), "Ġthe": ("Ġ", "the")}
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(words.values())))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str()


def byte_fallback_tokenizer() -> str:
    """As of Llama 2 and Mistral 7B: letters, `<0x..>` for other bytes; ▁ is a space, also before a text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehot"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def byte_level() -> str:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def byte_fallback() -> str:
    return byte_fallback_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama. Greedy and top-k sampling never end its texts: its end tokens have a logit of 0."""
    directory = tmp_path_factory.mktemp("model") / "checkpoint"
    write_checkpoint(directory, ARCHITECTURES["llama"], CONFIGURATIONS["v8-k256-256"])
    tensors = read_tensors(directory)
    tensors["lm_head.weight"][list(EOS_IDS)] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Path:
    path = checkpoint.parent / "model.gguf"
    convert(checkpoint, path)
    return path


@pytest.fixture
def changed_model(checkpoint: Path, tmp_path: Path) -> Callable[[Changes], Path]:
    """Converts the checkpoint with changes of its JSON files."""

    def change(changes: Changes) -> Path:
        copy = tmp_path / "checkpoint"
        shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
        for name, entries in changes.items():
            old = json.loads((copy / name).read_text(encoding="utf-8"))
            (copy / name).write_text(json.dumps(old | dict(entries)), encoding="utf-8")
        convert(copy, tmp_path / "changed.gguf")
        return tmp_path / "changed.gguf"

    return change


@pytest.fixture(scope="module")
def runtime(model: Path) -> Iterator[Runtime]:
    with Runtime(model, device="cpu") as runtime:
        yield runtime


@pytest.fixture
def tiny_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """vptq-bench knows a tiny shape, and measures the memory's bandwidth in no time."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 20)
