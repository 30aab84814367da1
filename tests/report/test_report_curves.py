import numpy as np
import pandas as pd

from vlmsft.report.curves import absent, axes, compact, curves_of, logged, points, rounded, without_restarts


def test_rounded_to_four_digits_and_as_short_in_json():
    values = np.array([0.00123456, 1234567.0, -2.34567, 0.0, np.nan, np.inf, 1.0])
    assert rounded(values) == [0.001235, 1235000.0, -2.346, 0.0, None, None, 1.0]
    many = np.random.default_rng(0).normal(size=1000) * 10.0 ** np.arange(-10, 10).repeat(50)
    assert max(len(repr(value)) for value in rounded(many)) <= len("-9876000000.0")
    np.testing.assert_allclose(np.array(rounded(many)), many, rtol=5.01e-4)


def test_named_validation_sets_follow_the_whole():
    found = curves_of(["val_loss_chat", "lr", "val_loss", "reduced_train_loss", "train_step_timing in s"])
    assert [curve.column for curve in found] == ["reduced_train_loss", "val_loss", "val_loss_chat", "lr"]
    assert found[2].title == "validation loss, chat"
    assert "tokens/s" in absent(found) and "learning rate" not in absent(found)


def test_rows_without_the_value_are_left_out_and_a_loss_of_nan_stays():
    frame = pd.DataFrame(
        {
            "step": [1, 2, 3, 3],
            "reduced_train_loss": [2.0, np.nan, 1.0, np.nan],
            "lr": [0.1, 0.1, 0.1, np.nan],
            "val_loss": [np.nan, np.nan, np.nan, 1.5],
        }
    )
    steps, loss = logged(frame, "reduced_train_loss")
    assert steps.tolist() == [1, 2, 3] and np.isnan(loss[1])
    assert [part.tolist() for part in points(frame, "val_loss")] == [[3.0], [1.5]]
    assert compact(frame)["curves"]["reduced_train_loss"] == [[1, 1, 1], [2.0, None, 1.0]]


def test_no_rows_and_no_columns():
    for frame in (pd.DataFrame(), pd.DataFrame({"step": [], "lr": []}), pd.DataFrame({"lr": [1.0]})):
        assert compact(frame) == {"axes": {}, "curves": {}}


def test_time_goes_on_over_a_resumed_run():
    assert without_restarts(np.array([10.0, 20.0, 5.0, 15.0, 2.0])).tolist() == [10, 20, 25, 35, 37]


def test_tokens_are_added_up_from_speeds():
    frame = pd.DataFrame(
        {
            "step": [1, 2, 4],
            "consumed_samples": [8, 16, 32],
            "samples_per_second": [10.0, 10.0, 20.0],
            "tokens_per_second": [1000.0, 2000.0, 2000.0],
        }
    )
    assert axes(frame)["tokens"].tolist() == [800, 2400, 4000]
    assert "tokens" not in axes(frame.drop(columns="tokens_per_second"))


def test_a_long_curve_has_means_beside_its_extremes():
    steps = np.arange(1, 10_001)
    values = np.where(steps % 2, 3.0, 1.0)
    values[5000] = 99.0
    frame = pd.DataFrame({"step": steps, "grad_norm": values})
    found = compact(frame)
    at, kept, mean_at, means = found["curves"]["grad_norm"]
    assert len(at) == len(kept) <= 1000 and 99.0 in kept
    assert np.cumsum(at)[kept.index(99.0)] == 5001
    assert len(mean_at) == len(means) == 500
    assert sorted(means)[:-1] == [2.0] * 499  # all but the spike's part
    assert np.cumsum(mean_at)[[0, -1]].tolist() == [10, 9990]
    assert len(found["axes"]["step"]) <= 250
