"""llm-jp-eval-mm for real: installed in its own environment, driven with a task registered from outside and with one of
its own, against a real OpenAI-compatible server and a judge that fails. Needs a Python 3.12 and PyPI, once a minute."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from eval_mm_server import NAMES, JudgeServer, Server, running
from PIL import Image

from vlmsft.errors import UserError
from vlmsft.evaluation import eval_mm
from vlmsft.evaluation.eval_mm.environment import environment_of
from vlmsft.evaluation.runner import Endpoint, EvalMM, Generation, JudgeSettings, Settings, Task
from vlmsft.evaluation.statistics import Bootstrap, Value, compare, summarize
from vlmsft.evaluation.store import Store

pytestmark = pytest.mark.nemo

TASKS_FILE = Path(__file__).with_name("eval_mm_tasks.py")
METRICS = ["heron-bench", "exact-match", "llm-as-a-judge", "rougel", "jmmmu", "jdocqa", "jic-vqa", "mecha-ja", "length"]


def python_312() -> str:
    """Of this interpreter, of the path or of pyenv; else uv has to find or download one."""
    if sys.version_info[:2] == (3, 12):
        return sys.executable
    found = [shutil.which("python3.12"), *sorted(Path.home().glob(".pyenv/versions/3.12.*/bin/python"))]
    return next((str(path) for path in found if path and _runs(path)), "3.12")


def _runs(python: str | Path) -> bool:
    """pyenv puts programs on the path that say no more than that another one would have to be chosen."""
    return subprocess.run([python, "--version"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def environment(pytestconfig):
    """Made once for a checkout."""
    return EvalMM(str(pytestconfig.cache.mkdir("eval_mm")), python_312())


@pytest.fixture(scope="module")
def judge():
    with running(JudgeServer()) as server:
        yield server


@pytest.fixture(scope="module")
def settings(tmp_path_factory, environment, judge):
    cache = tmp_path_factory.mktemp("judge") / "judge.sqlite"
    of_judge = JudgeSettings(judge.url, "judge", "-", 0.0, 1024, 0, 30.0, 1, 4, str(cache))
    return Settings(Generation(1024, 0.0, 1.0, 1234), None, 2, 30.0, 1, of_judge, environment)


def task(name="colors", metrics=METRICS, tasks_file: Path | None = TASKS_FILE, **more):
    options = {"task": name, "metrics": metrics, "tasks_file": tasks_file and str(tasks_file)}
    return Task(name, {"options": {**options, "rotate_choices": False, "images_last": False, **more}})


class Evaluated:
    """Two models asked and scored; what the servers were asked."""

    def __init__(self, folder: Path, settings: Settings, judge: JudgeServer):
        self.store, self.task = Store(folder), task()
        self.facts = eval_mm.describe(self.task, settings)
        with running(Server()) as server:
            for model in ("bad", "good"):
                self.ask(model, server, settings)
            self.requests = list(server.requests)
            self.ask("good", server, settings)
            self.requests_again = server.requests[len(self.requests) :]
        scored = [eval_mm.score(self.task, model, self.store, settings) for model in ("bad", "good")]
        self.scores = [score for of_model in scored for score in of_model]
        num_judged = len(judge.requests)
        self.again = eval_mm.score(self.task, "bad", self.store, settings)
        self.judged_again = judge.requests[num_judged:]

    def ask(self, model: str, server: Server, settings: Settings) -> None:
        eval_mm.ask(self.task, model, Endpoint(server.url, model), self.store, settings)

    def values(self, model: str, metric: str) -> dict[tuple[str, int], Value]:
        own = [score for score in self.scores if (score.model, score.metric) == (model, metric)]
        return {(score.id, score.repeat): Value(score.score, score.out_of, score.group) for score in own}

    def score(self, model: str, metric: str) -> float | None:
        return summarize(self.values(model, metric), Bootstrap(10)).score


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, settings, judge):
    return Evaluated(tmp_path_factory.mktemp("evaluation"), settings, judge)


def test_a_driver_that_dies_is_an_error(settings):
    """First in this file: those that follow show that another one goes on."""
    with pytest.raises(UserError, match=r"deadly: found an end with 3"):
        eval_mm.describe(task("deadly"), settings)


def test_it_lives_apart_without_torch(environment, evaluated):
    installed = environment_of(environment).folder / "venv" / "lib" / "python3.12" / "site-packages"
    names = {path.name for path in installed.iterdir()}
    assert "eval_mm" in names and not {"torch", "vlmsft", "av"} & names


def test_questions_arrive_as_the_task_has_them(evaluated):
    samples = evaluated.store.samples("colors")
    assert [(sample.id, sample.references) for sample in samples] == [
        (str(number), (name,)) for number, name in enumerate(NAMES.values())
    ]
    assert samples[0].prompt == "<image>\nWhat color is picture 0?" and samples[0].fields["domain"] == "warm"
    assert evaluated.facts["data"]["num_samples"] == 4
    assert evaluated.facts["scorers"]["rougel"]["versions"]["eval-mm"] == "0.4.1"


def test_each_is_asked_once_with_its_picture_and_parameters(evaluated):
    assert len(evaluated.requests) == 2 * 2 * 4 and evaluated.requests_again == []
    request = evaluated.requests[0]
    assert (request["max_tokens"], request["temperature"], request["top_p"]) == (1024, 0.0, 1.0)
    assert [part["type"] for part in request["messages"][0]["content"]] == ["image_url", "text"]
    answers = evaluated.store.answers("good", "colors")
    assert [answers[str(number), 0].answer for number in range(4)] == list(NAMES.values())  # it saw the pictures


@pytest.mark.parametrize("metric", ["exact-match", "rougel", "jmmmu", "jdocqa", "mecha-ja"])
def test_its_scores(evaluated, metric):
    assert (evaluated.score("bad", metric), evaluated.score("good", metric)) == (25, 100)


def test_the_mean_of_domains(evaluated):
    assert evaluated.score("bad", "jic-vqa") == 50


def test_a_scorer_from_outside(evaluated):
    assert evaluated.score("good", "length") == pytest.approx((3 + 5 + 4 + 5) / 4)


def test_failed_and_senseless_verdicts_are_missing_and_say_why(evaluated):
    """llm-jp-eval-mm itself would average 0 and -1 in."""
    assert evaluated.score("good", "llm-as-a-judge") == 5 and evaluated.score("bad", "llm-as-a-judge") == 3
    assert evaluated.score("good", "heron-bench") == 100 * 10 / 8
    reasons = {score.id: score.reason for score in evaluated.scores if score.metric == "heron-bench"}
    assert "out of order" in reasons["1"] and "rather not say" in reasons["2"]
    assert summarize(evaluated.values("good", "heron-bench"), Bootstrap(10)).num_missing == 2 * 2
    difference = compare(
        evaluated.values("good", "llm-as-a-judge"), evaluated.values("bad", "llm-as-a-judge"), Bootstrap(10)
    )
    assert (difference.win, difference.tie, difference.loss, difference.num) == (1, 1, 0, 2)


def test_only_missing_verdicts_are_asked_for_again(evaluated):
    assert [score.score for score in evaluated.again] == [
        score.score for score in evaluated.scores[: len(evaluated.again)]
    ]
    assert len(evaluated.judged_again) == 2 * 2
    assert all("green" in str(request) or "blue" in str(request) for request in evaluated.judged_again)


def test_a_task_that_fails_is_an_error_that_says_what_it_said(settings):
    expected = r"broken: found FileNotFoundError: Dataset not found\. Please prepare it\. \(eval_mm_tasks\.py:\d+\)"
    with pytest.raises(UserError, match=expected):
        eval_mm.describe(task("broken"), settings)
    with pytest.raises(UserError, match=r"ValueError: Task 'colour' is not supported"):
        eval_mm.describe(task("colour"), settings)


def test_one_of_its_own_tasks_with_pictures_in_parquet(tmp_path, monkeypatch, settings):
    """jic-vqa, the one whose data come from no hub; read by its version of `datasets`."""
    import datasets

    rows = {
        "question_id": [1, 2, 3],
        "input_text": ["何ですか?"] * 3,
        "answer": ["red", "green", "blue"],
        "domain": ["jaflower30", "jaflower30", "jafood101"],
        "image": [Image.new("RGB", (8, 8), name) for name in ("red", "green", "blue")],
    }
    features = datasets.Features({name: datasets.Value("string") for name in rows})
    features.update(question_id=datasets.Value("int64"), image=datasets.Image())
    (tmp_path / "dataset").mkdir()
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "dataset" / "jic_vqa.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    own, fewer = task("jic-vqa", ["jic-vqa"], None, images_last=True), replace(settings, limit=2, repeats=1)
    store = Store(tmp_path / "evaluation")
    assert eval_mm.describe(own, fewer)["data"]["num_samples"] == 2
    with running(Server()) as server:
        eval_mm.ask(own, "bad", Endpoint(server.url, "bad"), store, fewer)
        assert [part["type"] for part in server.requests[0]["messages"][0]["content"]] == ["text", "image_url"]
    assert [score.score for score in eval_mm.score(own, "bad", store, fewer)] == [100, 0]
