"""What a plan says: the recipe's values, the summary's numbers where they can be known, and no run folder."""

from dataclasses import asdict
from types import SimpleNamespace

import nemo_run as run
import pytest
import torch
from config_cases import DATA, compose

from vlmsft import estimates
from vlmsft.facts import Facts, shapes
from vlmsft.mllama.sizes import GIB, lora_hits, lora_matrices, parameter_counts
from vlmsft.plan import can_be_counted, facts, num_samples, written_out
from vlmsft.runtime import summary


class Part:
    def __init__(self, x: int = 0, y: list | None = None, deep: object = None):
        pass


def test_recipe_is_written_out_with_classes_and_without_defaults():
    inner = run.Config(Part, x=1)
    text = written_out(run.Partial(Part, y=[1, 2], deep=[inner, run.Config(Part)]))
    name = f"{Part.__module__}.Part"
    assert text.splitlines() == [f"run: {name}", "y = [1, 2]", f"deep[0]: {name}", "deep[0].x = 1", f"deep[1]: {name}"]


@pytest.mark.parametrize(
    ("overrides", "countable"),
    [
        (["experiment=demo"], True),
        (["experiment=llava_instruct_ja"], True),
        (["experiment=llava_instruct_ja", *DATA], True),
        (["experiment=lora", "peft=lora_tower"], True),
        (["experiment=demo", "optim.min_lr=9"], True),
        (["experiment=demo", "data.train_path=/nowhere"], True),
        (["experiment=demo", "+model.config.num_layerz=1"], True),
        (["experiment=demo", "trainer.devices=auto"], False),
        (["experiment=demo", "strategy.tensor_model_parallel_size=3", "trainer.devices=3"], False),
        (["experiment=demo", "data.global_batch_size=7", "data.micro_batch_size=2"], False),
        (["experiment=demo", "data.decoder_seq_length=long"], False),
        (["experiment=demo", "model.config.language_model_config.num_layers=many"], False),
        (["experiment=demo", "model.config.language_model_config.num_query_groups=3"], False),
        (["experiment=demo", "model=null"], False),
        (["experiment=lora", "peft.target_modules=[nothing]"], False),
        (["experiment=lora", "peft.dim=small"], False),
    ],
    ids=str,
)
def test_numbers_are_given_when_they_can_be_computed(overrides, countable):
    cfg = compose(*overrides) if "model=null" not in overrides else compose(overrides[0]).copy()
    if "model=null" in overrides:
        cfg.model = None
    assert can_be_counted(cfg) is countable
    if countable:
        assert facts(cfg).parameters


def test_full_finetuning():
    plan = facts(compose("experiment=llava_instruct_ja", *DATA))
    assert sum(total for total, _ in plan.parameters.values()) == 10_670_220_835
    assert all(trains == total for total, trains in plan.parameters.values())
    assert (plan.tensor_model_parallel_size, plan.data_parallel_size, plan.max_steps) == (2, 4, 1160)
    assert 45 < plan.memory_gib_per_gpu < 78


def test_lora_and_frozen_parts():
    text_only = facts(compose("experiment=lora", *DATA)).parameters
    with_tower = facts(compose("experiment=lora", "peft=lora_tower", *DATA)).parameters
    assert text_only["LoRA"] == (8 * (32 * 10240 + 8 * (8192 + 6144)),) * 2 and text_only["text"][1] == 0
    assert with_tower["LoRA"][0] == text_only["LoRA"][0] + 8 * 40 * 5120
    frozen = facts(compose("experiment=demo", "model.config.freeze_vision_model=true")).parameters
    assert frozen["tower"][1] == 0 < frozen["tower"][0] and frozen["projector"][1] > 0


def test_demo():
    plan = facts(compose("experiment=demo"))
    assert plan.memory_gib_per_gpu is None and plan.device == "the CPU", "an estimate for GPUs says nothing here"
    assert plan.num_train_samples == 106
    for unreadable in ("data.train_path=/nowhere", "data.train_path=null", "data.train_path=[/nowhere]"):
        assert num_samples(Facts(compose("experiment=demo", unreadable))) is None
    train_path = compose("experiment=demo").data.train_path
    assert num_samples(Facts(compose("experiment=demo", f"data.train_path=[{train_path},{train_path}]"))) == 212


class Model:
    """The parameters of a config's model under MLlama's names, without memory, frozen as NeMo does it."""

    def __init__(self, cfg):
        config = cfg.model.config
        text, vision = shapes(Facts(cfg))
        indices = range(vision.num_intermediate_layers)
        self.config = SimpleNamespace(
            language_model_config=SimpleNamespace(**asdict(text)),
            vision_model_config=SimpleNamespace(**asdict(vision), intermediate_layers_indices=indices),
        )
        element = torch.float32 if str(cfg.precision) == "32" else torch.bfloat16
        names = {
            "text": ("language_model.", config.freeze_language_model),
            "tower": ("vision_model.vision_encoder.", config.freeze_vision_model),
            "projector": ("vision_model.vision_projection.", config.freeze_vision_projection),
        }
        self.named = {}

        def add(name, count, trains):
            parameter = torch.nn.Parameter(torch.empty(count, dtype=element, device="meta"), requires_grad=trains)
            self.named[f"{name}weight"] = parameter

        for part, count in parameter_counts(text, vision).items():
            name, frozen = names[part]
            add(name, count.total, not frozen)
        if cfg.peft is None:
            return
        for name, parameter in self.named.items():  # nemo/collections/vlm/peft/lora.py, freeze_model
            freeze_text, freeze_vision = cfg.peft.freeze_language_model, cfg.peft.freeze_vision_model
            if (freeze_text and "language_model" in name) or (freeze_vision and "vision_model" in name):
                parameter.requires_grad_(False)
        matrices = lora_matrices(text, vision)
        for module in {hit for target in cfg.peft.target_modules for hit in lora_hits(target, matrices)}:
            add(f"{module}.adapter.", cfg.peft.dim * matrices[module], True)

    def modules(self):
        return [self]

    def megatron_because(self):
        return None

    def named_parameters(self):
        return self.named.items()

    def parameters(self):
        return iter(self.named.values())


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=demo"],
        ["experiment=demo", "model.config.freeze_vision_model=true"],
        ["experiment=lora", *DATA],
        ["experiment=lora", "peft=lora_tower", *DATA],
        ["experiment=lora", "peft.freeze_vision_model=false", *DATA],
        ["experiment=lora", "peft.freeze_language_model=false", "model.config.freeze_vision_projection=true", *DATA],
        ["experiment=llava_instruct_ja", "strategy.tensor_model_parallel_size=1", *DATA],
    ],
    ids=str,
)
def test_plan_says_what_the_summary_of_the_run_says(overrides):
    cfg = compose(*overrides)
    plan, model, data = facts(cfg), Model(cfg), SimpleNamespace(**cfg.data)
    optimizer = SimpleNamespace(use_distributed_optimizer=True)
    strategy = SimpleNamespace(tensor_model_parallel_size=1, ddp_config=optimizer)
    trainer = SimpleNamespace(datamodule=data, world_size=plan.data_parallel_size, strategy=strategy)
    assert summary.count_parameters(model) == plan.parameters
    assert summary._tokens_per_step(model, data) == plan.tokens_per_step
    memory = estimates.memory(Facts(cfg)).peak
    assert summary.memory_gib(trainer, model) == pytest.approx(memory / GIB)


@pytest.mark.parametrize(
    "override",
    [
        "strategy.ddp={overlap_param_gather: true}",
        "+model.config.language_model_config.hidden_dropout=0.1",
        "peft.dropout_position=post",
    ],
)
def test_memory_of_layers_that_are_no_functions(override):
    as_functions, without, found = (
        estimates.memory(Facts(compose("experiment=lora", *DATA, *more))).activations
        for more in ([], ["model.config.lean_forward=false"], [override])
    )
    assert found == without > 1.05 * as_functions


@pytest.mark.nemo
def test_command(run_main, monkeypatch, tmp_path):
    """Recipe, summary and problems, exit code 2 if there are any; never a run folder."""
    from vlmsft.plan import main

    monkeypatch.chdir(tmp_path)
    code, out, _ = run_main(main, "experiment=demo")
    assert code == 0 and "optim.config.lr = 0.003" in out and "parameters: 9" in out
    code, out, message = run_main(main, "experiment=lora", "peft=lora_tower", *DATA)
    assert code == 2 and "LoRA: 5.177 M, trains" in out and "GiB per GPU" in out
    for key in ("data.train_path", "data.validation_path", "restore_from"):
        assert f"{key}: found" in message
    code, out, message = run_main(main, "experiment=demo", "optim.min_lr=9", "data.global_batch_size=7")
    assert code == 2 and "optim.min_lr" in message and "data.global_batch_size" in message
    assert list(tmp_path.iterdir()) == []
