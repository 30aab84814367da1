"""Small copies of pictures for a page."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path

from PIL import Image, ImageOps

SIDE = 160
MOST_BYTES = 3 * 2**20
"""Of all pictures of a page together, as base64."""


class Pictures:
    """The pictures of a page, each once whatever number of runs has a copy of it.

    encoded: base64 JPEG files
    num_left_out: different pictures that went beyond MOST_BYTES
    """

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.encoded: list[str] = []
        self._most_bytes = most_bytes
        self._places: dict[str, int | None] = {}
        self._left_out: set[str] = set()

    @property
    def num_left_out(self) -> int:
        return len(self._left_out)

    def add(self, path: str) -> int | None:
        """Its place in `encoded`; None where it can't be read or is left out."""
        try:
            content = Path(path).read_bytes()
        except OSError:
            return None
        key = hashlib.sha256(content).hexdigest()
        if key not in self._places:
            self._places[key] = self._add(content, key)
        return self._places[key]

    def _add(self, content: bytes, key: str) -> int | None:
        small = thumbnail(content)
        if small is None:
            return None
        text = base64.b64encode(small).decode()
        if sum(map(len, self.encoded)) + len(text) > self._most_bytes:
            self._left_out.add(key)
            return None
        self.encoded.append(text)
        return len(self.encoded) - 1


def thumbnail(content: bytes) -> bytes | None:
    """A JPEG of at most SIDE pixels a side; None where the file is no picture that Pillow reads."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.thumbnail((SIDE, SIDE))
            out = io.BytesIO()
            ImageOps.exif_transpose(image).convert("RGB").save(out, "JPEG", quality=70, optimize=True)
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        return None
    return out.getvalue()
