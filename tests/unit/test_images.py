"""Images as PNG files lose nothing."""

import io

import numpy as np
import pytest
from PIL import Image

from kto_ray.images import to_png


@pytest.mark.parametrize("shape", [(3, 16, 24, 3), (1, 1, 1, 3), (2, 65, 7, 3)])
def test_png_loses_nothing(shape: tuple[int, ...]) -> None:
    shown = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    again = [np.asarray(Image.open(io.BytesIO(file), formats=["png"])) for file in to_png(shown)]
    np.testing.assert_array_equal(np.stack(again), shown)
