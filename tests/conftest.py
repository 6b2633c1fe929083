"""What a model runs on."""

import pytest
from gpu import need_gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda":
        need_gpu()
    return name
