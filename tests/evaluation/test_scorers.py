"""Scorers give what the upstream libraries give; formulas of llm-jp-eval-mm 0.4.1 stand here with their files."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from vlmsft.config_files import root
from vlmsft.evaluation import scorers as scorers_module
from vlmsft.evaluation.scorers import INSTALL, emoji_pattern, extract_letter, mmmu_letter, package_problems
from vlmsft.evaluation.store import Sample

DEFAULTS = OmegaConf.to_container(OmegaConf.load(root() / "conf" / "evaluate.yaml"), resolve=False)["scorers"]
PAIRS = [  # (reference, answer)
    ("たかしが公園で遊んでいた。", "たかしが公園にいたようだ。"),
    ("池のほとりです。", "ここは湖の岸です。"),
    ("猫です。", "猫です。"),
    ("猫です。", "犬が 走って\nいます。"),
    ("赤い服を着た女性が２人います。", "赤い服を着た女性が2人います🎉。とても楽しそうです😊！"),
    ("ロケットが打ち上げられています。", ""),
    (
        "カメラマンが屋外で三脚を使っています。",
        "ｶﾒﾗﾏﾝが三脚を使って、屋外で撮影しています。カメラマンは黒いコートを着ています。",
    ),
    ("A red bus, 3.5 m long", "The red bus is 3.5 m long."),
]


def scorer(name, **changes):
    return instantiate({**DEFAULTS[name], **changes})


def values(scorer, pairs, options=None):
    items = [(Sample("x", "?", references=(ref,), options=options or {}), answer) for ref, answer in pairs]
    return [outcome.score for outcome in scorer.score(items, None)]


def test_exact_match_is_eval_mms():
    """eval_mm/metrics/exact_match_scorer.py: int(ref == pred)"""
    pairs = [*PAIRS, ("犬", "犬"), ("犬", " 犬"), ("犬", "犬。")]
    assert values(scorer("exact_match", strip=False), pairs) == [100.0 * int(ref == pred) for ref, pred in pairs]


def test_exact_match_can_be_lenient():
    assert values(scorer("exact_match"), [("犬", " 犬\n"), ("犬", "犬。"), ("１０", "10")]) == [100, 0, 0]
    lenient = scorer("exact_match", ignore="。", nfkc=True)
    assert values(lenient, [("犬", "犬。"), ("１０", "10"), ("犬", "大")]) == [100, 100, 0]


def test_any_reference_counts():
    sample = Sample("x", "?", references=("犬", "いぬ"))
    for name in ("exact_match", "containment"):
        assert [outcome.score for outcome in scorer(name).score([(sample, "いぬ"), (sample, "猫")], None)] == [100, 0]


@pytest.mark.parametrize(("ref", "pred"), [("A", "Aです"), ("A", "答えはAではなくBです"), ("B", "答えはA"), ("", "x")])
def test_containment_is_eval_mms(ref, pred):
    """eval_mm/metrics/substring_match_scorer.py, mecha_ja_scorer.py: ref in pred"""
    assert values(scorer("containment"), [(ref, pred)]) == [100.0 * int(ref in pred)]


def upstream_jdocqa_normalize(text):
    """eval_mm/metrics/jdocqa_scorer.py"""
    text = text.replace("です", "").replace("。", "").replace("、", "").replace(" ", "").strip()
    return unicodedata.normalize("NFKC", text)


def test_containment_for_jdocqa_is_eval_mms():
    pairs = [*PAIRS, ("７割です。", "7割"), ("は い", "はい、そうです"), ("です", "犬")]
    expected = [100.0 * int(upstream_jdocqa_normalize(r) in upstream_jdocqa_normalize(p)) for r, p in pairs]
    assert values(scorer("containment", normalise="jdocqa"), pairs) == expected
    assert expected != values(scorer("containment"), pairs)


# --- multiple choice --------------------------------------------------------------------------------------------------


def upstream_letter(response, all_choices, index2ans):
    """eval_mm/metrics/jmmmu_scorer.py: parse_multi_choice_response(random_choice=False), which is MMMU's
    (github.com/MMMU-Benchmark/MMMU, eval/eval_utils.py) with Japanese punctuation."""
    for char in [",", ".", "!", "?", ";", ":", "'", "、", "。", "！", "？", "；", "："]:
        response = response.strip(char)
    response = " " + response + " "
    japanese_char_pattern = r"[\u3040-\u30FF\u4E00-\u9FFF]"
    index_ans, ans_with_brack, candidates = True, False, []
    for choice in all_choices:
        if f"({choice})" in response:
            candidates.append(choice)
            ans_with_brack = True
    if len(candidates) == 0:
        for choice in all_choices:
            if f"{choice} " in response:
                candidates.append(choice)
    if len(candidates) == 0:
        for choice in all_choices:
            if re.search(rf"{japanese_char_pattern}{choice}{japanese_char_pattern}", response):
                candidates.append(choice)
    if len(candidates) == 0:
        for choice in all_choices:
            if f"{choice}." in response:
                candidates.append(choice)
    if len(candidates) == 0 and len(response.split()) > 5:
        for index, ans in index2ans.items():
            if ans.lower() in response.lower():
                candidates.append(index)
                index_ans = False
    if len(candidates) == 0:
        return None
    if len(candidates) == 1:
        return candidates[0]
    start_indexes = []
    for can in candidates:
        if not index_ans:
            start_indexes.append(response.lower().rfind(index2ans[can].lower()))
        elif ans_with_brack:
            start_indexes.append(response.rfind(f"({can})"))
        else:
            start_indexes.append(response.rfind(f" {can} "))
    return candidates[np.argmax(start_indexes)]


OPTIONS = {"A": "dog", "B": "Cat", "C": "red bird", "D": "fish"}
ANSWERS = [
    "A", "B.", "(C)", "答えはDです。", "正解はBです", "(A) ではなく (C)", "A B C", "Is it A ? No, B .", "C. red bird",
    "I am quite sure that it is a red bird", "I see a dog and then also a cat here", "わかりません", "", "。", "USA",
    "選択肢Aと選択肢Bのうち", "The answer is (B), not (A).", "B、猫", "D. fish A. dog", "'A'", "it is dog",
]  # fmt: skip


def test_letters_are_upstreams():
    found = [mmmu_letter(answer, OPTIONS) for answer in ANSWERS]
    assert found == [upstream_letter(answer, list(OPTIONS), OPTIONS) for answer in ANSWERS]
    assert {*found} == {"A", "B", "C", "D", None}


def test_letters_that_upstream_does_not_find():
    for answer, letter in (("Ａ", "A"), ("（Ｂ）", "B"), ("C：赤い鳥", "C"), ("D、魚です", "D"), ("Apple", None)):
        assert upstream_letter(answer, list(OPTIONS), OPTIONS) is None
        assert extract_letter(answer, OPTIONS) == letter


def test_multiple_choice_says_what_it_found():
    sample = Sample("x", "?", references=("B",), options=OPTIONS)
    outcomes = scorer("multiple_choice").score([(sample, "Bです"), (sample, "(C)"), (sample, "さあ")], None)
    assert outcomes == [(100, "chose B"), (0, "chose C"), (0, "no letter in the answer")]


# --- ROUGE and BLEU ---------------------------------------------------------------------------------------------------


def upstream_rouge_l(ref, pred, is_emoji):
    """eval_mm/metrics/rougel_scorer.py: rouge_ja([ref], [pred])["rougeL"]"""
    from fugashi import Tagger
    from rouge_score import rouge_scorer, scoring

    class MecabTokenizer:
        def __init__(self):
            self.tagger = Tagger("-Owakati")

        def normalize_answer(self, text):
            text = "".join(["" if is_emoji(c) else c for c in text])
            emoji_pattern = re.compile(
                "["
                "\U0001f600-\U0001f64f"
                "\U0001f300-\U0001f5ff"
                "\U0001f680-\U0001f6ff"
                "\U0001f1e0-\U0001f1ff"
                "\U00002702-\U000027b0"
                "]+",
                flags=re.UNICODE,
            )
            return " ".join(unicodedata.normalize("NFKC", emoji_pattern.sub(r"", text)).split())

        def tokenize(self, text):
            return self.tagger.parse(self.normalize_answer(text)).split()

    aggregator = scoring.BootstrapAggregator()
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=MecabTokenizer())
    aggregator.add_scores(scorer.score(ref, pred))
    return aggregator.aggregate()["rougeL"].mid.fmeasure * 100


def test_rouge_l_is_eval_mms():
    # emoji outside eval-mm's own ranges need the package `emoji`: in the next test
    expected = [upstream_rouge_l(ref, pred, lambda c: False) for ref, pred in PAIRS]
    assert values(scorer("rouge_l"), PAIRS) == pytest.approx(expected, abs=1e-12)
    assert expected[:3] == pytest.approx([66.6667, 50, 100], abs=1e-3) and expected[5] == 0
    assert len({round(value) for value in expected}) >= 5


def test_emoji_are_the_packages():
    emoji = pytest.importorskip("emoji", reason="compares the table with the package, which vlmsft doesn't need")
    for code in range(0x20, 0x30000):
        is_ours = emoji_pattern().fullmatch(chr(code)) is not None
        in_ranges = 0x1F300 <= code <= 0x1F64F or 0x1F680 <= code <= 0x1F6FF or 0x2702 <= code <= 0x27B0
        assert is_ours == (emoji.is_emoji(chr(code)) or in_ranges or 0x1F1E0 <= code <= 0x1F1FF), hex(code)


def test_emoji_do_not_count():
    assert values(scorer("rouge_l"), [("星です", "⭐星☀です🇯🇵"), ("a b", "©a 🈁b")]) == [100, 100]


def test_rouge_ls_best_reference_counts():
    rouge = scorer("rouge_l")
    sample = Sample("x", "?", references=("池のほとりです。", "ここは湖の岸です。"))
    assert rouge.score([(sample, "ここは湖の岸です。")], None)[0].score == 100


def test_rouge_l_tells_how_texts_were_normalised(monkeypatch):
    described = scorer("rouge_l").describe()
    assert described["normalisation"] == "nfkc" and described["versions"]["rouge-score"]
    real = scorers_module.importlib.util.find_spec
    monkeypatch.setattr(
        scorers_module.importlib.util, "find_spec", lambda name: True if name == "neologdn" else real(name)
    )
    assert scorer("rouge_l").describe()["neologdn_installed"] is True


def test_bleu_is_eval_mms():
    """eval_mm/metrics/jdocqa_scorer.py: bleu_ja, there from 0 to 1."""
    from sacrebleu import sentence_bleu

    expected = [
        sentence_bleu(
            hypothesis=pred,
            references=[ref],
            smooth_method="exp",
            smooth_value=0.0,
            tokenize="ja-mecab",
            use_effective_order=False,
            lowercase=False,
        ).score
        for ref, pred in PAIRS
    ]
    assert values(scorer("bleu"), PAIRS) == pytest.approx(expected, abs=1e-12)
    assert len({round(value) for value in expected}) >= 5


# --- judge's prompt, packages -----------------------------------------------------------------------------------------

UPSTREAM_INSTRUCTION = """
You are an expert evaluator. You are given a (Question, Answer, Prediction) triplet. Your task is to evaluate how well the Prediction aligns with the Answer in the context of the Question.

Please assign a score from 1 to 5 based on the following criteria:

5: Excellent — The Prediction fully matches the Answer with complete correctness and relevance.
4: Good — The Prediction is mostly correct with only minor inaccuracies or missing details.
3: Fair — The Prediction is partially correct but contains noticeable errors or missing key points.
2: Poor — The Prediction is mostly incorrect or irrelevant, but there are small fragments of correctness.
1: Very Poor — The Prediction is completely incorrect or irrelevant.
Output only the score (an integer from 1 to 5). Do not add any explanation.

Triplet:
Question: {Question}
Answer: {Answer}
Prediction: {Prediction}

Your Score:
"""  # noqa: E501
"""eval_mm/metrics/llm_as_a_judge_scorer.py"""


def test_the_judge_is_asked_as_eval_mm_asks():
    sample = Sample("x", "<image>何の写真？", references=("犬",))
    expected = UPSTREAM_INSTRUCTION.format(Question="何の写真？", Answer="犬", Prediction="{reference}は猫")
    assert scorer("judge").messages(sample, "{reference}は猫") == [
        {"role": "system", "content": "You are an expert evaluator."},
        {"role": "user", "content": expected},
    ]


@pytest.mark.parametrize(("reply", "verdict"), [("4", 4), ("Score: 3", 3), ("0", None), ("9", None), ("good", None)])
def test_verdicts(reply, verdict):
    assert scorer("judge").verdict(reply) == verdict


def test_missing_packages_are_named_with_the_command(monkeypatch):
    real = scorers_module.importlib.util.find_spec
    absent = ("rouge_score", "fugashi")
    monkeypatch.setattr(scorers_module.importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    problems = package_problems({"rouge_l": scorer("rouge_l"), "bleu": scorer("bleu")})
    assert [problem.found for problem in problems] == ["no rouge-score", "no fugashi"]
    assert all(problem.remedy == INSTALL == "pip install 'vlmsft[eval]'" for problem in problems)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("containment", {"normalise": "x"}, "normalise is one of none, jdocqa"),
        ("rouge_l", {"normalisation": "x"}, "normalisation is one of nfkc, neologdn"),
        ("bleu", {"tokenizer": "x"}, "tokenizer is one of .*ja-mecab"),
        ("bleu", {"smooth_method": "x"}, "smooth_method is one of none, floor, add-k, exp"),
        ("judge", {"pattern": "[0-9]"}, "pattern has a group"),
        ("judge", {"pattern": "("}, "unterminated"),
        ("judge", {"least": 5}, "least is less than most"),
    ],
)
def test_wrong_values_are_named_before_anything_is_asked(name, change, said):
    with pytest.raises(Exception, match=said):
        scorer(name, **change)
