"""Small dense models, made once, and text to calibrate them with. Not to be changed: copy them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_models import write_dense, write_text

torch.set_num_threads(1)  # these models are so small that threads only wait for each other


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the dense model of an architecture by its name in ARCHITECTURES."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write_dense(tmp_path_factory.mktemp("dense") / name, name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def model(dense_model: Callable[[str], Path]) -> Path:
    return dense_model("llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")
