"""What `vlmsft train` takes from the machine and from how it was started."""

import pytest
from config_cases import compose

from vlmsft import train
from vlmsft.train import names_read_as_numbers, with_counted_devices


def devices(*overrides):
    return with_counted_devices(compose("experiment=demo", *overrides)).trainer.devices


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("auto", ["auto", "-1"])
@pytest.mark.parametrize("launch", ["local", "torchrun"])
def test_a_process_alone_counts_one_cpu(auto, launch):
    assert devices(f"trainer.devices={auto}", f"launch={launch}") == 1


@pytest.mark.parametrize("auto", ["auto", "-1"])
def test_below_torchrun_its_processes_count(auto, monkeypatch):
    """Lightning's auto would be one process, and an error."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert devices(f"trainer.devices={auto}") == 4
    assert devices(f"trainer.devices={auto}", "trainer.num_nodes=2") == 2


def test_below_srun_its_tasks_count(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "6")
    assert devices("trainer.devices=auto") == 1, "in an allocation, not below srun"
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert devices("trainer.devices=auto", "trainer.num_nodes=3") == 2


def test_a_number_and_other_machines_are_left_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert devices("trainer.devices=2") == 2
    assert devices("trainer.devices=auto", "launch=slurm") == "auto"
    cfg = compose("experiment=demo", "trainer.devices=auto")
    with_counted_devices(cfg)
    assert cfg.trainer.devices == "auto", "the config itself stays"


@pytest.mark.parametrize(
    ("override", "is_named"), [("id=20261129_1", True), ("name=1e3", True), ("id=7", False), ("id='1_0'", False)]
)
def test_a_name_that_hydra_reads_as_another_number(override, is_named, monkeypatch):
    monkeypatch.setattr(train, "overrides_of_this_run", lambda: ["seed=1_0", override])
    assert [problem.found for problem in names_read_as_numbers()] == [override.partition("=")[2]] * is_named
