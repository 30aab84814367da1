"""The YAML: every file composes by the command that it shows, and says what the issue asks for."""

import re
import subprocess
import sys

import pytest
from config_cases import DATA, commands_in, compose, compose_command, problems_of_values, yaml_files
from omegaconf import OmegaConf

from vlmsft.config_files import root

FILES = yaml_files()
COMMANDS = [(path, *command) for path in FILES for command in commands_in(path.read_text())]


def label(path):
    return str(path.relative_to(root()))


def header(path):
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def test_files_are_found():
    names = {label(path) for path in FILES}
    assert {"conf/train.yaml", "conf/experiment/demo.yaml", "launch/slurm.yaml", "sweeps/lr_tp.yaml"} <= names
    assert len(COMMANDS) >= len(FILES)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_header_has_purpose_cost_and_command(path):
    lines = [line for line in header(path) if not line.startswith("@package")]
    assert re.match(r"[A-Z].*", lines[0]) and not lines[0].startswith("Cost"), "first the purpose"
    assert any(line.startswith("Cost: ") for line in lines)
    assert commands_in(path.read_text())


@pytest.mark.parametrize(
    ("path", "name", "arguments"), COMMANDS, ids=[f"{label(c[0])}-{i}" for i, c in enumerate(COMMANDS)]
)
def test_command_of_header_composes(path, name, arguments):
    cfg = compose_command(name, arguments)
    missing = OmegaConf.missing_keys(cfg)
    assert not missing, f"the command leaves {missing} open"
    OmegaConf.to_container(cfg, resolve=True)
    assert problems_of_values(cfg) == []


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != root() / "conf"], ids=label)
def test_a_command_of_the_header_chooses_its_file(path):
    """Else the test above would pass with a file that nobody can read."""
    chosen = [compose_command(name, arguments, with_hydra=True) for name, arguments in commands_in(path.read_text())]
    if path.parent.name == "task":  # no group that is composed: evaluate reads tasks, several of them, by name
        assert any(path.stem in cfg.tasks for cfg in chosen)
        return
    groups = {"experiment": f"experiment/{path.parent.name}@data", "hydra": f"hydra/{path.parent.name}"}
    group = groups.get(path.parent.parent.name, path.parent.name)
    assert path.stem in [str(cfg.hydra.runtime.choices[group]) for cfg in chosen if group in cfg.hydra.runtime.choices]


def test_tutorial_values():
    cfg = compose("experiment=llava_instruct_ja", *DATA)
    assert (cfg.trainer.max_steps, cfg.trainer.val_check_interval, cfg.trainer.limit_val_batches) == (1160, 580, 1.0)
    assert type(cfg.trainer.limit_val_batches) is float, "1 would be one batch"
    assert (cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.log_every_n_steps) == (8, 1, 1)
    assert (cfg.data.global_batch_size, cfg.data.micro_batch_size) == (128, 1)
    assert (cfg.data.seq_length, cfg.data.decoder_seq_length) == (6404, 2048)
    assert (cfg.optim.max_lr, cfg.optim.min_lr, cfg.optim.warmup_steps) == (2e-5, 2e-7, 100)
    assert cfg.strategy.tensor_model_parallel_size == 2
    assert cfg.trainer.strategy is cfg.strategy
    assert cfg.log.ckpt.train_time_interval is None


def test_a_strategy_says_on_how_many_gpus_an_experiment_runs():
    def layout(*overrides):
        cfg = compose("experiment=lora", *overrides, *DATA)
        return cfg.trainer.devices, cfg.strategy.tensor_model_parallel_size, cfg.data.micro_batch_size

    assert layout() == (8, 1, 2)
    assert layout("strategy=lora_1x80gb") == (1, 1, 2)
    assert layout("peft=none", "strategy=full_8x80gb") == (8, 2, 1)


def test_the_demos_data_are_those_of_the_chosen_backend():
    assert compose("experiment=demo").data.train_path.endswith("sample/train.jsonl")
    energon = compose("experiment=demo", "data=energon")
    assert energon.data.path == energon.data.validation_path == "datasets/sample"
    assert energon.data.micro_batch_size == 16 and "train_path" not in energon.data
    assert compose("experiment=demo", "data=energon", "data.path=mine").data.path == "mine"


def test_command_line_wins_over_experiment_and_experiment_over_root():
    cfg = compose("experiment=demo", "optim.max_lr=0.5", "trainer.max_steps=7")
    assert (cfg.name, cfg.optim.max_lr, cfg.trainer.max_steps) == ("demo", 0.5, 7)
    assert compose("experiment=demo", "strategy=megatron").trainer.accelerator == "gpu"
    assert compose("name=mine", "experiment=demo").name == "mine"


def test_lora_stays_in_the_text_decoder_unless_asked():
    assert all("language_model" in target for target in compose("peft=lora", *DATA).peft.target_modules)
    assert list(compose("peft=lora_tower", *DATA).peft.target_modules) == ["linear_qkv", "linear_q", "linear_kv"]


@pytest.mark.parametrize("peft", ["lora", "lora_tower"])
def test_lora_saves_synchronously_by_itself(peft):
    assert compose(f"peft={peft}", *DATA).trainer.strategy.ckpt_async_save is False
    assert compose("peft=none", *DATA).strategy.ckpt_async_save is True


def test_the_monitor_stands_in_the_checkpoints_name():
    cfg = compose("log.ckpt.monitor=reduced_train_loss")
    assert cfg.log.ckpt.filename == "{reduced_train_loss:.4f}-{step}-{consumed_samples}"


def test_early_stopping_is_a_switch():
    assert compose("early_stopping=none").trainer.callbacks.early_stopping is None
    assert compose("early_stopping=val_loss").trainer.callbacks.early_stopping.monitor == "val_loss"


def test_one_seed():
    assert compose("seed=7").data.seed == 7


def test_no_key_in_any_yaml():
    for path in FILES:
        assert not re.search(r"(?i)(api_?key|token|secret|password)\s*:\s*(?!" ")\S", path.read_text()), path


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--help"], ["-m", "experiment=demo", "optim.max_lr=1,2"]])
def test_composing_imports_neither_torch_nor_nemo(flags):
    code = (
        "import sys\n"
        "from vlmsft.cli import command\n"
        "@command('train')\n"
        "def main(cfg): pass\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('HEAVY', [name for name in ('torch', 'nemo', 'numpy', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, cwd=root())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("HEAVY []\n")
