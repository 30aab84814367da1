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
