import json
import multiprocessing
import pickle

import pytest

from vlmsft.data.dataset import ConversationDataset, UserErrorLoader
from vlmsft.data.records import find_problems
from vlmsft.data.skips import Skip, SkippedFile, not_skippable, raise_above, skip_of
from vlmsft.errors import Problem, UserError


def record(question="q", answer="a", **rest):
    return {**rest, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


BAD = record("<image>\nq", image="gone.jpg")


def write(path, records):
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


@pytest.fixture
def dataset(tmp_path, sample_folder):
    path = write(tmp_path / "train.jsonl", [record(), BAD, record(), {"conversations": 3}])
    return ConversationDataset(str(path), str(tmp_path), str(sample_folder / "processor"), 256, on_error="skip")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stand_in_takes_the_place_and_the_batch_names_it(dataset, num_workers):
    loader = UserErrorLoader(
        pickle.loads(pickle.dumps(dataset)),
        mode="train",
        collate_fn=dataset.collate,
        batch_sampler=[[0, 1], [2, 0], [3], [~3]],
        num_workers=num_workers,
    )
    mixed, good, alone, filler = loader
    assert [len(batch["tokens"]) for batch in (mixed, good, alone, filler)] == [2, 2, 1, 1]
    assert mixed["loss_mask"].sum(1).gt(0).tolist() == [True, False]
    assert alone["loss_mask"].sum() == 0
    assert alone["tiles"].shape == (0, 3, 112, 112)
    assert "skipped" not in good
    (skip,) = mixed["skipped"]
    path = str(dataset.records.path)
    assert (skip.where, skip.dataset, skip.num_samples) == (f"{path}:2", path, 4)
    assert skip.reason.startswith("found unreadable image") and "gone.jpg" in skip.reason
    assert alone["skipped"] == filler["skipped"]
    assert (
        alone["skipped"][0].reason
        == "found conversations, expected a list of turns under `conversations` (or `messages`)"
    )


def test_a_processor_that_fails_is_not_skipped(tmp_path):
    path = write(tmp_path / "train.jsonl", [record()])
    dataset = ConversationDataset(str(path), None, str(tmp_path / "none"), 256, on_error="skip")
    item = dataset[0]
    assert isinstance(item, UserError)
    assert item.problems[0].where == "processor"


def test_the_reason_of_any_exception():
    assert skip_of("a.tar:7", KeyError("jpg"), "a", 3) == Skip("a.tar:7", "KeyError: 'jpg'", "a", 3)
    turn = UserError(Problem("t.jsonl:7 turn 2", "x", "y"))
    assert skip_of("t.jsonl:7", turn, "t.jsonl", 3).reason == "turn 2: found x, expected y"


def skip(number, dataset="train.jsonl"):
    return Skip(f"{dataset}:{number}", "broken", dataset, 1000)


def test_each_sample_is_named_once_and_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "skipped_samples.jsonl"
    first = SkippedFile(path)
    assert first.counts() == {}
    first.add([skip(1), skip(1), skip(2)])
    other = SkippedFile(path)
    assert other.add([skip(2), skip(3, "val.jsonl")]) == [skip(3, "val.jsonl")]
    assert first.counts() == other.counts() == {"train.jsonl": 2, "val.jsonl": 1}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {"where": "train.jsonl:1", "reason": "broken", "dataset": "train.jsonl"}
    assert [row["where"] for row in rows] == ["train.jsonl:1", "train.jsonl:2", "val.jsonl:3"]


def test_a_torn_last_line_costs_that_line_only(tmp_path):
    path = tmp_path / "skipped_samples.jsonl"
    SkippedFile(path).add([skip(1)])
    path.write_bytes(path.read_bytes() + b'{"where": "tr')
    SkippedFile(path).add([skip(1), skip(2)])
    assert SkippedFile(path).counts() == {"train.jsonl": 2}


def add_many(path, rank):
    file = SkippedFile(path)
    for number in range(60):
        file.add([skip(number), skip(1000 * rank + number, "val.jsonl")])


def test_ranks_write_at_once(tmp_path):
    path = tmp_path / "skipped_samples.jsonl"
    ranks = [multiprocessing.get_context("fork").Process(target=add_many, args=(path, rank)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert SkippedFile(path).counts() == {"train.jsonl": 60, "val.jsonl": 240}
    assert len(path.read_text().splitlines()) == 300


def test_more_than_the_share_stops_the_run():
    raise_above(0.001, skip(1), 1, "run/skipped_samples.jsonl")
    with pytest.raises(UserError, match=r"2 of 1000 samples of train\.jsonl .*at most 0\.001 .*run/skipped") as raised:
        raise_above(0.001, skip(7), 2, "run/skipped_samples.jsonl")
    assert raised.value.state == "the run stopped"


def test_the_look_before_training_lets_pass_what_will_be_skipped(tmp_path):
    path = write(tmp_path / "train.jsonl", [record(), BAD, record(), {"conversations": 3}])
    found = find_problems(path, tmp_path)
    assert len(found) == 2
    assert not_skippable(found, path, 0.5) == []
    refused = not_skippable(found, path, 0.25)
    assert refused[0].where == "data.max_skipped_share" and refused[0].found.startswith("2 of 4 samples")
    assert refused[1:] == found
    no_folder = find_problems(path, tmp_path / "none")
    assert [problem.where for problem in not_skippable(no_folder, path, 0.5)] == [str(tmp_path / "none")]
    path.write_text("[3, ")
    assert not_skippable(find_problems(path, tmp_path), path, 1.0) == find_problems(path, tmp_path) != []
