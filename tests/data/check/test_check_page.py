"""The data check's page in a real Chromium."""

import shutil

import pytest
from browser_cases import opened

from vlmsft.data.check import report
from vlmsft.data.check.parts import Settings
from vlmsft.data.check.scan import Scan
from vlmsft.data.check.sources import Records

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_request_or_an_error(tmp_path, sample_folder, scheme):
    shutil.copytree(sample_folder / "images", tmp_path / "images")
    lines = (sample_folder / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(lines + '{"image": "<img src=x onerror=alert(1)>"}\n')
    scan = Scan([Records("training", str(tmp_path / "train.jsonl"), str(tmp_path / "images"))], num_examples=3)
    settings = Settings(str(sample_folder / "processor"), 20, "full")
    scan.run(settings, 1, tmp_path / "findings.jsonl", lambda *progress: None)
    (tmp_path / "report.html").write_text(report.html(scan, settings, "today", "findings.jsonl"), encoding="utf-8")
    with opened(tmp_path / "report.html", color_scheme=scheme, viewport={"width": 1280, "height": 900}) as page:
        assert page.locator("figure svg:visible").count() == 5
        sizes = page.locator("img").evaluate_all("images => images.map((image) => image.naturalWidth)")
        assert sizes and min(sizes) > 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 24)"}[scheme]
