"""Wrong data, sizes and overrides end before training with a message that names file, line or key and the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from config_cases import compose
from PIL import Image

from vlmsft.checks import find_problems
from vlmsft.config_files import root


def record(image: str | list[str] = "a.jpg", question: str = "<image>\n何ですか。", answer: str = "猫です。") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


class Data:
    """Two files of good records and a folder of images, to be broken by a test."""

    def __init__(self, folder: Path):
        self.train, self.validation, self.images = folder / "train.jsonl", folder / "val.jsonl", folder / "images"
        self.images.mkdir()
        for name in ("a.jpg", "b.jpg"):
            Image.effect_noise((64, 48), 50).save(self.images / name)
        self.write(self.train, record("a.jpg"), record("b.jpg"))
        self.write(self.validation, record("a.jpg"))

    @staticmethod
    def write(path: Path, *lines: dict | str) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")

    @property
    def overrides(self) -> list[str]:
        paths = {"train_path": self.train, "validation_path": self.validation, "image_folder": self.images}
        return ["experiment=demo", *(f"data.{key}={path}" for key, path in paths.items())]

    def problems(self, *overrides: str) -> list[str]:
        found = find_problems(compose(*self.overrides, *overrides))
        return [str(problem) for problem in found]


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path)


def test_good_data_has_no_problem(data):
    assert data.problems() == []


def test_missing_image_folder_is_named_once(data):
    (problem,) = data.problems("data.image_folder=/nowhere/images")
    assert problem.startswith("data.image_folder: found no folder '/nowhere/images', expected the folder")


def test_record_without_image_file(data):
    data.write(data.train, record(), record("nowhere.jpg"))
    (problem,) = data.problems()
    assert problem.startswith(f"{data.train}:2: found no such image file, expected image nowhere.jpg")
    assert "Check data.image_folder" in problem


def test_broken_json(data):
    data.write(data.train, record(), '{"image": "a.jpg", "conversations": [')
    data.validation.write_text('[{"image": "a.jpg"},\n {"image": ]\n')
    first, second = data.problems()
    assert first.startswith(f"{data.train}:2: found broken JSON") and "one whole JSON object" in first
    assert second.startswith(f"{data.validation}:2: found broken JSON") and "one whole JSON list" in second


def test_truncated_image(data):
    path = data.images / "b.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (problem,) = data.problems()
    assert problem.startswith(f"{data.train}:2") and str(path) in problem and "truncated" in problem


@pytest.mark.parametrize(
    ("image", "question", "found"),
    [
        ("a.jpg", "<image><image>\n比べてください。", "2 <image> for 1 image(s)"),
        (["a.jpg", "b.jpg"], "<image>\n何ですか。", "1 <image> for 2 image(s)"),
        ("a.jpg", "何ですか。", "0 <image> for 1 image(s)"),
    ],
)
def test_image_token_count(data, image, question, found):
    data.write(data.train, record(), record(image, question))
    (problem,) = data.problems()
    assert problem.startswith(f"{data.train}:2: found {found}, expected as many markers as images. Write <image> into")


def test_many_problems_of_a_file_are_cut_short(data):
    data.write(data.train, *(record(f"nowhere{number}.jpg") for number in range(50)))
    problems = data.problems()
    assert len(problems) == 21 and "30 more like these" in problems[-1]


def test_missing_files_are_named_with_their_keys(data):
    problems = data.problems("data.train_path=/nowhere/t.jsonl", "data.validation_path=/nowhere/v.jsonl")
    assert [problem.split(":")[0] for problem in problems] == ["data.train_path", "data.validation_path"]


def test_everything_at_once(data):
    data.write(data.train, "{", record("nowhere.jpg"))
    problems = data.problems(
        "strategy.tensor_model_parallel_size=3",
        "trainer.devices=3",
        "data.global_batch_size=7",
        "data.micro_batch_size=2",
        "strategy.pipeline_model_parallel_size=2",
        "strategy.context_parallel_size=2",
        "strategy.expert_model_parallel_size=2",
        "trainer.val_check_interval=0.5",
    )
    text = "\n".join(problems)
    for expected in (
        f"{data.train}:1: found broken JSON",
        f"{data.train}:2: found no such image file",
        "strategy.tensor_model_parallel_size: found 3, expected a divisor of",
        "data.global_batch_size: found 7, expected a multiple of 2",
        "strategy.pipeline_model_parallel_size: found 2, expected 1. No test covers it yet",
        "strategy.context_parallel_size: found 2, expected 1",
        "strategy.expert_model_parallel_size: found 2, expected 1",
        "trainer.val_check_interval: found 0.5, expected a whole number of steps",
    ):
        assert expected in text
    assert len(problems) == 8


def test_answer_behind_the_length_limit(data):
    data.write(data.train, record(), record(question="<image>\n" + "長い質問です。" * 40))
    (problem,) = data.problems("data.decoder_seq_length=128")
    assert problem.startswith(f"{data.train}:2: found") and "data.decoder_seq_length" in problem
    assert data.problems("data.decoder_seq_length=512") == []


def test_processor_that_cannot_be_loaded(data, tmp_path, monkeypatch):
    import transformers

    tried = []
    load = transformers.AutoProcessor.from_pretrained
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda path: tried.append(path) or load(path))
    (tmp_path / "processor").mkdir()
    (problem,) = data.problems(f"processor={tmp_path / 'processor'}")
    assert problem.startswith("processor: found") and str(tmp_path / "processor") in problem
    assert len(tried) == 1


def test_images_that_are_not_decoded_are_counted(data, capsys):
    path = data.images / "b.jpg"
    path.write_bytes(path.read_bytes()[:100])
    assert data.problems("data.verify_images=1") == []
    assert "2 images not decoded" in capsys.readouterr().out


def test_data_is_looked_through_once_for_all_jobs_of_a_multirun(data, monkeypatch):
    from vlmsft.data import records

    looked = []
    look = records.find_problems
    monkeypatch.setattr(records, "find_problems", lambda *a, **k: looked.append(a) or look(*a, **k))
    for rate in ("1e-3", "2e-3"):
        assert data.problems(f"optim.max_lr={rate}") == []
    assert len(looked) == 2  # training and validation
    data.write(data.train, "{")
    assert len(data.problems()) == 1, "a file that was put right, or broken, is looked through again"


def test_a_slow_look_through_the_data_says_so(data, monkeypatch, capsys):
    from vlmsft import checks

    monkeypatch.setattr(checks, "SLOW_SECONDS", 0.0)
    data.problems()
    assert f"looking through {data.train} ..." in capsys.readouterr().out


def test_processes_that_torchrun_started(data):
    (problem,) = find_problems(compose(*data.overrides, "data.micro_batch_size=8"), world_size=2)
    assert str(problem).startswith("trainer.devices: found 1 with trainer.num_nodes, expected 2 processes in all")


# --- the commands themselves ------------------------------------------------------------------------------------------


def test_wrong_names_from_the_shell(tmp_path):
    arguments = ["experiment=demo", "optim.max_lrr=1", "model=mllama_12b"]
    environment = {**os.environ, "PYTHONPATH": str(root())}
    done = subprocess.run(
        [sys.executable, "-m", "vlmsft.train", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Did you mean 'optim.max_lr'?" in done.stderr and "expected one of mllama_11b" in done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing was started"


@pytest.fixture
def train(run_main, monkeypatch, tmp_path):
    """Runs the train command in this process: exit code and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        from vlmsft.train import main

        code, out, message = run_main(main, *arguments)
        return code, out + message

    return run


@pytest.mark.nemo
def test_missing_values_are_named_with_the_way_to_set_them(train, tmp_path):
    code, text = train("trainer.accelerator=gpu")
    assert code == 2 and "Traceback" not in text and not (tmp_path / "runs").exists()
    for key in ("data.train_path", "data.validation_path", "data.image_folder", "restore_from"):
        assert f"{key}: found" in text and f"{key}=" in text, key


@pytest.mark.nemo
def test_config_types_and_data_in_one_message(train, data):
    data.write(data.train, "{")
    code, text = train(*data.overrides, "optim.max_lr=fast", "trainer.max_stepz=3", "data.global_batch_size=7")
    assert code == 2 and "Did you mean 'trainer.max_steps'?" in text
    code, text = train(*data.overrides, "optim.max_lr=fast", "+trainer.max_stepz=3", "data.global_batch_size=7")
    assert code == 2 and "Traceback" not in text
    for expected in ("optim.max_lr: found", "trainer.max_stepz", "data.global_batch_size: found 7", f"{data.train}:1"):
        assert expected in text
    assert "; nothing was started:" in text


@pytest.mark.nemo
def test_a_multirun_starts_nothing_when_one_job_is_wrong(train, data, tmp_path):
    code, text = train("-m", *data.overrides, "optim.max_lr=1e-3,fast", "trainer.val_check_interval=0.5")
    assert code == 2 and not (tmp_path / "runs" / "demo").exists() and not (tmp_path / "runs" / "sweeps").exists()
    assert "job 1 (optim.max_lr=fast): optim.max_lr: found 'fast'" in text
    assert text.count("trainer.val_check_interval: found 0.5") == 1, "said once for both jobs"


@pytest.mark.nemo
def test_machine_without_gpus(train, data):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    code, text = train(
        *data.overrides, "strategy=megatron", "precision=bf16-mixed", "trainer.accelerator=gpu", "trainer.devices=1"
    )
    assert code == 2 and "trainer.devices: found 1 GPUs, expected at most the 0 of this machine" in text
