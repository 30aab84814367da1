import math

import plotly.graph_objects as go
import pytest
from page_cases import EVIL, LOSSES, SPEEDS, grid

from vlmsft.report import figures
from vlmsft.report.curves import CURVES
from vlmsft.report.plots import all_figures
from vlmsft.report.record import RunRecord

LR, TP = "optim.max_lr", "strategy.tensor_model_parallel_size"


@pytest.fixture
def runs(tmp_path):
    return grid(tmp_path)


def test_plotly_takes_every_figure(runs):
    made = dict(all_figures(runs))
    assert {"curve_reduced_train_loss", "curve_val_loss", "swept_keys", "two_keys", "pareto"} <= set(made)
    for figure in made.values():
        for template in figures.TEMPLATES.values():
            go.Figure({**figure, "layout": {**figure["layout"], "template": template}})  # raises


def test_heat_map_of_learning_rate_by_tensor_parallelism(runs):
    heat = figures.heat_figure(runs, LR, TP, "best_val_loss")["data"][0]
    assert heat["x"] == ["1e-05", "0.001"] and heat["y"] == ["1", "2"]
    assert heat["z"] == [[LOSSES[0], LOSSES[2]], [LOSSES[1], LOSSES[3]]]


def test_heat_map_cells_say_what_they_hold(runs):
    config = {LR: 1e-5, TP: 4}
    more = [
        RunRecord("grid", "5", "", "failed", config, {"best_val_loss": math.nan}, curves=lambda: None),
        RunRecord("grid", "6", "", "done", dict(runs[0].config), {"best_val_loss": 1.5}, curves=lambda: None),
    ]
    heat = figures.heat_figure([*runs, *more], LR, TP, "best_val_loss")["data"][0]
    assert heat["text"] == [["1.4<br>mean of 2", "1"], ["1.2", "1.1"], ["-", ""]]
    assert heat["z"][2] == [None, None]
    assert figures.heat_figure(runs, LR, TP, "tokens_per_second") is None


def test_blue_is_better(runs):
    blue = figures.HEAT_SCALE[0]
    assert figures.heat_figure(runs, LR, TP, "best_val_loss")["data"][0]["colorscale"][0] == [0.0, blue]
    assert figures.heat_figure(runs, LR, TP, "samples_per_second")["data"][0]["colorscale"][-1] == [1.0, blue]


def test_pareto_front():
    points = [(100, 1.3), (60, 1.2), (80, 1.0), (50, 1.1), (80, 1.0), (80, 1.05)]
    assert [points[i] for i in figures.pareto_front(points, ("higher", "lower"))] == [(100, 1.3), (80, 1.0), (80, 1.0)]
    assert [points[i] for i in figures.pareto_front(points, ("lower", "higher"))] == [(50, 1.1), (60, 1.2), (100, 1.3)]


def test_pareto_figure_leaves_out_what_was_not_measured(runs):
    names, colors = ["a", EVIL, "c", "d", "e"], ["#000"] * 5
    lacking = RunRecord("grid", "9", "", "failed", {}, {"best_val_loss": 0.1}, curves=lambda: None)
    front, every = figures.pareto_figure([*runs, lacking], names, colors, "best_val_loss", "samples_per_second")["data"]
    assert front["x"] == [SPEEDS[0], SPEEDS[2]] and front["y"] == [LOSSES[0], LOSSES[2]]
    assert len(every["x"]) == 4
    assert "<" not in every["text"][1]
    assert figures.pareto_figure([lacking], ["e"], ["#000"], "best_val_loss", "samples_per_second") is None


def test_parallel_axes(runs):
    trace = figures.parallel_figure(runs, [LR, TP, "z.note"], "best_val_loss")["data"][0]
    rate, size, note, loss = trace["dimensions"]
    assert rate["label"] == "max_lr (log)" and rate["ticktext"] == ["1e-05", "0.001"]
    assert rate["values"] == [pytest.approx(math.log10(x)) for x in (1e-5, 1e-5, 1e-3, 1e-3)]
    assert size["values"] == [1, 2, 1, 2]
    assert note["values"] == [1, 1, 1, 0] and "<" not in "".join(note["ticktext"])
    assert loss["values"] == list(LOSSES)


def test_many_runs_are_coloured_by_rank(runs):
    assert len(set(figures.run_colors(runs))) == 4
    many = [
        RunRecord("m", str(n), "", "done", {}, {"best_val_loss": loss}, curves=lambda: None)
        for n, loss in enumerate([math.nan, *range(20)])
    ]
    colors = figures.run_colors(many)
    assert colors[1] == "rgb(59, 130, 214)" and colors[0] == "rgb(224, 96, 44)"  # the best blue; NaN last


def test_a_loss_over_decades_is_logarithmic():
    line = {"x": [1, 2], "y": [1.0, 1e4], "name": "a", "color": "#000", "dash": "solid"}
    assert figures.curve_figure(CURVES[0], 1, [line])["layout"]["yaxis"]["type"] == "log"
    assert figures.curve_figure(CURVES[2], 1, [line])["layout"]["yaxis"]["type"] == "linear"
