from pathlib import Path

import pytest

import vlmsft.data

SAMPLE = Path(vlmsft.data.__file__).parent / "sample"


@pytest.fixture(scope="session")
def sample_folder() -> Path:
    return SAMPLE


@pytest.fixture(scope="session")
def encoder():
    from vlmsft.data.encode import SampleEncoder

    return SampleEncoder(str(SAMPLE / "processor"), decoder_seq_length=256)


@pytest.fixture(scope="session")
def photo(sample_folder):
    from vlmsft.data.encode import load_image

    return load_image(sample_folder / "images" / "cat.jpg")


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory, sample_folder) -> Path:
    """The sample set as shards of 20 records."""
    from shard_toys import record_parts, write_folder

    files = {"train": "train.jsonl", "val": "validation.jsonl"}
    splits = {name: record_parts(sample_folder / file, sample_folder / "images") for name, file in files.items()}
    return write_folder(tmp_path_factory.mktemp("shards") / "sample", splits)


@pytest.fixture
def ranks(monkeypatch):
    """Sets data-parallel rank and size without a process group."""
    from megatron.core import parallel_state

    def set_ranks(rank, size):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: rank)
        monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: size)

    set_ranks(0, 1)
    return set_ranks


@pytest.fixture
def loaders(ranks):
    """Gives a data module's loaders of training and validation, of the rank that `ranks` has set."""

    def loaders(module):
        module.setup("fit")
        transform = module.data_sampler.transform_dataloader
        return transform(module.train_dataloader()), transform(module.val_dataloader())

    return loaders
