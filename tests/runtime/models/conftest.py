"""A hub on this machine, and a cache of the test's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stub import HubStub
from huggingface_hub import constants


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in which vptq_runtime looks; it is not made before it is needed."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("VPTQ_CACHE", str(directory))
    monkeypatch.chdir(tmp_path)  # where no path looks like a repository
    return directory


@pytest.fixture
def hub(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """The hub that huggingface_hub talks to, here and in the commands that a test starts."""
    with HubStub() as stub:
        monkeypatch.setenv("HF_ENDPOINT", stub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "ENDPOINT", stub.endpoint)  # it has read the environment already
        template = stub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        yield stub


@pytest.fixture
def told() -> list[str]:
    """What was said: give its append as `tell`."""
    return []
