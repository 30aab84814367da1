"""The packaged sample set keeps what experiment=demo relies on."""

import json
from collections import defaultdict

import numpy as np
from PIL import Image
from transformers import AutoProcessor

from vlmsft.data.records import find_problems


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_problem_in_either_file(sample_folder):
    for name in ("train.jsonl", "validation.jsonl"):
        assert find_problems(sample_folder / name, sample_folder / "images") == []


def test_validation_is_part_of_train_and_asks_each_question_of_three_photographs_with_different_answers(sample_folder):
    train, validation = lines(sample_folder / "train.jsonl"), lines(sample_folder / "validation.jsonl")
    assert all(record in train for record in validation)
    answers, images = defaultdict(set), defaultdict(set)
    for record in validation:
        question, answer = (turn["value"] for turn in record["conversations"])
        answers[question].add(answer)
        images[question].add(record["image"])
    assert min(len(found) for found in answers.values()) >= 3
    assert min(len(found) for found in images.values()) >= 3
    assert len(images) == 5


def test_train_covers_text_only_two_images_and_two_turns(sample_folder):
    train = lines(sample_folder / "train.jsonl")
    assert any("image" not in record for record in train)
    assert any(isinstance(record.get("image"), list) for record in train)
    assert any(len(record["conversations"]) > 2 for record in train)


def test_24_photographs_small_distinct_and_with_a_licence(sample_folder):
    files = sorted((sample_folder / "images").iterdir())
    assert len(files) >= 24
    readme = (sample_folder / "README.md").read_text(encoding="utf-8")
    assert all(f"| {file.name} |" in readme for file in files)
    small = [np.asarray(Image.open(file).convert("RGB").resize((16, 16)), np.float32) for file in files]
    distances = [np.abs(a - b).mean() for n, a in enumerate(small) for b in small[:n]]
    assert min(distances) > 3
    assert all(max(Image.open(file).size) <= 320 for file in files)
    assert sum(file.stat().st_size for file in sample_folder.rglob("*") if file.is_file()) < 2 * 2**20


def test_processor_ids(sample_folder):
    tokenizer = AutoProcessor.from_pretrained(sample_folder / "processor").tokenizer
    assert tokenizer.convert_tokens_to_ids("<|image|>") == len(tokenizer) - 1 == 512
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert tokenizer("猫").input_ids[0] == tokenizer.bos_token_id


def test_template_renders_what_llama_renders(sample_folder):
    processor = AutoProcessor.from_pretrained(sample_folder / "processor")
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    user = "<|start_header_id|>user<|end_header_id|>\n\n<|image|>Q<|eot_id|>"
    assistant = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert processor.apply_chat_template(image, add_generation_prompt=True) == "<|begin_of_text|>" + user + assistant
    dated = (
        "<|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 1 Jan 2025\n\n{}<|eot_id|>"
    )
    system = [{"role": "system", "content": " S\n"}, *image]
    rendered = processor.apply_chat_template(system, date_string="1 Jan 2025")
    assert rendered == "<|begin_of_text|>" + dated.format("S") + user
    text = [{"role": "user", "content": "Q"}]
    rendered = processor.apply_chat_template(text, date_string="1 Jan 2025")
    assert rendered == "<|begin_of_text|>" + dated.format("") + user.replace("<|image|>", "")
