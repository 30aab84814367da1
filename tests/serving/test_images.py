"""Where images may come from, and what they may be."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from dataclasses import replace

import pytest
from PIL import Image
from serving_toys import data_url, picture, png, web_server

from vlmsft.serving import images
from vlmsft.serving.api_error import ApiError


@pytest.fixture
def limits(settings, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    return replace(settings.images, image_root=root)


def load(limits, *urls):
    return asyncio.run(images.load_images(tuple((f"part {i}", url) for i, url in enumerate(urls)), limits))


def refused(limits, *urls):
    with pytest.raises(ApiError) as error:
        load(limits, *urls)
    assert error.value.status == 400
    return error.value.message


def test_order_is_kept(limits):
    sizes = [(30, 20), (10, 50), (70, 5)]
    assert [image.size for image in load(limits, *(data_url(png(size=size)) for size in sizes))] == sizes


def test_turned_as_exif_says(limits):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture(size=(40, 20)).save(file, "JPEG", exif=exif)
    assert load(limits, data_url(file.getvalue()))[0].size == (20, 40)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("photo.png", "must begin with"),
        ("ftp://example.org/a.png", "must begin with"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,%%%", "base64"),
        ("data:image/png;base64,", "not an image"),
        (data_url(png()[:60]), "not an image"),
        (data_url(b"<svg/>"), "not an image"),
    ],
)
def test_bad_urls_and_content(limits, url, reason):
    message = refused(limits, data_url(png()), url)
    assert message.startswith("part 1: ") and reason in message


def test_limits(limits):
    assert "3 in a request" in refused(limits, *[data_url(png())] * 4)
    noise = Image.frombytes("RGB", (300, 300), os.urandom(270_000))
    file = io.BytesIO()
    noise.save(file, "PNG")
    assert "MiB" in refused(limits, data_url(file.getvalue()))
    assert "1200 x 1000 pixels" in refused(limits, data_url(png(size=(1200, 1000))))


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_below_the_root(limits):
    (limits.image_root / "deep").mkdir()
    for name in ("a.png", "deep/写真 1.png"):
        (limits.image_root / name).write_bytes(png(size=(33, 22)))
        assert load(limits, f"file://{limits.image_root}/{name}")[0].size == (33, 22)
    quoted = "deep/%E5%86%99%E7%9C%9F%201.png"
    assert load(limits, f"file://localhost{limits.image_root}/{quoted}")[0].size == (33, 22)


def test_files_elsewhere(limits):
    outside = limits.image_root.parent / "secret.png"
    outside.write_bytes(png())
    (limits.image_root / "link.png").symlink_to(outside)
    (limits.image_root / "up").symlink_to(limits.image_root.parent)
    os.mkfifo(limits.image_root / "pipe.png")
    sibling = limits.image_root.parent / "root2"
    sibling.mkdir()
    (sibling / "a.png").write_bytes(png())
    root = limits.image_root
    urls = [
        f"file://{outside}",
        f"file://{root}/../secret.png",
        f"file://{root}/%2e%2e/secret.png",
        f"file://{root}/link.png",
        f"file://{root}/up/secret.png",
        f"file://{root}/pipe.png",
        f"file://{root}/missing.png",
        f"file://{root}/a%00.png",
        f"file://{root}",
        f"file://{sibling}/a.png",
        "file:///etc/passwd",
    ]
    messages = {refused(limits, url) for url in urls}
    assert messages == {"part 0: no readable file below the server's image_root"}, "it tells nothing of other files"
    assert "host" in refused(limits, f"file://example.org{root}/a.png")
    assert "without image_root" in refused(replace(limits, image_root=None), f"file://{outside}")


def test_a_link_within_the_root(limits):
    (limits.image_root / "a.png").write_bytes(png())
    (limits.image_root / "b.png").symlink_to("a.png")
    assert load(limits, f"file://{limits.image_root}/b.png")


# --- http -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "body", "reason"),
    [
        (404, {}, b"", "answered 404"),
        (200, {"Content-Type": "text/html"}, b"<html>", "text/html"),
        (200, {"Content-Type": "image/png"}, b"<html>", "not an image"),
        (200, {"Content-Type": "image/png"}, b"x" * 300_000, "MiB"),
        (302, {"Location": "/again"}, b"", "redirects"),
        (302, {"Location": "file:///etc/passwd"}, b"", "no http(s) URL"),
    ],
)
def test_bad_answers(limits, status, headers, body, reason):
    with web_server(lambda path: (status, headers, body)) as web:
        assert reason in refused(limits, f"{web}/a.png")


def test_a_redirect_is_followed(limits):
    def answer(path):
        return (200, {"Content-Type": "image/png"}, png()) if path == "/b?x=1" else (307, {"Location": "/b?x=1"}, b"")

    with web_server(answer) as web:
        assert load(limits, f"{web}/a")


def test_a_slow_server(limits):
    refused_first = threading.Event()

    def answer(path):
        refused_first.wait(30)
        return 200, {}, png()

    with web_server(answer) as web:
        assert "within 0.2 s" in refused(replace(limits, fetch_timeout_seconds=0.2), f"{web}/a")
        refused_first.set()


def test_nobody_there(limits):
    assert "could not be fetched" in refused(limits, "http://127.0.0.1:9/a.png")
    assert "not found" in refused(limits, "http://nowhere.invalid/a.png")
    assert "off" in refused(replace(limits, fetch_timeout_seconds=0), "http://127.0.0.1:9/a.png")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "[::1]", "2130706433",
     "0x7f000001", "[::ffff:127.0.0.1]", "[fe80::1]", "[2002:7f00:1::]", "224.0.0.1", "100.64.0.1"],
)  # fmt: skip
def test_private_addresses(limits, host):
    closed = replace(limits, allow_private_addresses=False)
    assert "public" in refused(closed, f"http://{host}:9/latest/meta-data")


def test_a_redirect_to_a_private_address(limits, monkeypatch):
    """The first host counts as public here; the check comes again for where it leads."""
    asked = []
    monkeypatch.setattr(images, "_is_public", lambda address: asked.append(address) or len(asked) == 1)
    with web_server(lambda path: (302, {"Location": "http://127.0.0.1:9/secret"}, b"")) as web:
        assert "public" in refused(replace(limits, allow_private_addresses=False), f"{web}/a")
    assert len(asked) == 2


def test_the_checked_address_is_the_one_that_is_asked(limits, monkeypatch):
    """A name that leads elsewhere when it is asked again changes nothing: it is asked once."""
    hosts = []
    resolve = images._resolve

    async def note(url, limits):
        hosts.append(url.host)
        return await resolve(url, limits)

    monkeypatch.setattr(images, "_resolve", note)
    seen = []
    with web_server(lambda path: seen.append(path) or (200, {"Content-Type": "image/png"}, png())) as web:
        assert load(limits, web.replace("127.0.0.1", "localhost") + "/a")
    assert hosts == ["localhost"] and seen == ["/a"]
