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
