"""The gallery in a real Chromium: nothing is asked of a network, hostile answers stay text, filters and orders work."""

from __future__ import annotations

import json
import shutil

import pytest
from results_toys import HOSTILE, make, manifest

from vlmsft.evaluation import gallery

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """A function that opens a file; at the end no error and no request but for the file itself may have been."""
    said, asked, contexts = [], [], []

    def open_(path, **options):
        context = browser.new_context(viewport={"width": 1300, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{path}")
        return page

    yield open_
    assert said == []
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    path = folder / "gallery.html"
    path.write_text(gallery.html(manifest(), make(folder, num=30)))
    return path


def ids(page):
    return [text.split()[1] for text in page.locator(".where").all_text_contents()]


def test_hostile_answers_are_text(open_page, page_file):
    page = open_page(page_file)
    page.fill("#text", "heron-3")
    assert page.locator(".answer .text").first.inner_text() == HOSTILE
    assert page.title() == "Answers of evaluation 0123456789ab"
    assert page.locator(".answer img").count() == 0


def test_a_script_that_got_in_would_not_run(browser, tmp_path):
    """The policy is the second wall; its refusal is an error on the console."""
    path = tmp_path / "gallery.html"
    text = gallery.html(manifest(), make(tmp_path))
    path.write_text(text.replace("</main>", "</main><script>document.title = 'owned'</script>"))
    with browser.new_context() as context:
        page = context.new_page()
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.goto(f"file://{path}")
        assert page.title() == "Answers of evaluation 0123456789ab"
    assert len(said) == 1 and "Content Security Policy" in said[0]


def test_filters_and_search(open_page, page_file):
    page = open_page(page_file)
    assert page.text_content("#count") == "60 of 60"
    page.select_option("#task", "heron")
    assert page.text_content("#count") == "30 of 60"
    page.fill("#text", "質問 12")
    assert ids(page) == ["heron-12"]
    page.fill("#text", "")
    page.select_option("#show", label="a score is missing")
    assert ids(page) == ["heron-0", "heron-1"]
    page.select_option("#metric", "heron-bench")
    assert ids(page) == ["heron-0", "heron-1", "heron-7"]
    page.select_option("#show", label="an answer was cut")
    assert ids(page) == ["heron-5"]
    page.select_option("#task", "")
    assert page.input_value("#metric") == "" and page.text_content("#count") == "2 of 60"


def test_orders(open_page, page_file):
    page = open_page(page_file)
    page.select_option("#task", "heron")
    page.select_option("#metric", "heron-bench")
    page.select_option("#show", label="sft better than base")
    assert {int(id.split("-")[1]) % 3 for id in ids(page)} == {1, 2}
    page.select_option("#sort", label="biggest difference")
    differences = [int(id.split("-")[1]) % 3 for id in ids(page)]
    assert differences == sorted(differences, reverse=True)
    assert page.locator(".answer.better").count() > 0 and page.locator(".answer.worse").count() == 0


def test_cards_are_drawn_as_one_scrolls(open_page, page_file):
    page = open_page(page_file)
    page.wait_for_timeout(200)
    first = page.locator(".card").count()
    assert 20 <= first < 60
    for _ in range(20):
        page.mouse.wheel(0, 20_000)
        page.wait_for_timeout(30)
    assert page.locator(".card").count() == 60


def test_pictures_show(open_page, page_file):
    page = open_page(page_file)
    assert page.locator(".pictures img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 320


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(open_page, page_file, scheme):
    page = open_page(page_file, color_scheme=scheme)
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (luminance(paper) > luminance(ink)) == (scheme == "light")
    assert abs(luminance(paper) - luminance(ink)) > 150


def luminance(color: str) -> float:
    red, green, blue = json.loads(color.replace("rgb(", "[").replace(")", "]"))[:3]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_thousands_of_questions_are_not_drawn_at_once(open_page, tmp_path):
    """Nor when their order changes."""
    path = tmp_path / "gallery.html"
    path.write_text(gallery.html(manifest(), make(tmp_path, num=1500)))
    page = open_page(path)
    assert page.text_content("#count") == "3000 of 3000" and page.locator(".card").count() < 100
    page.select_option("#sort", label="biggest difference")
    page.fill("#text", "質問 14")
    assert page.text_content("#count") == "268 of 3000" and page.locator(".card").count() < 100
