import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vlmsft.data.records import IMAGE, RecordFile, Turn, capped, find_problems, parse
from vlmsft.errors import Problem, UserError


def turns(*values):
    roles = ["human", "gpt"] * len(values)
    return [{"from": role, "value": value} for role, value in zip(roles, values, strict=False)]


GOOD = {"image": "a.jpg", "conversations": turns("<image>\n何ですか？", "猫です。")}


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_jsonl_keeps_line_numbers_past_blank_lines_and_pickles_as_a_path(tmp_path):
    path = write(tmp_path / "train.jsonl", [GOOD, "", "  ", {"image": "b.jpg"}, ""])
    records = RecordFile(path)
    assert [records[0], records[1]] == [GOOD, {"image": "b.jpg"}]
    assert len(records) == 2
    assert records.where(1) == f"{path}:4"
    data = pickle.dumps(records)
    assert len(data) < 1000
    assert pickle.loads(data)[1] == records[1]


def test_sizes_are_bytes_in_both_kinds_of_files(tmp_path):
    texts = ["短い", "もっとずっと長い答えです。" * 9, "half of a pair: \ud83d", "中くらいの答え"]
    records = [{"image": "a.jpg", "conversations": turns("<image>\n何？", text)} for text in texts]
    lines = [json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass") for record in records]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "train.json").write_text(json.dumps(records))
    indices = np.array([3, 1, 0, 2])
    expected = [len(lines[index]) for index in indices]
    assert RecordFile(tmp_path / "train.json").sizes(indices).tolist() == expected
    assert RecordFile(tmp_path / "train.jsonl").sizes(indices).tolist() == [size + 1 for size in expected], "line ends"


def test_json_list_names_record_and_id(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "id": "x7"}], indent=1))
    records = RecordFile(path)
    assert records[1]["id"] == "x7"
    assert records.where(1) == f"{path}[1] (id x7)"


def test_a_file_with_byte_order_mark_reads(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert [RecordFile(path)[n] for n in range(2)] == [GOOD, GOOD]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\n何ですか？", (IMAGE, "何ですか？")),
        ("何ですか？\n<image>", (IMAGE, "何ですか？")),
        ("<image>\n<image>\n違いは？", (IMAGE, IMAGE, "違いは？")),
        ("違いは？<image><image>", (IMAGE, IMAGE, "違いは？")),
        ("一枚目<image>\n二枚目<image>", ("一枚目", IMAGE, "二枚目", IMAGE)),
        ("  何ですか？ ", ("何ですか？",)),
        ("<image>", (IMAGE,)),
    ],
)
def test_markers_become_image_parts(text, parts):
    assert Turn.from_text("user", text).parts == parts


def test_a_marker_in_an_answer_is_text():
    assert Turn.from_text("assistant", "<image> と書きます").parts == ("<image> と書きます",)


def test_messages_with_parts_equal_conversations():
    content = [{"type": "image"}, {"type": "text", "text": "何ですか？"}]
    answer = {"role": "assistant", "content": "猫です。"}
    messages = {"image": ["a.jpg"], "messages": [{"role": "user", "content": content}, answer]}
    assert parse(messages) == parse(GOOD)
    content[0]["image"] = "a.jpg"
    del messages["image"]
    assert parse(messages) == parse(GOOD)


BAD = {
    "not json": ('{"image": ', "broken JSON"),
    "not an object": ([1], "a list"),
    "no turns": ({"image": "a.jpg"}, "image, expected a list of turns"),
    "unknown role": ({"conversations": [{"from": "humman", "value": "x"}]}, "Did you mean 'human'?"),
    "no text": ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: found content 3"),
    "answer first": ({"conversations": turns("", "x")[1:] + turns("q", "a")}, "role assistant, expected role user"),
    "two questions": ({"conversations": turns("q")[:1] + turns("q", "a")}, "turn 2: found role user"),
    "system later": (
        {"conversations": [*turns("q", "a"), {"from": "system", "value": "s"}]},
        "turn 3: found role system",
    ),
    "no answer": ({"conversations": turns("q")[:1]}, "no gpt turn"),
    "unanswered": ({"conversations": turns("q", "a", "q")[:3]}, "a last question without an answer"),
    "empty answer": ({"conversations": turns("q", "  ")}, "turn 2: found empty text, expected an answer"),
    "no marker": ({"image": "a.jpg", "conversations": turns("q", "a")}, "0 <image> for 1 image(s)"),
    "two markers": ({"image": "a.jpg", "conversations": turns("<image><image>q", "a")}, "2 <image> for 1 image(s)"),
    "no image": ({"conversations": turns("<image>q", "a")}, "1 <image> for 0 image(s)"),
    "odd image": ({"image": 3, "conversations": turns("<image>q", "a")}, "image = 3"),
    "no such image": ({"image": "x.jpg", "conversations": turns("<image>q", "a")}, "x.jpg"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_record_is_named_with_file_and_line(name, tmp_path, images):
    record, message = BAD[name]
    path = write(tmp_path / "train.jsonl", [GOOD, record])
    (problem,) = find_problems(path, images)
    assert str(problem).startswith(f"{path}:2")
    assert message in str(problem)


def test_all_problems_of_a_file_come_at_once(tmp_path, images):
    path = write(tmp_path / "train.jsonl", [record for record, _ in BAD.values()])
    problems = find_problems(path, images)
    assert sorted(int(p.where.split(":")[1].split()[0]) for p in problems) == list(range(1, len(BAD) + 1))
    shown = capped(problems, 3)
    assert len(shown) == 4
    assert f"{len(BAD) - 3} more" in str(shown[-1])


def test_a_good_file_has_no_problem_and_progress_ends_at_the_total(tmp_path, images):
    path = write(tmp_path / "train.jsonl", [{"conversations": turns("q", "a")}, GOOD])
    calls = []
    assert find_problems(path, images, progress=lambda *call: calls.append(call)) == []
    assert calls[-1] == (4, 4)


def test_missing_file_folder_and_empty_file(tmp_path, images):
    path = write(tmp_path / "train.jsonl", [GOOD])
    (problem,) = find_problems(tmp_path / "trian.jsonl", images)
    assert "Did you mean 'train.jsonl'?" in str(problem)
    (problem,) = find_problems(path, tmp_path / "imges")
    assert problem.where == str(tmp_path / "imges")
    assert "no such folder" in problem.found
    path.write_text("\n")
    (problem,) = find_problems(path, images)
    assert "no record" in problem.found
    path.write_text("")
    assert "no record" in find_problems(path, images)[0].found


def test_without_an_image_folder_missing_images_are_still_found_beside_other_problems(tmp_path):
    missing = {"image": "/none/x.jpg", "conversations": GOOD["conversations"]}
    path = write(tmp_path / "train.jsonl", ["{", missing])
    assert [problem.where for problem in find_problems(path, None)] == [f"{path}:1", f"{path}:2"]


def test_broken_json_list_names_the_line(tmp_path, images):
    path = tmp_path / "train.json"
    path.write_text('[\n{"image": "a.jpg"},\n{"image" "b.jpg"}]')
    (problem,) = find_problems(path, images)
    assert problem.where == f"{path}:3"


def test_unreadable_images_are_found_when_asked(tmp_path, images):
    whole = (images / "a.jpg").read_bytes()
    (images / "a.jpg").write_bytes(whole[: len(whole) // 2])
    path = write(tmp_path / "train.jsonl", [GOOD])
    assert find_problems(path, images, verify_images=0) == []
    (problem,) = find_problems(path, images)
    assert str(problem).startswith(f"{path}:1: found unreadable image {images / 'a.jpg'}")


def test_too_long_samples_are_found_with_an_encoder(tmp_path, images, encoder):
    long = {"image": "a.jpg", "conversations": turns("長い" * 300 + "<image>と", "a")}
    path = write(tmp_path / "train.jsonl", [GOOD, long])
    (problem,) = find_problems(path, images, encoder=encoder)
    assert str(problem).startswith(f"{path}:2")
    assert "decoder_seq_length = 256" in str(problem)


def test_user_errors_name_problems():
    with pytest.raises(UserError, match="no gpt turn"):
        parse({"conversations": turns("q")[:1]})
    assert capped([Problem("a", "b", "c")]) == [Problem("a", "b", "c")]


@pytest.mark.parametrize("block", [1, 3, 1 << 24])
@pytest.mark.parametrize(
    "text", [b'{"a": 1}', b' {"a": 1}\n\n\r\n{}\n  \n[1]\n', b"\xef\xbb\xbf{}\n{}", b"\xef\xbb\xbf\n{}\n\n"]
)
def test_records_begin_where_lines_do_whatever_is_read_at_once(text, block, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmsft.data.records.BLOCK", block)
    (tmp_path / "t.jsonl").write_bytes(text)
    records = RecordFile(tmp_path / "t.jsonl")
    lines = text.decode("utf-8-sig").split("\n")
    assert [records[n] for n in range(len(records))] == [json.loads(line) for line in lines if line.strip()]
    numbers = [n for n, line in enumerate(lines, 1) if line.strip()]
    assert [records.where(n) for n in range(len(records))] == [f"{tmp_path / 't.jsonl'}:{number}" for number in numbers]
