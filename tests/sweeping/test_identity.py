"""Which jobs are the same, and composing many of them fast with the same results."""

import hydra
import pytest
from config_cases import DATA, compose
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from vlmsft.config_files import root
from vlmsft.sweeping.compose import SweepComposer
from vlmsft.sweeping.identity import identity_of, sweep_id_of


def identity(*overrides: str) -> str:
    return identity_of(compose("experiment=demo", *overrides))


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "run_dir=/elsewhere",
        "log=wandb",
        "launch=torchrun",
        "sweep.id=mine",
        "sweep.num=3",
        "trainer.log_every_n_steps=7",
        "data.train_path=${sample_set:}/../sample/train.jsonl",
    ],
)
def test_what_changes_no_result_changes_no_identity(override):
    assert identity(override) == identity()


@pytest.mark.parametrize(
    "override",
    [
        "optim.max_lr=1e-5",
        "seed=1",
        "strategy.tensor_model_parallel_size=2",
        "precision=bf16-mixed",
        "data.global_batch_size=32",
        "restore_from=/models/11b",
        "peft=lora",
        "+trainer.gradient_clip_val=1.0",
    ],
)
def test_what_changes_a_result_changes_the_identity(override):
    assert identity(override) != identity()


def test_an_id_that_is_given_is_part_of_it():
    assert identity("id=a") != identity("id=b") and identity("id=a") != identity()


def test_a_relative_path_is_the_file_that_it_names(tmp_path, monkeypatch):
    relative = compose(*DATA)
    monkeypatch.chdir(tmp_path)
    first = identity_of(relative)
    assert first == identity_of(compose(*[w if "=models" in w else w.replace("=", f"={tmp_path}/", 1) for w in DATA]))
    monkeypatch.chdir("/")
    assert identity_of(relative) != first


def test_sweep_id():
    jobs = [("aa", "demo"), ("bb", "demo")]
    assert sweep_id_of(jobs) == sweep_id_of(list(jobs)) and len(sweep_id_of(jobs)) == 8
    assert all(sweep_id_of([(str(number), "x")])[0].isalpha() for number in range(40)), "no number, as YAML reads it"
    assert sweep_id_of(jobs) != sweep_id_of(jobs[:1]) and sweep_id_of(jobs) != sweep_id_of([("aa", "x"), ("bb", "x")])


SWEEPS = [
    ["experiment=demo", "optim.max_lr=1e-5"],
    ["experiment=demo", "optim.max_lr=2e-5", "data=energon"],
    ["experiment=lora", "peft=lora", "peft.dim=4", *DATA],
    ["experiment=demo", "+trainer.gradient_clip_val=1.0", "~trainer.callbacks.overfit", "name='a, b'"],
    ["experiment=demo", "data.image_folder=null", "optim.max_lr=1e-5", "optim.max_lr=3e-5"],
]


def test_the_composer_gives_what_hydra_gives():
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("train", ["experiment=demo", "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
        expected = [loader.load_sweep_config(master, list(words)) for words in SWEEPS]
        composer = SweepComposer.install(loader)
        assert SweepComposer.install(loader) is composer
        for words, by_hydra in zip(SWEEPS, expected, strict=True):
            loader.load_sweep_config(master, list(words))  # the sweeper's look
            for cfg in (composer.take(master, words), composer.take(master, words)):
                found, wanted = (OmegaConf.to_container(each, resolve=False) for each in (cfg, by_hydra))
                found["hydra"]["job"].pop("override_dirname"), wanted["hydra"]["job"].pop("override_dirname")
                assert found == wanted
                cfg.optim.max_lr = "changed"  # the config is the caller's


def test_the_composer_refuses_what_hydra_refuses():
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("train", [], RunMode.MULTIRUN)
        composer = SweepComposer.install(loader)
        for word in ("optim.max_lrr=1", "optim=cosin", "+optim.max_lr=1"):
            with pytest.raises(Exception, match=word.split("=")[0].lstrip("+")):
                composer.take(master, [word])
