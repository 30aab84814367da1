"""W&B with its real package, offline: no network, no prompt, no key."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from config_cases import compose
from lightning.pytorch.callbacks import ModelCheckpoint

from vlmsft.runtime.metrics import MetricsTable
from vlmsft.runtime.provenance import write_run_folder
from vlmsft.runtime.wandb import RunLogger, run_config
from vlmsft.runtime.wandb_files import WandbLog, has_key, log_files, read_log, unsynced_folders

KEY = "0123456789" * 4
CONFIG = "name: demo\noptim: {max_lr: 0.001}\njudge: {api_key: plain-secret}\n"
VARIABLES = (
    "WANDB_API_KEY",
    "WANDB_MODE",
    "WANDB_BASE_URL",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_PROJECT",
    "WANDB_RUN_ID",
)


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def log_a_run(run_dir: Path, start: int, num: int = 3, **options) -> RunLogger:
    """A start that goes on after step `start`, and does `num` steps; rows as MetricsFile writes them."""
    import wandb

    logger = RunLogger("vlmsft-test", "demo-1", run_dir, group="demo", tags=["a", "b"], **options)
    # what NeMoLogger does to any WandbLogger
    logger._id, logger._save_dir = "", Path("elsewhere")
    logger._wandb_init["dir"] = Path("elsewhere")
    logger.expect_rows()
    table = MetricsTable(run_dir / "metrics.csv")
    table.drop_after(start)
    for step in range(start + 1, start + num + 1):
        log(logger, table, {"step": step, "reduced_train_loss": 1.0 / step})
        logger.log_metrics({"reduced_train_loss": 1.0 / step, "global_step": step - 1}, step - 1)
        if step % 3 == 0:
            log(logger, table, {"step": step, "val_loss": 2.0 / step})
    logger.finalize("success")
    wandb.finish()
    return logger


def log(logger: RunLogger, table: MetricsTable, row: dict) -> None:
    logger.log_row({name: float(text) for name, text in table.write(row).items()})


def logs_of(run_dir: Path) -> list[WandbLog]:
    """All starts, read when the last is whole: W&B's writer may still be at it when `wandb.finish` returns."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        logs = [read_log(path) for path in log_files(run_dir / "wandb")]
        if logs and logs[-1].exit_code is not None:
            return logs
        time.sleep(0.1)
    raise AssertionError(f"{run_dir} has an offline run without an end")


def metrics(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith("_")}


def test_offline_run_holds_the_config_and_no_key(tmp_path, no_login):
    run_dir = tmp_path / "runs" / "demo" / "1"
    write_run_folder(run_dir, CONFIG, ["judge.api_key=plain-secret"], code_dir=tmp_path)
    logger = log_a_run(run_dir, 0, job_type="train")
    assert (logger.version, logger.save_dir) == ("demo-1", str(run_dir)), "not what NeMoLogger wrote over it"

    (found,) = logs_of(run_dir)
    assert (found.run_id, found.project, found.group, found.tags) == ("demo-1", "vlmsft-test", "demo", ["a", "b"])
    assert found.job_type == "train"
    assert found.config["optim"] == {"max_lr": 0.001}
    assert found.config["provenance"]["packages"]["hydra-core"] == "1.3.2"
    assert found.config["provenance"]["overrides"] == ["judge.api_key=<hidden>"]
    rows = [{"step": 1, "reduced_train_loss": 1.0}, {"step": 2, "reduced_train_loss": 0.5}]
    rows += [{"step": 3, "reduced_train_loss": 0.3333333}, {"step": 3, "val_loss": 0.6666667}]
    assert [metrics(row) for row in found.rows if "step" in row] == rows, "as metrics.csv has them, nothing twice"
    assert found.artifacts == ["config/config-demo-1"]
    assert not Path("elsewhere").exists()

    for file in run_dir.rglob("*"):
        if file.is_file():
            assert b"plain-secret" not in file.read_bytes(), file


def test_a_resume_sends_each_row_once(tmp_path, no_login):
    """Killed after step 5, the last checkpoint of step 3: 4 and 5 are done again."""
    log_a_run(tmp_path, 0, 5)
    log_a_run(tmp_path, 3, 4)
    first, second = logs_of(tmp_path)
    assert first.run_id == second.run_id == "demo-1"
    rows = [row for log in (first, second) for row in log.rows]
    assert [(row["step"], "val_loss" in row) for row in rows] == [
        *((step, False) for step in (1, 2, 3)),
        (3, True),
        *((step, False) for step in (4, 5, 6)),
        (6, True),
        (7, False),
    ]
    assert [row["_step"] for row in rows] == list(range(9)), "W&B's own step goes on, also without its server"


def test_a_resume_sends_what_a_kill_lost(tmp_path, no_login, monkeypatch):
    monkeypatch.setattr("vlmsft.runtime.wandb.SETTLED_SECONDS", 0.0)
    log_a_run(tmp_path, 0, 5)
    (found,) = logs_of(tmp_path)
    # W&B's file ends after the row of step 2, as if the machine had died
    data = found.path.read_bytes()
    keep = next(size for size in range(len(data), 0, -50) if num_rows(found.path, data[:size]) == 2)
    found.path.write_bytes(data[:keep])

    log_a_run(tmp_path, 4, 2)
    rows = [row for log in logs_of(tmp_path) for row in log.rows]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6], (
        "a validation comes in a row of its own, or in the step's"
    )
    assert sum("val_loss" in row for row in rows) == 2


def num_rows(path: Path, data: bytes) -> int:
    path.write_bytes(data)
    return len(read_log(path).rows)


def test_wandb_added_at_a_resume_gets_the_whole_curve(tmp_path, no_login):
    table = MetricsTable(tmp_path / "metrics.csv")
    for step in (1, 2, 3, 4):
        table.write({"step": step, "reduced_train_loss": 1.0 / step})
    log_a_run(tmp_path, 3, 1)
    (found,) = logs_of(tmp_path)
    assert [row["step"] for row in found.rows] == [1, 2, 3, 4]


def test_numbers_that_no_row_has_come_with_the_next_row(tmp_path, no_login):
    import wandb

    logger = RunLogger("p", "1", tmp_path)
    logger.log_metrics({"early": 1.0}, 0)  # no MetricsFile has said that it writes rows
    logger.expect_rows()
    logger.log_metrics({"device/temperature": 40.0, "loss": 9.0}, 0)
    logger.log_row({"step": 1.0, "loss": 0.5})
    logger.log_metrics({"loss": 9.0, "loss_step": 9.0, "device/temperature": 41.0}, 0)
    logger.finalize("success")
    wandb.finish()
    (found,) = logs_of(tmp_path)
    assert [metrics(row) for row in found.rows] == [
        {"step": 1, "early": 1.0},
        {"step": 1, "loss": 0.5, "device/temperature": 40.0},
        {"device/temperature": 41.0},
    ]


def test_the_end_shows_the_command_that_uploads(tmp_path, no_login, caplog):
    caplog.set_level("INFO")
    log_a_run(tmp_path, 0, 1)
    log_a_run(tmp_path, 1, 1)
    folders = [path.parent for path in log_files(tmp_path / "wandb")]
    assert f"W&B: offline; to upload: wandb sync {folders[0]} {folders[1]}" in caplog.text
    for folder in folders[:1]:
        (folder / "run-demo-1.wandb.synced").touch()
    assert unsynced_folders(tmp_path) == folders[1:]


@pytest.mark.parametrize(("asked", "there"), [("last", ["model/model-1"]), ("best", []), (None, [])])
def test_a_checkpoint_is_uploaded_when_asked(tmp_path, no_login, caplog, asked, there):
    import wandb

    folder = tmp_path / "checkpoints" / "step=1-last"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"1")
    callback = ModelCheckpoint(tmp_path)
    callback.last_model_path = f"{folder}.ckpt"  # as NeMo has it; and no best one
    logger = RunLogger("p", "1", tmp_path, checkpoints=asked)
    logger.log_row({"step": 1.0, "loss": 0.5})
    logger.after_save_checkpoint(callback)
    logger.finalize("success")
    wandb.finish()
    assert logs_of(tmp_path)[0].artifacts == there
    assert ("no best checkpoint" in caplog.text) == (asked == "best")


def test_name_and_group_say_what_varies_in_which_sweep():
    alone = compose("experiment=demo", "log=wandb", "id=7").log.wandb
    assert (alone.name, alone.group, alone.run_id) == ("7", "demo", "demo-7")
    sweep = ("id=abc-7", "sweep.id=abc", "sweep.varies='optim.max_lr=1e-5'")
    job = compose("experiment=demo", "log=wandb", *sweep).log.wandb
    assert (job.name, job.group, job.run_id) == ("optim.max_lr=1e-5", "abc", "demo-abc-7")
    assert job.job_type == "train"


def test_names_that_wandb_takes(tmp_path, no_login):
    logger = RunLogger("p", "a/b-1", tmp_path, name="x" * 200, group="g" * 200)
    assert logger.version == "a-b-1"
    assert len(logger._wandb_init["name"]) == len(logger._wandb_init["group"]) == 128


def test_config_of_a_resume_is_its_own(tmp_path):
    write_run_folder(tmp_path, CONFIG, [], code_dir=tmp_path)
    write_run_folder(tmp_path, CONFIG.replace("0.001", "0.5"), [], code_dir=tmp_path)
    assert run_config(tmp_path)["optim"] == {"max_lr": 0.5}


def test_with_a_key_in_the_environment_no_file_holds_it(tmp_path, no_login, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_run_folder(tmp_path, CONFIG + f"note: {KEY}\n", [f"note={KEY}"], code_dir=tmp_path)
    log_a_run(tmp_path, 0)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(log_files(tmp_path / "wandb")) == 1 and len(files) > 3
    for file in files:
        assert KEY.encode() not in file.read_bytes(), file


def test_mode_follows_the_key(tmp_path, no_login, monkeypatch):
    def mode(**options):
        return RunLogger("p", "1", tmp_path, **options)._wandb_init["mode"]

    assert (mode(), mode(offline=False)) == ("offline", "online")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert (mode(), mode(offline=True)) == ("online", "offline")


def test_login_by_netrc(no_login, tmp_path, monkeypatch):
    assert not has_key()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key(), "a login for another host"
    (tmp_path / "netrc").write_text("broken {")
    assert not has_key()
