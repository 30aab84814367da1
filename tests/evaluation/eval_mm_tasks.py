"""Tasks and a scorer for llm-jp-eval-mm, as a user would write them. Runs in its environment: nothing of vlmsft."""

import os

from datasets import Dataset
from eval_mm.metrics.scorer import AggregateOutput, Scorer
from eval_mm.tasks.task import Task
from PIL import Image

COLORS = ("red", "green", "blue", "white")


class Colors(Task):
    """Four questions about one color each; the fields are those that the scorers of the ten tasks read."""

    def _prepare_dataset(self):
        rows = [
            {
                "question_id": number,
                "input_text": f"<image>\nWhat color is picture {number}?",
                "answer": color,
                "color": color,
                "category": "conv" if number < 2 else "detail",
                "context": f"A {color} square.",
                "domain": "warm" if color == "red" else "cold",
                "answer_type": 1,
                "background_text": "",
                "question_type": "short-answer",
                "id": f"validation_Art_{number}",
            }
            for number, color in enumerate(COLORS)
        ]
        return Dataset.from_list(rows)

    @staticmethod
    def doc_to_text(doc):
        return doc["input_text"]

    @staticmethod
    def doc_to_visual(doc):
        return [Image.new("RGB", (32, 16), doc["color"])]

    @staticmethod
    def doc_to_id(doc):
        return doc["question_id"]

    @staticmethod
    def doc_to_answer(doc):
        return doc["answer"]


class Length(Scorer):
    """Characters of the answer."""

    def score(self, refs, preds):
        return [len(pred) for pred in preds]

    def aggregate(self, scores):
        return AggregateOutput(sum(scores) / len(scores), {})


class Broken(Colors):
    def _prepare_dataset(self):
        raise FileNotFoundError("Dataset not found. Please prepare it.")


class Deadly(Colors):
    def _prepare_dataset(self):
        os._exit(3)


TASKS = {"colors": Colors, "broken": Broken, "deadly": Deadly}
SCORERS = {"length": Length}
