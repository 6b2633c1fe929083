"""What a vptq-run process holds: at most its file, the KV cache and 150 MiB."""

import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import pytest
from gguf import GGUFValueType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from vptq_converter.gguf_writer import write_gguf

from vptq_runtime.bench.shapes import Shape
from vptq_runtime.bench.synthetic import Quant, SyntheticModel

# As of an 8B Llama 3: 32 layers, each with 7 MiB of codebooks, and 128256 tokens. The rest is small.
SHAPE = Shape(32, 256, 1024, 4, 2, 128256, 8192, 5e5, head_dim=64)
N_PROMPT, N_NEW = 500, 12
REST = 150 << 20

RUN = """
import sys
from vptq_runtime.commands.run import main
status = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(peak, file=sys.stderr)
sys.exit(status)
"""


def large_tokenizer() -> tuple[str, list[str], list[str]]:
    """A tokenizer.json with a vocabulary of Llama 3's size; its tokens; its merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(letters, letters))
    triples = list(islice(product(letters, letters, letters), SHAPE.n_vocab - len(letters) - len(pairs)))
    tokens = ["".join(token) for token in (*letters, *pairs, *triples)]
    merges = [*pairs, *((a + b, c) for a, b, c in triples), *((a, b + c) for a, b, c in triples)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str(), tokens, [f"{left} {right}" for left, right in merges]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read the peak memory from")
def test_peak_memory(tmp_path: Path) -> None:
    model = SyntheticModel("large", SHAPE, Quant.parse("v8-k65536-256"), "q8_0", "q8_0")
    tensors = model.tensors(SHAPE.n_layer)
    tokenizer, tokens, merges = large_tokenizer()
    string, array = GGUFValueType.STRING, GGUFValueType.ARRAY
    keys = [
        *model.keys(SHAPE.n_layer),
        ("tokenizer.huggingface.json", tokenizer, string, None),
        ("tokenizer.ggml.tokens", tokens, array, string),
        ("tokenizer.ggml.merges", merges, array, string),
    ]
    path = tmp_path / "large.gguf"
    file_bytes = write_gguf(path, SHAPE.arch, keys, tensors)
    prompt = "~\n" * (N_PROMPT // 2)  # two tokens each
    done = subprocess.run(
        [sys.executable, "-c", RUN, *f"-m {path} -n {N_NEW} --device cpu -p".split(), prompt],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert f"prompt {N_PROMPT} tokens" in done.stderr and f"generated {N_NEW} tokens" in done.stderr
    peak = int(done.stderr.split("VmHWM:")[1].split()[0]) * 1024
    kv_bytes = 2 * SHAPE.n_layer * SHAPE.n_head_kv * SHAPE.head_dim * 2 * (N_PROMPT + N_NEW)
    assert peak > 0.9 * (file_bytes - tensors[0].nbytes)  # all but the embedding, of which two rows are read
    assert peak < file_bytes + kv_bytes + REST
