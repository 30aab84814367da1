"""Real NeMo trainings of the tiny model on the CPU: numbers that must agree, and runs that are cut and go on.

All start from the weights of one checkpoint (a seed alone gives other weights at another tensor-parallel size) and take
the same global batches, so each must log the losses of `reference`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_cases import (
    CHECKPOINT_AFTER,
    KILLED_AFTER,
    RUNS,
    Job,
    cut,
    kill_a_rank,
    largest_difference,
    metrics,
    run_jobs,
    write_sample_shards,
)

from vlmsft.config_files import sample_set

pytestmark = pytest.mark.nemo

STEPS, VALIDATE_EVERY = 10, CHECKPOINT_AFTER  # a checkpoint after each validation
DEMO = ["experiment=demo", "trainer.callbacks.overfit=null", "optim.warmup_steps=2", "optim.max_lr=2e-3"]
SHORT = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={VALIDATE_EVERY}", "log.ckpt.save_top_k=-1"]
LORA = ["peft=lora", "peft.dropout=0.2", "optim.max_lr=2e-2"]
TWO_RANKS = "trainer.devices=2"
OFTEN_SAVED = "log.ckpt.every_n_train_steps=3"  # between the validations, too
NOT_SAVED = "log.ckpt=null"
EXCHANGED_AFTER = 6
BLEND = [
    f"data.train_path={{chat:{{path:{sample_set()}/train.jsonl,weight:3}},ocr:{{path:{sample_set()}/validation.jsonl,weight:1}}}}",
    f"data.validation_path={{seen:{sample_set()}/validation.jsonl,all:{sample_set()}/train.jsonl}}",
]
TP2 = [TWO_RANKS, "strategy.tensor_model_parallel_size=2"]


def batches(global_batch_size: int, micro_batch_size: int) -> list[str]:
    return [f"data.global_batch_size={global_batch_size}", f"data.micro_batch_size={micro_batch_size}"]


def watch(callback: str, path: Path) -> str:
    return f"+trainer.callbacks.watch={{_target_:train_cases.{callback},path:{path}}}"


class Runs:
    """All trainings of this file, and one that the command starts: "exchanged" goes on from one process' checkpoint
    in two, loses a rank, and goes on in one."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_sample_shards(folder / "shards")
        self.energon = ["data=energon", f"data.path={folder / 'shards'}", "data.max_samples_per_sequence=5"]
        run_jobs(folder, self.one_process())
        run_jobs(folder, self.two_processes(), num_processes=2)
        run_jobs(folder, self.two_by_two(), num_processes=4)
        cut(self.of("reference"), self.of("exchanged"), CHECKPOINT_AFTER)
        job = self.job("exchanged", *TP2, OFTEN_SAVED)
        self.killed = kill_a_rank(folder, job.name, job.overrides, rank=1, after_step=EXCHANGED_AFTER + 1)
        run_jobs(folder, self.resumed())

    def of(self, name: str) -> Path:
        return self.folder / RUNS / name

    def job(self, name: str, *overrides: str, **cut) -> Job:
        return Job(name, [*DEMO, *SHORT, *batches(4, 4), *overrides], weights_from="start", **cut)

    def one_process(self) -> list[Job]:
        steps = ["trainer.max_steps=3", "trainer.val_check_interval=3"]
        frozen_text = ["model.config.freeze_language_model=true", "model.config.freeze_vision_projection=true"]
        return [
            Job("start", [*DEMO, "trainer.max_steps=2", "trainer.val_check_interval=2"]),
            self.job("reference", watch("ExactValidationLoss", self.folder / "exact-4.json")),
            self.job("often-saved", OFTEN_SAVED),
            self.job("mb1", *batches(4, 1), NOT_SAVED),
            self.job("gb20", *batches(20, 5), *steps, watch("ExactValidationLoss", self.folder / "exact-20.json")),
            self.job("lora", *LORA, watch("ChangedParameters", self.folder / "lora.json")),
            self.job(
                "frozen-tower",
                *steps,
                NOT_SAVED,
                "model.config.freeze_vision_model=true",
                watch("ChangedParameters", self.folder / "frozen-tower.json"),
            ),
            self.job(
                "frozen-text",
                *steps,
                NOT_SAVED,
                *frozen_text,
                watch("ChangedParameters", self.folder / "frozen-text.json"),
            ),
            self.job(
                "energon", *self.energon, NOT_SAVED, watch("ExactValidationLoss", self.folder / "exact-energon.json")
            ),
            self.job("blend", *BLEND, NOT_SAVED, watch("ExactValidationLoss", self.folder / "exact-sets.json")),
        ]

    def two_processes(self) -> list[Job]:
        return [
            self.job("tp2", *TP2),
            self.job("tp2-resumed", *TP2, cut_from="tp2"),
            self.job("dp2", TWO_RANKS, *batches(4, 2), NOT_SAVED),
            self.job("blend-dp2", *BLEND, TWO_RANKS, *batches(4, 1)),
            *self.energon_of_two_ranks(),
        ]

    def two_by_two(self) -> list[Job]:
        options = [*TP2, "trainer.devices=4", *batches(4, 2)]
        return [self.job("two-by-two", *options), self.job("resumed-two-by-two", *options, cut_from="reference")]

    def energon_of_two_ranks(self) -> list[Job]:
        options = [*self.energon, TWO_RANKS, *batches(4, 1), "data.num_workers=2"]
        return [self.job("energon-dp2", *options), self.job("energon-dp2-resumed", *options, cut_from="energon-dp2")]

    def resumed(self) -> list[Job]:
        return [
            self.job("resumed", cut_from="reference"),
            self.job("often-saved-resumed", OFTEN_SAVED, cut_from="often-saved", cut_after=6),
            self.job("resumed-mb1", *batches(4, 1), cut_from="reference"),
            self.job("lora-resumed", *LORA, cut_from="lora"),
            self.job("two-by-two-in-one", cut_from="two-by-two"),
            self.job("exchanged"),
            self.job("blend-resumed", *BLEND, *batches(4, 2), cut_from="blend-dp2"),
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def assert_same(run: dict, reference: dict, tolerance: float) -> None:
    """The same losses, learning rates, gradient norms and validation losses, each step once and none left out."""
    assert run["step"] == [float(step) for step in range(1, STEPS + 1)]
    for name in ("reduced_train_loss", "val_loss", "grad_norm", "lr"):
        difference = largest_difference(run[name], reference[name])
        print(f"{name} differs by {difference:.1e}")
        assert difference < tolerance, name


@pytest.fixture
def reference(runs):
    found = metrics(runs.of("reference"))
    assert found["val_loss"][-1] < 0.98 * found["val_loss"][0]  # it learns, so a wrong step shows
    return found


@pytest.mark.parametrize("name", ["mb1", "tp2", "dp2", "two-by-two"])
def test_losses_do_not_depend_on_how_a_global_batch_is_computed(runs, reference, name):
    """In four micro batches instead of one, by two tensor-parallel ranks, by two data-parallel ranks, by both."""
    assert_same(metrics(runs.of(name)), reference, 1e-4)


@pytest.mark.parametrize("name", ["mb1", "tp2", "dp2", "resumed"])
def test_logged_speed_counts_the_texts_of_all_ranks_once(runs, reference, name):
    """Whatever the step took, its texts are those of the reference; so are its FLOPs where the micro batches are."""
    found = metrics(runs.of(name))

    def of_steps(columns, speed):
        return [rate * seconds for rate, seconds in zip(columns[speed], columns["step_seconds"], strict=True)]

    assert len(found["tokens_per_second"]) == STEPS
    assert largest_difference(*(of_steps(run, "tokens_per_second") for run in (found, reference))) < 1e-4
    assert all(0 <= share < 1 for share in found["data_wait_fraction"])
    if name in ("tp2", "resumed"):
        ranks = 2 if name == "tp2" else 1
        flops = [ranks * value for value in of_steps(found, "tflops_per_second_per_gpu")]
        assert largest_difference(flops, of_steps(reference, "tflops_per_second_per_gpu")) < 1e-4


@pytest.mark.parametrize(
    ("name", "uninterrupted"),
    [
        ("resumed", "reference"),
        ("often-saved-resumed", "often-saved"),
        ("tp2-resumed", "tp2"),
        ("energon-dp2-resumed", "energon-dp2"),
    ],
)
def test_resumed_run_equals_the_one_that_never_stopped(runs, name, uninterrupted):
    assert_same(metrics(runs.of(name)), metrics(runs.of(uninterrupted)), 1e-6)


@pytest.mark.parametrize("name", ["resumed-mb1", "resumed-two-by-two", "two-by-two-in-one"])
def test_a_run_resumes_with_another_micro_batch_and_in_other_ranks(runs, reference, name):
    """With the optimizer: fresh moments would part from the reference at the second step."""
    assert_same(metrics(runs.of(name)), reference, 1e-4)


def test_two_ranks_go_on_from_the_checkpoint_of_one_process(runs, reference):
    found = runs.killed.rows
    assert found["step"] == [float(step) for step in range(1, EXCHANGED_AFTER + 2)]
    for name in ("reduced_train_loss", "grad_norm", "lr"):
        assert largest_difference(found[name], reference[name][: EXCHANGED_AFTER + 1]) < 1e-4, name


def test_a_killed_rank_is_named_and_takes_the_others_along(runs):
    killed = runs.killed
    assert killed.exit_code == 1 and "Traceback" not in killed.output
    assert "rank 1 was ended by SIGKILL" in killed.output
    assert f"To go on from step {EXCHANGED_AFTER}: the same command with id=exchanged" in killed.output
    assert killed.seconds < 45 and killed.left == []


def test_one_process_goes_on_from_the_checkpoint_of_the_killed_ranks(runs, reference):
    assert_same(metrics(runs.of("exchanged")), reference, 1e-4)
    dropped = (runs.of("exchanged") / "metrics-dropped.csv").read_text().splitlines()
    assert dropped[-1].startswith(f"{EXCHANGED_AFTER + 1},")


@pytest.mark.parametrize("name", ["blend-dp2", "blend-resumed"])
def test_a_blend_depends_on_its_weights_only(runs, name):
    """Two ranks, then one that goes on from their checkpoint."""
    assert_same(metrics(runs.of(name)), metrics(runs.of("blend")), 1e-4)


def test_energon_trains_in_an_order_of_its_own_and_validates_as_preloaded(runs, reference):
    found = metrics(runs.of("energon"))
    assert largest_difference(found["reduced_train_loss"], reference["reduced_train_loss"]) > 1e-3
    exact = json.loads((runs.folder / "exact-energon.json").read_text())
    assert found["val_loss"][-1] == pytest.approx(exact["val_loss"], rel=1e-6)


def test_each_named_validation_set_has_its_loss_and_val_loss_is_that_of_all(runs):
    exact = json.loads((runs.folder / "exact-sets.json").read_text())
    assert set(exact) == {"val_loss", "val_loss_seen", "val_loss_all"}
    found = metrics(runs.of("blend"))
    for name, value in exact.items():
        assert found[name][-1] == pytest.approx(value, rel=1e-6), name


def test_dropout_after_a_resume_is_that_of_the_run_that_never_stopped(runs, reference):
    uninterrupted = metrics(runs.of("lora"))
    assert_same(metrics(runs.of("lora-resumed")), uninterrupted, 1e-6)
    assert largest_difference(uninterrupted["reduced_train_loss"], reference["reduced_train_loss"]) > 1e-3


def test_rows_of_steps_that_a_kill_took_back_are_kept_aside(runs):
    dropped = (runs.of("resumed") / "metrics-dropped.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in dropped[1:]] == [
        str(step) for step in range(CHECKPOINT_AFTER + 1, KILLED_AFTER + 1)
    ]


@pytest.mark.parametrize(("name", "file"), [("reference", "exact-4.json"), ("gb20", "exact-20.json")])
def test_val_loss_is_the_mean_over_all_answer_tokens(runs, name, file):
    """48 samples: also when the last global batch of 20 holds only 8 of them."""
    exact = json.loads((runs.folder / file).read_text())["val_loss"]
    assert metrics(runs.of(name))["val_loss"][-1] == pytest.approx(exact, rel=1e-6)


def test_best_checkpoint_is_named_by_the_exact_val_loss(runs):
    val_loss = metrics(runs.of("gb20"))["val_loss"]
    names = [path.name for path in (runs.of("gb20") / "checkpoints").iterdir()]
    assert all(any(f"val_loss={value:.4f}-" in name for name in names) for value in val_loss), (val_loss, names)


PARTS = {"tower": "vision_model.vision_encoder.", "projection": "vision_projection.", "text": "language_model."}


@pytest.mark.parametrize(
    ("file", "frozen"), [("frozen-tower.json", {"tower"}), ("frozen-text.json", {"projection", "text"})]
)
def test_frozen_parts_stay_and_the_others_train(runs, file, frozen):
    changed = json.loads((runs.folder / file).read_text())
    for part, name in PARTS.items():
        found = {changed[parameter] for parameter in changed if name in parameter}
        assert found == ({False} if part in frozen else {True}), part


def test_lora_trains_all_adapters_and_nothing_else(runs):
    changed = json.loads((runs.folder / "lora.json").read_text())
    adapters = {name for name in changed if ".adapter." in name}
    assert adapters == {name for name in changed if changed[name]}
    assert len(adapters) == 2 * (2 + 2)  # in and out; linear_qkv of 2 layers, linear_q and linear_kv of one


def test_cpu_adam_is_torch_adamw():
    import torch

    from vlmsft.runtime.cpu import CpuAdam

    values = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0])) for _ in range(2))
    optimizers = CpuAdam([ours], **values), torch.optim.AdamW([theirs], **values)
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.tensor([0.3, -1.0, 2.0]) * (step - 1.5)
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert optimizers[0].param_groups[0]["step"] == 4
