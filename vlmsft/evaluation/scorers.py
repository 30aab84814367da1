"""Scorers: a number for an answer, equal to what the upstream libraries give.

A scorer is an object with the attributes and methods of `Scorer`; a task's YAML names it, and conf/evaluate.yaml
(scorers) has its class and keys. Accuracies, ROUGE and BLEU are percentages. "eval-mm" below is llm-jp-eval-mm 0.4.1
(https://github.com/llm-jp/llm-jp-eval-mm, Apache-2.0), whose rules are followed to the digit.

Packages that not all installations have are imported where they are used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from vlmsft.data.records import IMAGE_MARKER
from vlmsft.errors import Problem
from vlmsft.evaluation.runner import JudgeSettings
from vlmsft.evaluation.store import Sample

INSTALL = "pip install 'vlmsft[eval]'"
"""Brings the packages of ROUGE-L and BLEU."""

RIGHT, WRONG = 100.0, 0.0


class Outcome(NamedTuple):
    """Of one answer: as in vlmsft.evaluation.store.Score."""

    score: float | None
    reason: str | None = None


class Scorer(Protocol):
    """needs: what each sample must have: "references", "options"; and "judge", for a judge's settings
    packages: {module: distribution} that must be installed
    """

    needs: tuple[str, ...]
    packages: Mapping[str, str]

    def describe(self) -> dict[str, Any]:
        """What its numbers depend on, for the manifest."""
        ...

    def score(self, items: Sequence[tuple[Sample, str]], judge: JudgeSettings | None) -> list[Outcome]:
        """An outcome for each (sample, answer), in order."""
        ...


def package_problems(scorers: Mapping[str, Scorer]) -> list[Problem]:
    """Packages that are not installed, each once."""
    missing: dict[str, str] = {}
    for name, scorer in scorers.items():
        for module, distribution in scorer.packages.items():
            if importlib.util.find_spec(module) is None:
                missing.setdefault(distribution, name)
    expected = "the package installed"
    return [Problem(f"scorer {name}", f"no {package}", expected, INSTALL) for package, name in missing.items()]


def versions(packages: Mapping[str, str]) -> dict[str, str]:
    return {distribution: importlib.metadata.version(distribution) for distribution in packages.values()}


# --- whole answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactMatch:
    """The answer is one of the references.

    strip: white space around both doesn't count. Without it this is eval-mm's `exact-match`.
    ignore: characters that don't count, "。" say
    nfkc: full-width and half-width forms are the same
    """

    strip: bool
    ignore: str
    nfkc: bool
    needs = ("references",)
    packages = {}  # noqa: RUF012 # of the class, never changed

    def describe(self) -> dict[str, Any]:
        return {"scorer": "exact match", "strip": self.strip, "ignore": self.ignore, "nfkc": self.nfkc}

    def score(self, items: Sequence[tuple[Sample, str]], judge: JudgeSettings | None) -> list[Outcome]:
        return [_either(self._plain(answer) in map(self._plain, sample.references)) for sample, answer in items]

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text) if self.nfkc else text
        text = text.translate({ord(character): None for character in self.ignore})
        return text.strip() if self.strip else text


@dataclass(frozen=True)
class Containment:
    """A reference is somewhere in the answer: `ref in pred`, which eval-mm calls accuracy for JIC-VQA, MECHA-ja and
    (with normalise="jdocqa") JDocQA. A long answer that happens to hold the letter A is right where A is: it favours
    models that say much.

    normalise: none, or jdocqa: です, 。, 、 and spaces go, then NFKC
    """

    normalise: str
    needs = ("references",)
    packages = {}  # noqa: RUF012

    def __post_init__(self):
        _raise_unless_one_of("normalise", self.normalise, CONTAINMENT_TEXTS)

    def describe(self) -> dict[str, Any]:
        return {"scorer": "containment: the reference is in the answer", "normalise": self.normalise}

    def score(self, items: Sequence[tuple[Sample, str]], judge: JudgeSettings | None) -> list[Outcome]:
        plain = CONTAINMENT_TEXTS[self.normalise]
        return [_either(any(plain(ref) in plain(answer) for ref in sample.references)) for sample, answer in items]


def jdocqa_text(text: str) -> str:
    """eval_mm/metrics/jdocqa_scorer.py: jdocqa_normalize."""
    for removed in ("です", "。", "、", " "):
        text = text.replace(removed, "")
    return unicodedata.normalize("NFKC", text.strip())


CONTAINMENT_TEXTS: Mapping[str, Callable[[str], str]] = {"none": str, "jdocqa": jdocqa_text}


def _raise_unless_one_of(key: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{key} is one of {', '.join(known)}")


def _either(holds: bool, reason: str | None = None) -> Outcome:
    return Outcome(RIGHT if holds else WRONG, reason)


# --- multiple choice --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MultipleChoice:
    """The letter that the answer settles on is the reference's; an answer without one is wrong, and `reason` says so.

    Letters are found as MMMU and eval-mm's JMMMU scorer find them; where they find none, letters are looked for in the
    NFKC form as well, and at the answer's beginning ("Ａ：犬").
    """

    needs = ("references", "options")
    packages = {}  # noqa: RUF012

    def describe(self) -> dict[str, Any]:
        return {"scorer": "multiple choice: MMMU's extraction, then NFKC and the first letter"}

    def score(self, items: Sequence[tuple[Sample, str]], judge: JudgeSettings | None) -> list[Outcome]:
        return [self._one(sample, answer) for sample, answer in items]

    def _one(self, sample: Sample, answer: str) -> Outcome:
        letter = extract_letter(answer, sample.options)
        return _either(letter in sample.references, f"chose {letter}" if letter else "no letter in the answer")


def extract_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer settles on; None if it names none.

    options: {"A": text, ...}
    """
    plain = unicodedata.normalize("NFKC", answer)
    return mmmu_letter(answer, options) or mmmu_letter(plain, options) or _first_letter(plain, options)


def _first_letter(answer: str, options: Mapping[str, str]) -> str | None:
    match = re.match(rf"\W*({'|'.join(map(re.escape, options))})(?![A-Za-z0-9])", answer.strip())
    return match[1] if match else None


def mmmu_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """eval_mm/metrics/jmmmu_scorer.py: parse_multi_choice_response without its random guess, after MMMU's
    eval_utils.py: (A), then "A ", A between Japanese characters, "A.", then an option's text in an answer of more than
    five words. Of several the last in the answer, as upstream looks for it.
    """
    for mark in ",.!?;:'、。！？；：":
        answer = answer.strip(mark)
    answer = f" {answer} "
    japanese = r"[\u3040-\u30FF\u4E00-\u9FFF]"
    ways: list[tuple[Callable[[str], bool], Callable[[str], int]]] = [
        (lambda letter: f"({letter})" in answer, lambda letter: answer.rfind(f"({letter})")),
        (lambda letter: f"{letter} " in answer, lambda letter: answer.rfind(f" {letter} ")),
        (
            lambda letter: bool(re.search(japanese + letter + japanese, answer)),
            lambda letter: answer.rfind(f" {letter} "),
        ),
        (lambda letter: f"{letter}." in answer, lambda letter: answer.rfind(f" {letter} ")),
    ]
    if len(answer.split()) > 5:
        lower = answer.lower()
        texts = {letter: text.lower() for letter, text in options.items()}
        ways.append((lambda letter: texts[letter] in lower, lambda letter: lower.rfind(texts[letter])))
    for is_named, place in ways:
        named = [letter for letter in options if is_named(letter)]
        if named:
            return max(named, key=place)  # the first of them where none has a place, as numpy.argmax
    return None


# --- overlap of texts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RougeL:
    """ROUGE-L's F measure over MeCab's words (fugashi, unidic-lite), as eval_mm/metrics/rougel_scorer.py: emoji go, the
    text is normalised, runs of white space become one space; no stemming. Of several references the best counts.

    normalisation: nfkc (eval-mm 0.4.1), or neologdn (later versions where it is installed): two installations can give
        different numbers, so that the manifest says which it was
    """

    normalisation: str
    needs = ("references",)
    packages = {"rouge_score": "rouge-score", "fugashi": "fugashi", "unidic_lite": "unidic-lite"}  # noqa: RUF012

    def __post_init__(self):
        _raise_unless_one_of("normalisation", self.normalisation, NORMALISATIONS)
        if self.normalisation == "neologdn" and importlib.util.find_spec("neologdn") is None:
            raise ValueError("it needs the package neologdn: pip install neologdn")

    def describe(self) -> dict[str, Any]:
        is_there = importlib.util.find_spec("neologdn") is not None
        return {
            "scorer": "ROUGE-L F measure, fugashi with unidic-lite",
            "normalisation": self.normalisation,
            "neologdn_installed": is_there,
            "versions": versions(self.packages),
        }

    def score(self, items: Sequence[tuple[Sample, str]], judge: JudgeSettings | None) -> list[Outcome]:
        from rouge_score.rouge_scorer import RougeScorer

        rouge = RougeScorer(["rougeL"], tokenizer=_MecabWords(self.normalisation))
        return [
            Outcome(max(rouge.score(reference, answer)["rougeL"].fmeasure * 100 for reference in sample.references))
            for sample, answer in items
        ]


class _MecabWords:
    """What rouge_score calls a tokenizer."""

    def __init__(self, normalisation: str):
        import fugashi
        import unidic_lite

        # as Tagger("-Owakati"), which prefers the dictionary `unidic` where that is installed too
        tagger: Any = fugashi.GenericTagger  # pyright: ignore[reportAttributeAccessIssue] # compiled, without annotations
        self._tagger = tagger(f"-Owakati -r {unidic_lite.DICDIR}/dicrc -d {unidic_lite.DICDIR}")
        self._normalise = NORMALISATIONS[normalisation]

    def tokenize(self, text: str) -> list[str]:
        plain = " ".join(self._normalise(emoji_pattern().sub("", text)).split())
        return self._tagger.parse(plain).split()


def _neologdn(text: str) -> str:
    import neologdn

    return neologdn.normalize(text)


NORMALISATIONS = {"nfkc": functools.partial(unicodedata.normalize, "NFKC"), "neologdn": _neologdn}

EMOJI = """
A9 AE 203C 2049 2122 2139 2194-2199 21A9-21AA 231A-231B 2328 23CF 23E9-23F3 23F8-23FA 24C2 25AA-25AB 25B6 25C0
25FB-25FE 2600-2604 260E 2611 2614-2615 2618 261D 2620 2622-2623 2626 262A 262E-262F 2638-263A 2640 2642 2648-2653
265F-2660 2663 2665-2666 2668 267B 267E-267F 2692-2697 2699 269B-269C 26A0-26A1 26A7 26AA-26AB 26B0-26B1 26BD-26BE
26C4-26C5 26C8 26CE-26CF 26D1 26D3-26D4 26E9-26EA 26F0-26F5 26F7-26FA 26FD 2702-27B0 27BF 2934-2935 2B05-2B07
2B1B-2B1C 2B50 2B55 3030 303D 3297 3299 1F004 1F0CF 1F170-1F171 1F17E-1F17F 1F18E 1F191-1F19A 1F1E0-1F1FF
1F201-1F202 1F21A 1F22F 1F232-1F23A 1F250-1F251 1F300-1F64F 1F680-1F6FF 1F7E0-1F7EB 1F7F0 1F90C-1F93A 1F93C-1F945
1F947-1F9FF 1FA70-1FA7C 1FA80-1FAC6 1FAC8 1FACC-1FADD 1FADF-1FAEB 1FAEF-1FAFA
"""
"""Code points that eval-mm removes: `emoji.is_emoji` (emoji 2.16.0) and its own ranges. As a table, since otherwise the
numbers would change with that package's version."""


@functools.cache
def emoji_pattern() -> re.Pattern[str]:
    ranges = [[chr(int(end, 16)) for end in each.split("-")] for each in EMOJI.split()]
    return re.compile(f"[{''.join('-'.join(ends) for ends in ranges)}]")


@dataclass(frozen=True)
class Bleu:
    """A sentence's BLEU over MeCab's words, as eval_mm/metrics/jdocqa_scorer.py: bleu_ja (there from 0 to 1).

    tokenizer: of sacrebleu; smooth_method: exp, floor, add-k or none
    """

    tokenizer: str
    smooth_method: str
    needs = ("references",)
    packages = {"sacrebleu": "sacrebleu", "MeCab": "mecab-python3", "ipadic": "ipadic"}  # noqa: RUF012

    def __post_init__(self):
        if importlib.util.find_spec("sacrebleu") is not None:
            from sacrebleu.metrics.bleu import BLEU

            _raise_unless_one_of("tokenizer", self.tokenizer, BLEU.TOKENIZERS)
            _raise_unless_one_of("smooth_method", self.smooth_method, BLEU.SMOOTH_DEFAULTS)

    def describe(self) -> dict[str, Any]:
        return {
            "scorer": "sentence BLEU",
            "tokenizer": self.tokenizer,
            "smooth_method": self.smooth_method,
            "versions": versions(self.packages),
        }

    def score(self, items: Sequence[tuple[Sample, str]], judge: JudgeSettings | None) -> list[Outcome]:
        from sacrebleu.metrics.bleu import BLEU

        bleu = BLEU(tokenize=self.tokenizer, smooth_method=self.smooth_method, effective_order=False)
        return [Outcome(bleu.sentence_score(answer, list(sample.references)).score) for sample, answer in items]


# --- judge ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Another model's verdict. A call that fails, takes too long or gives no verdict is made again; if that doesn't
    help the score is missing, never a zero, and the next start asks again. vlmsft.evaluation.judge keeps verdicts.

    system, template: of the request; {question}, {reference} and {answer} stand in the template
    pattern: regular expression whose first group is the verdict; least, most: what it may be
    """

    system: str
    template: str
    pattern: str
    least: float
    most: float
    needs = ("references", "judge")
    packages = {}  # noqa: RUF012

    def __post_init__(self):
        if re.compile(self.pattern).groups < 1:
            raise ValueError("pattern has a group, which is the verdict")
        if not self.least < self.most:
            raise ValueError("least is less than most")

    def describe(self) -> dict[str, Any]:
        return {
            "scorer": "judge",
            "system": self.system,
            "template": self.template,
            "pattern": self.pattern,
            "least": self.least,
            "most": self.most,
        }

    def messages(self, sample: Sample, answer: str) -> list[dict[str, str]]:
        """Of the request."""
        question = sample.prompt.replace(IMAGE_MARKER, "").strip()
        values = {"question": question, "reference": "\n".join(sample.references), "answer": answer}
        # one pass: an answer that holds "{reference}" stays as it is
        text = re.sub(r"\{(question|reference|answer)\}", lambda match: values[match[1]], self.template)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": text}]

    def verdict(self, reply: str) -> float | None:
        """None where the reply has none."""
        match = re.search(self.pattern, reply)
        try:
            value = float(match[1]) if match else None
        except ValueError:
            return None
        return value if value is not None and self.least <= value <= self.most else None

    def score(self, items: Sequence[tuple[Sample, str]], judge: JudgeSettings | None) -> list[Outcome]:
        from vlmsft.evaluation.judge import ask_judge

        assert judge is not None, "tasks that need a judge are refused without one"
        verdicts = ask_judge([self.messages(*item) for item in items], self.verdict, judge)
        return [
            Outcome(verdict.score, verdict.reply if verdict.error is None else verdict.error) for verdict in verdicts
        ]
