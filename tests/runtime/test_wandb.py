"""W&B with its real package, offline: no network, no prompt, no key."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest

from vlmsft.runtime.provenance import write_run_folder
from vlmsft.runtime.wandb import RunLogger, has_key

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


def log_a_run(run_dir: Path, start: int) -> RunLogger:
    import wandb

    logger = RunLogger("vlmsft-test", "demo-1", run_dir, group="demo", tags=["a", "b"])
    # what NeMoLogger does to any WandbLogger
    logger._id, logger._save_dir = "", Path("elsewhere")
    logger._wandb_init["dir"] = Path("elsewhere")
    for step in range(start, start + 3):
        logger.log_metrics({"reduced_train_loss": 1.0 / (step + 1)}, step)
    logger.finalize("success")
    wandb.finish()
    return logger


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def records(folder: Path) -> list:
    """All records of a finished offline run: W&B's writer may still be at it when `wandb.finish` returns."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = read_records(folder)
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{folder} has no end")


def read_records(folder: Path) -> list:
    """The records of an offline run's file: a LevelDB log (blocks of 32 KiB; crc, length, type before each piece)."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("run-*.wandb")
    data, position, pieces, found = file.read_bytes(), 7, [], []
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        pieces.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(pieces))
            found.append(record)
            pieces = []
    return found


def test_offline_run_holds_the_config_and_no_key(tmp_path, no_login):
    run_dir = tmp_path / "runs" / "demo" / "1"
    write_run_folder(run_dir, CONFIG, ["judge.api_key=plain-secret"], code_dir=tmp_path)
    logger = log_a_run(run_dir, 0)
    assert (logger.version, logger.save_dir) == ("demo-1", str(run_dir)), "not what NeMoLogger wrote over it"

    (folder,) = offline_runs(run_dir)
    found = records(folder)
    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.run_group, list(run.tags)) == ("demo-1", "vlmsft-test", "demo", ["a", "b"])
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optim"] == {"max_lr": 0.001}
    assert config["provenance"]["packages"]["hydra-core"] == "1.3.2"
    assert sum(record.WhichOneof("record_type") == "history" for record in found) == 3
    assert not Path("elsewhere").exists()

    for file in run_dir.rglob("*"):
        if file.is_file():
            assert b"plain-secret" not in file.read_bytes(), file


def test_resume_has_the_same_run_id(tmp_path, no_login):
    for start in (0, 3):
        write_run_folder(tmp_path, CONFIG, [], code_dir=tmp_path)
        log_a_run(tmp_path, start)
    ids = set()
    for folder in offline_runs(tmp_path):
        ids |= {record.run.run_id for record in records(folder) if record.WhichOneof("record_type") == "run"}
    assert ids == {"demo-1"}


def test_with_a_key_in_the_environment_no_file_holds_it(tmp_path, no_login, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_run_folder(tmp_path, CONFIG + f"note: {KEY}\n", [f"note={KEY}"], code_dir=tmp_path)
    log_a_run(tmp_path, 0)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(offline_runs(tmp_path)) == 1 and len(files) > 3
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
