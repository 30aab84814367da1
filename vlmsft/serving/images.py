"""The images of a request: data:, http(s): and file: URLs, each within the limits that the server was started with."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import os
import socket
import stat
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import httpx
from PIL import Image, ImageOps

from vlmsft.serving.api_error import invalid

MIB = 2**20
REDIRECTS = (301, 302, 303, 307, 308)
MAX_REDIRECTS = 3
USER_AGENT = "vlmsft"


@dataclass(frozen=True)
class ImageLimits:
    """What images may be and where they may come from.

    max_images: of a request
    max_image_bytes: of a file, as it is sent or fetched
    max_image_pixels: width x height; a small file can unpack to gigabytes
    fetch_timeout_seconds: for all of an http(s) image, redirects included; 0 = no http(s) images
    allow_private_addresses: whether http(s) may reach this machine and its network
    image_root: file: URLs are read below this folder; None = none are
    """

    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    fetch_timeout_seconds: float
    allow_private_addresses: bool
    image_root: Path | None


async def load_images(urls: tuple[tuple[str, str], ...], limits: ImageLimits) -> list[Image.Image]:
    """The pictures, turned as their EXIF says, in order. Raises ApiError (400) naming the part that is wrong.

    urls: (where it stands in the request, URL)
    """
    if len(urls) > limits.max_images:
        where = urls[limits.max_images][0]
        raise invalid(f"{len(urls)} images; this server takes {limits.max_images} in a request", where)
    return list(await asyncio.gather(*(_load(where, url, limits) for where, url in urls)))


async def _load(where: str, url: str, limits: ImageLimits) -> Image.Image:
    try:
        data = await _read(url, limits)
        return await asyncio.to_thread(_decode, data, limits)
    except _Refused as refused:
        raise invalid(f"{where}: {refused}", where, "invalid_image") from None


class _Refused(Exception):
    """Why an image isn't taken."""


async def _read(url: str, limits: ImageLimits) -> bytes:
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        return _read_data(url, limits)
    if scheme == "file":
        return await asyncio.to_thread(_read_file, url, limits)
    if scheme in ("http", "https"):
        return await _fetch(url, limits)
    raise _Refused("the URL must begin with data:, http:, https: or file:")


def _read_data(url: str, limits: ImageLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise _Refused("a data URL must look like data:image/jpeg;base64,...")
    if len(payload) * 3 // 4 > limits.max_image_bytes + 2:
        raise _too_large(limits)
    try:
        return base64.b64decode(urllib.parse.unquote(payload), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Refused(f"what stands after 'base64,' is not base64 ({error})") from None


def _read_file(url: str, limits: ImageLimits) -> bytes:
    if limits.image_root is None:
        raise _Refused("file: URLs are off: the server was started without image_root")
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise _Refused("a file: URL names no host: file:///folder/photo.jpg")
    outside = _Refused("no readable file below the server's image_root")  # the same for all: tells nothing of the rest
    try:
        root = limits.image_root.resolve(strict=True)
        path = Path(urllib.parse.unquote(parts.path)).resolve(strict=True)
        if not path.is_relative_to(root):
            raise outside
        # A pipe would block here for ever, and the last part may have become a link since it was resolved
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (OSError, ValueError, RuntimeError):
        raise outside from None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise outside
        if facts.st_size > limits.max_image_bytes:
            raise _too_large(limits)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limits.max_image_bytes)
    finally:
        os.close(descriptor)


async def _fetch(url: str, limits: ImageLimits) -> bytes:
    if limits.fetch_timeout_seconds == 0:
        raise _Refused("http(s) images are off on this server: send it as a data URL")
    try:
        return await asyncio.wait_for(_follow(url, limits), limits.fetch_timeout_seconds)
    except (asyncio.TimeoutError, TimeoutError):  # one and the same from Python 3.11 on
        raise _Refused(f"not fetched within {limits.fetch_timeout_seconds:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _Refused(f"could not be fetched ({type(error).__name__})") from None


async def _follow(url: str, limits: ImageLimits) -> bytes:
    # Proxies of the environment would resolve names themselves, behind the check of the address
    async with httpx.AsyncClient(trust_env=False, timeout=limits.fetch_timeout_seconds) as client:
        for _ in range(MAX_REDIRECTS + 1):
            request = await _request(client, url, limits)
            response = await client.send(request, stream=True)
            try:
                if response.status_code not in REDIRECTS or "location" not in response.headers:
                    return await _read_body(response, limits)
                url = urllib.parse.urljoin(url, response.headers["location"])
            finally:
                await response.aclose()
    raise _Refused(f"more than {MAX_REDIRECTS} redirects")


async def _request(client: httpx.AsyncClient, url: str, limits: ImageLimits) -> httpx.Request:
    """A GET to the very address that was checked: asking the name again might give another one."""
    parsed = httpx.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise _Refused("redirected to what is no http(s) URL")
    address = await _resolve(parsed, limits)
    return client.build_request(
        "GET",
        parsed.copy_with(host=address),
        headers={"Host": parsed.netloc.decode("ascii"), "User-Agent": USER_AGENT, "Accept": "image/*"},
        extensions={"sni_hostname": parsed.raw_host.decode("ascii")},
    )


async def _read_body(response: httpx.Response, limits: ImageLimits) -> bytes:
    if response.status_code != 200:
        raise _Refused(f"the image's server answered {response.status_code}")
    kind = response.headers.get("content-type", "image/").lower()
    if not kind.startswith(("image/", "application/octet-stream", "binary/octet-stream")):
        raise _Refused(f"the image's server sent {kind.partition(';')[0]}, not an image")
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > limits.max_image_bytes:
            raise _too_large(limits)
    return bytes(data)


async def _resolve(url: httpx.URL, limits: ImageLimits) -> str:
    """An address of the URL's host that may be asked. All of them must be: which is used is chance."""
    loop = asyncio.get_running_loop()
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        found = await loop.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _Refused(f"the host {url.host!r} was not found") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not limits.allow_private_addresses and not all(_is_public(address) for address in addresses):
        raise _Refused(f"the host {url.host!r} is not a public one")
    return addresses[0]


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    # an IPv6 address may carry an IPv4 one, which is where the connection goes in the end
    inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())] if isinstance(ip, ipaddress.IPv6Address) else []
    return all(each.is_global and not each.is_multicast for each in [ip, *inner] if each is not None)


def _too_large(limits: ImageLimits) -> _Refused:
    return _Refused(f"larger than this server's {limits.max_image_bytes / MIB:g} MiB for an image")


def _decode(data: bytes, limits: ImageLimits) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as file:
            if file.width * file.height > limits.max_image_pixels:
                size = f"{file.width} x {file.height} pixels"
                raise _Refused(f"{size}; this server takes {limits.max_image_pixels:,} pixels in an image")
            file.load()
            return ImageOps.exif_transpose(file)
    except _Refused:
        raise
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise _Refused(f"not an image that Pillow opens ({type(error).__name__})") from None
