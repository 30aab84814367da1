"""Wrong overrides: all of them in one message, each with its nearest name, exit code 2, no traceback."""

import functools
import os
import subprocess
import sys

import pytest

from vlmsft.cli import command, quoted_beyond_ascii
from vlmsft.config_files import root
from vlmsft.errors import Problem, UserError


@command("train")
def main(cfg):
    print("STARTED", os.environ.get("HYDRA_FULL_ERROR"))
    if cfg.seed == 1:
        raise UserError(Problem("seed", "1", "another"))
    if cfg.seed == 2:
        raise ZeroDivisionError


@pytest.fixture
def run(run_main):
    return functools.partial(run_main, main)


@pytest.fixture
def refused(run):
    def refused(*arguments):
        code, out, message = run(*arguments)
        assert code == 2
        assert "Traceback" not in message and "STARTED" not in out
        return message

    return refused


def test_misspelt_key_names_the_right_one(refused):
    message = refused("experiment=demo", "optim.max_lrr=1")
    assert "optim.max_lrr" in message and "'optim.max_lr'" in message
    assert message.startswith("1 problem")


def test_all_at_once(refused):
    message = refused(
        "experiment=demos",
        "optim.max_lrr=1",
        "stratgy=cpu",
        "data=energy",
        "name=[1,",
        "max_steps=3",
        "trainer.strategy.sequence_parallel=true",
    )
    assert message.startswith("7 problems")
    for expected in (
        "experiment: found 'demos', expected one of demo, llava_instruct_ja, llava_instruct_ja_energon, lora. ",
        "Did you mean 'demo'?",
        "Did you mean 'optim.max_lr'?",
        "Did you mean 'strategy'?",
        "data: found 'energy', expected one of energon, preloaded",
        "name: found 'name=[1,'",
        "Did you mean 'trainer.max_steps'?",
        "Write strategy.sequence_parallel=true",
    ):
        assert expected in message


def test_key_of_the_launcher(refused):
    message = refused("experiment=demo", "hydra.launcher.max_paralel=1")
    assert "Did you mean 'hydra.launcher.max_parallel'?" in message


def test_keys_that_have_to_be_set_are_keys(refused):
    message = refused("data.train_path=a.jsonl", "restore_from=models/11b", "optim.max_lrr=1")
    assert message.startswith("1 problem") and "optim.max_lrr" in message


def test_null_for_a_group(refused):
    assert refused("trainer=null").endswith("trainer: found null, expected one of default\n")


@pytest.mark.parametrize("given", ["--config-dir={}", "hydra.searchpath=[file://{}]"])
def test_options_of_ones_own_folder(refused, run, tmp_path, given, caplog):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - demo\n")
    own = given.format(tmp_path)
    message = refused(own, "experiment=mine", "optim.max_lrr=1")
    assert message.startswith("1 problem") and "Did you mean 'optim.max_lr'?" in message
    assert "Did you mean 'mine'?" in refused(own, "experiment=minee")
    assert run(own, "experiment=mine")[0] == 0
    assert caplog.text == "", "of the multi-storage client, a traceback"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("data.image_folder=写真", 'data.image_folder="写真"'),
        ("name=täst/ラン", 'name="täst/ラン"'),
        ("name='täst'", "name='täst'"),
        ("data.train_path=[写真,b]", "data.train_path=[写真,b]"),
        ("--config-dir=写真", "--config-dir=写真"),
        ("name=test", "name=test"),
    ],
)
def test_letters_beyond_ascii_need_no_quotes(typed, read):
    assert quoted_beyond_ascii(typed) == read


def test_a_folder_in_japanese(run):
    code, out, _ = run("data.image_folder=写真")
    assert code == 0 and "STARTED" in out


def test_option_of_a_sweep_that_does_not_exist(refused):
    assert "model: found 'mllama_12b'" in refused("-m", "model=mllama_tiny,mllama_12b", "experiment=demo")


@pytest.mark.parametrize("override", ["~optim.max_lrr", "+seed=3", "hydra.nonsense=1", "experiment=[]x"])
def test_what_hydra_refuses_ends_in_our_message(refused, override):
    assert "; nothing was started:" in refused(override)


def test_user_error_of_the_command(run):
    code, out, message = run("seed=1")
    assert code == 2 and "STARTED None" in out, "child processes of a command don't inherit HYDRA_FULL_ERROR"
    assert message == "1 problem; nothing was started:\n  seed: found 1, expected another\n"
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_bug_is_raised(run):
    with pytest.raises(ZeroDivisionError):
        run("seed=2")


def test_exit_code_of_a_process():
    code = "from vlmsft.cli import command\n@command('train')\ndef main(cfg): pass\nmain()"
    arguments = ["experiment=demo", "optim.max_lrr=1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=root())
    assert done.returncode == 2 and "'optim.max_lr'" in done.stderr and "Traceback" not in done.stderr
