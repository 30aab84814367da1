import base64
import gzip
import json
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
from page_cases import EVIL, grid

from vlmsft.errors import UserError
from vlmsft.report.html import MOST_LETTERS, render, write_report
from vlmsft.report.pictures import Pictures, thumbnail
from vlmsft.report.record import RunRecord, SampleAnswer


class Page(HTMLParser):
    VOID = ("meta", "input", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.scripts, self.texts = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[self.open[-1][1]] = data
        else:
            self.texts.append(data)

    def unpacked(self, script):
        return gzip.decompress(base64.b64decode(self.scripts[script])).decode()


@pytest.fixture
def runs(tmp_path):
    return grid(tmp_path)


@pytest.fixture
def page(runs):
    return Page(render(runs, title=f"Sweep {EVIL}"))


def test_one_file_that_is_whole_and_names_no_other(page):
    assert page.open == []
    assert not any(name in attributes for _, attributes in page.tags for name in ("src", "srcset", "data-src"))
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert "Plotly" in page.unpacked("plotly")


def test_what_runs_say_is_text(page):
    """Each hostile string of page_cases, the title included, is on the page as text and never as a tag."""
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    text = "".join(page.texts)
    for part in (f"Sweep {EVIL}", f"grid/{EVIL}", f"note={EVIL}", f"metrics.csv: {EVIL}"):
        assert part in text
    assert "<" not in page.scripts["data"] + page.scripts["series"] + page.scripts["plotly"]


def test_table_and_commands_stand_there_without_javascript(page):
    text = "".join(page.texts)
    for part in ("max_lr", "tensor_model_parallel_size", "best val loss", "samples/s", "grid/0", "0123abc"):
        assert part in text
    assert "python -m vlmsft.train optim.max_lr=1e-05 'note=plain'" in text
    assert "run_dir" not in text


def test_what_is_missing_is_said(runs):
    text = render(runs, "t")
    assert "Not logged by any of these runs: gradient norm, tokens/s" in text
    bare = [RunRecord("a", str(n), f"/a/{n}", "pending", {}, {}, curves=pd.DataFrame) for n in range(2)]
    text = render(bare, "t")
    for said in (
        "None of these runs has a metrics.csv with values.",
        "No config key varies between these runs.",
        "A heat map needs two keys that vary, with up to 20 values each; there is none.",
        "No run has both a loss or score and a throughput.",
        "No run has answered a validation question",
        "This run's command is not known.",
    ):
        assert said in text


def test_one_run_alone(runs):
    assert "1 done" in render(runs[:1], "t")


def test_differences_are_there_for_any_two_runs(page):
    config = json.loads(page.unpacked("data"))["config"]
    assert config["keys"] == ["optim.max_lr", "strategy.tensor_model_parallel_size", "z.note"]
    assert config["values"][0] == ["1e-05", "1e-05", "0.001", "0.001"]
    assert config["num_same"] == 1  # trainer.max_steps; run_dir only names the run


def test_figures_for_all_choices(page):
    figures = json.loads(page.unpacked("data"))["figures"]
    assert "optim.max_lr|strategy.tensor_model_parallel_size|best_val_loss" in figures["heat"]
    assert "strategy.tensor_model_parallel_size|optim.max_lr|samples_per_second" in figures["heat"]
    assert set(figures["pareto"]) == {"best_val_loss|samples_per_second"}
    assert set(figures["parallel"]) == {"best_val_loss", "samples_per_second", "max_lr"}


def test_a_picture_comes_once_and_a_missing_one_is_missing(page):
    answers = json.loads(page.unpacked("data"))["answers"]
    assert len(answers["pictures"]) == 1
    (question,) = answers["questions"]
    assert question["pictures"] == [0, None]
    assert set(question["answers"]) == {"0", "1", "2", "3"}


def test_questions_are_told_apart_by_what_they_ask(runs):
    other = replace(runs[1], answers=(SampleAnswer(40, 0, "Another?", "yes", "no"),))
    answers = json.loads(Page(render([runs[0], other], "t")).unpacked("data"))["answers"]
    assert [list(question["answers"]) for question in answers["questions"]] == [["0"], ["1"]]


def test_long_answers_are_cut_and_say_so(runs):
    long = replace(runs[0], answers=(SampleAnswer(40, 0, "?", "", "x" * 50_000),))
    text = json.loads(Page(render([long], "t")).unpacked("data"))["answers"]["questions"][0]["answers"]["0"]["text"]
    assert text == "x" * MOST_LETTERS + "... (50,000 letters)"


def test_pictures_are_small_and_limited(tmp_path):
    grid(tmp_path)
    picture = tmp_path / "0-0.png"
    small = thumbnail(picture.read_bytes())
    assert small is not None and len(small) < 3000
    pictures = Pictures(most_bytes=10)
    assert pictures.add(str(picture)) is None
    assert pictures.num_left_out == 1
    (tmp_path / "no.png").write_bytes(b"no picture")
    assert pictures.add(str(tmp_path / "no.png")) is None
    assert pictures.num_left_out == 1


def test_nothing_is_overwritten(runs, tmp_path):
    path = tmp_path / "new" / "out.html"
    write_report(runs, path)
    first = path.read_text()
    assert "<title>Comparison of 4 runs</title>" in first
    with pytest.raises(UserError, match="which exists"):
        write_report(runs[:1], path)
    assert path.read_text() == first
    assert [one.name for one in path.parent.iterdir()] == ["out.html"]


def test_half_a_letter_in_an_answer_is_no_reason_to_fail(runs, tmp_path):
    torn = replace(runs[0], answers=(SampleAnswer(40, 0, "?", "", "a\udce3b"),))
    write_report([torn], tmp_path / "out.html")
