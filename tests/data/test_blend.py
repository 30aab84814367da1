import pytest

from vlmsft.data.blend import SET_KEY, SET_NAMES_KEY, Blend, joined
from vlmsft.data.dataset import ConversationDataset
from vlmsft.data.sources import Source


@pytest.fixture(scope="module")
def datasets(sample_folder):
    limits = (str(sample_folder / "images"), str(sample_folder / "processor"), 256)
    return [ConversationDataset(str(sample_folder / f"{name}.jsonl"), *limits) for name in ("train", "validation")]


def test_one_index_over_all(datasets):
    blend = Blend(datasets, None)
    train, validation = datasets
    assert (len(blend), blend.sizes) == (154, [106, 48])
    for index, dataset, within in ((0, train, 0), (105, train, 105), (106, validation, 0), (153, validation, 47)):
        assert blend.sample(index).tokens.equal(dataset.sample(within).tokens)
        number, item = blend[~index]
        assert datasets[number] is dataset and item.tokens.equal(dataset[~within].tokens)
        assert (item.labels == -100).all()


def test_batches_say_which_named_set_a_sample_is_of(datasets):
    batch = Blend(datasets, ("chat", "ocr")).collate([Blend(datasets, None)[i] for i in (3, 110, ~4)])
    assert batch[SET_KEY].tolist() == [0, 1, 0] and batch[SET_NAMES_KEY] == ("chat", "ocr")
    assert SET_KEY not in Blend(datasets, None).collate([Blend(datasets, None)[3]])


def test_joined_is_the_dataset_itself_where_there_is_one_without_a_name(datasets):
    assert joined(datasets[:1], [Source("k", None, "a")], named=True) is datasets[0]
    assert joined(datasets[:1], [Source("k", "a", "a")], named=False) is datasets[0]
    named = joined(datasets[:1], [Source("k", "a", "a")], named=True)
    assert isinstance(named, Blend) and named.names == ("a",)
    weighted = joined(datasets, [Source("k", "a", "a", 0.7), Source("k", "b", "b", 0.3)], named=False)
    assert isinstance(weighted, Blend) and (weighted.names, weighted.weights) == (None, (7, 3))
