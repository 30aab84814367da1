import pytest

from vlmsft.data.sources import Source, sources
from vlmsft.errors import UserError

KEY = "data.train_path"


def test_forms():
    assert sources(None, KEY) == []
    assert sources("a.jsonl", KEY, "images") == [Source(KEY, None, "a.jsonl", None, "images")]
    assert [source.path for source in sources(["a.jsonl", "b.jsonl"], KEY)] == ["a.jsonl", "b.jsonl"]
    named = sources({"chat": "a.jsonl", "ocr": {"path": "b.jsonl", "image_folder": "scans"}}, KEY, "images")
    assert [(s.key, s.name, s.image_folder) for s in named] == [
        ("data.train_path.chat", "chat", "images"),
        ("data.train_path.ocr", "ocr", "scans"),
    ]
    assert sources({"a": {"path": "a", "weight": 3}, "b": {"path": "b", "weight": 1}}, KEY)[0].weight == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "found 7, expected a path, a list of paths or a mapping"),
        ([], r"found \[\], expected a path"),
        ([{"path": "a"}], r"data.train_path\[0\]: found .* a mapping by name"),
        ({"a": {"weight": 1}}, "data.train_path.a: found .*a mapping with `path`"),
        ({"a": {"path": "a", "weigth": 1}}, "data.train_path.a.weigth: .*Did you mean 'weight'"),
        ({"a": {"path": "a", "weight": 0}}, "data.train_path.a.weight: found 0, expected a positive number"),
        ({"a": {"path": "a", "weight": 1}, "b": "b"}, "found no weight for b, expected a weight for every dataset"),
        ({"a b": "a"}, "a name of letters"),
    ],
)
def test_what_cannot_be_understood_is_named(value, message):
    with pytest.raises(UserError, match=message):
        sources(value, KEY)


def test_shards_have_no_image_folder():
    with pytest.raises(UserError, match="image_folder: found 'x', expected path or weight"):
        sources({"a": {"path": "a", "image_folder": "x"}}, KEY, has_image_folders=False)
