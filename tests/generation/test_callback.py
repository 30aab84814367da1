"""Validation answers in real trainings: they disturb nothing, and are what the checkpoint answers when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_cases import RUNS, Job, last_checkpoint, metrics, run_jobs

from vlmsft.config_files import sample_set

pytestmark = pytest.mark.nemo

DEMO = ["experiment=demo", "trainer.callbacks.overfit=null", "optim.warmup_steps=2", "optim.max_lr=4e-3"]
SHORT = ["data.global_batch_size=4", "trainer.max_steps=6", "trainer.val_check_interval=3"]
TOKENS = 12
ON = ["trainer.callbacks.answers.num_samples=3", f"trainer.callbacks.answers.max_new_tokens={TOKENS}"]
OFF = ["trainer.callbacks.answers=null"]
LORA = ["peft=lora", "peft.dropout=0.2", "optim.max_lr=2e-2"]  # dropout: a random number drawn in between would show
TWO_RANKS = "trainer.devices=2"


class Runs:
    def __init__(self, folder: Path):
        self.folder = folder
        one, two = [*DEMO, *SHORT, "data.micro_batch_size=4"], [*DEMO, *SHORT, "data.micro_batch_size=2", TWO_RANKS]
        start = [*DEMO, *OFF, "trainer.max_steps=40", "trainer.val_check_interval=40"]
        run_jobs(
            folder,
            [
                Job("start", start),
                Job("full", [*one, *ON, "log=wandb", "log.wandb.offline=true"], weights_from="start"),
                Job("full-off", [*one, *OFF], weights_from="start"),
                Job("lora", [*one, *ON, *LORA], weights_from="start"),
                Job("lora-off", [*one, *OFF, *LORA], weights_from="start"),
            ],
        )
        tensor_parallel = "strategy.tensor_model_parallel_size=2"
        run_jobs(
            folder,
            [
                Job("tp2", [*two, *ON, tensor_parallel], weights_from="start"),
                Job("dp2", [*two, *ON], weights_from="start"),
            ],
            num_processes=2,
        )

    def of(self, name: str) -> Path:
        return self.folder / RUNS / name

    def answers(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.of(name) / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("answers"))


@pytest.mark.parametrize("name", ["full", "lora"])
def test_training_is_the_same_with_and_without(runs, name):
    mine, without = metrics(runs.of(name)), metrics(runs.of(f"{name}-off"))
    for column in ("reduced_train_loss", "val_loss", "grad_norm", "consumed_samples"):
        assert mine[column] == without[column], column
    assert not (runs.of(f"{name}-off") / "answers.jsonl").exists()


def test_file_holds_questions_references_and_pictures(runs):
    rows = runs.answers("full")
    assert [(row["step"], row["number"]) for row in rows] == [(step, n) for step in (3, 6) for n in range(3)]
    records = [json.loads(line) for line in (Path(sample_set()) / "validation.jsonl").read_text().splitlines()]
    for row, record in zip(rows, records[:3] * 2, strict=True):
        question, reference = (turn["value"] for turn in record["conversations"])
        assert (row["question"], row["reference"]) == (question.removeprefix("<image>\n"), reference)
        (image,) = row["image"]
        assert (runs.of("full") / image).stat().st_size > 500


def test_tensorboard_has_texts_and_pictures(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = runs.of("full").glob("tb_logs/**/events.out.tfevents.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert {f"answers/{n}/0" for n in range(3)} <= set(accumulator.Tags()["images"])
    (first, _) = accumulator.Tensors("answers/0/text_summary")
    text = first.tensor_proto.string_val[0].decode()
    assert first.step == 3 and runs.answers("full")[0]["question"] in text


def test_wandb_has_a_table_with_pictures(runs):
    tables = list(runs.of("full").glob("wandb/**/media/table/answers*.json"))
    assert tables
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["step", "question", "reference", "answer", "images"]
    assert [row[4] for row in table["data"]] == [["Image"]] * 3  # the pictures are in what `wandb sync` uploads
    assert [row[1] for row in table["data"]] == [row["question"] for row in runs.answers("full")[:3]]


def test_tensor_parallel_ranks_answer_together(runs):
    assert runs.answers("tp2") == runs.answers("full")


def test_one_data_parallel_rank_answers(runs):
    rows = runs.answers("dp2")
    assert [(row["step"], row["number"]) for row in rows] == [(step, n) for step in (3, 6) for n in range(3)]
    assert all(row["answer"] for row in rows)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_loaded_checkpoint_gives_the_same_answers(runs, name, monkeypatch):
    """Megatron's model token by token without a cache; HF's repaired one, batched, padded on the left and with one."""
    from vlmsft.data.encode import load_image
    from vlmsft.generation.generate import Generator, Prompt, Sampling
    from vlmsft.generation.model import load_model

    monkeypatch.chdir(runs.folder)
    rows = [row for row in runs.answers(name) if row["step"] == 6]
    records = (Path(sample_set()) / "validation.jsonl").read_text().splitlines()
    images = [load_image(Path(sample_set()) / "images" / json.loads(line)["image"]) for line in records[:3]]
    prompts = [Prompt.from_text(row["question"], [image]) for row, image in zip(rows, images, strict=True)]
    generator = Generator(load_model(last_checkpoint(runs.of(name)), device="cpu"))
    answers = generator.generate(prompts, Sampling(TOKENS))
    assert [answer.text for answer in answers] == [row["answer"] for row in rows]
    assert any(row["answer"] for row in rows)
