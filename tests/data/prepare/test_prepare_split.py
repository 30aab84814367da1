import numpy as np
import pytest

from vlmsft.data.prepare.split import by_image, by_record


@pytest.mark.parametrize("count", [7, 100, 1001])
def test_by_record_is_the_tutorials_split(count):
    import datasets

    data = datasets.Dataset.from_dict({"number": range(count)})
    data = data.train_test_split(test_size=0.05, shuffle=True, seed=42)
    training, validation = by_record(count, 0.05, 42)
    assert training.tolist() == data["train"]["number"][:]
    assert validation.tolist() == data["test"]["number"][:]


def test_one_epoch_of_the_tutorial_is_1160_steps():
    """156 300 is the smallest multiple of a hundred that "156k" can mean with 1160 whole steps of 128."""
    training, _ = by_record(156_300, 0.05, 42)
    assert len(training) // 128 == 1160


def test_by_image_keeps_each_picture_on_one_side():
    generator = np.random.default_rng(0)
    images = [[f"{number}" for number in generator.integers(0, 400, generator.integers(0, 3))] for _ in range(1000)]
    training, validation = by_image(images, 0.1, 42)
    assert sorted([*training, *validation]) == list(range(1000))
    used = [{name for number in side for name in images[number]} for side in (training, validation)]
    assert not used[0] & used[1]
    assert by_image(images, 0.1, 42)[1].tolist() == validation.tolist() != by_image(images, 0.1, 43)[1].tolist()


def test_by_image_reaches_the_fraction():
    images = [[f"{number % 100}"] for number in range(1000)]
    _, validation = by_image(images, 0.05, 1)
    assert len(validation) == 50


def test_by_image_follows_records_that_tie_pictures_together():
    training, validation = by_image([["a"], ["a", "b"], ["b"], ["c"]], 0.25, 0)
    assert set(validation.tolist()) in ({3}, set()) and {0, 1, 2} <= set(training.tolist())


def test_no_validation():
    assert [len(side) for side in by_record(10, 0.0, 1)] == [10, 0]
    assert [len(side) for side in by_image([["a"]] * 10, 0.0, 1)] == [10, 0]
