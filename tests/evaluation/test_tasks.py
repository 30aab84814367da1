"""Tasks: their YAML, and what becomes of records, data sets and pictures."""

from __future__ import annotations

import base64
import io
import json

import pytest
from evaluation_toys import defaults, questions, write_task
from PIL import Image

from vlmsft.config_files import register_resolvers, root, sample_set
from vlmsft.errors import UserError
from vlmsft.evaluation.builtin import messages_of
from vlmsft.evaluation.store import Store
from vlmsft.evaluation.tasks import (
    data_url,
    fingerprint,
    load_questions,
    read_task,
    read_tasks,
    store_samples,
    task_names,
)

CONF_TASK = root() / "conf" / "task"


def read(path):
    return read_task(path, defaults("task_defaults"), defaults("scorers"))


def load(path, limit=None):
    return load_questions(read(path), limit)


def picture(color, kind="PNG", size=(6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(picture(color))
    return tmp_path


def test_every_task_can_be_read():
    register_resolvers()
    names = task_names([CONF_TASK])
    assert "sample" in names
    for name in names:
        assert read(CONF_TASK / f"{name}.yaml").name == name


def test_the_sample_task_has_all_of_the_validation_set():
    register_resolvers()
    questions = load(CONF_TASK / "sample.yaml")
    lines = [json.loads(line) for line in open(f"{sample_set()}/validation.jsonl")]  # noqa: SIM115
    assert len(questions) == len(lines) == 48
    for question, line in zip(questions, lines, strict=True):
        assert question.sample.references == (line["conversations"][1]["value"],)
        assert question.sample.prompt == line["conversations"][0]["value"].replace("<image>\n", "<image>")
        assert [path.name for path in question.pictures] == [line["image"]]


def test_names_paths_and_the_nearest(tmp_path):
    own = write_task(tmp_path / "mine", questions(1), "quiz")
    arguments = ([tmp_path / "mine"], defaults("task_defaults"), defaults("scorers"))
    tasks, problems = read_tasks(["quiz"], *arguments)
    assert [task.name for task in tasks] == ["quiz"] and problems == []
    tasks, problems = read_tasks([str(own), "quiz", "quizz", "no/such.yaml"], *arguments)
    said = "\n".join(map(str, problems))
    assert "Did you mean 'quiz'?" in said and "no/such.yaml, which is no file" in said and "quiz twice" in said


def test_unknown_keys_and_scorers_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no such key.*Did you mean 'prompt'"):
        read(write_task(tmp_path, questions(1), promt="x"))
    with pytest.raises(UserError, match=r"no such scorer.*Did you mean 'rouge_l'"):
        read(write_task(tmp_path, questions(1), scorers=["rougel"]))


def test_a_task_changes_keys_of_scorers_and_brings_its_own(tmp_path):
    own = {"exact_match": {"ignore": "。"}, "mine": {"_target_": "my.Scorer", "x": 1}}
    scorers = read(write_task(tmp_path, questions(1), scorers=own)).config["scorers"]
    assert scorers["exact_match"] == {**defaults("scorers")["exact_match"], "ignore": "。"}
    assert scorers["mine"] == {"_target_": "my.Scorer", "x": 1}


def test_template_choices_and_pictures(photos):
    records = [
        {"q": "どれ？", "c": ["犬", "猫"], "answer": 1, "pic": "a.png", "level": "easy"},
        {"q": "<image>と<image>", "c": ["x", "y", "z"], "answer": "C", "pic": ["a.png", "b.png"]},
        {"q": "文字だけ", "c": ["赤", "青"], "answer": "赤", "pic": None},
    ]
    template = "{{ q }}\n{% for letter, text in options.items() %}{{ letter }}. {{ text }}\n{% endfor %}"
    keys = {"image_columns": ["pic"], "reference_column": "answer", "options_column": "c", "image_folder": "."}
    loaded = load(write_task(photos, records, prompt=template, **keys))
    samples = [question.sample for question in loaded]
    assert samples[0].prompt == "<image>どれ？\nA. 犬\nB. 猫" and samples[0].options == {"A": "犬", "B": "猫"}
    assert [sample.references for sample in samples] == [("B",), ("C",), ("A",)]
    assert samples[0].fields["level"] == "easy" and [sample.id for sample in samples] == ["0", "1", "2"]
    content = messages_of(loaded[1])[0]["content"]
    assert [part["type"] for part in content] == ["image_url", "text", "image_url", "text"]
    sent = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert [base64.b64decode(url.split(",")[1]) for url in sent] == [picture("red"), picture("blue")]
    assert messages_of(loaded[2]) == [{"role": "user", "content": samples[2].prompt}]


def test_a_conversation_keeps_its_turns(photos):
    turns = [("human", "<image>\n何？"), ("gpt", "赤"), ("human", "本当？"), ("gpt", "はい")]
    record = {"image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    (question,) = load(write_task(photos, [record], prompt=None, image_folder="."))
    assert question.sample.references == ("はい",)
    messages = messages_of(question)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert [message["content"] for message in messages[1:]] == ["赤", "本当？"]


def test_a_parquet_file_with_pictures_inside(tmp_path):
    import datasets

    rows = {"question": ["何色？", "文字"], "reference": ["赤", "x"], "image": [Image.new("RGB", (5, 5), "red"), None]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.yaml").write_text('data: t.parquet\nprompt: "{{ question }}"\nscorers: [exact_match]\n')
    task = read(tmp_path / "t.yaml")
    loaded = load_questions(task, None)
    store = Store(tmp_path / "evaluation")
    store_samples(task, loaded, store)
    first, second = store.samples("t")
    assert first.prompt == "<image>何色？" and second.images == ()
    with Image.open(store.folder / first.images[0]) as image:
        assert image.size == (5, 5) and image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert messages_of(loaded[0])[0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_all_problems_of_the_records_at_once(photos):
    (photos / "torn.png").write_bytes(b"no picture")
    records = [
        {"question": "x", "reference": "y", "image": "nope.png"},
        {"question": "x", "reference": "y", "image": "torn.png"},
        {"reference": "y"},
        {"question": "<image><image>", "image": "a.png"},
        {"question": "x", "reference": "y", "image": 3},
    ]
    with pytest.raises(UserError) as error:
        load(write_task(photos, records, image_folder="."))
    places = sorted(problem.where.rpartition(":")[2] for problem in error.value.problems)
    assert places == ["1", "2", "3", "4", "5"]


def test_the_same_id_twice(tmp_path):
    with pytest.raises(UserError, match="the id 'q0' twice"):
        load(write_task(tmp_path, questions(1) * 2))


def test_the_fingerprint_is_of_content(tmp_path):
    def of(folder, color="red", text="何？", place="a.png"):
        folder.mkdir()
        (folder / place).write_bytes(picture(color))
        records = [{"question": text, "reference": "y", "image": place}]
        return fingerprint(load(write_task(folder, records, image_folder=".")))

    first = of(tmp_path / "1")
    assert first["num_samples"] == 1
    assert of(tmp_path / "2") == first, "wherever it lies"
    assert of(tmp_path / "3", color="blue") != first
    assert of(tmp_path / "4", text="何色？") != first


def test_pictures_that_servers_do_not_read_are_sent_as_png():
    url = data_url(picture("red", "BMP"))
    assert url.startswith("data:image/png;base64,")
    assert (
        data_url(picture("red", "JPEG"))
        == "data:image/jpeg;base64," + base64.b64encode(picture("red", "JPEG")).decode()
    )
