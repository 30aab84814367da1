"""What the gallery's file holds, without a browser; test_gallery_browser.py drives it."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import json

import pytest
from PIL import Image
from results_toys import HOSTILE, make, manifest

from vlmsft.evaluation import gallery


class Scripts(html.parser.HTMLParser):
    """Attributes and content of each script and style element, as a browser splits them."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self._open: tuple[str, dict[str, str | None]] | None = None
        self.metas: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "style"):
            self._open = (tag, dict(attrs))
        if tag == "meta":
            self.metas.append(dict(attrs))

    def handle_data(self, data):
        if self._open:
            self.found.append((*self._open, data))

    def handle_endtag(self, tag):
        self._open = None


def data_of(text):
    return {
        attributes["id"]: json.loads(content) for _, attributes, content in Scripts(text).found if "id" in attributes
    }


def test_nothing_a_model_wrote_leaves_its_json(tmp_path):
    text = gallery.html(manifest(), make(tmp_path))
    parsed = Scripts(text)
    assert [tag for tag, _, _ in parsed.found] == ["style", "script", "script", "script"]
    answers = [answer["text"] for card in data_of(text)["data"]["cards"] for of in card["answers"] for answer in of]
    assert HOSTILE in answers
    assert text.count("onerror") == text.count("\\u003cimg src=x onerror") > 0


def test_the_policy_names_this_script_and_this_style_and_no_place_to_load_from(tmp_path):
    parsed = Scripts(gallery.html(manifest(), make(tmp_path)))
    policy = next(meta["content"] for meta in parsed.metas if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for tag, attributes, content in parsed.found:
        if "type" not in attributes:
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy


def test_cards_have_question_references_and_every_answer(tmp_path):
    data = data_of(gallery.html(manifest(repeats=2), make(tmp_path, repeats=2)))["data"]
    assert data["models"] == ["base", "sft", "sft_energon"] and len(data["cards"]) == 24
    card = data["cards"][0]
    assert (card["question"], card["references"]) == ("質問 0: 何が写っていますか?", ["正解 0"])
    assert [len(of_model) for of_model in card["answers"]] == [2, 2, 2]
    missing = card["answers"][2][0]
    assert missing["text"] is None and "timed out" in missing["error"]
    assert missing["scores"]["rougel"] == [None, None, f"no answer: {missing['error']}"]
    assert data["cards"][5]["answers"][0][0]["cut"]


def test_a_picture_of_many_questions_is_there_once(tmp_path):
    data = data_of(gallery.html(manifest(), make(tmp_path, num_pictures=3)))
    assert len(data["pictures"]) == 3
    assert {index for card in data["data"]["cards"] for index in card["pictures"]} == {0, 1, 2}


def test_pictures_keep_to_their_budget_and_the_page_says_so(tmp_path):
    store = make(tmp_path, num_pictures=6)
    text = gallery.html(manifest(), store, picture_bytes=7_000)
    pictures = [base64.b64decode(picture) for picture in data_of(text)["pictures"]]
    assert 0 < sum(map(len, pictures)) <= 7_000 and len(pictures) < 6
    assert max(Image.open(io.BytesIO(pictures[0])).size) == 120
    assert f"{6 - len(pictures)} pictures left out" in text


def test_pictures_that_are_gone_are_counted(tmp_path):
    store = make(tmp_path)
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    text = gallery.html(manifest(), store)
    assert "2 pictures can&#39;t be read any more" in text and len(data_of(text)["pictures"]) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_thumbnails_of_every_mode(tmp_path, mode):
    path = tmp_path / f"picture.{'tif' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (640, 320)).save(path)
    made = gallery.thumbnail(path, 320)
    assert made is not None and Image.open(io.BytesIO(made)).size == (320, 160)


def test_what_is_transparent_lies_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "picture.png")
    made = gallery.thumbnail(tmp_path / "picture.png", 320)
    assert made is not None and Image.open(io.BytesIO(made)).getpixel((4, 4)) == (255, 255, 255)
