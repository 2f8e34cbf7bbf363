"""The figures of pictures, against PIL, colorsys and scipy, and at the ends of their ranges."""

import colorsys

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy.spatial.distance import pdist
from scipy.stats import entropy

from kto_ray.pictures import picture_figures

Pixels = npt.NDArray[np.uint8]
SIZES = [(8, 8), (16, 24), (9, 8), (13, 21), (15, 100)]


def photos(count: int, height: int, width: int, seed: int = 0) -> Pixels:
    """Smooth colours with grain and black corners: edges, flat parts and all hues."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
        image = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        image = np.clip(image + rng.integers(-20, 21, image.shape), 0, 255).astype(np.uint8)
        image[:3, :3] = 0
        images.append(image)
    return np.stack(images)


def flat(*colors: tuple[int, int, int]) -> Pixels:
    return np.stack([np.full((11, 14, 3), color, np.uint8) for color in colors])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_brightness_is_pil_s(height: int, width: int) -> None:
    pixels = photos(3, height, width)
    lumas = [np.asarray(Image.fromarray(image).convert("L")).mean() / 255 for image in pixels]
    assert picture_figures(pixels)["pictures/brightness"] == pytest.approx(np.mean(lumas), abs=0.5 / 255)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_saturation_is_colorsys_s(height: int, width: int) -> None:
    pixels = photos(2, height, width)
    saturations = [colorsys.rgb_to_hsv(*(pixel / 255))[1] for pixel in pixels.reshape(-1, 3)]
    assert picture_figures(pixels)["pictures/saturation"] == pytest.approx(np.mean(saturations))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_color_entropy_is_scipy_s(height: int, width: int) -> None:
    pixels = photos(3, height, width)
    histograms = [np.histogramdd(image.reshape(-1, 3), bins=4, range=[(0, 256)] * 3)[0] for image in pixels]
    expected = np.mean([entropy(histogram.ravel(), base=2) for histogram in histograms])
    assert picture_figures(pixels)["pictures/color_entropy"] == pytest.approx(expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_edges_are_counted_pixel_by_pixel(height: int, width: int) -> None:
    (image,) = photos(1, height, width)
    luma = [[299 * int(r) + 587 * int(g) + 114 * int(b) for r, g, b in row] for row in image]
    edges = 0
    for y in range(height):
        for x in range(width):
            neighbours = [luma[b][a] for a, b in ((x + 1, y), (x, y + 1)) if a < width and b < height]
            edges += any(abs(luma[y][x] - neighbour) > 25_500 for neighbour in neighbours)
    assert 0 < edges < height * width
    assert picture_figures(image[None])["pictures/edge_density"] == pytest.approx(edges / (height * width))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (64, 64)])
def test_diversity_is_scipy_s_distance_of_pil_s_thumbnails(height: int, width: int) -> None:
    pixels = photos(6, height, width)
    # PIL reduces one float channel at a time without rounding.
    thumbnails = [
        np.stack(
            [Image.fromarray(c.astype(np.float32)).reduce((width // 8, height // 8)) for c in np.moveaxis(i, -1, 0)]
        )
        for i in pixels
    ]
    rows = np.stack(thumbnails).reshape(6, -1).astype(np.float64) / 255
    assert rows.shape == (6, 192)
    expected = pdist(rows).mean() / np.sqrt(192)
    assert picture_figures(pixels)["pictures/diversity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("height", "width"), [(9, 8), (13, 21), (15, 100)])
def test_cells_of_odd_sizes_hold_every_pixel_once(height: int, width: int) -> None:
    pixels = photos(2, height, width)
    rows, columns = (np.floor(np.arange(9) * size / 8).astype(int) for size in (height, width))
    cells = [
        pixels[:, rows[y] : rows[y + 1], columns[x] : columns[x + 1]].mean(axis=(1, 2)) / 255
        for y in range(8)
        for x in range(8)
    ]
    first, second = np.stack(cells, axis=1)
    expected = np.sqrt(np.mean((first - second) ** 2))
    assert picture_figures(pixels)["pictures/diversity"] == pytest.approx(expected, rel=1e-5)


def test_the_ends_of_the_ranges() -> None:
    assert picture_figures(flat((0, 0, 0), (255, 255, 255))) == {
        "pictures/edge_density": 0,
        "pictures/color_entropy": 0,
        "pictures/brightness": pytest.approx(0.5),
        "pictures/saturation": 0,
        "pictures/diversity": 1,
    }
    assert picture_figures(flat((255, 0, 0), (0, 0, 255)))["pictures/saturation"] == 1
    assert picture_figures(flat((9, 80, 200), (9, 80, 200)))["pictures/diversity"] == 0
    levels = np.arange(0, 256, 64, dtype=np.uint8)
    every_bin = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, 8, 8, 3)
    assert picture_figures(every_bin)["pictures/color_entropy"] == pytest.approx(6)
    checkers = np.where(np.indices((20, 20)).sum(0)[None, ..., None] % 2, 255, 0).astype(np.uint8).repeat(3, axis=-1)
    assert picture_figures(checkers)["pictures/edge_density"] == 399 / 400  # the last pixel has no neighbour left


def test_sets_of_images_are_told_apart() -> None:
    varied = photos(8, 32, 32)
    collapsed = np.repeat(varied[:1], 8, axis=0)
    noise = np.random.default_rng(1).integers(0, 256, varied.shape, np.uint8)
    gray = np.repeat(varied.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    ours = picture_figures(varied)
    assert picture_figures(collapsed)["pictures/diversity"] == 0 < ours["pictures/diversity"]
    assert picture_figures(noise)["pictures/edge_density"] > ours["pictures/edge_density"]
    assert picture_figures(noise)["pictures/color_entropy"] > ours["pictures/color_entropy"]
    assert picture_figures(gray)["pictures/saturation"] == 0 < ours["pictures/saturation"]


def test_a_set_has_the_mean_of_its_images() -> None:
    pixels = photos(5, 12, 17)
    single = [picture_figures(image[None]) for image in pixels]
    together = picture_figures(pixels)
    assert set(together) - set(single[0]) == {"pictures/diversity"}  # one image is not diverse, nor is it not
    for name, value in single[0].items():
        assert together[name] == pytest.approx(np.mean([figures[name] for figures in single])), name
        assert isinstance(value, float)


def test_views_are_read_and_left_as_they_are() -> None:
    pixels = photos(3, 16, 16)
    flipped = pixels[:, ::-1, ::-1]
    flipped.flags.writeable = False
    assert picture_figures(flipped) == picture_figures(flipped.copy())
    assert (pixels == photos(3, 16, 16)).all()


@pytest.mark.parametrize(
    ("pixels", "problem"),
    [
        (np.zeros((2, 16, 16, 3), np.float32), "float32"),
        (np.zeros((16, 16, 3), np.uint8), r"\(16, 16, 3\)"),
        (np.zeros((2, 16, 16, 4), np.uint8), "4"),
        (np.zeros((0, 16, 16, 3), np.uint8), "at least one"),
        (np.zeros((2, 16, 7, 3), np.uint8), r"8x8 .*\(16, 7\)"),
    ],
)
def test_what_is_no_set_of_images_is_refused(pixels: Pixels, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        picture_figures(pixels)
