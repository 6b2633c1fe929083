"""What is wrong with a model, a text or an option is said in one line, before the work where that can be."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from configurations import ARCHITECTURES, CONFIGURATIONS
from converted import change_json, change_tensors
from dense_models import SMALL, write_text
from hostile_config import NESTED, NOT_NEEDED
from vptq_converter.checkpoint import Checkpoint
from vptq_quantizer import QuantizeOptions, quantize
from vptq_quantizer.dense_model import DenseModel

from vptq_runtime import FileError, OptionError, UnsupportedError


@pytest.fixture
def model(dense_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(dense_model("llama"), tmp_path / "model"))


def refuse(model: Path, text: Path, error: type[Exception], match: str, **options: Any) -> None:
    """Nothing is written, either."""
    out = model.parent / "out"
    with pytest.raises(error, match=match):
        quantize(model, out, replace(SMALL, **options), calibration=[text])
    assert not (out / "config.json").exists()


def test_quantised_already(text: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", ARCHITECTURES["llama"], CONFIGURATIONS["v8-k256-256"])
    refuse(
        model,
        text,
        UnsupportedError,
        r"quantization_config: .* quantised already \('vptq'\), expected a dense",
    )


def test_an_architecture_that_is_not_supported(model: Path, text: Path) -> None:
    change_json(model / "config.json", lambda config: config.update(architectures=["GemmaForCausalLM"]))
    refuse(model, text, UnsupportedError, "'GemmaForCausalLM' is not supported, only LlamaForCausalLM")


@pytest.mark.parametrize(("key", "value"), NOT_NEEDED.items())
def test_keys_of_the_config_that_a_layer_does_not_need(
    key: str, value: Any, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change_json(model / "config.json", lambda config: config.update({key: value}))
    dense = DenseModel(Checkpoint(model), torch.device("cpu"))
    hidden = dense.embed(np.arange(8)[None])
    dense.advance(0, dense.load_layer(0), hidden)
    assert hidden.isfinite().all()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("rope_parameters", NESTED, r"config\.json: transformers cannot use it: RecursionError"),
        ("sliding_window", "a", r"config\.json: transformers cannot use it: .*sliding_window"),
        ("max_window_layers", "a", r"config\.json: transformers cannot use it: .*max_window_layers"),
    ],
)
def test_keys_that_it_needs(
    key: str, value: Any, match: str, dense_model: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    """Of Qwen2 with its window switched off, so that vptq-convert does not look at them."""
    model = Path(shutil.copytree(dense_model("qwen2"), tmp_path / "model"))
    change_json(model / "config.json", lambda config: config.update({"rope_scaling": None, key: value}))
    refuse(model, text, FileError, match)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, model: Path, text: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(model, lambda tensors: tensors[name][3].fill_(value))
    refuse(model, text, FileError, rf"tensor {name}: found a NaN or infinity, expected finite numbers")
    # What was finished before is there.
    assert [path.name for path in (model.parent / "out/.parts").glob("layer*")] == ["layer-00000.safetensors"]


def test_an_embedding_that_is_no_number(model: Path, text: Path) -> None:
    name = "model.embed_tokens.weight"
    change_tensors(model, lambda tensors: tensors[name].fill_(float("nan")))
    refuse(model, text, FileError, rf"tensor {name}: found a NaN or infinity")


def test_a_number_that_float16_cannot_hold(model: Path, text: Path) -> None:
    name = "model.norm.weight"

    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].float()
        tensors[name][0] = 1e6

    change_tensors(model, large)
    refuse(model, text, FileError, rf"tensor {name}: found a number beyond 65504")


@pytest.mark.parametrize(
    ("weight", "normalize", "found"),
    [
        (1e6, True, "deviations of its columns: found inf, expected numbers up to 65504"),
        (1e30, True, "deviations of its columns: found inf, expected numbers up to 65504"),
        (1e5, False, r"centroids: found inf, expected numbers up to 65504"),
        (1e30, False, r"weights: found 1e\+30, expected numbers up to 1e\+15"),
    ],
)
def test_a_weight_that_leaves_what_is_stored_infinite(
    weight: float, normalize: bool, found: str, model: Path, text: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].float()
        tensors[name][3, 5] = weight

    change_tensors(model, large)
    refuse(model, text, FileError, rf"^tensor {name}: {found}", normalize=normalize, res_centroids=0)


def test_a_missing_tensor(model: Path, text: Path) -> None:
    change_tensors(model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(model, text, FileError, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing")


def test_more_centroids_than_vectors(model: Path, text: Path) -> None:
    """k_proj has 20 rows of 100: 500 vectors of 4."""
    match = "--centroids: found 512, expected at most 256: a codebook of self_attn.k_proj .* 500 vectors"
    refuse(model, text, OptionError, match, centroids=512)
    refuse(model, text, OptionError, "--centroids: found 256, expected at most 128", centroids=256, groups=2)
    match = "--outlier-centroids: found 32, expected at most 8: .* 10 vectors"
    refuse(model, text, OptionError, match, outliers=2, outlier_centroids=32)


def test_vectors_longer_than_a_column(model: Path, text: Path) -> None:
    match = r"--vector-len: found 32, expected at most 20, the output rows of self_attn\.k_proj"
    refuse(model, text, OptionError, match, vector_len=32)


def test_groups_that_do_not_divide(model: Path, text: Path) -> None:
    match = r"k_proj: 100 input columns, 0 of them outliers: found --groups 3, expected a divisor of the rest"
    refuse(model, text, OptionError, match, groups=3)


def test_windows_longer_than_the_context(model: Path, text: Path) -> None:
    refuse(
        model,
        text,
        OptionError,
        "--seq-len: found 2048, expected at most the model's context, 1024",
        seq_len=2048,
    )


def test_layers_that_are_not_there(model: Path, text: Path) -> None:
    with pytest.raises(OptionError, match="--layers: found 1-2, expected layers from 0 to 1"):
        quantize(model, model.parent / "out", SMALL, calibration=[text], layers=(1, 2))


@pytest.mark.parametrize(
    ("device", "error", "match"),
    [
        ("tpu", OptionError, "--device: found tpu, expected cpu, cuda or cuda:N"),
        ("mps", OptionError, "--device: found mps, expected cpu, cuda or cuda:N"),
        ("cuda:99", UnsupportedError, "--device cuda:99: PyTorch finds [0-9]+ GPUs here"),
    ],
)
def test_devices(device: str, error: type[Exception], match: str, model: Path, text: Path) -> None:
    with pytest.raises(error, match=match):
        quantize(model, model.parent / "out", SMALL, calibration=[text], device=device)


def test_neither_text_nor_hessians(model: Path) -> None:
    with pytest.raises(OptionError, match="--calibration: found no text, and no Hessians of layer 0"):
        quantize(model, model.parent / "out", SMALL)
    with pytest.raises(OptionError, match="--end-to-end: found no --calibration, expected text to train on"):
        quantize(model, model.parent / "out", replace(SMALL, end_to_end=1))


def test_too_little_text_is_said_and_damped(model: Path, tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.txt", 20)
    warnings: list[str] = []
    report = quantize(model, tmp_path / "out", SMALL, calibration=[short], warn=warnings.append)
    assert report["finished"]
    windows, rank = warnings
    assert windows == "--calibration: found text for 1 window of 22 tokens, expected --samples 16"
    assert "tokens, expected at least 198, the inputs of the largest" in rank
    quantize(
        model,
        tmp_path / "enough",
        SMALL,
        calibration=[write_text(tmp_path / "long.txt")],
        warn=warnings.append,
    )
    assert len(warnings) == 2


@pytest.mark.parametrize(
    ("changes", "is_slow"),
    [
        ({"vector_len": 3}, True),
        ({"vector_len": 4}, False),
        ({"embedding_type": "v3-k16-0"}, True),
        ({"embedding_type": "v6-k16-0"}, False),
    ],
)
def test_a_vector_length_without_a_kernel_is_said(
    model: Path, tmp_path: Path, changes: dict[str, Any], is_slow: bool
) -> None:
    warnings: list[str] = []
    options = replace(SMALL, **changes)
    text = write_text(tmp_path / "text.txt")
    quantize(model, tmp_path / "out", options, calibration=[text], dry_run=True, warn=warnings.append)
    assert len(warnings) == is_slow
    for warning in warnings:
        assert warning.startswith("vector length: found 3, expected one of 2, 4, 6, 8, 12, 16: ")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("vector_len", 0, "--vector-len: found 0, expected an integer from 1 to 64"),
        ("vector_len", 8.0, "--vector-len: found 8.0, expected an integer"),
        ("centroids", 1, "--centroids: found 1, expected a power of two from 2 to 65536"),
        ("centroids", 1000, "--centroids: found 1000, expected a power of two"),
        ("centroids", 131072, "--centroids: found 131072, expected a power of two from 2 to 65536"),
        ("res_centroids", 3, r"--res-centroids: found 3, expected 0 \(none\) or a power of two"),
        ("groups", 0, "--groups: found 0, expected an integer from 1"),
        ("outliers", -1.0, "--outliers: found -1.0, expected a percentage from 0 to 50"),
        ("outliers", float("nan"), "--outliers: found nan"),
        ("outliers", "5", "--outliers: found 5, expected a percentage"),
        ("damping", None, "--damping: found None, expected a number above 0"),
        ("damping", 0.0, "--damping: found 0.0, expected a number above 0"),
        ("samples", 0, "--samples: found 0"),
        ("seq_len", 1, "--seq-len: found 1"),
        ("seed", -1, "--seed: found -1"),
    ],
)
def test_options_out_of_range(name: str, value: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        QuantizeOptions(**{name: value})


def test_a_residual_that_the_published_package_cannot_read() -> None:
    with pytest.raises(
        OptionError, match=r"--res-centroids: found 512, expected at most --centroids \(256\)"
    ):
        QuantizeOptions(centroids=256, res_centroids=512)


def test_without_torch(model: Path) -> None:
    """One line that says what to install; the rest of the package works without."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from vptq_quantizer.cli import main\n"
        f"sys.exit(main([{str(model)!r}, {str(model.parent / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("vptq-quantize: error: quantising needs torch")
        and done.stderr.count("\n") == 1
    )
    assert 'pip install "vptq-runtime[quantize]"' in done.stderr
