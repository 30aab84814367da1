import base64
import io
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from vlmsft.data.check import report
from vlmsft.data.check.parts import Settings
from vlmsft.data.check.pictures import look, thumbnail
from vlmsft.data.check.scan import Scan
from vlmsft.data.check.sources import Records
from vlmsft.errors import UserError


@pytest.fixture(scope="module")
def found(tmp_path_factory, sample_folder):
    """(scan, settings) of the sample set with half a photograph and a record that no page may take as HTML."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copytree(sample_folder / "images", folder / "images")
    whole = (folder / "images" / "cat.jpg").read_bytes()
    (folder / "images" / "cat.jpg").write_bytes(whole[: len(whole) // 2])
    lines = (sample_folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(lines + '{"image": "<script>alert(1)</script>"}\n{"<b>": 1}\n')
    settings = Settings(str(sample_folder / "processor"), 20, "full")
    scan = Scan([Records("training", str(folder / "train.jsonl"), str(folder / "images"))], num_examples=3)
    scan.run(settings, 1, folder / "findings.jsonl", lambda *progress: None)
    return scan, settings


class Page(HTMLParser):
    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_other_file(found):
    text = report.html(*found, "today", "findings.jsonl")
    page = Page(text)
    assert page.open == []
    assert page.tags.count("svg") == 5
    assert "script" not in page.tags and "b" not in page.tags
    assert len(page.pictures) > 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.pictures)
    first = Image.open(io.BytesIO(base64.b64decode(page.pictures[0].partition(",")[2])))
    assert 0 < max(first.size) <= 160
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert "color-scheme" in text


def test_the_text_says_all_on_one_page(found):
    text = report.text(*found)
    lines = text.splitlines()
    assert len(lines) < 50 and max(map(len, lines)) <= 200
    assert "decoder_seq_length  20, which" in text
    assert re.search(r"proposed +64 holds every sample whole, 64 holds 99\.9% of them", text)
    assert re.search(r"1  refused  corrupt or truncated images\n +\S+train\.jsonl:17: .*cat\.jpg .*in 6 places", text)
    assert lines[-1] == report.verdict(found[0])
    assert re.fullmatch(r"\d+ would be refused and \d+ would be lost in training", lines[-1])


def test_an_interrupted_scan_says_what_it_read(found):
    scan, settings = found
    scan.is_complete = False
    scan.read["images"] = (3, 22)
    try:
        text = report.text(scan, settings)
    finally:
        scan.is_complete = True
    assert re.search(r"images read +3 of 22", text)
    assert text.splitlines()[-1].startswith("Interrupted: ")


def test_nothing_read_is_a_page_too(found):
    scan = Scan(found[0].sets, num_examples=3)
    assert "nothing wrong so far" in report.html(scan, found[1], "today", "findings.jsonl")


def test_half_a_photograph_has_a_thumbnail_and_noise_has_none(sample_folder):
    whole = (sample_folder / "images" / "cat.jpg").read_bytes()
    small = thumbnail(whole[: len(whole) // 2])
    assert small is not None and Image.open(io.BytesIO(small)).size[0] <= 160
    assert thumbnail(b"noise") is None
    with pytest.raises(UserError, match="truncated"):  # showing a part must not let training take it
        look(whole[: len(whole) // 2], decode=True)


def test_sizes_are_those_that_training_sees(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert look(tmp_path / "turned.jpg", decode=False) == look(tmp_path / "turned.jpg", decode=True) == (10, 20, "JPEG")
