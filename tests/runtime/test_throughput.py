"""Speed as it is logged: with Lightning's real trainer, and the counts of a batch against the batch itself."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from runtime_toys import ToyData, ToyModel

from vlmsft.mllama.flops import Counts, count_batch, step_costs
from vlmsft.mllama.memory import Training
from vlmsft.mllama.sizes import TextShape, VisionShape
from vlmsft.runtime import throughput
from vlmsft.runtime.metrics import MetricsFile
from vlmsft.runtime.throughput import Throughput, counts_of, peak_flops

TEXT, VISION = TextShape(4, 2, 32, 64, 4, 2, 128), VisionShape(3, 2, 48, 56, 14, 2, 32)
BATCH = {
    "num_text_tokens": torch.tensor([10, 20]),
    "answer_rows": torch.arange(7),
    "num_tiles": torch.tensor([1, 4]),
    "visible_from": torch.tensor([2, 0]),
    "visible_until": torch.tensor([5, 20]),
    "data_wait_seconds": 0.05,
}
OF_BATCH = count_batch(VISION, text_tokens=[10, 20], num_answers=7, num_tiles=[1, 4], visible_rows=[3, 20])


class MLlamaLike(ToyModel):
    """A toy whose parameters and config look like an MLlama's, and which takes a step of two micro batches as NeMo."""

    def __init__(self):
        super().__init__()
        self.vision_model, self.vision_projection, self.language_model = (torch.nn.Linear(1, 1) for _ in range(3))
        self.vision_model.requires_grad_(False)
        text, vision = ({**vars(shape)} for shape in (TEXT, VISION))
        self.config = SimpleNamespace(
            language_model_config=SimpleNamespace(**text),
            vision_model_config=SimpleNamespace(**vision, intermediate_layers_indices=[0, 2]),
        )

    def training_step(self, batch, batch_idx):
        for callback in self.trainer.callbacks:
            if isinstance(callback, Throughput):
                for _ in range(2):
                    callback.on_megatron_microbatch_start(SimpleNamespace(trainer=self.trainer), BATCH)
        time.sleep(0.2)
        return super().training_step(batch, batch_idx)


def rows_of(toy_trainer, path, model, *callbacks, **options):
    trainer = toy_trainer(Throughput(), MetricsFile(path), *callbacks, **{"limit_val_batches": 0, **options})
    trainer.fit(model, ToyData())
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_counts_of_a_batch_are_those_of_its_host_tensors():
    assert counts_of(BATCH, VISION) == OF_BATCH
    none = {name: torch.zeros(0, dtype=torch.int64) for name in ("num_tiles", "visible_from", "visible_until")}
    assert counts_of({**BATCH, **none}, VISION) == Counts(text=30, text_pairs=250, answers=7)


def test_what_is_logged_at_each_step(toy_trainer, tmp_path):
    rows = rows_of(toy_trainer, tmp_path / "m.csv", MLlamaLike(), max_steps=3)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    flops = step_costs(TEXT, VISION, Training(tower=False)).of(OF_BATCH)
    for row in rows[1:]:
        seconds = float(row["step_seconds"])
        assert 0.2 < seconds < 1.0
        assert float(row["samples_per_second"]) == pytest.approx(4 / seconds, rel=1e-4)
        assert float(row["tokens_per_second"]) == pytest.approx(2 * 30 / seconds, rel=1e-4)
        assert float(row["tflops_per_second_per_gpu"]) == pytest.approx(2 * flops / seconds / 1e12, rel=1e-4)
        assert float(row["data_wait_fraction"]) == pytest.approx(0.1 / seconds, rel=1e-4)
        assert row["mfu"] == row["peak_memory_gib"] == "", "there is no GPU: not measured, so empty and not 0"


def test_means_over_the_steps_since_the_last_row(toy_trainer, tmp_path):
    rows = rows_of(toy_trainer, tmp_path / "m.csv", MLlamaLike(), max_steps=5, log_every_n_steps=2)
    assert [row["step"] for row in rows] == ["2", "4", "5"]
    for row in rows:
        assert 0.2 < float(row["step_seconds"]) < 1.0
        assert float(row["tokens_per_second"]) == pytest.approx(60 / float(row["step_seconds"]), rel=1e-4)


def test_validation_and_saving_are_left_out(toy_trainer, tmp_path):
    class Slow(Callback):
        def on_validation_end(self, *args):
            time.sleep(1.0)

    options = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1}
    rows = rows_of(toy_trainer, tmp_path / "m.csv", MLlamaLike(), Slow(), **options)
    assert max(float(row["step_seconds"]) for row in rows) < 0.9


def test_other_models_have_samples_only(toy_trainer, tmp_path):
    rows = rows_of(toy_trainer, tmp_path / "m.csv", ToyModel(), max_steps=2)
    assert all(float(row["samples_per_second"]) > 0 and row["tokens_per_second"] == "" for row in rows)


def test_validation_batches_are_not_counted():
    callback = Throughput()
    callback._interval, callback._vision = throughput._Interval(0.0, 0), VISION
    for training, counted in ((False, Counts()), (True, OF_BATCH)):
        callback.on_megatron_microbatch_start(SimpleNamespace(trainer=SimpleNamespace(training=training)), BATCH)
        assert callback._interval.counts == counted


def test_mfu_where_the_peak_is_known(monkeypatch):
    callback = Throughput()
    callback._costs, callback._peak = step_costs(TEXT, VISION, Training()), 989e12
    interval = throughput._Interval(0.0, 0, counts=OF_BATCH * 1e6)
    trainer = SimpleNamespace(world_size=8, datamodule=SimpleNamespace(global_batch_size=4))
    metrics = callback._metrics(trainer, interval, seconds=2.0, num_steps=1)
    flops = callback._costs.of(interval.counts)
    assert metrics["mfu"] == pytest.approx(flops / 2 / 8 / 989e12)
    assert metrics["tflops_per_second_per_gpu"] == pytest.approx(flops / 2 / 8 / 1e12)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_by_name(name, tflops):
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_values_stay_on_the_host(toy_trainer, tmp_path, monkeypatch):
    """Lightning copies a number to the model's device, and that waits for the GPU."""
    seen = []
    log = pl.LightningModule.log
    monkeypatch.setattr(
        pl.LightningModule, "log", lambda self, name, value, **k: seen.append(value) or log(self, name, value, **k)
    )
    rows_of(toy_trainer, tmp_path / "m.csv", MLlamaLike(), max_steps=1)
    speeds = [value for value in seen if not value.requires_grad]
    assert len(speeds) >= 5 and all(isinstance(value, torch.Tensor) for value in seen)


def test_sums_are_over_all_ranks(tmp_path):
    code = (
        "import sys, torch\n"
        "from vlmsft.runtime.throughput import _num_data_parallel_ranks, _sum_over_data_parallel_ranks\n"
        "rank = int(sys.argv[1])\n"
        f"torch.distributed.init_process_group('gloo', init_method='file://{tmp_path}/s', rank=rank, world_size=2)\n"
        "assert _num_data_parallel_ranks() == 2\n"
        "assert [float(x) for x in _sum_over_data_parallel_ranks([1.0 + rank, 3e15])] == [3.0, 6e15]\n"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in ranks] == [0, 0]
    assert throughput._sum_over_data_parallel_ranks([1.0, 2.0]) == [1.0, 2.0], "no collective in a single process"
