import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from config_cases import compose

from vlmsft.check_data import check
from vlmsft.config_files import root, sample_set
from vlmsft.errors import UserError


def config(tmp_path, *overrides):
    """The sample set's; a run folder of its own, so that runs don't meet."""
    return compose(
        f"data.train_path={sample_set()}/train.jsonl",
        f"data.validation_path={sample_set()}/validation.jsonl",
        f"data.image_folder={sample_set()}/images",
        f"processor={sample_set()}/processor",
        f"output_dir={tmp_path}/out",
        "num_workers=1",
        *overrides,
        config_name="check_data",
    )


def exit_code(cfg):
    with pytest.raises(SystemExit) as ended:
        check(cfg)
    return ended.value.code


def test_a_clean_set_exits_with_0_and_leaves_a_report(tmp_path, capsys):
    assert exit_code(config(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "Training would take all of it as it is" in out
    assert f"report: {tmp_path}/out/report.html" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.txt", "findings.jsonl"}
    assert "106 training, 48 validation" in out
    outcomes = {json.loads(line)["outcome"] for line in (tmp_path / "out" / "findings.jsonl").open()}
    assert outcomes == {"remark"}, "the sample's validation records are training records"


def test_a_loss_exits_with_1(tmp_path, capsys):
    assert exit_code(config(tmp_path, "data.decoder_seq_length=20")) == 1
    assert "would be" in capsys.readouterr().out


def test_an_earlier_report_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"output_dir: found .*which exists"):
        check(config(tmp_path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("images=some", r"images: found 'some', expected one of full, headers, none"),
        ("num_workers=0", r"num_workers: found 0"),
        ("data.train_path=gone.jsonl", r"gone\.jsonl: found no such file"),
        ("processor=/none", r"processor: found /none"),
    ],
)
def test_wrong_usage_is_a_user_error(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        check(config(tmp_path, override))
    assert not (tmp_path / "out").exists()


def test_several_sets_by_name(tmp_path, capsys):
    sets = f"data.validation_path={{a: {sample_set()}/validation.jsonl, b: {sample_set()}/train.jsonl}}"
    assert exit_code(config(tmp_path, sets)) == 0
    assert "106 training, 154 validation" in capsys.readouterr().out


def test_ctrl_c_leaves_a_partial_report(tmp_path):
    lines = Path(sample_set(), "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(lines * 2000)  # a minute's work
    command = [sys.executable, "-m", "vlmsft.check_data", f"data.train_path={tmp_path}/train.jsonl"]
    command += ["data.validation_path=null", f"data.image_folder={sample_set()}/images", "num_workers=2"]
    command += [f"processor={sample_set()}/processor", f"output_dir={tmp_path}/out"]
    environment = {**os.environ, "PYTHONPATH": str(root())}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("reading 212,000 records")
    findings = tmp_path / "out" / "findings.jsonl"
    assert findings.exists()
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted: " in out
    assert "of 212,000" in (tmp_path / "out" / "report.txt").read_text()
