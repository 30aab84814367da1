import pytest
from page_cases import grid
from PIL import Image

from vlmsft.errors import UserError
from vlmsft.report.plots import write_pngs

pytestmark = pytest.mark.browser


def test_a_file_for_each_plot_and_none_is_overwritten(tmp_path):
    runs = grid(tmp_path)
    folder = tmp_path / "plots"
    paths = write_pngs(runs, folder)
    curves = ["reduced_train_loss", "val_loss", "lr", "samples_per_second"]
    names = [*(f"curve_{name}" for name in curves), "swept_keys", "two_keys", "pareto"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (1800, 1120)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20  # something is drawn, on white
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(UserError) as error:
        write_pngs(runs, folder)
    assert len(error.value.problems) == len(paths)


def test_a_missing_browser_is_named_with_the_way_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"BROWSER_PATH=.*none.*apt install chromium"):
        write_pngs(grid(tmp_path), tmp_path / "plots")
