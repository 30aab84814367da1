"""Rebuilds vlmsft/data/sample/ (photographs, records, processor) from photographs that ship inside Python packages.

    python -m venv photos
    photos/bin/pip install --no-deps scikit-image==0.26.0 scikit-learn==1.9.1 matplotlib==3.11.2
    pip download --no-deps --dest photos scipy==1.9.3 && unzip photos/scipy-1.9.3*.whl 'scipy/misc/*' -d photos/scipy
    python benchmarks/make_sample_set.py photos/lib/python3.11/site-packages photos/scipy

Prints what it wrote. Needs Pillow, tokenizers and transformers. The questions and answers were written by looking at
the pictures; each is in PHOTOS below.
"""

from __future__ import annotations

import argparse
import bz2
import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MllamaImageProcessor, MllamaProcessor, PreTrainedTokenizerFast

SAMPLE = Path(__file__).resolve().parents[1] / "vlmsft" / "data" / "sample"
LONGEST_SIDE = 320
TILE = 112
VOCAB_SIZE = 512  # rows of the embedding proper: 256 bytes, merges, 16 special tokens; <|image|> comes behind them

SUBJECT = "何が写っていますか？"
COLOUR = "目立つ色は何色ですか？"
PLACE = "屋内ですか、屋外ですか、宇宙ですか？"
KIND = "どんな種類の写真ですか？"
SENTENCE = "一文で説明してください。"

CC0 = "CC0 1.0"
PUBLIC = "public domain"
BSD = "BSD-3-Clause (part of scikit-image, which states no other terms for it)"


@dataclass(frozen=True)
class Photo:
    """A photograph: where it comes from, and the answers (None: the question isn't asked of it)."""

    name: str
    file: str
    author: str
    licence: str
    subject: str
    colour: str
    kind: str
    place: str | None = None
    sentence: str | None = None
    crop: tuple[int, int, int, int] | None = None  # left, top, right, bottom in pixels of the original


SKIMAGE, SKLEARN = "skimage/data/", "sklearn/datasets/images/"
PHOTOS = [
    Photo(
        "astronaut", SKIMAGE + "astronaut.png", "NASA", PUBLIC,
        "宇宙飛行士", "オレンジ色", "人物", "屋内", "宇宙服を着た女性が笑っています。",
    ),
    Photo("brick", SKIMAGE + "brick.png", "CC0Textures (Bricks25)", CC0, "れんが", "灰色", "模様"),
    Photo(
        "camera", SKIMAGE + "camera.png", "Lav Varshney", CC0,
        "カメラマン", "灰色", "人物", "屋外", "男性が三脚のカメラをのぞいています。",
    ),
    Photo("cell", SKIMAGE + "cell.png", "Paul Müller et al. (doi:10.1364/OE.26.010729)", CC0, "細胞", "灰色", "顕微鏡"),
    Photo(
        "cat", SKIMAGE + "chelsea.png", "Stefan van der Walt", CC0,
        "猫", "茶色", "動物", None, "茶色の猫の顔が大きく写っています。",
    ),
    Photo("clock", SKIMAGE + "clock_motion.png", "Stefan van der Walt", PUBLIC, "ぶれた時計", "灰色", "物"),
    Photo(
        "coffee", SKIMAGE + "coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar", CC0,
        "コーヒー", "茶色", "物", None, "木の机に赤いカップのコーヒーがあります。",
    ),
    Photo(
        "coins", SKIMAGE + "coins.png", "Brooklyn Museum Collection", "no known copyright restrictions",
        "硬貨", "黒", "物", None, "たくさんの古い硬貨が並んでいます。",
    ),
    Photo("grass", SKIMAGE + "grass.png", "linolafett (DeviantArt, Grass 01)", CC0, "草", "灰色", "植物", "屋外"),
    Photo("gravel", SKIMAGE + "gravel.png", "CC0Textures (Gravel04)", CC0, "砂利", "灰色", "模様"),
    Photo(
        "galaxies", SKIMAGE + "hubble_deep_field.jpg", "NASA (Hubble eXtreme Deep Field)", PUBLIC,
        "銀河", "黒", "天体", "宇宙", "暗い宇宙に多くの銀河が光っています。",
    ),
    Photo(
        "tissue", SKIMAGE + "ihc.png", "Center for Microscopy And Molecular Imaging (CMMI)",
        "no known copyright restrictions", "染色した組織", "茶色", "顕微鏡",
    ),
    Photo("vessels", SKIMAGE + "microaneurysms.png", "Andreas Maier (HRF image database)", CC0, "血管", "灰色", "医療"),
    Photo(
        "moon", SKIMAGE + "moon.png", "scikit-image", BSD,
        "月の表面", "灰色", "天体", "宇宙", "月の表面にクレーターがあります。",
    ),
    Photo("page", SKIMAGE + "page.png", "scikit-image", BSD, "英語の文章", "白", "文字"),
    Photo(
        "retina", SKIMAGE + "retina.jpg", "Mikael Häggström", CC0, "目の網膜", "赤", "医療", None,
    ),
    Photo(
        "rocket", SKIMAGE + "rocket.jpg", "SpaceX", PUBLIC,
        "ロケット", "紺色", "乗り物", "屋外", "暗い空の下にロケットが立っています。",
    ),
    Photo("handwriting", SKIMAGE + "text.png", "Wikipedia (Corner.png)", PUBLIC, "手書きの数式", "灰色", "文字"),
    Photo(
        "pagoda", SKLEARN + "china.jpg", "danielbuechele (flickr.com/photos/danielbuechele/6061409035)", "CC BY 2.0",
        "中国の塔", "緑", "建物", "屋外", "湖のそばに中国風の塔が立っています。",
    ),
    Photo(
        "flower", SKLEARN + "flower.jpg", "vultilion (flickr.com/photos/vultilion/6056698931)", "CC BY 2.0",
        "花", "オレンジ色", "植物", "屋外", "オレンジ色の丸い花が咲いています。",
    ),
    Photo(
        "officer", "matplotlib/mpl-data/sample_data/grace_hopper.jpg", "United States Navy (James S. Davis)", PUBLIC,
        "海軍の軍人", "紺色", "人物", "屋内", "軍服の女性が旗の前にいます。",
    ),
    Photo(
        "raccoon", "scipy/misc/face.dat", "public-domain-image.com", PUBLIC,
        "アライグマ", "灰色", "動物", "屋外", "アライグマが葉の上でこちらを見ています。", (415, 0, 1024, 768),
    ),
    Photo(
        "leaves", "scipy/misc/face.dat", "public-domain-image.com", PUBLIC,
        "細長い葉", "緑", "植物", "屋外", None, (0, 430, 410, 768),
    ),
    Photo(
        "stairs", "scipy/misc/ascent.dat", "public-domain-image.com", PUBLIC,
        "階段", "灰色", "建物", "屋外", "人が鉄の階段をのぼっています。",
    ),
]  # fmt: skip

VALIDATED = {  # besides every SUBJECT question: at least three different answers to each question
    COLOUR: ["astronaut", "cat", "coffee", "flower", "galaxies", "leaves", "moon", "retina"],
    PLACE: ["astronaut", "camera", "galaxies", "moon", "officer", "pagoda"],
    KIND: ["brick", "cat", "cell", "flower", "handwriting", "stairs"],
    SENTENCE: ["cat", "coffee", "flower", "rocket"],
}
PAIRS = [("cat", "coffee"), ("rocket", "flower"), ("coins", "pagoda"), ("moon", "astronaut")]
TEXT_ONLY = [
    ("日本の首都はどこですか？", "東京です。"),
    ("一週間は何日ですか？", "七日です。"),
    ("猫は動物ですか？", "はい、動物です。"),
]
SPECIAL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(2, 7)),
]
# How Llama 3 cuts text before BPE, and what Llama-3.2-Vision's template renders for messages without tools.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set date_string = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{%- set has_system = messages[0]['role'] == 'system' %}
{%- set seen = namespace(image=false) %}
{%- for message in (messages[1:] if has_system else messages) %}
    {%- for part in message['content'] if message['content'] is not string and part['type'] == 'image' %}
        {%- set seen.image = true %}
    {%- endfor %}
{%- endfor %}
{%- if has_system or not seen.image %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
    {{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' }}
    {{- (messages[0]['content'] | trim if has_system else '') + '<|eot_id|>' }}
{%- endif %}
{%- for message in (messages[1:] if has_system else messages) %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {{- '<|image|>' if part['type'] == 'image' else part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def read_photo(photo: Photo, site_packages: Path, scipy: Path) -> Image.Image:
    """The photograph (or its crop) as RGB, at most LONGEST_SIDE pixels wide and high."""
    if photo.file.endswith("face.dat"):
        raw = bz2.decompress((scipy / photo.file).read_bytes())
        image = Image.fromarray(np.frombuffer(raw, np.uint8).reshape(768, 1024, 3))
    elif photo.file.endswith("ascent.dat"):
        image = Image.fromarray(np.array(pickle.loads((scipy / photo.file).read_bytes()), np.uint8))
    else:
        image = Image.open(site_packages / photo.file)
    image = image.convert("RGB").crop(photo.crop or (0, 0, *image.size))
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return image


def record(question: str, answer: str, images: list[str]) -> dict:
    """One LLaVA-style record; `image` is a string for one image and a list for several."""
    files = [f"{name}.jpg" for name in images]
    image = {} if not files else {"image": files[0] if len(files) == 1 else files}
    value = "<image>\n" * len(files) + question
    return {**image, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]}


def photo_records(photo: Photo) -> dict[str, dict]:
    """The photograph's single-turn records by question."""
    answers = {
        SUBJECT: f"{photo.subject}です。",
        COLOUR: f"{photo.colour}です。",
        KIND: f"{photo.kind}の写真です。",
        PLACE: photo.place and f"{photo.place}です。",
        SENTENCE: photo.sentence,
    }
    return {question: record(question, answer, [photo.name]) for question, answer in answers.items() if answer}


def all_records() -> tuple[list[dict], list[dict]]:
    """(train, validation); validation is part of train."""
    by_name = {photo.name: photo for photo in PHOTOS}
    train, validation = [], []
    for photo in PHOTOS:
        for question, entry in photo_records(photo).items():
            train.append(entry)
            if question == SUBJECT or photo.name in VALIDATED[question]:
                validation.append(entry)
    for first, second in PAIRS:
        answer = f"一枚目は{by_name[first].subject}、二枚目は{by_name[second].subject}です。"
        train.append(record("二枚の写真には何が写っていますか？", answer, [first, second]))
    train += [record(question, answer, []) for question, answer in TEXT_ONLY]
    for name in ("cat", "rocket"):  # two turns about one photograph
        turns = photo_records(by_name[name])
        entry = turns[SUBJECT]["conversations"] + turns[COLOUR]["conversations"]
        entry = [
            {**turn, "value": turn["value"].replace("<image>\n", "") if n else turn["value"]}
            for n, turn in enumerate(entry)
        ]
        train.append({"image": f"{name}.jpg", "conversations": entry})
    return train, validation


def make_processor(texts: list[str], folder: Path) -> None:
    """A Llama-3.2-Vision processor in small: byte-level BPE over the set's own text, 112-pixel tiles."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in [*SPECIAL_TOKENS, "<|image|>"]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    assert tokenizer.token_to_id("<|image|>") == VOCAB_SIZE, tokenizer.get_vocab_size()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        additional_special_tokens=["<|image|>"],
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    images = MllamaImageProcessor(
        size={"height": TILE, "width": TILE},
        max_image_tiles=4,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    MllamaProcessor(images, fast, chat_template=CHAT_TEMPLATE).save_pretrained(folder)


def readme_table() -> str:
    rows = ["| photograph | taken from | author or source | licence |", "|---|---|---|---|"]
    for photo in PHOTOS:
        crop = f", pixels {photo.crop[0]},{photo.crop[1]} to {photo.crop[2]},{photo.crop[3]}" if photo.crop else ""
        rows.append(f"| {photo.name}.jpg | {photo.file}{crop} | {photo.author} | {photo.licence} |")
    return "\n".join(rows)


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in records), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site_packages", type=Path, help="where skimage, sklearn and matplotlib are installed")
    parser.add_argument("scipy", type=Path, help="folder with scipy/misc of scipy 1.9.3")
    arguments = parser.parse_args()
    for folder in ("images", "processor"):
        shutil.rmtree(SAMPLE / folder, ignore_errors=True)
        (SAMPLE / folder).mkdir(parents=True)
    for photo in PHOTOS:
        image = read_photo(photo, arguments.site_packages, arguments.scipy)
        image.save(SAMPLE / "images" / f"{photo.name}.jpg", quality=88, optimize=True)
    train, validation = all_records()
    write_jsonl(SAMPLE / "train.jsonl", train)
    write_jsonl(SAMPLE / "validation.jsonl", validation)
    texts = [turn["value"].replace("<image>", "") for entry in train for turn in entry["conversations"]]
    make_processor([*texts, *["user", "assistant", "system"] * len(train)], SAMPLE / "processor")
    head, _ = (SAMPLE / "README.md").read_text(encoding="utf-8").split("| photograph |", 1)
    (SAMPLE / "README.md").write_text(head + readme_table() + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in SAMPLE.rglob("*") if file.is_file())
    records = f"{len(train)} train and {len(validation)} validation records"
    print(f"{len(PHOTOS)} photographs, {records}, {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
