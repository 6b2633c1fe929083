"""A dense checkpoint, run by transformers: what a quantised model is compared with."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vptq_runtime import _native
from vptq_runtime.checks import check_choice, check_int
from vptq_runtime.errors import FileError, OptionError, OutOfMemoryError, UnsupportedError, VPTQError
from vptq_runtime.evaluate.dense_checkpoint import EMBEDDING, OUTPUT, DenseCheckpoint
from vptq_runtime.text.tokenizer import Tokenizer

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a weight
PIECE = 128  # tokens fed at once
# Of a config.json, what a forward pass depends on. transformers sees nothing else of it: other keys are
# another's affair, and some would make it fill the memory (num_labels) or read other keys (attribute_map).
CONFIG_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "original_max_position_embeddings"),
    *("rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
    *("sliding_window", "use_sliding_window", "max_window_layers"),
)


class DenseModel:
    """A dense model of an architecture that vptq-convert knows: a directory in the Hugging Face layout, or a
    GGUF file of llama.cpp.

    device: "cpu" or "cuda".
    dtype: what its weights become, and what PyTorch computes in: "float32", "bfloat16" or "float16".
    n_threads: PyTorch's, of the whole process; None leaves them as they are.

    Code that came with a checkpoint is never run. Raises FileError (missing, damaged, contradictory,
    quantised), UnsupportedError (architecture, no GPU, no PyTorch), OptionError, OutOfMemoryError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        n_threads: int | None = None,
    ) -> None:
        check_choice("device", device, ("cpu", "cuda"))
        check_choice("dtype", dtype, list(DTYPES))
        if n_threads is not None:
            check_int("n_threads", n_threads, 1, 1024)
        self._path = Path(path)
        checkpoint = _open(self._path)
        self.n_vocab = checkpoint.n_vocab
        self._tokenizer = Tokenizer(checkpoint.tokenizer_json(), self.n_vocab, str(checkpoint.tokenizer))
        self._torch, self._transformers = _library("torch"), _library("transformers")
        self._device = device
        self._check_memory(checkpoint.n_weights * DTYPES[dtype])
        if n_threads is not None:
            self._torch.set_num_threads(n_threads)
        self._model = self._load(dtype, checkpoint)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with BOS where the tokenizer adds it."""
        return self._tokenizer.encode(text, add_special=True)

    def logits_in_pieces(self, tokens: Sequence[int], *, first: int = 0) -> Generator[NDArray[np.float32]]:
        """Logits of the token after each of tokens[first:], some n tokens at a time: float32 (n, n_vocab).

        Raises OptionError for no tokens and for those that the model has not, FileError where the logits are
        not finite.
        """
        if not tokens:
            raise OptionError("tokens: found none, expected at least one")
        check_int("first", first, 0, len(tokens) - 1)
        for index, token in enumerate(tokens):
            check_int(f"tokens[{index}]", token, 0, self.n_vocab - 1)
        cache = self._transformers.DynamicCache(config=self._model.config)
        starts = [*range(0, first, PIECE), *range(first, len(tokens), PIECE)]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            piece = self._torch.tensor([list(tokens[start:end])], device=self._device)
            wanted = start >= first
            with self._torch.inference_mode(), self._errors("compute"):
                # The cache is the fourth argument, behind mask and positions: its name differs by version.
                # logits_to_keep: 0 is all; what is only fed computes the last one's.
                logits = self._model(
                    piece, None, None, cache, use_cache=True, logits_to_keep=0 if wanted else 1
                ).logits[0]
            if wanted:
                values: NDArray[np.float32] = logits.float().cpu().numpy()
                if not np.isfinite(values).all():
                    found = "the logits are not finite: some weights are NaN, infinite or too large"
                    raise FileError(f"{self._path}: {found}")
                yield values

    def _check_memory(self, needed: int) -> None:
        if self._device == "cpu":
            available = _native.available_memory()
        elif self._torch.cuda.is_available():
            available = self._torch.cuda.mem_get_info()[0]
        else:
            raise UnsupportedError("device cuda: PyTorch finds no GPU, expected one, or the device cpu")
        if needed > available:
            gib = f"its weights take {needed / 2**30:.2f} GiB, {available / 2**30:.2f} GiB are available"
            less = "in bfloat16 they take 2 bytes each; vptq-convert makes a file of them, which is mapped"
            raise OutOfMemoryError(f"{self._path}: {gib}; {less}")

    def _load(self, dtype: str, checkpoint: DenseCheckpoint) -> Any:
        torch = self._torch
        with self._errors("load"), quiet(self._transformers):
            causal_class, config = class_and_config(self._transformers, checkpoint.config)
            with torch.device("meta"):  # nothing is allocated by what a config says
                model = causal_class(config)
            expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            tied = config.tie_word_embeddings
            if tied and OUTPUT not in checkpoint.shapes:
                del expected[OUTPUT]
            checkpoint.check_shapes(expected)
            weights = {
                name: tensor.to(getattr(torch, dtype)) for name, tensor in checkpoint.tensors(self._device)
            }
            if tied and not torch.equal(weights.setdefault(OUTPUT, weights[EMBEDDING]), weights[EMBEDDING]):
                found = f"found other values than those of {EMBEDDING}"
                raise FileError(f"{self._path}: {OUTPUT}: {found}, expected the same: they are tied")
            model.load_state_dict(weights, strict=True, assign=True)
            model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no file
            return model.eval().to(self._device)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except VPTQError:
            raise
        except Exception as error:  # the library's, PyTorch's, the system's: no common base
            if is_out_of_memory(error):
                raise OutOfMemoryError(f"{self._path}: no memory to {what} it: {error}") from None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FileError(f"{self._path}: transformers cannot {what} it: {reason}") from None


def _open(path: Path) -> DenseCheckpoint:
    if path.is_dir():
        return DenseCheckpoint.open(path)
    if not path.is_file() or path.suffix != ".gguf":
        raise FileError(
            f"{path}: found no directory, expected that of a dense checkpoint, or a dense GGUF file"
        )
    from vptq_runtime.evaluate.dense_gguf import DenseGguf  # the converter is slow to import

    return DenseGguf.open(path)


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is PyTorch's way to say that memory is short, on the CPU or a GPU: RuntimeErrors."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def class_and_config(transformers: Any, values: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' class that a config.json names, one of ARCHITECTURES, and its config of CONFIG_KEYS.

    Raises whatever transformers does for what is wrong with those: no common base.
    """
    causal_class = getattr(transformers, values["architectures"][0])
    kept = {key: copy.deepcopy(values[key]) for key in CONFIG_KEYS if key in values}
    return causal_class, causal_class.config_class(**kept)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        expected = 'expected it installed: pip install "vptq-runtime[quantize]"'
        raise UnsupportedError(f"dense checkpoint: found no {name} ({error}), {expected}") from None


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without its progress bar and its warnings."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
