import hashlib
import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vlmsft.errors import UserError

pytestmark = pytest.mark.nemo


@pytest.fixture
def arguments(sample_folder):
    return {
        "train_path": str(sample_folder / "train.jsonl"),
        "validation_path": str(sample_folder / "validation.jsonl"),
        "image_folder": str(sample_folder / "images"),
        "processor": str(sample_folder / "processor"),
        "seq_length": 288,
        "decoder_seq_length": 256,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "num_workers": 0,
        "seed": 3,
    }


@pytest.fixture
def module(arguments):
    from vlmsft.data.preloaded import PreloadedDataModule

    return PreloadedDataModule(**arguments)


def test_loaders_give_each_rank_its_share(module, ranks, loaders):
    batches = []
    for rank in range(2):
        ranks(rank, 2)
        train, validation = loaders(module)
        assert (train.mode, validation.mode) == ("train", "validation")
        assert len(validation) == 12  # 48 samples, micro batch 2, 2 ranks
        batches += list(islice(train, 2))
    ranks(0, 1)
    alone = list(islice(loaders(module)[0], 4))

    def rows(group):
        return sorted(
            tuple(row[mask > 0].tolist()) for b in group for row, mask in zip(b["labels"], b["loss_mask"], strict=True)
        )

    assert rows(batches) == rows(alone)


def write_texts(path: Path, lengths: range) -> str:
    """Records with answers of so many tokens and a constant; a JSON list or JSONL, by the path."""
    records = [
        {"conversations": [{"from": "human", "value": "何？"}, {"from": "gpt", "value": "猫" * n}]} for n in lengths
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text(f"[{','.join(lines)}]" if path.suffix == ".json" else "\n".join(lines))
    return str(path)


@pytest.mark.parametrize(("weights", "num_workers"), [([], 0), ([3, 1], 0), ([None, None], 2)])
def test_similar_lengths_share_a_micro_batch(weights, num_workers, arguments, loaders, tmp_path):
    """Of one file, and of a JSONL file and a JSON list whose lengths take turns."""
    from vlmsft.data.preloaded import PreloadedDataModule

    odd, even = write_texts(tmp_path / "a.jsonl", range(1, 48, 2)), write_texts(tmp_path / "b.json", range(2, 49, 2))
    named = {"odd": odd, "even": even}.items()
    mix = {name: {"path": path, "weight": weight} for (name, path), weight in zip(named, weights, strict=False)}
    changes = {"train_path": mix or odd, "num_workers": num_workers, "validation_path": None}
    train, _ = loaders(PreloadedDataModule(**{**arguments, **changes}))
    lengths = torch.cat([batch["num_text_tokens"] for batch in islice(train, 4 * 3)]).view(3, 8).tolist()
    assert lengths == [sorted(step, reverse=True) for step in lengths]
    assert len({length % 2 for step in lengths for length in step}) == (2 if mix else 1)


def test_training_has_no_length_and_validation_repeats(module, loaders):
    train, validation = loaders(module)
    with pytest.raises(TypeError):
        len(train)
    first, second = list(validation), list(validation)
    assert len(first) == 24
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_resume_continues_behind_the_consumed_samples_and_validation_does_not_move(module, arguments, loaders):
    from vlmsft.data.preloaded import PreloadedDataModule

    train, validation = loaders(module)
    expected = list(islice(train, 20))[12:]  # 3 steps of 4 micro batches are behind us
    resumed = PreloadedDataModule(**arguments)
    resumed.setup("fit")
    resumed.load_state_dict({"consumed_samples": 24, "num_train_samples": 106, "seed": 3})  # of an earlier version
    assert resumed.data_sampler.init_consumed_samples == resumed.data_sampler.prev_consumed_samples == 24
    train_again, validation_again = loaders(resumed)
    for one, other in zip(expected, islice(train_again, 8), strict=True):
        assert one["tokens"].equal(other["tokens"])
    for one, other in zip(validation, validation_again, strict=True):
        assert one["tokens"].equal(other["tokens"])


def test_resume_on_other_data_is_refused(module):
    with pytest.raises(UserError, match=r"(?s)data.num_train_samples: found 106, expected 7 .*data.seed: found 3"):
        module.load_state_dict({"consumed_samples": 24, "num_train_samples": 7, "seed": 1})


def test_resume_on_as_many_other_samples_is_refused(arguments, tmp_path):
    from vlmsft.data.preloaded import PreloadedDataModule

    state = PreloadedDataModule(**arguments).state_dict()
    lines = Path(arguments["train_path"]).read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    other = PreloadedDataModule(**{**arguments, "train_path": str(tmp_path / "train.jsonl")})
    with pytest.raises(UserError, match=r"data\.train_sha256"):
        other.load_state_dict(state)


def test_state_counts_the_steps_since_the_start(module, monkeypatch):
    module.trainer = SimpleNamespace(global_step=5)
    module.init_global_step = 2
    monkeypatch.setattr(module.data_sampler, "compute_consumed_samples", lambda steps: 8 * steps)
    content = hashlib.sha256(Path(module.train_path).read_bytes()).hexdigest()
    expected = {"consumed_samples": 24, "num_train_samples": 106, "seed": 3, "train_sha256": content, "weights": None}
    assert module.state_dict() == expected
    module.load_state_dict(expected)
    module.setup("fit")
    module.train_dataloader()
    assert module.data_sampler.init_global_step == 5


def test_a_run_that_goes_on_without_a_place_is_refused(module):
    """As with a checkpoint of another data module, for which Lightning calls no load_state_dict."""
    module.trainer = SimpleNamespace(global_step=5)
    module.setup("fit")
    with pytest.raises(UserError, match="a checkpoint of step 5 that holds no place in the stream of Preloaded"):
        module.train_dataloader()


def blend(sample_folder, first: float = 3) -> dict:
    train, validation = (str(sample_folder / f"{name}.jsonl") for name in ("train", "validation"))
    return {"chat": {"path": train, "weight": first}, "ocr": {"path": validation, "weight": 1}}


def test_a_blend_resumes_and_does_not_depend_on_the_number_of_ranks(arguments, sample_folder, ranks, loaders):
    from vlmsft.data.preloaded import PreloadedDataModule

    arguments = {**arguments, "train_path": blend(sample_folder), "validation_path": blend(sample_folder)}
    train, validation = loaders(PreloadedDataModule(**arguments))
    whole = list(islice(train, 24))
    state = {**PreloadedDataModule(**arguments).state_dict(), "consumed_samples": 24}
    parts = []
    for rank in range(2):
        ranks(rank, 2)
        resumed = PreloadedDataModule(**arguments)
        resumed.load_state_dict(state)
        parts.append(list(islice(loaders(resumed)[0], 6)))
    rounds = list(zip(*parts, strict=True))
    rounds[1::2] = [pair[::-1] for pair in rounds[1::2]]  # two in a step, the second from the last rank to the first
    in_order = [batch for pair in rounds for batch in pair]
    for one, other in zip(whole[12:], in_order, strict=True):
        assert one["tokens"].equal(other["tokens"])
    sets = torch.cat([batch["validation_set"] for batch in validation]).tolist()
    assert sets[:154] == [0] * 106 + [1] * 48


def test_resume_with_other_weights_is_refused(arguments, sample_folder):
    from vlmsft.data.preloaded import PreloadedDataModule

    state = PreloadedDataModule(**{**arguments, "train_path": blend(sample_folder)}).state_dict()
    other = PreloadedDataModule(**{**arguments, "train_path": blend(sample_folder, first=2)})
    with pytest.raises(
        UserError, match=r"data.weights: found \{'chat': 2, 'ocr': 1\}, expected \{'chat': 3, 'ocr': 1\}"
    ):
        other.load_state_dict(state)


def test_no_validation(arguments):
    from vlmsft.data.preloaded import PreloadedDataModule

    module = PreloadedDataModule(**{**arguments, "validation_path": None})
    module.prepare_data()
    module.setup("fit")
    assert module.val_dataloader() == []
    assert module.data_sampler.transform_dataloader(module.val_dataloader()) == [], "NeMo's strategy hands it over too"


def test_problems_of_both_files_come_before_training(arguments, tmp_path):
    from vlmsft.data.preloaded import PreloadedDataModule

    (tmp_path / "bad.jsonl").write_text('{"image": "none.jpg"}\n{"broken\n')
    module = PreloadedDataModule(**{**arguments, "train_path": str(tmp_path / "bad.jsonl"), "validation_path": "gone"})
    with pytest.raises(UserError) as raised:
        module.prepare_data()
    wheres = [problem.where for problem in raised.value.problems]
    assert wheres == [f"{tmp_path / 'bad.jsonl'}:1", f"{tmp_path / 'bad.jsonl'}:2", "gone"]


def test_the_module_and_its_tokenizer_travel_with_a_checkpoint(module, tmp_path):
    from nemo.collections.llm.api import _set_with_io
    from nemo.lightning import io

    _set_with_io(module, "tokenizer", module.tokenizer)  # as llm.finetune does
    module.io_dump(tmp_path, yaml_attrs=[])
    loaded = io.load(tmp_path)
    assert (loaded.train_path, loaded.seed, loaded.global_batch_size) == (module.train_path, 3, 8)
    assert loaded.tokenizer.text_to_ids("猫") == module.tokenizer.text_to_ids("猫")


def test_masks_equal_nemo():
    """visible_from and visible_until against create_vision_mask_tensor, on random places of the image token."""
    from nemo.collections.vlm.mllama.model.utils import create_vision_mask_tensor

    from vlmsft.data.encode import visible_until

    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        length = int(torch.randint(2, 30, (1,), generator=generator))
        images = torch.rand(length, generator=generator) < 0.4
        if not images.any():
            continue
        masks = create_vision_mask_tensor(torch.where(images, 7, 1), 7)
        positions = images.nonzero().flatten().tolist()
        assert masks[:, 0].tolist() == positions
        assert masks[:, 1].tolist() == visible_until(positions, length)


def test_nemo_validation_loss_survives_micro_batches_without_loss(monkeypatch):
    """The fill of the last validation batch: weightless in NeMo's reduction, in any micro batch, without NaN."""
    from megatron.core import parallel_state
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: None)
    monkeypatch.setattr(parallel_state, "get_data_parallel_group", lambda with_context_parallel: None)
    reduction = MaskedTokenLossReduction(validation_step=True)
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    masks = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        reduced = []
        for row in order:
            reduction.setup({"loss_mask": masks[row : row + 1]})
            reduced.append(reduction(losses[row : row + 1])[-1])
        assert reduction.reduce(reduced) == pytest.approx(7 / 3)
