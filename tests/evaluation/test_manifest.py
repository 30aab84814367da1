"""What makes two sets of numbers comparable, and what names an evaluation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from evaluation_toys import settings

from vlmsft.evaluation import manifest as manifests

MODEL = {"source": "exports/a", "folder": "/x/exports/a", "content": ["1"], "engine": "vlmsft builtin",
         "engine_version": "v", "transformers": "4.57.6", "dtype": "bfloat16"}  # fmt: skip
TASK = {"runner": "r", "prompt": None, "data": {"sha256": "d"}, "scorers": {"m": {"scorer": "s"}},
        "judge": {"model": "gpt"}}  # fmt: skip


def make(**changes):
    """changes: {"models.a.dtype": value}"""
    manifest = manifests.make(settings(), {"a": dict(MODEL), "b": {**MODEL, "content": ["2"]}}, {"t": dict(TASK)})
    manifest = json.loads(json.dumps(manifest))
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = manifest
        for parent in parents:
            node = node[parent]
        node[last] = value
    return manifest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("generation.temperature", 1.0),
        ("repeats", 2),
        ("limit", 5),
        ("tasks.t.data.sha256", "other"),
        ("tasks.t.judge.model", "other"),
        ("tasks.t.scorers.m.scorer", "other"),
        ("models.a.content", ["3"]),
        ("models.a.transformers", "5"),
        ("code.answers", "other"),
    ],
)
def test_the_id_depends_on_what_numbers_depend_on(key, value):
    assert manifests.identity(make(**{key: value})) != manifests.identity(make())


@pytest.mark.parametrize("key", ["models.a.folder", "models.a.source", "code.commit", "code.dirty"])
def test_the_id_does_not_depend_on_where_and_when(key):
    assert manifests.identity(make(**{key: "elsewhere"})) == manifests.identity(make())
    more = {**make(), "id": "x", "created": "now", "command": [], "base": "b"}
    assert manifests.identity(more) == manifests.identity(make())


def test_answers_depend_on_neither_scorers_nor_judge():
    key = manifests.answers_key(make(), "a", "t")
    for same in (
        "tasks.t.judge.model",
        "tasks.t.scorers.m.scorer",
        "code.scores",
        "models.b.content",
        "models.a.folder",
    ):
        assert manifests.answers_key(make(**{same: "other"}), "a", "t") == key
    for other in ("models.a.content", "generation.seed", "repeats", "tasks.t.data.sha256", "code.answers"):
        assert manifests.answers_key(make(**{other: "other"}), "a", "t") != key


@pytest.mark.parametrize(
    "key",
    ["model.engine", "model.engine_version", "model.transformers", "model.dtype", "generation.seed", "limit",
     "tasks.t.judge.model", "tasks.t.data.sha256", "code.scores"],
)  # fmt: skip
def test_differences_are_named(key):
    one, other = manifests.of_model(make(), "a"), manifests.of_model(make(), "b")
    assert manifests.differences(one, other, "t") == [], "other weights are what is compared"
    changed = copy.deepcopy(other)
    *parents, last = key.split(".")
    node = changed
    for parent in parents:
        node = node[parent]
    node[last] = "other"
    (said,) = manifests.differences(one, changed, "t")
    assert said.startswith(key.removeprefix("model.").replace("tasks.t", "task") + ": ") and said.endswith("/ other")


def test_what_a_server_does_not_say_counts_as_the_same():
    one, other = manifests.of_model(make(), "a"), manifests.of_model(make(**{"models.b.dtype": None}), "b")
    assert manifests.differences(one, other, "t") == []


def test_models_of_other_engines_than_the_bases_are_problems():
    assert manifests.engine_problems(make(), "a") == []
    (problem,) = manifests.engine_problems(make(**{"models.b.engine": "vllm"}), "a")
    assert "engine: vllm / vlmsft builtin" in problem.found and "force=true" in problem.remedy


def test_a_folder_takes_new_models_and_tasks():
    kept = {**make(), "created": "then"}
    new = {**make(), "created": "now"}
    new["models"] = {"c": {**MODEL, "content": ["3"]}}
    new["tasks"] = {"u": dict(TASK)}
    assert manifests.folder_problems(kept, new, Path("x")) == []
    merged = manifests.merged(kept, new)
    assert set(merged["models"]) == {"a", "b", "c"} and set(merged["tasks"]) == {"t", "u"}
    assert merged["created"] == "then"
    wrong = make(**{"generation.seed": 9, "models.a.dtype": "float16"})
    assert [problem.where for problem in manifests.folder_problems(kept, wrong, Path("x"))] == [
        "generation.seed",
        "models.a.dtype",
    ]
