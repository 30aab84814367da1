"""The command: what it asks, writes and refuses, and that it goes on where it was cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from config_cases import compose
from generation_toys import write_hf_folder

from vlmsft.config_files import root, sample_set
from vlmsft.errors import UserError
from vlmsft.generate import answer_file, answer_one, problems_of_keys, quote_texts

IMAGES = f"{sample_set()}/images"
QUESTIONS = [
    {"id": "a", "image": "cat.jpg", "prompt": "何が写っていますか？"},
    {"id": "b", "prompt": "text alone"},
    {
        "id": "c",
        "image": ["cat.jpg", "moon.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\n違いは？"},
            {"from": "gpt", "value": "猫と月です。"},
        ],
    },
    {"messages": [{"role": "user", "content": "no answer, no id, and a long text to be asked first"}]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads cost this model ten times what they save on a busy machine
    yield write_hf_folder(tmp_path_factory.mktemp("command") / "model")
    torch.set_num_threads(before)


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """answer_file on `records`, 4 tokens an answer; (exit code, lines of the output)."""
    monkeypatch.chdir(tmp_path)

    def run(records, *overrides):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        Path("questions.jsonl").write_text("\n".join(lines))
        files = ["input=questions.jsonl", "output=answers.jsonl", f"image_folder={IMAGES}"]
        options = [f"checkpoint={model}", "device=cpu", "max_new_tokens=4", "batch_size=2", *files, *overrides]
        code = answer_file(compose(*options, config_name="generate"))
        return code, [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]

    return run


def test_answers_are_in_the_files_order_with_all_that_was_asked(run, capsys):
    code, answers = run(QUESTIONS)
    assert code == 0
    assert [(answer["index"], answer["id"]) for answer in answers] == [(0, "a"), (1, "b"), (2, "c"), (3, None)]
    assert [answer["reference"] for answer in answers] == [None, None, "猫と月です。", None]
    assert answers[2]["prompt"] == "<image><image>違いは？" and answers[2]["image"] == ["cat.jpg", "moon.jpg"]
    cut = sum(answer["finish_reason"] == "length" for answer in answers)
    assert cut and f"{cut} of them cut at max_new_tokens = 4" in capsys.readouterr().out


def test_a_repeated_run_loads_nothing_and_changes_nothing(run, monkeypatch, capsys):
    run(QUESTIONS)
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    monkeypatch.setattr("vlmsft.generate.load", lambda cfg: pytest.fail("loaded"))
    assert run(QUESTIONS)[0] == 0
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
    assert "nothing was asked" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_a_killed_run_goes_on(run, monkeypatch, temperature):
    """After the first batch and half a line of the second; the answers are those of a run that wasn't killed."""
    from vlmsft.generation.generate import Generator

    _, whole = run(QUESTIONS, f"temperature={temperature}")
    lines = {line["index"]: json.dumps(line, ensure_ascii=False) for line in whole}
    first = [2, 0]  # most images first
    Path("answers.jsonl").write_text("".join(f"{lines[i]}\n" for i in first) + lines[3][:20])
    asked, generate = [], Generator.generate
    monkeypatch.setattr(
        Generator, "generate", lambda self, prompts, *a, **k: asked.extend(prompts) or generate(self, prompts, *a, **k)
    )
    assert run(QUESTIONS, f"temperature={temperature}")[1] == whole
    assert len(asked) == 2, "nothing is asked twice"


def test_other_settings_get_a_file_of_their_own(run):
    run(QUESTIONS)
    before = Path("answers.jsonl").read_bytes()
    with pytest.raises(UserError) as error:
        run(QUESTIONS[:2], "temperature=1", "stop=[x]")
    assert {problem.where for problem in error.value.problems} == {"temperature", "stop", "input_sha256"}
    assert Path("answers.jsonl").read_bytes() == before


def test_a_file_of_somebody_else_is_left_alone(run):
    Path("answers.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="without answers"):
        run(QUESTIONS)
    assert Path("answers.jsonl").read_text() == "mine\n" and not Path("answers.jsonl.settings.json").exists()


def test_all_problems_are_named_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr("vlmsft.generate.load", lambda cfg: pytest.fail("loaded"))
    records = [
        {"image": "nope.jpg", "prompt": "何？"},
        "{broken",
        {"prompt": ""},
        {"image": ["cat.jpg"], "conversations": [{"from": "human", "value": "<image><image>何？"}]},
    ]
    with pytest.raises(UserError) as error:
        run(records, "top_p=2", "dtype=int8")
    places = [problem.where.rpartition("/")[2] for problem in error.value.problems]
    assert sorted(places) == ["dtype", *(f"questions.jsonl:{line}" for line in (1, 2, 3, 4)), "top_p"]
    assert not Path("answers.jsonl").exists()


def test_an_image_that_breaks_later_fails_its_question_only(run, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    records = [*QUESTIONS, {"id": "bad", "image": str(tmp_path / "bad.jpg"), "prompt": "何？"}]
    code, answers = run(records, "verify_images=0")
    assert code == 1 and [answer["index"] for answer in answers] == [0, 1, 2, 3]
    out = capsys.readouterr().out
    assert "1 questions could not be asked" in out and "questions.jsonl:5" in out
    assert run(records, "verify_images=0")[0] == 1, "asked again, and failed again"


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([], "prompt, input"),
        (["prompt=a", "input=b", "output=c"], "prompt, input"),
        (["input=b"], "output"),
        (["input=b", "output=c", "image=d"], "image"),
        (["prompt=a", "batch_size=0"], "batch_size"),
    ],
)
def test_what_is_asked_must_be_clear(overrides, where):
    cfg = compose("checkpoint=x", *overrides, config_name="generate")
    assert [problem.where for problem in problems_of_keys(cfg)] == [where]


def test_a_missing_checkpoint_is_named():
    assert [p.where for p in problems_of_keys(compose("prompt=a", config_name="generate"))] == ["checkpoint"]


def test_one_question(model, capsys):
    options = [f"checkpoint={model}", "device=cpu", "max_new_tokens=3", f"image=[{IMAGES}/cat.jpg,{IMAGES}/moon.jpg]"]
    answer_one(compose(*options, "prompt=what", config_name="generate"))
    captured = capsys.readouterr()
    assert captured.out.endswith("\n") and "cut at max_new_tokens = 3" in captured.err


@pytest.mark.parametrize(
    "text", ["何ですか？", 'say "hi"', "a\\", 'x\\"y', "it's", "a, b: [c] {d}", "${x}", "12", "line\nbreak", ""]
)
def test_a_prompt_is_any_text(text):
    (quoted,) = quote_texts([f"prompt={text}"])
    assert compose("checkpoint=x", quoted, config_name="generate").prompt == text


def test_what_hydra_reads_itself_stays():
    arguments = ["prompt=null", "prompt='quoted'", "image=[a.jpg,b.jpg]", "output=a.jsonl", "top_p=0.5", "--cfg", "job"]
    assert quote_texts(arguments) == arguments
    assert quote_texts(["image=写真.jpg"]) == ['image="写真.jpg"']


def test_neither_nemo_nor_megatron_is_imported(model):
    code = (
        "import sys\n"
        "from vlmsft.generation import answers_file, ask, generate, model, questions\n"
        "print([name for name in ('nemo', 'megatron', 'lightning') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
