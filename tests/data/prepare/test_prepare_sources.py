import io
import json

import pytest
from PIL import Image

from vlmsft.data.prepare.sources import Normaliser, open_source
from vlmsft.data.records import parse
from vlmsft.errors import UserError

TURNS = [{"from": "human", "value": "<image>\n何？"}, {"from": "gpt", "value": "猫。"}]


@pytest.fixture
def normalise(tmp_path):
    return Normaliser(tmp_path / "images", inside=True)


@pytest.mark.parametrize(
    "raw",
    [
        {"id": 7, "image": "a.jpg", "conversations": TURNS, "model": "gpt-4"},
        {"image": ["a.jpg"], "conversations": [{**turn, "role": None} for turn in TURNS], "messages": None},
        {
            "images": ["a.jpg"],
            "messages": [{"role": "user", "content": "<image>何？"}, {"role": "assistant", "content": "猫。"}],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None, "path": "a.jpg"},
                        {"type": "text", "text": "何？", "path": None},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "猫。"}]},
            ]
        },
        {
            "image": "a.jpg",
            "conversations": [{"from": "user", "value": "何？<image>"}, {"from": "assistant", "value": "猫。"}],
        },
    ],
    ids=["llava", "nulls of Arrow", "messages", "content parts", "sharegpt"],
)
def test_records_of_all_kinds_mean_the_same(normalise, raw):
    before = json.dumps(raw)
    prepared = normalise(raw)
    assert json.dumps(raw) == before
    conversation = parse(prepared)
    assert prepared["image"] == "a.jpg" and conversation.images == ("a.jpg",)
    assert [turn.text for turn in conversation.turns] == ["何？", "猫。"] and conversation.turns[0].parts[0] is None
    assert set(prepared) <= {"id", "image", "conversations", "messages"}


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "..\\a.jpg"])
def test_names_that_lead_out_of_the_image_folder(normalise, name):
    with pytest.raises(UserError, match=r"without '..'"):
        normalise({"image": name, "conversations": TURNS})
    Normaliser(normalise.image_folder, inside=False)({"image": name, "conversations": TURNS})


def test_a_bad_record_says_what_is_wrong(normalise):
    with pytest.raises(UserError, match="0 <image> for 1 image"):
        normalise({"image": "a.jpg", "conversations": [{"from": "human", "value": "?"}, TURNS[1]]})


def png():
    buffer = io.BytesIO()
    Image.new("RGBA", (5, 4), (1, 2, 3, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def with_pictures(tmp_path, photographs, monkeypatch):
    """A Parquet file as `datasets` writes it: a column of one picture, and one of lists."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    photo = next(iter(photographs.values()))
    rows = {
        "images": [
            [{"bytes": photo, "path": "x.jpg"}, {"bytes": png(), "path": None}],
            [{"bytes": photo, "path": "y.jpg"}],
        ],
        "messages": [
            [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "猫"}],
            [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "犬"}],
        ],
    }
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(turn)})
    folder = tmp_path / "hub"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder, photo


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_pictures_in_records_become_files_with_their_original_bytes(with_pictures, normalise, kind):
    folder, photo = with_pictures
    source = open_source(str(folder / "train.parquet" if kind == "parquet" else folder), None, "train")
    first, second = [normalise(raw) for raw in source]
    assert len(source) == 2
    assert [(normalise.image_folder / name).read_bytes() for name in first["image"]] == [photo, png()]
    assert second["image"] == first["image"][0]  # the same picture is one file
    assert first["image"][0].endswith(".jpg") and first["image"][1].endswith(".png")


def test_json_source_says_what_it_read(conversations):
    source = open_source(str(conversations), None, "train")
    assert len(source) == len(list(source)) == 40
    assert len(source.identity()["sha256"]) == 64 and source.where(1).endswith("mine.jsonl:2")


@pytest.mark.parametrize("name", ["mine.json", "a/b/c", "no such thing"])
def test_missing_conversations(tmp_path, name):
    with pytest.raises(UserError, match=r"dataset.conversations: found no file"):
        open_source(name, None, "train")


def test_a_broken_parquet_file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="broken file"):
        open_source(str(tmp_path / "x.parquet"), None, "train")


def test_a_hub_that_cannot_be_reached(monkeypatch, request):
    import datasets
    import huggingface_hub.constants
    import huggingface_hub.utils

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.reset_sessions()  # a session keeps what the variable was when it was made
    request.addfinalizer(huggingface_hub.utils.reset_sessions)
    with pytest.raises(UserError, match=r"nobody/nothing .*can't be loaded.*dataset.conversations=records.jsonl"):
        open_source("nobody/nothing", None, "train")
