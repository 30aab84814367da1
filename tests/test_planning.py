"""A sweep's table: what can run, memory, hours, and where the numbers come from."""

import io
import sys

import pytest
from config_cases import DATA, compose
from rich.console import Console

from vlmsft import planning
from vlmsft.errors import UserError
from vlmsft.facts import Facts
from vlmsft.mllama.flops import count_batch, step_costs
from vlmsft.mllama.memory import Training
from vlmsft.mllama.sizes import lora_modules
from vlmsft.planning import flops_per_sample, format_hours, plan_job, show, speed_of

LORA = ("experiment=lora", *DATA)
IN_TEXT = [f"*.language_model.*.{name}" for name in ("linear_qkv", "linear_q", "linear_kv")]


def shown(*jobs):
    out = Console(file=io.StringIO(), width=160, force_terminal=False)
    show(jobs, out)
    return out.file.getvalue()


def test_time_is_flops_over_speed():
    cfg = compose(*LORA, "plan.mfu=0.5", "plan.peak_tflops_per_second=1000", "plan.tiles_per_image=2")
    job = plan_job(cfg, "peft.dim=8")
    text, vision = planning.estimates.shapes_of(Facts(cfg))
    training = Training(
        text=False, tower=False, projector=False, lora_modules=lora_modules(text, vision, IN_TEXT), lora_dim=8
    )
    sample = count_batch(vision, text_tokens=[2048], num_answers=2048, num_tiles=[2], visible_rows=[2048])
    expected = 1160 * 128 * step_costs(text, vision, training).of(sample) / (8 * 500e12)
    assert job.seconds == pytest.approx(expected)
    assert job.gpu_hours == pytest.approx(expected / 3600 * 8) and job.num_gpus == 8
    assert "50 % of 1000 TFLOP/s" in job.source and job.source.startswith("assumed")


def test_shorter_texts_and_fewer_tiles_take_less_time():
    most, shorter, fewer = (
        flops_per_sample(Facts(compose(*LORA, *overrides)), tokens)
        for overrides, tokens in (((), None), ((), 256), (("plan.tiles_per_image=1",), None))
    )
    assert shorter < 0.5 * most and fewer < most
    assert flops_per_sample(Facts(compose(*LORA)), 10**6) == most, "a longer text is cut"


def write_metrics(folder, rows):
    names = ("step", "tflops_per_second_per_gpu", "tokens_per_second", "samples_per_second")
    folder.mkdir()
    text = "\n".join(",".join(map(str, row)) for row in [names, *rows])
    (folder / "metrics.csv").write_text(f"{text}\n")
    return folder


def test_speed_of_an_earlier_run(tmp_path):
    """Medians, without the first step, which pays for compilation."""
    run = write_metrics(tmp_path / "run", [(1, 1, 10, 1), (2, 300, 2000, 10), (3, 310, 2200, 10), (4, 100, 2100, 10)])
    speed = speed_of(compose(*LORA, f"plan.like_run={run}"))
    assert (speed.flops_per_second, speed.text_tokens) == (300e12, 210)
    assert speed.source.startswith("measured: 300 TFLOP/s a GPU at 210 text tokens") and str(run) in speed.source
    on_cpu = plan_job(compose("experiment=demo", f"plan.like_run={run}"), "")
    assert on_cpu.seconds > 0 and on_cpu.num_gpus == 0, "a run on a CPU says what a CPU does"


@pytest.mark.parametrize("rows", [[], [(1, 300, 2000, 10)], [(1, "", "", 10), (2, "", "", 10), (3, "", "", 10)]])
def test_a_run_that_says_nothing_of_speed(tmp_path, rows):
    run = write_metrics(tmp_path / "run", rows)
    with pytest.raises(UserError, match=r"plan\.like_run"):
        speed_of(compose(*LORA, f"plan.like_run={run}"))


def test_wrong_numbers_come_at_once():
    with pytest.raises(UserError) as error:
        speed_of(compose(*LORA, "plan.mfu=high", "plan.tiles_per_image=0"))
    assert {problem.where for problem in error.value.problems} == {"plan.mfu", "plan.tiles_per_image"}


def test_table():
    too_big = plan_job(compose(*LORA, "data.micro_batch_size=16"), "data.micro_batch_size=16")
    fits = plan_job(compose(*LORA), "data.micro_batch_size=1")
    text = shown(fits, too_big)
    assert "1 of 2 jobs can run: about 13.1 GPU hours in all" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line[:4] in ("   0", "   1")}
    assert "data.micro_batch_size=1 " in rows["0"] and " yes " in rows["0"] and "1.6 h" in rows["0"]
    assert "gpu_memory_gib: found about 217 GiB a GPU" in rows["1"] and " h " not in rows["1"]
    assert "memory: estimated" in text and "assumed: 33 % of 989 TFLOP/s" in text


def test_a_sweep_on_the_cpu_has_no_hours():
    text = shown(*(plan_job(compose("experiment=demo", f"seed={seed}"), f"seed={seed}") for seed in (1, 2)))
    assert "2 of 2 jobs can run" in text and "GPU hours in all" not in text and "memory" not in text


def test_format():
    assert [format_hours(s) for s in (None, 12.3, 150, 3600 * 5.61)] == ["", "12 s", "2 min", "5.6 h"]


def test_command_writes_nothing_and_imports_no_nemo(run_main, monkeypatch, tmp_path):
    from vlmsft.plan import main

    monkeypatch.chdir(tmp_path)
    nemo = {name for name in sys.modules if name.split(".")[0] == "nemo"}
    sweep = "strategy.tensor_model_parallel_size=1,2", "trainer.devices=2"
    code, out, _ = run_main(main, "-m", "experiment=demo", *sweep, "data.micro_batch_size=8")
    assert code == 0 and "2 of 2 jobs can run" in out and "strategy.tensor_model_parallel_size=2" in out
    assert {name for name in sys.modules if name.split(".")[0] == "nemo"} == nemo
    assert list(tmp_path.iterdir()) == []


def test_what_is_malformed_stops_a_sweep(run_main, monkeypatch, tmp_path):
    from vlmsft.plan import main

    monkeypatch.chdir(tmp_path)
    code, out, message = run_main(main, "-m", "experiment=demo", "optim.min_lr=9,3e-5", "seed=-1")
    assert code == 2 and "0 of 2 jobs can run" in out
    assert "job 0 (optim.min_lr=9): optim.min_lr" in message and "seed: found -1" in message
    assert list(tmp_path.iterdir()) == []
