"""Text files that users wrote."""

from pathlib import Path

from kto_ray.errors import UserError


def read_text(path: Path, what: str) -> str:
    """All of a UTF-8 file; see `decode`."""
    return decode(path.read_bytes(), what)


def decode(data: bytes, what: str) -> str:
    """UTF-8, with or without a byte order mark; every end of line becomes a line feed.

    Args:
        what: how messages begin, for instance "recipe mine.yaml".

    Raises:
        UserError: it is in another encoding.
    """
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text: {error}; save it as UTF-8") from error
    if "\0" in text:  # UTF-16 of which nothing at the beginning says so reads as UTF-8, too
        raise UserError(f"{what} is not UTF-8 text: it holds zero bytes; save it as UTF-8")
    return text
