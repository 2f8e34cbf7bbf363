"""Small pictures for grids, made when they are first looked at, and once: later askers get the same bytes."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from PIL import Image

from kto_ray.evaluate.albums import ImageStory
from kto_ray.samples import Pixels

EDGE = 192
"""Pixels of a thumbnail's longer edge: sharp in a grid on a phone's screen, too. A smaller image is left as it is."""
MOST_BYTES = 128 * 2**20
"""Of all that are kept; those that nobody looked at for longest go first. Tens of thousands, as a rule."""


class Thumbnails:
    """See the module. To be called from any thread."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._made: OrderedDict[str, Future[bytes]] = OrderedDict()
        self._bytes, self._most_bytes = 0, most_bytes
        self._lock = threading.Lock()

    def of(self, image: ImageStory, pixels: Callable[[], Pixels]) -> bytes:
        """A WebP file.

        Args:
            pixels: reads the image, uint8 RGB of shape (H, W, 3); what it raises is raised for all who wait.
        """
        place = image.record.place
        key = (place.pixels_digest if place else "") or f"{image.key} {image.record.id}"
        with self._lock:
            made = self._made.get(key)
            mine = made is None
            if made is None:
                made = self._made[key] = Future()
            self._made.move_to_end(key)
        if mine:
            try:
                made.set_result(to_webp(pixels()))
            except BaseException as error:
                with self._lock:
                    self._made.pop(key, None)  # who asks later tries again
                made.set_exception(error)
                raise
            self._count(len(made.result()))
        return made.result()

    def _count(self, more: int) -> None:
        with self._lock:
            self._bytes += more
            for key in list(self._made):
                if self._bytes <= self._most_bytes:
                    return
                if self._made[key].done():
                    self._bytes -= len(self._made.pop(key).result())


def to_webp(pixels_HWC: Pixels) -> bytes:
    """No larger than a thumbnail; lossless where it is not made smaller, so that drawings stay sharp."""
    image = Image.fromarray(pixels_HWC)
    small = max(image.size) <= EDGE
    image.thumbnail((EDGE, EDGE))
    file = io.BytesIO()
    image.save(file, "webp", lossless=small, quality=80, method=0 if small else 2)
    return file.getvalue()
