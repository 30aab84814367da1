"""What an evaluation's numbers depend on, and whether two sets of numbers may be compared.

    {"id", "created", "command", "base",
     "generation": {...}, "limit", "repeats",
     "tasks": {name: {"runner", "data": {...}, "prompt", "scorers": {...}, "judge": {...} or null, ...}},
     "models": {name: {"source" or "url", "engine", "engine_version", "transformers", "dtype", ...}},
     "code": {"answers", "scores": hashes of the code that makes them, "commit", "dirty"}}

The id is a hash over all of it but where and when: the same command is the same evaluation and goes on in its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmsft.errors import Problem
from vlmsft.evaluation.runner import Settings
from vlmsft.generation.version import code_hash
from vlmsft.runtime.provenance import code_state, flatten

ANSWERS_CODE = ("evaluation/builtin.py", "evaluation/chat.py", "evaluation/tasks.py", "evaluation/eval_mm")
SCORES_CODE = ("evaluation/scorers.py", "evaluation/judge.py", "evaluation/eval_mm")
WHERE_AND_WHEN = ("id", "created", "command", "base", "code.commit", "code.dirty")
OF_THE_MACHINE = ("source", "folder")
"""Of a local model: where it lies, not what it is, which is in "content"."""
ENGINE = ("engine", "engine_version", "transformers", "dtype")
"""Of a model: what computed its answers, as opposed to what was computed."""

Manifest = dict[str, Any]


def make(settings: Settings, models: Mapping[str, Any], tasks: Mapping[str, Any]) -> Manifest:
    """Without id, time and command.

    models: {name: what models.describe gave}; tasks: {name: what its runner's describe gave}
    """
    generation = settings.generation
    return {
        "generation": {**vars(generation), "stop": list(generation.stop)},
        "limit": settings.limit,
        "repeats": settings.repeats,
        "tasks": dict(tasks),
        "models": dict(models),
        "code": code(),
    }


def code() -> dict[str, Any]:
    """Of this package: hashes of what makes answers and scores; git's commit for the reader."""
    state, _ = code_state(Path(__file__).resolve().parent)
    hashes = {"answers": code_hash(ANSWERS_CODE), "scores": code_hash(SCORES_CODE)}
    return {**hashes, "commit": state["commit"], "dirty": state["dirty"]}


def identity(manifest: Manifest) -> str:
    """12 hex digits over what the numbers depend on."""
    relevant = json.dumps(_relevant(manifest), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(relevant.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def _relevant(manifest: Manifest) -> dict[str, Any]:
    models = {name: _without(facts, OF_THE_MACHINE) for name, facts in manifest["models"].items()}
    top = {key: value for key, value in manifest.items() if key not in WHERE_AND_WHEN}
    return {**top, "models": models, "code": _without(manifest["code"], ("commit", "dirty"))}


def _without(facts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in names}


def answers_key(manifest: Manifest, model: str, task: str) -> str:
    """What the answers of one model to one task depend on; scorers and judges do not."""
    parts = {
        "generation": manifest["generation"],
        "repeats": manifest["repeats"],
        "task": _without(manifest["tasks"][task], ("scorers", "judge")),
        "model": _without(manifest["models"][model], OF_THE_MACHINE),
        "code": manifest["code"]["answers"],
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def of_model(manifest: Manifest, model: str) -> Manifest:
    """The part that holds for one model: what a run's folder keeps beside its scores."""
    return {**{key: value for key, value in manifest.items() if key != "models"}, "model": manifest["models"][model]}


# --- comparing --------------------------------------------------------------------------------------------------------


def differences(one: Manifest, other: Manifest, task: str) -> list[str]:
    """Why two models' numbers of a task are not comparable, as "engine: vllm / vlmsft builtin"; empty where they are.

    one, other: as `of_model` gives them, of the same or of different evaluations. The models themselves may differ, and
    so may tasks that only one of the two has; what a server doesn't say counts as the same.
    """
    return [f"{key}: {_short(first)} / {_short(second)}" for key, first, second in _differing(one, other, task)]


def _differing(one: Manifest, other: Manifest, task: str) -> Iterator[tuple[str, Any, Any]]:
    ours, theirs = (comparable_facts(each, task) for each in (one, other))
    for key in dict.fromkeys([*ours, *theirs]):
        first, second = ours.get(key), theirs.get(key)
        is_unsaid = key in ENGINE and (first is None or second is None)
        if first != second and not is_unsaid:
            yield key, first, second


def comparable_facts(manifest: Manifest, task: str) -> dict[str, Any]:
    """What `differences` looks at, flat; `manifest` as `of_model` gives it."""
    facts = {
        **{key: manifest["model"].get(key) for key in ENGINE},
        **{key: manifest[key] for key in ("generation", "limit", "repeats")},
        "task": manifest["tasks"][task],
        "code": _without(manifest["code"], ("commit", "dirty")),
    }
    return flatten(facts)


def engine_problems(manifest: Manifest, base: str) -> list[Problem]:
    """Models of one evaluation that another engine computes than `base`'s: one problem for each."""
    problems = []
    theirs = of_model(manifest, base)
    task = next(iter(manifest["tasks"]))
    for name in manifest["models"]:
        found = differences(of_model(manifest, name), theirs, task)
        if found:
            expected = f"what computes {base}"
            remedy = "Serve both alike, or force=true compares all the same"
            problems.append(Problem(f"models: {name} / {base}", "; ".join(found), expected, remedy))
    return problems


def folder_problems(kept: Manifest, new: Manifest, folder: Path) -> list[Problem]:
    """Why `new` can't go into a folder that holds `kept`. Models and tasks may be added, not changed."""
    old, now = _relevant(kept), _relevant(new)
    pairs = [("", _without(old, ("models", "tasks")), _without(now, ("models", "tasks")))]
    for kind in ("models", "tasks"):
        both = old[kind].keys() & now[kind].keys()
        pairs += [(f"{kind}.{name}", old[kind][name], now[kind][name]) for name in sorted(both)]
    problems = []
    for prefix, first, second in pairs:
        flat, flat_now = flatten(first, prefix), flatten(second, prefix)
        for key in dict.fromkeys([*flat, *flat_now]):
            if flat.get(key) != flat_now.get(key):
                expected = f"{_short(flat.get(key))} as in {folder}"
                problems.append(Problem(key, _short(flat_now.get(key)), expected, "Another id, or id=null"))
    return problems


def merged(kept: Manifest, new: Manifest) -> Manifest:
    """`new` with the models and tasks that only `kept` has."""
    both = {kind: {**kept[kind], **new[kind]} for kind in ("models", "tasks")}
    return {**new, **both, "created": kept["created"]}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
