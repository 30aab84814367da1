"""Image files looked at for a report: their size without decoding, and small copies of what can be decoded."""

from __future__ import annotations

import io
import os
from typing import NamedTuple

from PIL import Image, ImageFile, ImageOps

from vlmsft.data.encode import load_image

THUMBNAIL_SIDE = 160
TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""
ORIENTATION = 0x0112


class Picture(NamedTuple):
    """Size in pixels as training sees it (turned as EXIF says); `format` is Pillow's name."""

    width: int
    height: int
    format: str


def look(source: str | os.PathLike[str] | bytes, *, decode: bool) -> Picture:
    """Opens the image, and decodes it as training does where asked. Raises UserError, or what Pillow raises."""
    if decode:
        load_image(_file(source))
    with Image.open(_file(source)) as image:
        width, height = image.size
        if image.getexif().get(ORIENTATION) in TURNED:
            width, height = height, width
        return Picture(width, height, image.format or "?")


def _file(source: str | os.PathLike[str] | bytes) -> str | os.PathLike[str] | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def thumbnail(source: str | os.PathLike[str] | bytes) -> bytes | None:
    """A small JPEG of the image, or of the part of it that is there; None where nothing can be decoded."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        with Image.open(_file(source)) as image:
            image.draft("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
            out = io.BytesIO()
            ImageOps.exif_transpose(image).convert("RGB").save(out, "JPEG", quality=70)
            return out.getvalue()
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
