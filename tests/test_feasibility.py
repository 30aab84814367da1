"""Points of a sweep that can't run: named as infeasible, never as malformed, and fast enough for a thousand of them."""

import subprocess
import sys
import time

import pytest
from config_cases import DATA, compose

from vlmsft.checks import find_problems, malformed
from vlmsft.errors import Problem
from vlmsft.facts import Facts
from vlmsft.feasibility import CHECKS, infeasible

TEXT, VISION = "model.config.language_model_config", "model.config.vision_model_config"
TP = "strategy.tensor_model_parallel_size"
DEMO = ("experiment=demo",)
LORA = ("experiment=lora", *DATA)
FULL = ("experiment=llava_instruct_ja", *DATA)
CASES = [
    # overrides, the key that is named, a part of what was found, a part of what was expected
    ((*DEMO, "strategy.pipeline_model_parallel_size=2"), "strategy.pipeline_model_parallel_size", "2", "1"),
    ((*DEMO, "strategy.sequence_parallel=true"), "strategy.sequence_parallel", "True", "false with"),
    (
        (*DEMO, "strategy.tensor_model_parallel_size=3", "trainer.devices=3"),
        TP,
        "3",
        "num_attention_heads 4",
    ),
    (
        (*LORA, "strategy.tensor_model_parallel_size=16", "trainer.devices=16"),
        TP,
        "16",
        "num_query_groups 8",
    ),
    ((*DEMO, "strategy.tensor_model_parallel_size=2"), "trainer.devices", "1 processes", "multiple of"),
    (
        (*LORA, "strategy.tensor_model_parallel_size=4", "trainer.devices=6"),
        "trainer.devices",
        "6 processes",
        "multiple of",
    ),
    ((*DEMO, "data.global_batch_size=7", "data.micro_batch_size=2"), "data.global_batch_size", "7", "a multiple of 2"),
    (
        (*DEMO, "trainer.limit_val_batches=3", "data.micro_batch_size=4", "data.global_batch_size=8"),
        "trainer.limit_val_batches",
        "3",
        "a multiple of 2",
    ),
    ((*DEMO, f"{TEXT}.num_query_groups=3"), f"{TEXT}.num_attention_heads", "4", "a multiple of"),
    ((*DEMO, "data.decoder_seq_length=4096"), "data.decoder_seq_length", "4096", "at most"),
    ((*DEMO, f"{VISION}.num_attention_heads=5"), f"{VISION}.hidden_size", "64", "a multiple of"),
    ((*FULL, "trainer.devices=2"), "gpu_memory_gib", "GiB a GPU", "at most gpu_memory_gib 78"),
    ((*LORA, "gpu_memory_gib=20"), "gpu_memory_gib", "GiB a GPU", "at most gpu_memory_gib 20"),
]


@pytest.mark.parametrize(("overrides", "where", "found", "expected"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_point_is_infeasible_and_well_formed(overrides, where, found, expected):
    cfg = compose(*overrides)
    (problem,) = infeasible(cfg)
    assert problem.where == where and found in problem.found and expected in problem.expected
    assert problem in find_problems(cfg), "for a single run it is an error"
    assert problem not in malformed(cfg)


def test_every_check_has_a_case():
    configs = [(Facts(compose(*overrides)), where) for overrides, where, *_ in CASES]
    caught = {check for check in CHECKS for facts, where in configs if any(p.where == where for p in check(facts))}
    assert caught == set(CHECKS)


@pytest.mark.parametrize(
    "overrides",
    [
        (*DEMO, "optim.min_lr=9"),
        (*DEMO, "data.train_path=/nowhere"),
        (*DEMO, "peft=lora", "peft.target_modules=[linear_qqv]"),
        (*DEMO, "data.micro_batch_size=many"),
        (*DEMO, "strategy.tensor_model_parallel_size=0"),
        (*DEMO, "trainer.devices=auto"),
        (*FULL, "trainer.devices=auto"),
        (*LORA, "peft.dim=small"),
        (*LORA, "gpu_memory_gib=null"),
        (*DEMO, "gpu_memory_gib=1"),
        (*LORA, "strategy.sequence_parallel=true", "strategy.tensor_model_parallel_size=2", "trainer.devices=2"),
        DEMO,
        LORA,
        FULL,
    ],
    ids=" ".join,
)
def test_feasible_and_malformed_points_are_not_called_infeasible(overrides):
    """Nor is anything said of memory on the CPU, or where gpu_memory_gib is null."""
    assert infeasible(compose(*overrides)) == []


def test_memory_decides_between_points_of_a_sweep():
    """LoRA on one H100, micro batches at 256 tokens of text: measured to fit 24, not 32 (two tiles an image)."""
    fits = {
        size: not infeasible(compose(*LORA, "data.decoder_seq_length=256", f"data.micro_batch_size={size}"))
        for size in (1, 16, 32)
    }
    assert fits == {1: True, 16: True, 32: False}


def test_a_problem_says_what_to_do():
    (problem,) = infeasible(compose(*FULL, "trainer.devices=2"))
    assert isinstance(problem, Problem) and "data.micro_batch_size" in problem.remedy


def test_a_job_takes_a_small_part_of_composing_it():
    """A sweep waits for both; the limit is a ratio, as a machine may be slow."""
    overrides = [(*LORA, f"peft.dim={dim}") for dim in range(1, 3)]
    cfgs = [compose(*job) for job in overrides]
    infeasible(cfgs[0])
    checking = best_of_three(lambda: [infeasible(cfg) for cfg in cfgs])
    composing = best_of_three(lambda: [compose.__wrapped__(*job) for job in overrides])
    assert checking < composing / 10


def best_of_three(work):
    """Seconds of this process."""
    rounds = []
    for _ in range(3):
        started = time.process_time()
        work()
        rounds.append(time.process_time() - started)
    return min(rounds)


def test_processes_that_torchrun_started_count_where_the_config_leaves_them_open():
    assert infeasible(compose(*LORA, "trainer.devices=auto"), 2) == []
    assert [problem.where for problem in infeasible(compose(*FULL, f"{TP}=1", "trainer.devices=auto"), 2)]


def test_imports_neither_torch_nor_nemo():
    heavy = ("torch", "nemo", "numpy", "transformers")
    code = f"import sys, vlmsft.feasibility; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
