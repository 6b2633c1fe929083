"""How far numbers are from what they should be."""

import numpy as np
from numpy.typing import NDArray


def relative_l2(found: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    assert found.shape == expected.shape
    return float(np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected))
