"""What a sweep reads of a run's metrics.csv."""

import pytest

from vlmsft.sweeping import objective
from vlmsft.sweeping.objective import Progress, objective_of, progress_of

HEADER = "step,epoch,reduced_train_loss,val_loss\n"
ROWS = "1,0,5.0,\n2,0,4.0,3.5\n3,0,3.0,\n4,0,nan,3.75\n5,0,2.0,inf\n"


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "metrics.csv").write_text(HEADER + ROWS)
    return tmp_path


@pytest.mark.parametrize(("mode", "value"), [("min", 3.5), ("max", 3.75), ("last", 3.75)])
def test_objective(run_dir, mode, value):
    assert objective_of(run_dir, "val_loss", mode) == value
    assert objective_of(run_dir, "val_los", mode) is None and objective_of(run_dir / "x", "val_loss", mode) is None


def test_progress_reads_the_end_of_a_long_file(run_dir, monkeypatch):
    assert progress_of(run_dir) == Progress(5, 2.0, float("inf"))
    assert progress_of(run_dir / "x") == Progress()
    monkeypatch.setattr(objective, "TAIL_BYTES", 30)  # begins in the middle of a row
    assert progress_of(run_dir) == Progress(5, 2.0, float("inf"))
    (run_dir / "metrics.csv").write_text(HEADER)
    assert progress_of(run_dir) == Progress()
