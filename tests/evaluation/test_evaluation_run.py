"""An evaluation from end to end, on the real builtin server with the tiny model and on a scripted one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from config_cases import compose
from evaluation_toys import last_text, questions, scripted, write_task
from omegaconf import OmegaConf

from vlmsft.config_files import root, sample_set
from vlmsft.errors import UserError
from vlmsft.evaluate import plan_of
from vlmsft.evaluation.run import evaluate
from vlmsft.evaluation.store import Answer, Store


def _fixtures_of(folder):
    """Those of another folder's conftest.py, which can't be imported by its name."""
    path = Path(__file__).parents[1] / folder / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_conftest", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_serving = _fixtures_of("serving")
hf_folder, loaded, generator = _serving.hf_folder, _serving.loaded, _serving.generator
serving, tiny_settings, url = _serving.serving, _serving.settings, _serving.url
settings = tiny_settings


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command in an empty folder; gives (exit code, the evaluation's folder)."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides, models, tasks):
        cfg = OmegaConf.merge(compose(config_name="evaluate"), OmegaConf.from_dotlist(list(overrides)))
        cfg = OmegaConf.merge(cfg, {"models": models, "tasks": tasks})
        before = set(Path("evaluations").glob("*"))
        code = evaluate(plan_of(cfg, [root() / "conf" / "task"]))
        new = [path for path in Path("evaluations").glob("*/manifest.json") if path.parent not in before]
        folders = new or list(Path("evaluations").glob("*/manifest.json"))
        return code, folders[0].parent

    return run


def right(body, number):
    """The answer to question N is N."""
    return last_text(body).split()[-1]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_sample_task_on_the_real_server(run, url, loaded, capsys):
    """Answers are those of the generator itself; the table and the manifest have what they must."""
    from vlmsft.data.encode import load_image
    from vlmsft.generation.generate import Generator, Prompt, Sampling

    code, folder = run("limit=3", "generation.max_new_tokens=4", models={"tiny": f"{url}/v1"}, tasks=["sample"])
    assert code == 0 and "sample" in capsys.readouterr().out
    answers = Store(folder).answers("tiny", "sample")
    image = load_image(f"{sample_set()}/images/astronaut.jpg")
    texts = [record["conversations"][0]["value"] for record in rows(Path(sample_set(), "validation.jsonl"))[:3]]
    prompts = [Prompt.from_text(text, [image]) for text in texts]
    expected = Generator(loaded).generate(prompts, Sampling(max_new_tokens=4))
    assert [answers[str(index), 0].answer for index in range(3)] == [answer.text for answer in expected]
    assert {answer.finish_reason for answer in answers.values()} == {answer.finish_reason for answer in expected}
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = manifest["models"]["tiny"]
    assert facts["engine"] == "vlmsft builtin" and facts["transformers"] == "4.57.6" and facts["engine_version"]
    results = json.loads((folder / "results.json").read_text())
    assert results["tiny"]["sample"]["exact_match"]["num"] == 3
    assert {row["metric"] for row in rows(folder / "scores.jsonl")} == {"exact_match", "containment"}


def test_the_same_command_asks_nothing_again(run, tmp_path):
    task = write_task(tmp_path / "t", questions(5))
    with scripted(right) as server:
        code, folder = run(models={"a": server.url}, tasks=[str(task)])
        assert code == 0 and len(server.asked) == 5
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert run(models={"a": server.url}, tasks=[str(task)]) == (0, folder)
        assert len(server.asked) == 5
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert {name: data for name, data in after.items() if name != "manifest.json"} == {
            name: data for name, data in before.items() if name != "manifest.json"
        }


def test_the_request_is_what_the_config_says(run, tmp_path):
    task = write_task(tmp_path / "t", questions(1))
    options = ["generation.temperature=0.5", "generation.stop=[x]", "generation.seed=7", "repeats=2"]
    with scripted(right) as server:
        run(*options, models={"a": server.url}, tasks=[str(task)])
    message = {"role": "user", "content": "question 0"}
    common = {
        "model": "toy",
        "messages": [message],
        "max_tokens": 1024,
        "temperature": 0.5,
        "top_p": 1.0,
        "stop": ["x"],
    }
    assert sorted(server.asked, key=lambda body: body["seed"]) == [{**common, "seed": 7}, {**common, "seed": 8}]


def test_errors_are_recorded_counted_and_asked_again(run, tmp_path, capsys):
    task = write_task(tmp_path / "t", questions(6))
    broken = {"1", "4"}

    def reply(body, number):
        return 500 if right(body, 0) in broken else right(body, 0)

    with scripted(reply) as server:
        code, folder = run("num_attempts=2", models={"a": server.url}, tasks=[str(task)])
        assert code == 1 and len(server.asked) == 4 + 2 * 2
        answers = Store(folder).answers("a", "toy")
        assert {id for (id, _), answer in answers.items() if answer.error} == {"q1", "q4"}
        said = capsys.readouterr().out
        assert "2 without an answer, the last: InternalServerError" in said and "same command asks again" in said
        found = json.loads((folder / "results.json").read_text())["a"]["toy"]["exact_match"]
        assert (found["score"], found["num"], found["num_missing"]) == (100, 4, 2)
        broken.clear()
        server.asked.clear()
        assert run("num_attempts=2", models={"a": server.url}, tasks=[str(task)])[0] == 0
        assert sorted(map(last_text, server.asked)) == ["question 1", "question 4"]
        found = json.loads((folder / "results.json").read_text())["a"]["toy"]["exact_match"]
        assert (found["score"], found["num"], found["num_missing"]) == (100, 6, 0)


def test_a_passing_error_is_no_error(run, tmp_path):
    task = write_task(tmp_path / "t", questions(3))
    with scripted(lambda body, number: 429 if number == 0 else right(body, number)) as server:
        assert run("concurrency=1", models={"a": server.url}, tasks=[str(task)])[0] == 0
        assert len(server.asked) == 4


def test_an_endpoint_that_is_gone_ends_it_with_answers_kept(run, tmp_path):
    task = write_task(tmp_path / "t", questions(60))
    options = ["num_attempts=1", "concurrency=1"]
    with scripted(lambda body, number: right(body, number) if number < 10 else 503) as server:
        with pytest.raises(UserError, match="20 errors in a row, the last: InternalServerError") as error:
            run(*options, models={"a": server.url}, tasks=[str(task)])
        assert "same command goes on" in error.value.state
        assert len(server.asked) == 30
        server.reply = right
        server.asked.clear()
        assert run(*options, models={"a": server.url}, tasks=[str(task)])[0] == 0
        assert len(server.asked) == 50


def test_a_judge_that_fails_leaves_scores_missing_until_the_next_start(run, tmp_path, capsys):
    task = write_task(tmp_path / "t", questions(4), scorers=["judge"])
    is_broken = True

    def verdict(body, number):
        text = last_text(body)
        if is_broken and "question 1" in text:
            return 500
        return "no idea" if is_broken and "question 2" in text else "4"

    with scripted(right) as server, scripted(verdict) as judge:
        options = [f"judge.base_url={judge.url}", "judge.api_key_variable=null", "judge.num_attempts=2"]
        code, folder = run(*options, models={"a": server.url}, tasks=[str(task)])
        found = json.loads((folder / "results.json").read_text())["a"]["toy"]["judge"]
        assert code == 1 and (found["score"], found["num"], found["num_missing"]) == (4, 2, 2)
        assert "2 scores missing, the last: no verdict in the judge's reply: 'no idea'" in capsys.readouterr().out
        is_broken = False
        judge.asked.clear()
        code, folder = run(*options, models={"a": server.url}, tasks=[str(task)])
        found = json.loads((folder / "results.json").read_text())["a"]["toy"]["judge"]
        assert code == 0 and (found["score"], found["num"], found["num_missing"]) == (4, 4, 0)
        assert len(judge.asked) == 2 and len(server.asked) == 4
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["tasks"]["toy"]["judge"]["base_url"] == judge.url


def test_questions_that_a_server_refuses_do_not_end_it(run, tmp_path):
    """Too long for the model, say: their own errors, however many in a row; at the next start the others come first."""
    task = write_task(tmp_path / "t", questions(40))
    options = ["num_attempts=1", "concurrency=1"]
    refuses = lambda body, number: 400 if int(right(body, number)) < 30 else right(body, number)  # noqa: E731
    with scripted(refuses) as server:
        code, folder = run(*options, models={"a": server.url}, tasks=[str(task)])
        assert code == 1 and len(server.asked) == 40
        path = Store(folder).answers_path("a", "toy")
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows(path)[:35]))  # five not asked
        server.asked.clear()
        run(*options, models={"a": server.url}, tasks=[str(task)])
        assert [int(right(body, 0)) for body in server.asked] == [*range(35, 40), *range(30)]


def test_answers_of_another_evaluation_are_taken_over(run, tmp_path, capsys):
    """Another scorer, or a model more, is another evaluation; nothing is asked twice for it."""
    task = write_task(tmp_path / "t", questions(4))
    with scripted(right) as server, scripted(lambda body, number: "0") as other:
        _, first = run(models={"a": server.url}, tasks=[str(task)])
        write_task(tmp_path / "t", questions(4), scorers=["containment"])
        code, second = run(models={"a": server.url, "b": other.url}, tasks=[str(task)])
        assert code == 0 and second != first
        assert (len(server.asked), len(other.asked)) == (4, 4)
        assert f"a, toy: answers of evaluation {first.name}" in capsys.readouterr().out
        run("generation.temperature=0.1", models={"a": server.url}, tasks=[str(task)])
        assert len(server.asked) == 8, "other parameters, other answers"
        run("limit=4", "reuse_answers=false", models={"a": server.url}, tasks=[str(task)])
        assert len(server.asked) == 12


def test_a_given_id_takes_more_models_but_no_other_settings(run, tmp_path):
    task = str(write_task(tmp_path / "t", questions(3)))
    with scripted(right) as server, scripted(lambda body, number: "0") as other:
        run("id=mine", models={"a": server.url}, tasks=[task])
        _, folder = run("id=mine", models={"b": other.url}, tasks=[task])
        assert (len(server.asked), len(other.asked)) == (3, 3)
        assert {row["model"] for row in rows(folder / "scores.jsonl")} == {"a", "b"}
        results = json.loads((folder / "results.json").read_text())
        assert results["b"]["toy"]["exact_match"]["delta"] == pytest.approx(-200 / 3), "against the base it had"
        before = (folder / "manifest.json").read_bytes()
        with pytest.raises(UserError) as error:
            run("id=mine", "generation.temperature=1", "repeats=2", models={"a": server.url}, tasks=[task])
        assert {problem.where for problem in error.value.problems} == {"generation.temperature", "repeats"}
        assert (folder / "manifest.json").read_bytes() == before


def test_other_engines_are_not_compared_without_force(run, tmp_path, capsys):
    task = str(write_task(tmp_path / "t", questions(2)))
    vllm = {"owned_by": "vllm"}
    with scripted(right) as server, scripted(right, vllm, {"/version": {"version": "0.10.2"}}) as other:
        models = {"a": server.url, "b": other.url}
        with pytest.raises(UserError) as error:
            run(models=models, tasks=[task])
        (problem,) = error.value.problems
        assert problem.where == "models: b / a" and "engine: vllm / vlmsft builtin" in problem.found
        assert server.asked == other.asked == [] and not Path("evaluations").exists()
        code, _ = run("force=true", models=models, tasks=[task])
        assert code == 0
        assert "warning: b (vllm 0.10.2): tokens in front of the first image" in " ".join(
            capsys.readouterr().out.split()
        )


def test_all_problems_at_once_and_nothing_is_asked(run, tmp_path):
    good = write_task(tmp_path / "t", questions(2))
    bad = write_task(tmp_path / "t", [{"question": "x"}], "bad", prompt="{{ nothing }}", scorers=["judge"])
    with scripted(right) as server:
        models = {"a": server.url, "b": "http://127.0.0.1:9/v1", "c": "nowhere"}
        with pytest.raises(UserError) as error:
            run("repeats=0", "base=z", "judge.model=null", models=models, tasks=[str(good), str(bad), "sampel"])
        assert server.asked == []
    places = [problem.where for problem in error.value.problems]
    assert {"repeats", "base", "judge", "models.c", "http://127.0.0.1:9/v1/models", "tasks"} <= set(places)
    assert any(place.endswith("bad.jsonl:1") for place in places)
    assert "Did you mean 'sample'?" in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("generation.stop=x", "generation.stop: found 'x', expected a list of texts"),
        ("force=3", "force: found 3, expected true or false"),
        ("judge.base_url=null", "judge.base_url: found None, expected a text"),
        ("id=3", """id: found 3, expected a text or null. Quote it: id='"3"'"""),
        ("output=null", "output: found None, expected a text"),
        ("id=a/b", "id: found 'a/b', expected a folder's name"),
        ("judge=null", "judge: found None, expected a mapping"),
        ("timeout_seconds=.nan", "timeout_seconds: found nan, expected a number of at least 0.1"),
    ],
)
def test_values_of_another_kind_are_named(run, override, said):
    with pytest.raises(UserError) as error:
        run(override, models={"a": "http://127.0.0.1:9/v1"}, tasks=["sample"])
    assert said in str(error.value)


@pytest.mark.parametrize("tasks", [3, [3], []])
def test_tasks_that_are_no_names(run, tasks):
    with pytest.raises(UserError, match=r"tasks: found .*, expected a list with at least one task"):
        run(models={"a": "http://127.0.0.1:9/v1"}, tasks=tasks)


def test_a_dry_run_counts_and_asks_nothing(run, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    task = str(write_task(tmp_path / "t", questions(7), scorers=["exact_match", "judge"]))
    with scripted(right) as server:
        options = ["dryrun=true", "repeats=3", "limit=5"]
        cfg = OmegaConf.merge(compose(config_name="evaluate"), OmegaConf.from_dotlist(options))
        cfg = OmegaConf.merge(cfg, {"models": {"a": server.url, "b": server.url}, "tasks": [task]})
        assert evaluate(plan_of(cfg, [])) == 0
        assert server.asked == []
    assert not Path("evaluations").exists(), "nothing is written"
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert table[1][:5] == ["a", "toy", "5", "15", "15"] and table[3][:4] == ["all", "10", "30", "30"]
    assert 2000 < int(table[1][5].replace(",", "")) < 10000, "about 300 tokens each, the instructions' most of all"


@pytest.fixture
def written(tmp_path):
    """Writes a score to the run of a checkpoint; gives what then is in its folder."""
    from evaluation_toys import settings

    from vlmsft.evaluation.models import Model, Serve
    from vlmsft.evaluation.run import Plan, write_to_runs

    run_dir = tmp_path / "runs" / "demo" / "1"
    models = [Model("demo", "demo", run_dir / "checkpoints" / "x", run_dir=run_dir), Model("u", "http://x")]
    serve = Serve("cpu", "auto", None, 1, 1)
    plan = Plan(models, [], settings(), serve, 1, "demo", None, tmp_path, False, True, False)
    manifest = {"id": "abc", "generation": {}, "models": {"demo": {"engine": "e"}, "u": {}}}

    def written(score):
        numbers = {"score": score, "num": 2, "num_missing": 0, "interval": [0, 1]}
        write_to_runs(plan, manifest, {"demo": {"t": {"m": numbers}}, "u": {"t": {"m": numbers}}})
        return json.loads((run_dir / "evaluation" / "abc.json").read_text())

    return written


def test_scores_are_written_to_the_runs_of_checkpoints(written, capsys):
    assert written(1.0) == {
        "id": "abc",
        "manifest": {"id": "abc", "generation": {}, "model": {"engine": "e"}},
        "scores": {"t": {"m": {"score": 1.0, "num": 2, "num_missing": 0}}},
        "in_wandb": False,
    }
    assert capsys.readouterr().err == ""


def test_scores_go_to_wandb_once_and_its_failure_is_only_named(written, monkeypatch, capsys):
    from vlmsft.runtime import wandb_scores

    logged = []

    def fail(run_dir, scores):
        raise ConnectionError("no route\nto host")

    def log(run_dir, scores):
        logged.append((Path(run_dir).name, scores["t"]["m"]["score"]))
        return True

    monkeypatch.setattr(wandb_scores, "log_scores", fail)
    assert written(1.0)["in_wandb"] is False
    assert "demo: its scores are not in W&B (no route); the same command logs them" in capsys.readouterr().out
    monkeypatch.setattr(wandb_scores, "log_scores", log)
    for score in (1.0, 1.0, 2.0):
        assert written(score)["in_wandb"] is True
    assert logged == [("1", 1.0), ("1", 2.0)]


def test_a_run_folder_that_can_not_be_written_is_named(written, tmp_path, capsys):
    (tmp_path / "runs").write_text("")
    with pytest.raises(OSError):
        written(1.0)
    assert "demo: its scores are not in its run's folder" in capsys.readouterr().out


def test_one_evaluate_at_a_time_in_a_folder(run, tmp_path):
    from filelock import FileLock

    task = str(write_task(tmp_path / "t", questions(1)))
    with scripted(right) as server:
        _, folder = run(models={"a": server.url}, tasks=[task])
        with FileLock(folder / ".lock"), pytest.raises(UserError, match="another evaluate works in"):
            run(models={"a": server.url}, tasks=[task])


def test_a_torn_last_line_is_asked_again(run, tmp_path):
    task = str(write_task(tmp_path / "t", questions(3)))
    with scripted(right) as server:
        _, folder = run(models={"a": server.url}, tasks=[task])
        path = Store(folder).answers_path("a", "toy")
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        server.asked.clear()
        assert run(models={"a": server.url}, tasks=[task])[0] == 0
        assert len(server.asked) == 1
        assert len(rows(path)) == 3 and Answer(**rows(path)[2]).error is None
