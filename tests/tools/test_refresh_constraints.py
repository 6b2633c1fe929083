"""constraints.txt names a version of everything that pyproject.toml asks for."""

from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_one_version_of_each_requirement_that_it_allows(python: str) -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = chain(
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
    )
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pinned: dict[str, Requirement] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pinned.setdefault(canonicalize_name(pin.name), pin) is pin, line
    for requirement in map(Requirement, asked):
        [pin] = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement}: {pin}, refresh constraints.txt"
