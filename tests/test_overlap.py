"""Two data-parallel ranks that exchange gradients and weights beside their computation, of whom one sees no image.

Full fine-tuning of the tiny model in several buckets; the data is such that in every micro batch, in validation too,
one rank has a text alone and the other one an image. Where the ranks' orders differ, gloo pairs their buckets wrongly.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_cases import RUNS, Job, largest_difference, metrics, run_jobs

from vlmsft.config_files import sample_set

pytestmark = pytest.mark.nemo

STEPS = 4
DDP = "strategy.ddp={{_target_:megatron.core.distributed.DistributedDataParallelConfig,bucket_size:60000,{}}}"
OVERLAPS = {
    "gradients": DDP.format("overlap_grad_reduce:true"),
    "gradients-and-weights": DDP.format("overlap_grad_reduce:true,overlap_param_gather:true"),
    "weights": DDP.format("overlap_param_gather:true"),
}


def text(words: int) -> dict:
    answer = "いろはにほへと"[words % 7] * words
    return {"conversations": [{"from": "human", "value": f"{words}"}, {"from": "gpt", "value": answer}]}


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def data_of(folder: Path) -> list[str]:
    """A step has the four samples long text, image, image, short text: sorted by length, so they go to the ranks in
    two micro batches. Validation: an image for one rank, a text for the other."""
    lines = (Path(sample_set()) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    pictures = [record for record in map(json.loads, lines) if record.get("image")][: 2 * STEPS]
    sets = {
        "long": (write(folder / "long.jsonl", [text(100 + i) for i in range(STEPS)]), 1),
        "images": (write(folder / "images.jsonl", pictures), 2),
        "short": (write(folder / "short.jsonl", [text(1 + i) for i in range(STEPS)]), 1),
    }
    train = ",".join(f"{name}:{{path:{path},weight:{weight}}}" for name, (path, weight) in sets.items())
    mixed = [record for picture in pictures[:4] for record in (picture, text(5))]
    validation = write(folder / "validation.jsonl", mixed)
    return [
        f"data.train_path={{{train}}}",
        f"data.validation_path={validation}",
        f"data.image_folder={sample_set()}/images",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("overlap")
    overrides = [
        "experiment=demo",
        "trainer.callbacks.overfit=null",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS // 2}",
        "trainer.devices=2",
        "data.global_batch_size=4",
        "data.micro_batch_size=1",
        "optim.warmup_steps=0",
        "optim.max_lr=2e-3",
        "log.ckpt=null",
        *data_of(folder),
    ]
    jobs = [Job("plain", overrides), *(Job(name, [*overrides, ddp]) for name, ddp in OVERLAPS.items())]
    run_jobs(folder, jobs, num_processes=2)
    return folder / RUNS


@pytest.mark.parametrize("name", OVERLAPS)
def test_losses_do_not_depend_on_when_ranks_communicate(runs, name):
    plain, found = metrics(runs / "plain"), metrics(runs / name)
    assert len(plain["reduced_train_loss"]) == STEPS and plain["val_loss"][-1] < plain["val_loss"][0]
    for column in ("reduced_train_loss", "val_loss", "grad_norm"):
        difference = largest_difference(found[column], plain[column])
        print(f"{column} differs by {difference:.1e}")
        assert difference < 1e-5, column
