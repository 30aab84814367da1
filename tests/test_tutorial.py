"""experiment=llava_instruct_ja is NVIDIA's tutorial, experiment=lora its LoRA counterpart: beside NeMo's recipes.

Each list of differences is exact: a difference that isn't listed fails, and so does a listed one that is none any more.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time

import fiddle as fdl
import pytest
import yaml
from config_cases import DATA, compose

pytestmark = pytest.mark.nemo

DIRECTORY, NAME, CHECKPOINT = (
    "/workspace/results",
    "mllama_11b_finetune",
    "/workspace/models/Llama-3.2-11B-Vision-Instruct",
)


def tutorial(peft_scheme="none", tensor_parallel=2):
    """configure_recipe() of the tutorial's preloaded script, data left out (NeMo's module can't take two files)."""
    import nemo_run as run
    import torch
    from nemo import lightning as nl
    from nemo.collections import vlm
    from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing

    recipe = vlm.mllama_11b.finetune_recipe(
        name=NAME, dir=DIRECTORY, num_nodes=1, num_gpus_per_node=8, peft_scheme=peft_scheme
    )
    recipe.resume.restore_config = run.Config(nl.RestoreConfig, path=CHECKPOINT)
    recipe.trainer.strategy = run.Config(
        nl.MegatronStrategy,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=1,
        encoder_pipeline_model_parallel_size=0,
        pipeline_dtype=torch.bfloat16,
    )
    recipe.trainer.max_steps = 1160
    recipe.trainer.log_every_n_steps = 1
    recipe.trainer.limit_val_batches = 1.0
    recipe.trainer.val_check_interval = 580
    recipe.log.use_datetime_version = False
    recipe.log.ckpt.train_time_interval = None
    if peft_scheme == "none":
        recipe.optim = distributed_fused_adam_with_cosine_annealing(max_lr=2.0e-5, min_lr=2.0e-07, warmup_steps=100)
    return recipe


@functools.cache
def ours(experiment, *overrides):
    from vlmsft.recipe import finetune_recipe

    data = ["data.path=datasets/llava_instruct_ja"] if experiment.endswith("energon") else DATA
    overrides = (f"run_dir={DIRECTORY}/{NAME}", f"name={NAME}", *data, f"restore_from={CHECKPOINT}", *overrides)
    return finetune_recipe(compose(f"experiment={experiment}", *overrides))


def without_our_callbacks(trainer):
    trainer = trainer.clone()
    trainer.callbacks = [callback for callback in trainer.callbacks if not is_ours(callback)]
    return trainer


def is_ours(config):
    return config.__fn_or_cls__.__module__.startswith("vlmsft.")


def flat(value, path=""):
    """{path: leaf} of a Config, defaults included; a Config also counts as its class."""
    if isinstance(value, fdl.Buildable):
        leaves = {f"{path}()": value.__fn_or_cls__}
        for name, argument in fdl.ordered_arguments(value, include_defaults=True).items():
            leaves |= flat(argument, f"{path}.{name}".lstrip("."))
        return leaves
    if isinstance(value, (list, tuple)):
        leaves = {f"{path}#": len(value)}
        for index, item in enumerate(value):
            leaves |= flat(item, f"{path}[{index}]")
        return leaves
    return {path: value}


def differences(theirs, ours):
    theirs, ours = flat(theirs), flat(ours)
    missing = object()
    return {key for key in {*theirs, *ours} if theirs.get(key, missing) != ours.get(key, missing)}


TRAINER = {
    "num_sanity_val_steps": "Lightning's default of 2 counts micro batches, but validation takes 32 of them at once",
}
LOG = {
    "ckpt.save_optim_on_train_end": "without the optimizer a finished run can't go on to a larger max_steps",
    "ckpt.filename": "the recipe's {model_name} is no metric and prints model_name=0; two decimals tell too few apart",
    "tensorboard.save_dir": "NeMo joins it to log_dir, so that the events of all runs would lie together",
}
RESUME = {
    "resume_if_exists": "the same command continues a run that was cut off",
    "resume_ignore_no_checkpoint": "and starts it the first time",
}
LORA_PEFT = {
    "target_modules[0]": "NeMo's name also matches the frozen vision tower's layers; peft=lora_tower has it",
    "target_modules[1]": "as above",
    "target_modules[2]": "as above",
}
LORA_OPTIM = {
    "lr_scheduler.warmup_steps": "the recipe's 150 belong to its 5190 steps; here 1160 as in the tutorial, with its 100"
}
LORA_TRAINER = TRAINER | {
    "strategy.ckpt_async_save": "the tutorial's own LoRA example: asynchronous checkpointing doesn't work with PEFT",
}


@pytest.mark.parametrize(
    ("experiment", "scheme", "tensor_parallel", "trainer"),
    [("llava_instruct_ja", "none", 2, TRAINER), ("lora", "lora", 1, LORA_TRAINER)],
)
def test_trainer_log_and_resume(experiment, scheme, tensor_parallel, trainer):
    theirs, mine = tutorial(scheme, tensor_parallel), ours(experiment)
    assert differences(theirs.trainer, without_our_callbacks(mine.trainer)) == set(trainer)
    assert differences(theirs.log, mine.log) == set(LOG)
    assert differences(theirs.resume, mine.resume) == set(RESUME)


def test_equal_once_the_listed_differences_are_taken_over():
    """`==` of run.Config, which also compares what flat() might overlook."""
    theirs, mine = tutorial(), ours("llava_instruct_ja").clone()
    trainer = without_our_callbacks(mine.trainer)
    trainer.num_sanity_val_steps = None
    mine.log.tensorboard.save_dir = "tb_logs"
    mine.log.ckpt.save_optim_on_train_end = theirs.log.ckpt.save_optim_on_train_end
    mine.log.ckpt.filename = theirs.log.ckpt.filename
    mine.resume.resume_if_exists = mine.resume.resume_ignore_no_checkpoint = False
    assert trainer == theirs.trainer
    assert mine.log == theirs.log
    assert mine.resume == theirs.resume
    assert mine.optim == theirs.optim
    assert mine.peft is None and "peft" not in theirs.__arguments__


def test_the_energon_run_is_the_tutorials():
    """Its script sets steps and validation, takes the recipe's own strategy, and Energon's data with these values."""
    theirs, mine = tutorial(), ours("llava_instruct_ja_energon")
    theirs.trainer.max_steps = theirs.trainer.val_check_interval = 1143
    assert differences(theirs.trainer, without_our_callbacks(mine.trainer)) == set(TRAINER)
    assert differences(theirs.log, mine.log) == set(LOG)
    assert mine.optim == theirs.optim
    data = mine.data
    assert data.__fn_or_cls__.__name__ == "EnergonDataModule"
    assert (data.seq_length, data.decoder_seq_length, data.num_workers) == (6404, 2048, 8)
    assert (data.global_batch_size, data.micro_batch_size) == (128, 1)
    assert (data.shuffle_buffer_size, data.max_samples_per_sequence) == (100, None), "NeMo's own defaults"
    assert data.path == data.validation_path == os.path.abspath("datasets/llava_instruct_ja")


def test_lora():
    theirs, mine = tutorial("lora", 1), ours("lora")
    assert differences(theirs.peft, mine.peft) == set(LORA_PEFT)
    assert differences(theirs.optim, mine.optim) == set(LORA_OPTIM)
    assert theirs.peft == ours("lora", "peft=lora_tower").peft


def test_lora_targets_match_the_text_decoder_only():
    from nemo.collections.vlm import LoRA

    names = {
        "module.language_model.decoder.layers.0.self_attention.linear_qkv": True,
        "module.language_model.decoder.xattn_layers.3.cross_attention.linear_q": True,
        "module.language_model.decoder.xattn_layers.3.cross_attention.linear_kv": True,
        "module.language_model.decoder.layers.0.mlp.linear_fc1": False,
        "module.vision_model.vision_encoder.transformer.layers.0.self_attention.linear_qkv": False,
        "module.vision_model.vision_encoder.global_transformer.layers.0.self_attention.linear_qkv": False,
    }
    lora = fdl.build(ours("lora").peft)
    assert isinstance(lora, LoRA)
    for full_name, matches in names.items():
        prefix, _, name = full_name.rpartition(".")
        assert (lora.match(None, name, prefix) is not None) == matches, full_name
    tower = fdl.build(ours("lora", "peft=lora_tower").peft)
    assert tower.match(None, "linear_qkv", "module.vision_model.vision_encoder.transformer.layers.0.self_attention")


def test_relative_paths_start_from_the_folder_of_the_command(tmp_path, monkeypatch):
    from vlmsft.recipe import finetune_recipe

    cfg = compose("experiment=llava_instruct_ja", *DATA, "data.image_folder='~/images'")
    monkeypatch.chdir(tmp_path)
    recipe = finetune_recipe(cfg)
    assert recipe.data.train_path == str(tmp_path / "t.jsonl")
    assert recipe.data.validation_path == str(tmp_path / "v.jsonl")
    assert recipe.data.image_folder == os.path.expanduser("~/images")
    assert recipe.data.processor == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert recipe.resume.restore_config.path == str(tmp_path / "models/11b")
    assert cfg.data.train_path == "t.jsonl", "the composed config is never changed"


def test_data_values():
    data = ours("llava_instruct_ja").data
    assert (data.seq_length, data.decoder_seq_length, data.num_workers) == (6404, 2048, 2)
    assert (data.global_batch_size, data.micro_batch_size) == (128, 1)


# --- model configs, built ---------------------------------------------------------------------------------------------

OUR_FIELDS = {
    "layers": "which kit of layers: TransformerEngine's or portable ones",
    "lean_forward": "layers as plain functions, or Megatron's classes",
    "frozen_fp8": "products with frozen matrices in fp8; NeMo's fp8 is TransformerEngine's, for all",
    "freeze_language_model": "what is trained; NeMo's MLlama has no such switch",
    "freeze_vision_model": "as above",
    "freeze_vision_projection": "as above",
    "gate_init": "what a fresh model's gates hold; 0 as in NeMo, more for the tiny one, which learns from nothing",
    "language_model_config.layers": "follows layers",
    "vision_model_config.layers": "follows layers",
    "vision_model_config.patch_size": "NeMo hard-codes 14",
    "vision_model_config.intermediate_layers_indices": "NeMo hard-codes 3,7,15,23,30",
    "vision_model_config.image_mean": "the tower normalises uint8 tiles itself",
    "vision_model_config.image_std": "as above",
}
OUR_VALUES = {
    "calculate_per_token_loss": "micro batch size and accumulation must not change the loss",
    "data_step_fn": "our batch has another layout",
    "forward_step_fn": "as above",
    "qk_layernorm": "makes Megatron sum the gradients of cross-attention's q and k norms over tensor-parallel ranks",
}


def fields_of(config, prefix=""):
    """{path: value} of a built config dataclass, partial functions made comparable."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            values |= fields_of(value, f"{prefix}{field.name}.")
        elif isinstance(value, functools.partial):
            values[prefix + field.name] = (value.func, value.args, tuple(value.keywords.items()))
        else:
            values[prefix + field.name] = value
    return values


@pytest.mark.parametrize(
    ("model", "stock"), [("mllama_11b", "MLlamaConfig11BInstruct"), ("mllama_90b", "MLlamaConfig90BInstruct")]
)
def test_model_config(model, stock):
    from nemo.collections import vlm

    theirs = fields_of(getattr(vlm, stock)())
    mine = fields_of(fdl.build(ours("lora", f"model={model}").model.config))
    assert set(mine) - set(theirs) == set(OUR_FIELDS)
    assert set(theirs) - set(mine) == set()
    assert {name for name in theirs if theirs[name] != mine[name]} == set(OUR_VALUES)


# --- translation against NeMo's own recipes ---------------------------------------------------------------------------

RECIPES = [
    ("vlm", "mllama_11b", "finetune_recipe"),
    ("vlm", "mllama_90b", "finetune_recipe"),
    ("vlm", "llava15_7b", "finetune_recipe"),
    ("vlm", "gemma3vl_4b", "finetune_recipe"),
    ("llm", "llama3_8b", "finetune_recipe"),
    ("llm", "llama3_8b", "pretrain_recipe"),
    ("llm", "mixtral_8x7b", "pretrain_recipe"),
]


def exported(collection, module, function):
    import importlib

    from nemo_run.core.serialization.yaml import YamlSerializer

    recipe = getattr(getattr(importlib.import_module(f"nemo.collections.{collection}"), module), function)(
        dir="/d", name="n"
    )
    return recipe, yaml.safe_load(YamlSerializer().serialize(recipe))


@pytest.mark.parametrize(("collection", "module", "function"), RECIPES)
def test_round_trip_of_nemo_runs_export(collection, module, function):
    from vlmsft.recipe import translate

    recipe, text = exported(collection, module, function)
    assert translate(text) == recipe


def test_a_name_that_nemo_itself_gets_wrong():
    """ckpt_include_optimizer is gone from MegatronStrategy; recipes of NeMo still pass it, and **kwargs swallow it."""
    from vlmsft.errors import UserError
    from vlmsft.recipe import translate

    _, text = exported("llm", "mistral_7b", "pretrain_recipe")
    with pytest.raises(UserError) as error:
        translate(text)
    assert [problem.where for problem in error.value.problems] == ["trainer.strategy.ckpt_include_optimizer"]


def test_children_of_a_default_factory():
    """NeMo-Run can neither read nor override them."""
    from nemo.collections.vlm.mllama.model.base import CrossAttentionTextConfig

    from vlmsft.recipe import translate

    config = translate(
        {
            "_target_": "nemo.collections.vlm.MLlamaConfig90BInstruct",
            "language_model_config": {"num_attention_heads": 32},
        }
    )
    assert config.language_model_config.__fn_or_cls__ is CrossAttentionTextConfig
    built = fdl.build(config).language_model_config
    assert (built.num_layers, built.hidden_size, built.num_attention_heads, built.kv_channels) == (80, 8192, 32, 256)


BLEND = "data.train_path={chat:{path:c.jsonl,weight:3},ocr:{path:o.jsonl,weight:1}}"


@pytest.mark.parametrize("overrides", [["experiment=llava_instruct_ja"], ["experiment=lora"], [BLEND], None])
def test_recipe_travels(overrides):
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    recipe = demo() if overrides is None else finetune(*overrides)
    assert ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(recipe)) == recipe


def finetune(*overrides):
    from vlmsft.recipe import finetune_recipe

    return finetune_recipe(compose(*DATA, *overrides))


def test_named_datasets_become_absolute_mappings():
    train_path = finetune(BLEND).data.train_path
    assert train_path["ocr"] == {"path": os.path.abspath("o.jsonl"), "weight": 1}
    assert finetune("data.train_path=[a.jsonl,/b.jsonl]").data.train_path == [os.path.abspath("a.jsonl"), "/b.jsonl"]


def demo(*overrides):
    from vlmsft.recipe import finetune_recipe

    return finetune_recipe(compose("experiment=demo", *overrides))


def test_takes_less_than_composing():
    """Both on this machine, as it may be slow; a first recipe imports what it is made of."""
    from vlmsft.recipe import finetune_recipe

    overrides = [("experiment=demo", f"optim.max_lr={rate}") for rate in (1e-4, 2e-4, 3e-4)]
    cfgs = [compose(*one) for one in overrides]
    finetune_recipe(cfgs[0])
    translating = min(seconds_of(finetune_recipe, cfg) for cfg in cfgs)
    assert translating < min(seconds_of(compose.__wrapped__, *one) for one in overrides)


def seconds_of(function, *arguments):
    started = time.process_time()
    function(*arguments)
    return time.process_time() - started


def test_unset_values_are_named_with_the_way_to_set_them():
    from vlmsft.errors import UserError
    from vlmsft.recipe import finetune_recipe

    with pytest.raises(UserError) as error:
        finetune_recipe(compose("experiment=llava_instruct_ja"))
    remedies = {problem.where: problem.remedy for problem in error.value.problems}
    assert remedies == {
        key: f"Set it: {key}=..."
        for key in ("data.train_path", "data.validation_path", "data.image_folder", "restore_from")
    }


def test_problems_of_nemo_nodes():
    from vlmsft.errors import UserError
    from vlmsft.recipe import finetune_recipe

    overrides = [
        "+strategy.tensr=3",
        "optim.max_lr=fast",
        "+log.ckpt.save_topk=2",
        "precision=bf16",
        "trainer.devices=1.5",
    ]
    with pytest.raises(UserError) as error:
        finetune_recipe(compose("experiment=demo", *overrides))
    found = {problem.where: problem for problem in error.value.problems}
    assert {"strategy.tensr", "optim.max_lr", "log.ckpt.save_topk", "precision", "trainer.devices"} <= set(found)
    assert "'log.ckpt.save_top_k'" in found["log.ckpt.save_topk"].remedy
    assert "bf16-mixed" in found["precision"].expected


def test_restore_from_null_means_fresh_weights():
    assert demo().resume.restore_config is None


def test_early_stopping_and_wandb_switches():
    from lightning.pytorch.callbacks import EarlyStopping

    classes = [callback.__fn_or_cls__ for callback in demo("early_stopping=val_loss").trainer.callbacks]
    assert EarlyStopping in classes
    assert EarlyStopping not in [callback.__fn_or_cls__ for callback in demo().trainer.callbacks]
    assert demo("log=wandb").log.wandb.project == "vlmsft"


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32", 32])
def test_precision_reaches_plugin_optimizer_and_strategy(precision):
    recipe = ours("llava_instruct_ja", f"precision={precision}")
    assert recipe.trainer.plugins.precision == str(precision)
    assert (recipe.optim.config.bf16, recipe.optim.config.fp16) == (precision == "bf16-mixed", precision == "16-mixed")
    assert recipe.trainer.strategy.pipeline_dtype == recipe.trainer.plugins.pipeline_dtype


def test_optimizer_values_that_nemos_factory_hides():
    config = demo("optim.weight_decay=0.2", "optim.adam_eps=1e-7", "optim.adam_beta2=0.99").optim.config
    assert (config.weight_decay, config.adam_eps, config.adam_beta2) == (0.2, 1e-7, 0.99)


@pytest.mark.parametrize("launch", ["local", "torchrun", "slurm"])
def test_executors(launch):
    from vlmsft.recipe import translate

    values = ["account=a", "partition=p", "container_image=null", "tunnel.job_dir=/s"] if launch == "slurm" else []
    cfg = compose(f"launch={launch}", *[f"launch.executor.{value}" for value in values])
    executor = fdl.build(translate(cfg.launch))["executor"]
    if launch == "local":
        assert executor is None
    else:
        assert (executor.nnodes(), executor.nproc_per_node()) == (1, 8)
