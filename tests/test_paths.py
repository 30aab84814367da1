"""Which values of a config become absolute paths."""

import os

from config_cases import DATA, compose
from omegaconf import OmegaConf

from vlmsft.paths import with_absolute_paths


def test_paths_are_absolute_and_the_rest_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = compose(*DATA, "data.validation_path=null", "data.image_folder='~/images'")
    absolute = with_absolute_paths(cfg)
    assert absolute.data.train_path == str(tmp_path / "t.jsonl")
    assert absolute.restore_from == absolute.resume.restore_config.path == str(tmp_path / "models" / "11b")
    assert absolute.data.image_folder == os.path.expanduser("~/images")
    assert absolute.data.validation_path is None
    assert absolute.data.processor == "meta-llama/Llama-3.2-11B-Vision-Instruct", "a hub id"
    assert cfg.data.train_path == "t.jsonl", "the composed config is never changed"


def test_urls_and_what_is_not_set_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = with_absolute_paths(compose("restore_from=nemo://llama"))
    assert cfg.restore_from == "nemo://llama"
    assert OmegaConf.is_missing(cfg.data, "train_path")


def test_a_processors_folder_is_told_from_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "processor").mkdir(parents=True)
    cfg = with_absolute_paths(compose(*DATA, "processor=mine/processor"))
    assert cfg.processor == cfg.data.processor == str(tmp_path / "mine" / "processor")
    assert with_absolute_paths(compose(*DATA, "processor=./gone")).processor == str(tmp_path / "gone")


def test_the_paths_of_named_datasets(tmp_path, monkeypatch):
    cfg = compose(*DATA, "data.train_path={a:x.jsonl,b:{path:y.jsonl,weight:2,image_folder:scans}}")
    monkeypatch.chdir(tmp_path)
    absolute = with_absolute_paths(cfg).data.train_path
    entry = {"path": str(tmp_path / "y.jsonl"), "weight": 2, "image_folder": str(tmp_path / "scans")}
    assert absolute == {"a": str(tmp_path / "x.jsonl"), "b": entry}
    energon = compose("experiment=demo", "data=energon", "data.path=[one,two]")
    data = with_absolute_paths(energon).data
    assert data.path == data.validation_path == [str(tmp_path / "one"), str(tmp_path / "two")]
