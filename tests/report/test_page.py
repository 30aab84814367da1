"""The report in a real Chromium: what a person does with it."""

import re

import pytest
from browser_cases import opened
from page_cases import EVIL, LOSSES, SPEEDS, grid

from vlmsft.report.html import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_report(grid(folder), folder / "out.html", title="Toy runs")
    return folder / "out.html"


@pytest.fixture(scope="module")
def page(path):
    """One browser for all tests, each with the page loaded afresh. Ends with: no request, no console error."""
    with opened(path, viewport={"width": 1280, "height": 900}) as page:
        yield page


@pytest.fixture(autouse=True)
def fresh(page):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")
    page.reload()
    ready(page)


def ready(page):
    page.wait_for_selector("html[data-ready=true]", state="attached")


def shown_runs(page):
    rows = page.locator("#table tbody tr:visible")
    return [int(row.get_attribute("data-run")) for row in rows.all()]


def drawn(page, plot):
    """The plot's div as Plotly keeps it, once it is drawn: {"data": ..., "layout": ...}."""
    page.locator(f"#{plot}").scroll_into_view_if_needed()
    page.locator(f"#{plot} .main-svg").first.wait_for()
    return page.evaluate(
        f"""() => {{ const div = document.getElementById("{plot}"); const list = (x) => x && Array.from(x);
        const layout = div._fullLayout;
        return {{ data: div.data.map((t) => ({{ ...t, x: list(t.x), y: list(t.y) }})), type: layout.yaxis?.type,
        x: layout.xaxis?.title?.text, ink: layout.font.color }}; }}"""
    )


def settled(page, plot, condition):
    """Waits for a plot that is drawn again. condition: JavaScript on `div`"""
    page.wait_for_function(
        f"() => {{ const div = document.getElementById('{plot}'); return div.data && ({condition}); }}"
    )
    return drawn(page, plot)


def test_sort_by_a_metric_both_ways(page):
    head = page.locator("th", has_text="best val loss")
    head.locator("button").click()
    assert shown_runs(page) == [2, 3, 1, 0]
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")  # keyboard
    assert shown_runs(page) == [0, 1, 3, 2]
    assert head.get_attribute("aria-sort") == "descending"


def test_filter_by_words_and_by_numbers(page):
    box = page.locator("#filter")
    for text, runs in {
        "failed": [1],
        "max_lr>=1e-3": [2, 3],
        "tensor_model_parallel_size=1 best_val_loss<1.2": [2],
        "samples/s>70": [0, 2],
        "nothing-like-it": [],
        "": [0, 1, 2, 3],
    }.items():
        box.fill(text)
        assert shown_runs(page) == runs, text
    box.fill("mfu>1")
    assert page.locator("#count").inner_text() == "There is no column mfu"
    assert shown_runs(page) == [0, 1, 2, 3]


def test_the_filter_holds_for_plots_and_commands(page):
    page.locator("#filter").fill("max_lr>=1e-3")
    assert page.locator(".again:visible").count() == 2
    found = settled(page, "curve-0", "div.data.length === 2")
    assert [trace["y"][0] for trace in found["data"]] == [LOSSES[2] + 3, LOSSES[3] + 3]
    page.locator("#table tbody tr:visible input").first.uncheck()
    settled(page, "curve-0", "div.data.length === 1")
    page.locator("#tick-none").click()
    page.get_by_text("No plotted run has training loss on this axis.").wait_for()
    page.locator("#tick-all").click()
    settled(page, "curve-0", "div.data.length === 2")


def test_differences_of_two_runs(page):
    page.locator("#diff-a").select_option("0")
    page.locator("#diff-b").select_option("3")
    rows = [row.inner_text().split("\t") for row in page.locator("#diff-table tbody tr").all()]
    assert rows == [
        ["optim.max_lr", "1e-05", "0.001"],
        ["strategy.tensor_model_parallel_size", "1", "2"],
        ["z.note", "plain", EVIL],
    ]
    page.locator("#diff-b").select_option("1")
    assert page.locator("#diff-table tbody tr").count() == 1
    assert page.locator("#diff-count").inner_text() == "1 of 4 keys differ"


def test_curves_over_other_axes(page):
    assert drawn(page, "curve-0")["data"][0]["x"][:2] == [1, 2]
    page.locator("#axis").select_option("samples")
    assert settled(page, "curve-0", "div.data[0].x[0] === 16")["x"] == "samples"
    page.locator("#axis").select_option("hours")
    found = settled(page, "curve-0", "div.data[0].x[0] < 1")
    assert found["data"][0]["x"][-1] == pytest.approx(0.4)
    option = page.locator("#axis option", has_text="tokens")
    assert option.inner_text() == "tokens (not logged)" and option.is_disabled()


def test_smoothing(page):
    raw = drawn(page, "curve-0")["data"][0]["y"]
    assert max(raw) == 9.0  # the spike
    page.locator("#smoothing").fill("0.9")
    assert page.locator("#smoothing-value").inner_text() == "0.9"
    found = settled(page, "curve-0", "div.data.length === 8")["data"]
    assert found[0]["y"] == raw and found[0]["opacity"] == 0.25
    mean, norm = 0.0, 0.0
    for value, smooth in zip(raw, found[1]["y"], strict=True):
        mean, norm = 0.9 * mean + 0.1 * value, 0.9 * norm + 0.1
        assert smooth == pytest.approx(mean / norm)


def test_losses_on_a_logarithmic_scale(page):
    drawn(page, "curve-0")
    page.locator("#log").check()
    settled(page, "curve-0", "div._fullLayout.yaxis.type === 'log'")
    rate = page.locator("figure div[aria-label^='learning rate']").get_attribute("id")
    assert drawn(page, rate)["type"] == "linear"


def test_parallel_coordinates(page):
    page.locator("#parallel-plot").scroll_into_view_if_needed()
    page.locator("#parallel-plot .parcoords .axis-title").first.wait_for()
    titles = page.locator("#parallel-plot .axis-title").all_text_contents()
    assert titles == ["max_lr (log)", "tensor_model_parallel_size", "note", "best val loss"]
    assert page.locator("#parallel-plot canvas").count() == 3
    page.locator("#parallel-metric").select_option("samples_per_second")
    page.get_by_text("samples/s", exact=True).and_(page.locator("#parallel-plot .axis-title")).wait_for()


def test_heat_map_with_other_keys(page):
    drawn(page, "heat-plot")
    assert page.evaluate("document.getElementById('heat-plot').data[0].z") == [[1.3, 1.0], [1.2, 1.1]]
    page.locator("#heat-metric").select_option("samples_per_second")
    page.wait_for_function("document.getElementById('heat-plot').data?.[0].z[0][0] === 100")
    page.locator("#heat-y").select_option("optim.max_lr")
    page.get_by_text("Choose two different keys.").wait_for()
    page.locator("#heat-x").select_option("strategy.tensor_model_parallel_size")
    page.wait_for_function("document.getElementById('heat-plot').data?.[0].z[0][1] === 60")


def test_pareto_front(page):
    front, every = drawn(page, "pareto-plot")["data"]
    assert front["x"] == [SPEEDS[0], SPEEDS[2]] and front["y"] == [LOSSES[0], LOSSES[2]]
    assert sorted(every["x"]) == sorted(SPEEDS)


def test_answers_side_by_side(page):
    card = page.locator(".question")
    assert card.count() == 1
    picture = card.locator("img")
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 160
    assert card.get_by_text("picture not there").count() == 1
    texts = [text.inner_text() for text in card.locator(".text > p:first-of-type").all()]
    assert texts == ["orange", "red", "orange", EVIL]
    assert card.get_by_text("= reference").count() == 2
    page.locator("#tick-none").click()
    assert page.locator(".question").count() == 0


def test_what_runs_say_is_text(page):
    assert page.locator("img[src=x]").count() == 0
    assert EVIL in page.locator("#table tbody").inner_text()


def test_copying_a_command(page):
    """Into the clipboard, or selected where that is not allowed; the clipboard itself is left alone."""
    command = "python -m vlmsft.train optim.max_lr=1e-05 'note=plain'"
    page.evaluate("() => { navigator.clipboard.writeText = async (text) => { window.copied = text; }; }")
    page.locator(".copy").first.click()
    assert page.wait_for_function("window.copied").json_value() == command
    page.evaluate("() => { navigator.clipboard.writeText = async () => { throw new Error(); }; }")
    page.locator(".copy").first.click()
    assert page.wait_for_function("getSelection().toString()").json_value() == command


def lightness(colour):
    red, green, blue = map(int, re.findall(r"\d+", colour)[:3])
    return (red + green + blue) / 3


def test_theme_follows_the_system_and_the_button(page):
    paper = "getComputedStyle(document.body).backgroundColor"
    assert lightness(page.evaluate(paper)) > 200
    light = drawn(page, "curve-0")["ink"]
    page.emulate_media(color_scheme="dark")
    settled(page, "curve-0", f"div._fullLayout.font.color !== '{light}'")
    assert lightness(page.evaluate(paper)) < 60
    page.locator("#theme").click()  # back to light, whatever the system says
    settled(page, "curve-0", f"div._fullLayout.font.color === '{light}'")
    assert lightness(page.evaluate(paper)) > 200
    assert page.locator("#theme").get_attribute("aria-label") == "Switch to dark colours"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_readable(page, scheme):
    """WCAG AA, 4.5 to 1, for each element with words of its own."""
    page.emulate_media(color_scheme=scheme)
    poor = page.evaluate(
        """() => {
        const parts = (c) => c.match(/[\\d.]+/g).map(Number);
        const linear = (v) => v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
        const light = (c) => { const [r, g, b] = parts(c).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const under = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
          if ((parts(c)[3] ?? 1) > 0) return c; } return "rgb(255,255,255)"; };
        const own = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        return [...document.querySelectorAll("header *, main *")]
          .filter((e) => !e.closest("svg") && own(e) && e.offsetWidth)
          .filter((e) => { const [a, b] = [light(getComputedStyle(e).color), light(under(e))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05) < 4.5; }).map((e) => e.outerHTML.slice(0, 80)); }"""
    )
    assert poor == []


def test_every_control_has_a_name(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, button")].filter((e) => !(e.labels?.length ||
        e.getAttribute("aria-label") || e.textContent.trim())).map((e) => e.outerHTML)"""
    )
    assert nameless == []


def test_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    ready(page)
    drawn(page, "curve-0")
    drawn(page, "heat-plot")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
