"""llm-jp-eval-mm's scores in the store's terms, its tasks' YAML, and what its environment holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vlmsft.config_files import root
from vlmsft.evaluation import eval_mm
from vlmsft.evaluation.eval_mm.environment import LOCK, environment_of
from vlmsft.evaluation.eval_mm.metrics import METRICS, score_of, verdict_of
from vlmsft.evaluation.runner import EvalMM, Generation, JudgeSettings, Settings, Task
from vlmsft.evaluation.tasks import read_task

JUDGE = JudgeSettings("http://judge/v1", "judge", "-", 0.0, 1024, 0, 10.0, 1, 1, "judge.sqlite")
TUTORIAL = {
    "japanese-heron-bench": ["heron-bench"],
    "ja-vg-vqa-500": ["llm-as-a-judge", "rougel"],
    "ja-vlm-bench-in-the-wild": ["llm-as-a-judge", "rougel"],
    "ja-multi-image-vqa": ["llm-as-a-judge", "rougel"],
    "jdocqa": ["jdocqa", "llm-as-a-judge"],
    "jmmmu": ["jmmmu"],
    "jic-vqa": ["jic-vqa"],
    "mecha-ja": ["mecha-ja"],
    "mmmu": ["mmmu"],
    "llava-bench-in-the-wild": ["llm-as-a-judge", "rougel"],
}


def settings(tmp_path: Path, judge: JudgeSettings | None = JUDGE) -> Settings:
    generation = Generation(1024, 0.0, 1.0, 1234)
    return Settings(generation, None, 1, 10.0, 1, judge, EvalMM(str(tmp_path / "cache"), "3.12"))


def task(name="mecha-ja", **options) -> Task:
    defaults = OmegaConf.to_container(OmegaConf.load(root() / "conf" / "evaluate.yaml"), resolve=False)
    read = read_task(root() / "conf" / "task" / f"{name}.yaml", defaults["task_defaults"], {})  # pyright: ignore
    return Task(name, {**read.config, "options": {**read.config["options"], **options}})


@pytest.mark.parametrize("name", TUTORIAL)
def test_the_tutorials_tasks(tmp_path, name):
    """Their metrics are the columns of its table."""
    found = task(name)
    assert found.config["runner"] == "vlmsft.evaluation.eval_mm"
    assert (found.config["options"]["task"], found.config["options"]["metrics"]) == (name, TUTORIAL[name])
    assert eval_mm.problems(found, settings(tmp_path)) == []


def test_a_judged_task_needs_a_judge(tmp_path):
    found = eval_mm.problems(task("jdocqa"), settings(tmp_path, judge=None))
    assert [problem.where for problem in found] == ["judge"] and "llm-as-a-judge" in found[0].expected
    assert eval_mm.problems(task("mecha-ja"), settings(tmp_path, judge=None)) == []


def test_all_wrong_options_are_named_at_once(tmp_path):
    wrong = task(rotate_choise=True, metrics="mecha-ja", images_last="yes")
    found = {problem.where.rpartition(".")[2]: str(problem) for problem in eval_mm.problems(wrong, settings(tmp_path))}
    assert set(found) == {"rotate_choise", "metrics", "images_last"}
    assert "rotate_choices" in found["rotate_choise"]
    del wrong.config["options"]["tasks_file"]
    assert any("tasks_file" in problem.where for problem in eval_mm.problems(wrong, settings(tmp_path)))


def test_unknown_metrics_and_files(tmp_path):
    (problem,) = eval_mm.problems(task(metrics=["mecha"]), settings(tmp_path))
    assert "mecha-ja" in problem.remedy
    (problem,) = eval_mm.problems(task(tasks_file=str(tmp_path / "none.py")), settings(tmp_path))
    assert problem.where.endswith("tasks_file")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    environment = environment_of(settings(tmp_path).eval_mm)
    environment.folder.mkdir(parents=True)
    (environment.folder / "mine").touch()
    (problem,) = eval_mm.problems(task(), settings(tmp_path))
    assert problem.where == "eval_mm.folder"


def test_the_environment_is_pinned_hashed_and_has_no_torch():
    lines = LOCK.read_text().splitlines()
    packages = {line.split("==")[0] for line in lines if re.match(r"[a-z]", line)}
    assert "eval-mm" in packages and not {"torch", "av", "webdataset"} & packages
    assert all("==" in line for line in lines if re.match(r"[a-z]", line))
    assert sum("--hash=sha256:" in line for line in lines) > len(packages)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric not in ("heron-bench", "jic-vqa")])
def test_scores_are_percent_or_points(metric):
    factor = 1 if metric in ("rougel", "llm-as-a-judge") else 100
    assert score_of(metric, 0.5, {}) == {"score": 0.5 * factor, "group": ""}
    assert score_of(metric, None, {}) == {"score": None, "group": ""}


def test_metrics_over_groups_say_which():
    assert score_of("jic-vqa", 1, {"domain": "jaflower30"}) == {"score": 100, "group": "jaflower30"}
    heron = score_of("heron-bench", {"score": 6, "score_gpt": 8}, {"category": "conv"})
    assert heron == {"score": 6, "out_of": 8, "group": "conv"}
    assert score_of("heron-bench", {"score": -1, "score_gpt": -1}, {"category": "conv"})["score"] is None


@pytest.mark.parametrize(
    "metric, reply, expected",
    [
        ("llm-as-a-judge", "4", 4),
        ("llm-as-a-judge", "Score: 5", 5),
        ("llm-as-a-judge", "10", None),
        ("llm-as-a-judge", "0", None),
        ("llm-as-a-judge", "no idea", None),
        ("llm-as-a-judge", "", None),
        ("heron-bench", '```json\n{"score_gpt": 8, "score": 6}\n```', 6),
        ("heron-bench", '{"score_gpt": 8,\n "score": "7"}', 7),
        ("heron-bench", '{"score_gpt": 8}', None),
        ("heron-bench", '{"score_gpt": 11, "score": 6}', None),
        ("heron-bench", '{"score_gpt": null, "score": 6}', None),
        ("heron-bench", "{broken", None),
        ("length", "whatever", 0),
    ],
)
def test_what_is_a_verdict(metric, reply, expected):
    assert verdict_of(metric, reply) == expected
