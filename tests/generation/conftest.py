from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # helpers of tests/, also where this folder runs alone


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    from generation_toys import write_hf_folder

    return write_hf_folder(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="session")
def loaded(hf_folder):
    import torch

    from vlmsft.generation.model import load_model

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads cost this model ten times what they save on a busy machine
    yield load_model(hf_folder, device="cpu")
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def generator(loaded):
    from vlmsft.generation.generate import Generator

    return Generator(loaded)
