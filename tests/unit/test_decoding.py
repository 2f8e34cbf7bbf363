"""Image files as they come: odd ones are read as they were meant, and what cannot be read says why."""

import contextlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kto_ray.offline.decoding import UnreadableError, bucket_of, buckets, decode, upright_size

WHITE, GRAY = (255, 255, 255), (128, 128, 128)
LEFT_RED = np.zeros((20, 40, 3), np.uint8)
LEFT_RED[:, :20, 0] = LEFT_RED[:, 20:, 2] = 255  # red, then blue


def file_of(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def picture() -> Image.Image:
    return Image.fromarray(LEFT_RED)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff", "avif"])
def test_formats_are_read_alike(kind: str) -> None:
    data = file_of(picture(), kind, **({"quality": 95} if kind in ("jpeg", "webp", "avif") else {}))
    assert upright_size(data) == (20, 40)
    decoded = decode(data, 20, 40, WHITE)
    assert decoded.shape == (20, 40, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded[:, :18].astype(int) - (255, 0, 0)).max() < 40
    assert np.abs(decoded[:, 22:].astype(int) - (0, 0, 255)).max() < 40


def test_lossless_images_of_the_right_size_stay_as_they_are() -> None:
    assert np.array_equal(decode(file_of(picture(), "png"), 20, 40, WHITE), LEFT_RED)


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_images_are_upright(orientation: int, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(picture(), "png", exif=exif)
    assert upright_size(data) == ((40, 20) if turned else (20, 40))
    decoded = decode(data, *upright_size(data), WHITE)
    first = decoded[0, 0].tolist()
    assert first == {1: [255, 0, 0], 3: [0, 0, 255], 6: [255, 0, 0], 8: [0, 0, 255]}[orientation]


def test_what_stands_over_is_cut_off_on_both_sides() -> None:
    decoded = decode(file_of(picture(), "png"), 20, 20, WHITE)
    assert np.array_equal(decoded, LEFT_RED[:, 10:30])


def with_alpha(mode: str) -> Image.Image:
    alpha = np.zeros((20, 40), np.uint8)
    alpha[:, :20] = 255
    image = picture().convert("LA" if mode == "LA" else "RGBA")
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_the_background(mode: str) -> None:
    decoded = decode(file_of(with_alpha(mode), "png"), 20, 40, GRAY)
    assert np.array_equal(decoded[:, 20:], np.broadcast_to(np.array(GRAY, np.uint8), (20, 20, 3)))
    assert not np.array_equal(decoded[0, 0], GRAY)


def test_a_transparent_colour_of_a_palette_shows_the_background() -> None:
    image = picture().quantize(2)
    image.info["transparency"] = image.getpixel((39, 0))
    decoded = decode(file_of(image, "png", transparency=image.getpixel((39, 0))), 20, 40, GRAY)
    assert decoded[0, 39].tolist() == list(GRAY)
    assert decoded[0, 0].tolist() == [255, 0, 0]


def test_cmyk_is_read_in_its_colours() -> None:
    decoded = decode(file_of(picture().convert("CMYK"), "jpeg", quality=95), 20, 40, WHITE)
    assert decoded[10, 5, 0] > 200
    assert decoded[10, 5, 2] < 60


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_become_8_and_are_not_cut_off(kind: str) -> None:
    ramp_HW = np.broadcast_to(np.linspace(0, 65535, 40).astype(np.uint16), (20, 40)).copy()
    decoded = decode(file_of(Image.fromarray(ramp_HW), kind), 20, 40, WHITE)
    assert np.abs(decoded[0, :, 0].astype(int) - np.linspace(0, 255, 40)).max() <= 1


def test_of_an_animation_the_first_frame_is_read() -> None:
    other = Image.new("RGB", (40, 20), (0, 255, 0))
    data = file_of(picture(), "gif", save_all=True, append_images=[other])
    assert decode(data, 20, 40, WHITE)[10, 5].tolist() == [255, 0, 0]


def huge_png(side: int) -> bytes:
    """A PNG that says it has side x side pixels, and has none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


UNREADABLE = {
    "the file is empty": lambda: b"",
    "is no image": lambda: b"<html>404</html>",
    "is HEIC": lambda: b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic",
    "more than 89 megapixels": lambda: huge_png(10000),
    "more than 89 megapixels; scale it down": lambda: huge_png(14143),  # 200 million
}


@pytest.mark.parametrize("reason", list(UNREADABLE))
@pytest.mark.parametrize("look", [upright_size, lambda data: decode(data, 8, 8, WHITE)])
def test_what_is_no_image_says_why(reason: str, look: Callable[[bytes], Any]) -> None:
    with pytest.raises(UnreadableError, match=reason):
        look(UNREADABLE[reason]())


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_a_truncated_file_is_no_image(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = file_of(Image.fromarray(noise), kind)
    with pytest.raises(UnreadableError):
        decode(data[: len(data) // 2], 64, 64, WHITE)


@given(cut=st.integers(0, 400), at=st.integers(0, 400), byte=st.integers(0, 255))
def test_damaged_bytes_are_an_image_or_a_reason(cut: int, at: int, byte: int) -> None:
    data = bytearray(file_of(picture(), "png"))
    data[at % len(data)] = byte
    with contextlib.suppress(UnreadableError):
        assert decode(bytes(data[: len(data) - cut % 3]), 8, 8, WHITE).shape == (8, 8, 3)


@pytest.mark.parametrize(("side", "multiple"), [(512, 8), (1024, 16), (64, 8), (768, 32)])
def test_buckets_have_about_the_area_of_the_models_size(side: int, multiple: int) -> None:
    sizes = buckets(side, side, multiple)
    assert (side, side) in sizes
    assert all(h % multiple == 0 == w % multiple and h * w <= side * side for h, w in sizes)
    assert all(max(size) <= 2 * min(size) for size in sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    assert bucket_of(3 * side, 3 * side, sizes) == (side, side)
    tall, wide = bucket_of(3000, 1800, sizes), bucket_of(1800, 3000, sizes)
    assert tall == wide[::-1]
    assert tall[0] > tall[1]
