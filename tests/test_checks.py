"""How values must fit each other. Every check is shown a config that breaks it, and the shipped configs break none."""

import json

import pytest
from config_cases import DATA, compose

from vlmsft.checks import CHECKS, MINIMA, find_problems, world_size_is_started
from vlmsft.facts import Facts

TEXT, VISION = "model.config.language_model_config", "model.config.vision_model_config"
ELSEWHERE = "launch.executor={_target_: x}"  # the files are another machine's


def problems(*overrides, world_size=None):
    return find_problems(compose(*overrides), world_size)


@pytest.mark.parametrize("experiment", ["llava_instruct_ja", "lora"])
def test_shipped_experiments_have_none(experiment):
    assert problems(f"experiment={experiment}", *DATA, ELSEWHERE) == []


def test_90b_has_none_with_eight_way_tensor_parallelism():
    overrides = ["model=mllama_90b", "peft=lora", "strategy.tensor_model_parallel_size=8", *DATA, ELSEWHERE]
    assert problems(*overrides) == []


def test_demo_has_none():
    assert problems("experiment=demo") == []


FP8 = ["peft=lora", "model.config.frozen_fp8=tower"]
FP8_ALL = ["peft=lora", "model.config.frozen_fp8=all"]
FROZEN = [
    "model.config.freeze_language_model=true",
    "model.config.freeze_vision_model=true",
    "model.config.freeze_vision_projection=true",
]
LEAN = "model.config.lean_forward=true"
TP_2 = "strategy.tensor_model_parallel_size=2"
CASES = [
    # overrides of experiment=demo, the key that is named, a part of what was expected
    (["strategy.pipeline_model_parallel_size=2"], "strategy.pipeline_model_parallel_size", "1"),
    (["strategy.context_parallel_size=2"], "strategy.context_parallel_size", "1"),
    (
        ["strategy.sequence_parallel=true"],
        "strategy.sequence_parallel",
        "false with strategy.tensor_model_parallel_size 1",
    ),
    (["strategy.expert_model_parallel_size=2"], "strategy.expert_model_parallel_size", "1"),
    (["strategy.encoder_pipeline_model_parallel_size=1"], "strategy.encoder_pipeline_model_parallel_size", "0"),
    (["strategy.virtual_pipeline_model_parallel_size=2"], "strategy.virtual_pipeline_model_parallel_size", "null"),
    (
        ["strategy.tensor_model_parallel_size=3", "trainer.devices=3"],
        "strategy.tensor_model_parallel_size",
        "num_attention_heads 4",
    ),
    (["strategy.tensor_model_parallel_size=0"], "strategy.tensor_model_parallel_size", "at least 1"),
    (["strategy.tensor_model_parallel_size=2"], "trainer.devices", "multiple of"),
    (["launch=slurm", "trainer.devices=-1"], "trainer.devices", "a number of GPUs"),
    (["trainer.devices=two"], "trainer.devices", "a number from 1 on"),
    (["trainer.devices=0"], "trainer.devices", "a number from 1 on"),
    (["trainer.devices=[]"], "trainer.devices", "a number from 1 on"),
    (["gpu_memory_gib=80GB"], "gpu_memory_gib", "a number of GiB above 0"),
    (["gpu_memory_gib=0"], "gpu_memory_gib", "a number of GiB above 0"),
    (["id="], "id", "a folder's name"),
    (["id=.."], "id", "a folder's name"),
    (["name=null"], "name", "a folder's name"),
    (["run_dir=null"], "run_dir", "a folder"),
    (["data.image_folder=2017"], "data.image_folder", "a folder"),
    (["log.ckpt.monitor=val_los"], "log.ckpt.monitor", "a metric of this run: val_loss"),
    (["log.ckpt.monitor=val_loss_chat"], "log.ckpt.monitor", "a metric of this run: val_loss"),
    (
        ["early_stopping=val_loss", "trainer.callbacks.early_stopping.monitor=train_loss"],
        "trainer.callbacks.early_stopping.monitor",
        "reduced_train_loss",
    ),
    (["precision=bf16-mixed"], "precision", "'32'"),
    (["strategy=megatron", "trainer.accelerator=cpu"], "trainer.accelerator", "'gpu'"),
    (["trainer.accelerator=gpu"], "trainer.accelerator", "'cpu'"),
    (["model.config.layers=transformer_engine"], "model.config.layers", "'torch'"),
    (["data.global_batch_size=7", "data.micro_batch_size=2"], "data.global_batch_size", "a multiple of 2"),
    (["data.micro_batch_size=0"], "data.micro_batch_size", "at least 1"),
    (["seed=-1"], "seed", "at least 0"),
    (["peft=lora", "peft.dim=0"], "peft.dim", "at least 1"),
    (["trainer.limit_val_batches=-1"], "trainer.limit_val_batches", "at least 0"),
    ([f"+{TEXT}.cpu_offloading=true"], f"{TEXT}.cpu_offloading", "false"),
    ([f"+{TEXT}.fp8=hybrid"], f"{TEXT}.fp8", "null"),
    (["model.config.frozen_fp8=tower"], "model.config.frozen_fp8", "null where something of the tower trains"),
    (["peft=lora", "model.config.frozen_fp8=text"], "model.config.frozen_fp8", "tower, all or null"),
    (
        ["model.config.freeze_vision_model=true", "model.config.frozen_fp8=all"],
        "model.config.frozen_fp8",
        "tower or null where the text decoder's own weights train",
    ),
    (["peft=lora_tower", "model.config.frozen_fp8=all"], "model.config.frozen_fp8", "null where something"),
    (["peft=lora_tower", "model.config.frozen_fp8=tower"], "model.config.frozen_fp8", "null where something"),
    ([*FP8, "model.config.lean_forward=false"], "model.config.lean_forward", "null or true"),
    ([*FP8, "strategy.tensor_model_parallel_size=2"], "strategy.tensor_model_parallel_size", "1 with"),
    ([*FP8_ALL, "strategy.tensor_model_parallel_size=2"], "strategy.tensor_model_parallel_size", "1 with"),
    (
        ["model.config.freeze_vision_model=true", "model.config.frozen_fp8=tower", TP_2, "trainer.devices=2"],
        "strategy.tensor_model_parallel_size",
        "1 with model.config.frozen_fp8=tower",
    ),
    ([*FP8, f"{VISION}.ffn_hidden_size=120"], f"{VISION}.ffn_hidden_size", "a multiple of 16"),
    ([*FP8_ALL, f"{TEXT}.ffn_hidden_size=120"], f"{TEXT}.ffn_hidden_size", "a multiple of 16"),
    ([*FP8_ALL, f"+{TEXT}.kv_channels=6"], f"{TEXT}.num_attention_heads", "outputs as a multiple of 16"),
    ([*FP8_ALL, f"+{TEXT}.kv_channels=6"], f"{TEXT}.num_query_groups", "outputs as a multiple of 16"),
    ([f"{VISION}.recompute_granularity=some"], f"{VISION}.recompute_granularity", "full, selective or null"),
    (
        [LEAN, "peft=lora", "strategy.tensor_model_parallel_size=2", "trainer.devices=2"],
        "strategy.tensor_model_parallel_size",
        "1 where there are adapters, with model.config.lean_forward=true",
    ),
    (
        [LEAN, "strategy.sequence_parallel=true", "strategy.tensor_model_parallel_size=2", "trainer.devices=2"],
        "strategy.sequence_parallel",
        "false with model.config.lean_forward=true",
    ),
    (
        [LEAN, "strategy.sequence_parallel=true"],
        "strategy.sequence_parallel",
        "false with strategy.tensor_model_parallel_size 1",
    ),
    ([LEAN, "strategy.ddp={overlap_param_gather: true}"], "strategy.ddp.overlap_param_gather", "false"),
    ([LEAN, f"+{TEXT}.hidden_dropout=0.1"], f"{TEXT}.hidden_dropout", "0.0 with model.config.lean_forward=true"),
    ([LEAN, f"+{TEXT}.rotary_percent=0.5"], f"{TEXT}.rotary_percent", "1.0 with"),
    ([LEAN, f"+{VISION}.gated_linear_unit=true"], f"{VISION}.gated_linear_unit", "false with"),
    ([LEAN, f"{VISION}.recompute_granularity=selective"], f"{VISION}.recompute_granularity", "null or full with"),
    ([LEAN, "peft=lora", "peft._target_=nemo.collections.llm.peft.DoRA"], "peft._target_", "NeMo's LoRA"),
    ([LEAN, "peft=lora", "peft.dropout_position=post"], "peft.dropout_position", "pre with"),
    (["launch=torchrun", "trainer.num_nodes=2"], "trainer.num_nodes", "1 with launch=torchrun"),
    (FROZEN, ", ".join(name.split("=")[0] for name in FROZEN), "peft=lora"),
    (["trainer.max_steps=-1", "optim.warmup_steps=0"], "trainer.max_steps", "at least 1"),
    (["trainer.val_check_interval=100000"], "trainer.val_check_interval", "at most trainer.max_steps"),
    (["trainer.val_check_interval=0.5"], "trainer.val_check_interval", "a whole number"),
    (["trainer.val_check_interval=0"], "trainer.val_check_interval", "at least 1"),
    (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches", "1"),
    (["trainer.limit_val_batches=0.5"], "trainer.limit_val_batches", "1.0"),
    (
        ["trainer.limit_val_batches=3", "data.micro_batch_size=4", "data.global_batch_size=8"],
        "trainer.limit_val_batches",
        "a multiple of 2",
    ),
    (["data.validation_path=null"], "log.ckpt.monitor", "a metric of training"),
    (
        ["trainer.limit_val_batches=0", "log.ckpt.monitor=null", "early_stopping=val_loss"],
        "trainer.callbacks.early_stopping",
        "null",
    ),
    (["data.validation_path=null"], "log.ckpt.every_n_train_steps", "a number of steps"),
    (
        ["trainer.limit_val_batches=0", "log.ckpt.every_n_train_steps=70"],
        "log.ckpt.every_n_train_steps",
        "a divisor of trainer.max_steps 300",
    ),
    (
        ["trainer.limit_val_batches=0", "log.ckpt.train_time_interval={minutes: 15}"],
        "log.ckpt.every_n_train_steps",
        "a divisor of trainer.max_steps 300",
    ),
    (["log.ckpt.monitor=null"], "log.ckpt.monitor", "the name of a metric"),
    (["log.ckpt.filename='{step}'"], "log.ckpt.filename", "a name with {val_loss:.4f}"),
    (["peft=lora", "strategy.ckpt_async_save=true"], "strategy.ckpt_async_save", "false with peft"),
    (["optim.max_lr=1e-9"], "optim.min_lr", "at most optim.max_lr"),
    (["optim.warmup_steps=100000"], "optim.warmup_steps", "less than trainer.max_steps"),
    ([f"{TEXT}.num_query_groups=3"], f"{TEXT}.num_attention_heads", "a multiple of"),
    ([f"{TEXT}.num_cross_attention_layers=9"], f"{TEXT}.num_cross_attention_layers", "at most"),
    (["data.decoder_seq_length=4096"], "data.decoder_seq_length", "at most"),
    ([f"{VISION}.num_attention_heads=5"], f"{VISION}.hidden_size", "a multiple of"),
    ([f"{VISION}.patch_size=15"], f"{VISION}.vision_chunk_size", "a multiple of"),
    ([f"{VISION}.text_hidden_size=64"], f"{VISION}.text_hidden_size", "128"),
    ([f"{VISION}.vision_max_num_chunks=2"], f"{VISION}.max_num_tiles", "2"),
    ([f"{VISION}.intermediate_layers_indices=[1,99]"], f"{VISION}.intermediate_layers_indices", "increasing"),
    (["data.seq_length=6404"], "data.seq_length", "68"),
    ([f"{TEXT}.vocab_size=1024"], f"{TEXT}.vocab_size", "512"),
    (["processor=/nowhere/at/all"], "processor", "a folder"),
    (["restore_from=/nowhere/at/all"], "restore_from", "NeMo checkpoint"),
    (["data.train_path=/nowhere/train.jsonl"], "data.train_path", "a JSON or JSONL file"),
    (["data.image_folder=/nowhere"], "data.image_folder", "the folder"),
    (["data.train_path={a:{path:t.jsonl,wait:1}}"], "data.train_path.a.wait", "path or weight or image_folder"),
    (["data.train_path={a:{path:t.jsonl,weight:1},b:t.jsonl}"], "data.train_path", "a weight for every dataset"),
    (["data.validation_path={a:/nowhere/v.jsonl}"], "data.validation_path.a", "a JSON or JSONL file"),
    (["data=energon", "data.path=/nowhere"], "data.path", "a folder of shards"),
    (["peft=lora", "peft.target_modules=[linear_qqv]"], "peft.target_modules", "linear_qkv"),
]


@pytest.mark.parametrize(("overrides", "where", "expected"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_problem_is_named(overrides, where, expected):
    found = {problem.where: problem for problem in problems("experiment=demo", *overrides)}
    assert where in found, list(found)
    assert expected in found[where].expected


def test_metrics_of_named_validations_and_of_callbacks():
    named = "data.validation_path={chat: c.jsonl, ocr: o.jsonl}"
    stopping = ["early_stopping=val_loss", "trainer.callbacks.early_stopping.monitor"]

    def wrong(metric):
        found = problems("experiment=demo", named, stopping[0], f"{stopping[1]}={metric}")
        return [problem.remedy for problem in found if problem.where == stopping[1]]

    assert wrong("val_loss_ocr") == wrong("bleu") == wrong("reduced_train_loss") == []
    assert wrong("val_loss_orc") == ["Did you mean 'val_loss_ocr'?"]


def test_what_restore_from_may_have_meant(tmp_path):
    """A run's folder, which other commands take, and a Hugging Face model."""
    checkpoint = tmp_path / "run" / "checkpoints" / "val_loss=0.5000-step=9-last"
    for folder in ("weights", "context"):
        (checkpoint / folder).mkdir(parents=True)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")

    def remedies(path):
        found = problems("experiment=demo", f"restore_from='{path}'")
        return [problem.remedy for problem in found if problem.where == "restore_from"]

    assert remedies(checkpoint) == remedies("nemo://llama") == []
    assert remedies(tmp_path / "run") == [f"Of this run: \"restore_from='{checkpoint}'\""]
    assert "vlmsft.import_ckpt" in remedies(tmp_path / "hf")[0]
    assert "restore_from=null" in remedies(tmp_path / "hf" / "nowhere")[0]


def test_adapters_are_trained_where_all_weights_are_frozen():
    assert problems("experiment=demo", "peft=lora", *FROZEN) == []


@pytest.mark.parametrize(
    "overrides", [["peft=lora"], ["model.config.freeze_vision_model=true"]], ids=["LoRA", "frozen tower"]
)
def test_a_frozen_tower_can_be_in_fp8(overrides):
    assert problems("experiment=demo", *overrides, "model.config.frozen_fp8=tower") == []


@pytest.mark.parametrize("overrides", [["peft=lora"], FROZEN[:2]], ids=["LoRA", "frozen"])
def test_a_frozen_text_decoder_can_be_in_fp8_as_well(overrides):
    assert problems("experiment=demo", *overrides, "model.config.frozen_fp8=all") == []
    in_fp8 = [*overrides, "model.config.frozen_fp8=tower", f"{TEXT}.ffn_hidden_size=120"]
    assert problems("experiment=demo", *in_fp8) == [], "the text decoder's sizes matter where it is in fp8"


def test_every_minimum_is_a_key():
    """A key that was renamed would never be looked at again."""
    overrides = ("experiment=demo", "peft=lora", "early_stopping=val_loss")
    configs = [Facts(compose(*overrides, f"data={data}")) for data in ("preloaded", "energon")]
    may_be_null = {"log.ckpt.every_n_train_steps"}
    assert {key for key in MINIMA if all(facts[key] is None for facts in configs)} == may_be_null


def test_what_a_run_without_validation_must_set():
    without = ["experiment=demo", "data.validation_path=null", "log.ckpt.monitor=reduced_train_loss"]
    assert problems(*without, "log.ckpt.every_n_train_steps=150") == []
    assert problems(*without, "log.ckpt.train_time_interval={minutes: 1}", "trainer.val_check_interval=1000") == []
    (problem,) = problems(*without)
    assert "log.ckpt.every_n_train_steps=150, or" in problem.remedy, "what it proposes is right"


def test_all_at_once():
    found = problems(
        "experiment=demo", "strategy.pipeline_model_parallel_size=2", "optim.min_lr=9", "precision=16-mixed"
    )
    assert {problem.where for problem in found} == {
        "strategy.pipeline_model_parallel_size",
        "optim.min_lr",
        "precision",
    }


def test_every_check_has_a_case():
    caught = set()
    for overrides, where, _ in CASES:
        cfg = compose("experiment=demo", *overrides)
        caught |= {check for check in CHECKS if any(p.where == where for p in check(Facts(cfg)))}
    elsewhere = {check for check in CHECKS if check.__module__ == "vlmsft.launch_checks"}  # tests/test_launch.py
    assert caught == set(CHECKS) - elsewhere - {world_size_is_started}, "which has a test of its own"


def test_started_processes_are_those_that_the_config_says():
    (problem,) = problems("experiment=demo", "data.micro_batch_size=8", world_size=2)
    assert problem.where == "trainer.devices" and "2 processes in all" in problem.expected


def test_world_size_comes_from_the_launch_when_it_is_known():
    overrides = ["experiment=demo", "trainer.devices=auto", "strategy.tensor_model_parallel_size=2"]
    assert problems(*overrides) == []
    assert [problem.where for problem in problems(*overrides, world_size=3)] == ["trainer.devices"]


def test_what_is_not_set_is_left_to_the_translation():
    assert problems("experiment=llava_instruct_ja") == []
    cfg = compose("experiment=demo").copy()
    cfg.data.global_batch_size = "${no.such.key}"
    assert find_problems(cfg) == []


def test_files_of_another_machine_are_not_looked_for():
    assert problems("experiment=demo", "data.train_path=/elsewhere/t.jsonl", ELSEWHERE) == []


def test_only_the_first_process_reads_the_data(monkeypatch):
    broken = ["experiment=demo", "data.train_path=/nowhere/t.jsonl"]
    assert problems(*broken)
    monkeypatch.setenv("RANK", "1")
    assert problems(*broken) == []


def test_broken_record_is_named_with_its_line(tmp_path):
    path = tmp_path / "train.jsonl"
    record = {
        "image": "nowhere.jpg",
        "conversations": [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "!"}],
    }
    path.write_text(json.dumps(record) + "\n{broken\n")
    where = " ".join(problem.where for problem in problems("experiment=demo", f"data.train_path={path}"))
    assert f"{path}:1" in where and f"{path}:2" in where


def test_a_missing_folder_of_shards_is_named_once_with_the_command_that_makes_it():
    (problem,) = problems("experiment=demo", "data=energon", "data.path=/nowhere")
    assert "python -m vlmsft.prepare dataset=sample" in problem.remedy
