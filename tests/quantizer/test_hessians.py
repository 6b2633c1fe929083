"""The dense model, layer by layer, is transformers' model; its Hessians are those of its inputs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from configurations import ARCHITECTURES
from converted import change_tensors
from dense_models import SEQ_LEN
from torch import Tensor
from transformers import AutoModelForCausalLM
from vptq_converter.checkpoint import Checkpoint
from vptq_quantizer.calibration.hessians import HESSIAN_OF, collect, model_key
from vptq_quantizer.calibration.text import read_calibration
from vptq_quantizer.dense_model import DenseModel, linears

from vptq_runtime import FileError, OptionError


def open_model(directory: Path) -> DenseModel:
    return DenseModel(Checkpoint(directory), torch.device("cpu"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_and_hessians_are_transformers(
    name: str, dense_model: Callable[[str], Path], text: Path
) -> None:
    directory = dense_model(name)
    dense = open_model(directory)
    windows = read_calibration(dense.checkpoint, dense.n_vocab, [text], 5, SEQ_LEN, 0).windows
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    inputs: dict[str, Tensor] = {}
    for n, layer in enumerate(model.model.layers):
        for path, linear in linears(layer).items():
            key = f"{n}.{path}"
            linear.register_forward_pre_hook(lambda _, args, key=key: inputs.update({key: args[0]}))
    with torch.inference_mode():
        states = model(input_ids=torch.from_numpy(windows), output_hidden_states=True).hidden_states

    hidden = dense.embed(windows)
    torch.testing.assert_close(hidden, states[0])
    for n in range(dense.n_layers):
        hessians = collect(dense, n, dense.load_layer(n), hidden)
        for path, of in HESSIAN_OF.items():
            x = inputs[f"{n}.{path}"].flatten(0, 1).double()
            expected = 2 * x.T @ x / len(x)
            error = (hessians[of] - expected).norm() / expected.norm()
            assert error < 1e-4, f"layer {n}, {path}: relative error {error:.1e}"
    # transformers puts the final norm on the last one.
    with torch.inference_mode():
        torch.testing.assert_close(model.model.norm(hidden), states[-1], rtol=1e-3, atol=1e-4)


def test_windows_do_not_overlap_and_depend_on_the_seed(
    dense_model: Callable[[str], Path], text: Path
) -> None:
    dense = open_model(dense_model("llama"))

    def read(samples: int, seed: int) -> Tensor:
        calibration = read_calibration(dense.checkpoint, dense.n_vocab, [text], samples, SEQ_LEN, seed)
        return torch.from_numpy(calibration.windows)

    everything = read(10**6, 0)
    assert everything.shape[0] * SEQ_LEN > 2900  # all that there is
    first, again, other = read(6, 1), read(6, 1), read(6, 2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    places = [int((everything == window).all(1).nonzero()[0, 0]) for window in first]
    assert places == sorted(set(places))


def test_a_text_shorter_than_a_window_is_one_window(
    dense_model: Callable[[str], Path], tmp_path: Path
) -> None:
    dense = open_model(dense_model("llama"))
    (tmp_path / "short.txt").write_text("the quick brown fox")
    windows = read_calibration(dense.checkpoint, dense.n_vocab, [tmp_path / "short.txt"], 8, 512, 0).windows
    assert windows.shape[0] == 1 and 2 <= windows.shape[1] < 40
    assert windows[0, 0] == 0  # <|bos|>, as before a prompt


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"\xff", "is not UTF-8")])
def test_text_that_cannot_be_read(
    content: bytes | None, message: str, dense_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    dense = open_model(dense_model("llama"))
    with pytest.raises(FileError, match=rf"text\.txt: .*{message}"):
        read_calibration(dense.checkpoint, dense.n_vocab, [path], 8, 64, 0)


def test_empty_text(dense_model: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    dense = open_model(dense_model("llama"))
    with pytest.raises(OptionError, match=r"--calibration: found 1 tokens in .*text\.txt, expected text"):
        read_calibration(dense.checkpoint, dense.n_vocab, [tmp_path / "text.txt"], 8, 64, 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn])
def test_a_model_is_named_whatever_types_its_unused_tensors_have(
    dtype: torch.dtype, dense_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(dense_model("llama"), tmp_path / "model"))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(model, lambda tensors: tensors.update({name: torch.ones(5).to(dtype)}))
    ones = model_key(Checkpoint(model))
    change_tensors(model, lambda tensors: tensors.update({name: torch.zeros(5).to(dtype)}))
    assert model_key(Checkpoint(model)) != ones
