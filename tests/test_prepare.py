"""python -m vlmsft.prepare: its YAML, its messages, and the sample set."""

import json
import shlex
import subprocess
import sys

import hydra
import pytest

from vlmsft.config_files import register_resolvers, root, sample_set
from vlmsft.errors import UserError
from vlmsft.prepare import settings_of, train_commands

YAML = [root() / "conf" / "prepare.yaml", *sorted((root() / "conf" / "dataset").glob("*.yaml"))]
SHOWN = [line[2:] for path in YAML for line in path.read_text().splitlines() if line.startswith("# python -m")]


def compose(*overrides):
    register_resolvers()
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        return hydra.compose("prepare", list(overrides))


@pytest.mark.parametrize("line", SHOWN)
def test_shown_commands_compose(line):
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "vlmsft.prepare"]
    settings = settings_of(compose(*words[3:]))
    assert not settings.problems()


def test_every_yaml_shows_a_command():
    assert len(YAML) == 4
    assert all("# python -m vlmsft.prepare" in path.read_text() for path in YAML)


def test_what_only_the_user_knows_is_named():
    with pytest.raises(UserError, match=r"dataset.conversations"):
        settings_of(compose("dataset=local"))


def test_the_tutorials_values():
    settings = settings_of(compose("dataset=llava_instruct_ja"))
    assert (settings.validation_fraction, settings.seed, settings.split_by) == (0.05, 42, "record")
    assert settings.conversations == "llm-jp/llava-instruct-ja" and settings.images.endswith("train2017.zip")


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "vlmsft.prepare", *arguments], capture_output=True, text=True, cwd=cwd,
        env={"PYTHONPATH": str(root()), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
    )  # fmt: skip


def test_the_sample_set_is_split_as_shipped_and_says_how_to_train(tmp_path):
    done = run("dataset=sample", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "datasets" / "sample"
    for made, shipped in (("training", "train"), ("validation", "validation")):
        records = [json.loads(line) for line in (out / f"{made}.jsonl").read_text().splitlines()]
        with open(f"{sample_set()}/{shipped}.jsonl", encoding="utf-8") as file:
            assert records == [json.loads(line) for line in file]
    commands = [line for line in done.stdout.splitlines() if line.startswith("python -m vlmsft.train")]
    assert len(commands) == 2
    assert f"data.train_path={out}/training.jsonl" in commands[0]
    assert commands[1].endswith(f"experiment=demo data=energon data.path={out}/shards")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("datasets", ".cache", ".config")]


def test_wrong_values_come_as_one_message(tmp_path):
    done = run("dataset=sample", "split_by=x", "formats=[csv]", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "split_by" in done.stderr and "formats" in done.stderr
    assert not (tmp_path / "datasets").exists()


@pytest.mark.parametrize("folder", ["out", "写 真", "it's", 'a "b" c', "a,b=[c]"])
def test_the_preloaded_command_composes(tmp_path, folder):
    cfg = compose("dataset=sample").copy()
    cfg.output = f"{tmp_path}/{folder}"
    settings = settings_of(cfg)
    line = train_commands(cfg, settings, {"counts": {"training": 1, "validation": 1}})[0]
    with hydra.initialize_config_dir(str(root() / "conf"), version_base="1.3"):
        composed = hydra.compose("train", shlex.split(line)[3:])
    assert composed.data.train_path == f"{tmp_path}/{folder}/training.jsonl"
    assert composed.data.image_folder == str(settings.image_folder)
