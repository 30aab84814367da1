"""Every answer beside the others in one HTML file that needs no other and asks no network for anything.

Cards are drawn as one scrolls, from JSON in the page, so that thousands of questions stay usable; what models wrote
becomes text there, never markup, and the page's own policy lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from vlmsft.data.records import IMAGE_MARKER
from vlmsft.evaluation.store import Answer, Sample, Score, Store

FOLDER = Path(__file__).parent
PICTURE_BYTES = 32_000_000
"""Of all pictures together; base64 makes 43 MB of it. Browsers open such a file in a second or two."""
SIDES = ((14_000, 320), (6_000, 200), (0, 120))
"""(bytes that each picture may have, the longer side in pixels): many pictures are smaller ones."""
REASON_CHARACTERS = 400


def html(manifest: Mapping[str, Any], store: Store, picture_bytes: int = PICTURE_BYTES) -> str:
    """The whole page.

    picture_bytes: of all pictures together; the page says how many it had no room for
    """
    import jinja2

    samples = {task: store.samples(task) for task in manifest["tasks"]}
    paths = {name: store.folder / name for of_task in samples.values() for sample in of_task for name in sample.images}
    pictures, notes = _pictures(paths, picture_bytes)
    data = _data(manifest, store, samples, {name: index for index, name in enumerate(pictures)})
    style, script = ((FOLDER / f"gallery.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((FOLDER / "gallery.html.j2").read_text(encoding="utf-8")).render(
        id=manifest["id"],
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=_inside_script(data),
        pictures=_inside_script(list(pictures.values())),
        notes=notes,
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _inside_script(value: Any) -> str:
    """JSON in which nothing ends the script element or opens a comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


# --- questions and answers --------------------------------------------------------------------------------------------


def _data(
    manifest: Mapping[str, Any], store: Store, samples: Mapping[str, Sequence[Sample]], pictures: Mapping[str, int]
) -> dict[str, Any]:
    """What gallery.js reads; the base is its first model."""
    base = manifest["base"]
    models = [base, *(name for name in manifest["models"] if name != base)]
    scores: dict[tuple[str, str, str, int], list[Score]] = {}
    metrics: dict[str, dict[str, None]] = {task: {} for task in samples}
    for score in store.scores():
        scores.setdefault((score.model, score.task, score.id, score.repeat), []).append(score)
        if score.task in metrics:
            metrics[score.task][score.metric] = None
    cards = []
    for task, of_task in samples.items():
        answers = {model: store.answers(model, task) for model in models}
        for sample in of_task:
            given = [
                [
                    _answer(answers[model].get((sample.id, repeat)), scores.get((model, task, sample.id, repeat), ()))
                    for repeat in range(manifest["repeats"])
                ]
                for model in models
            ]
            cards.append({"task": task, **_question(sample, pictures), "answers": given})
    return {"models": models, "metrics": {task: list(names) for task, names in metrics.items()}, "cards": cards}


def _question(sample: Sample, pictures: Mapping[str, int]) -> dict[str, Any]:
    turns = sample.turns[:-1]
    earlier = "".join(f"{turn['role']}: {turn['text']}\n\n" for turn in turns)
    return {
        "id": sample.id,
        "question": f"{earlier}{sample.prompt}".replace(IMAGE_MARKER, "").strip(),
        "references": list(sample.references),
        "pictures": [pictures[name] for name in sample.images if name in pictures],
        "num_pictures": len(sample.images),
    }


def _answer(answer: Answer | None, scores: Iterable[Score]) -> dict[str, Any]:
    """scores: {metric: [score or null, what it is relative to or null, reason]}"""
    found = {score.metric: [score.score, score.out_of, (score.reason or "")[:REASON_CHARACTERS]] for score in scores}
    text = None if answer is None else answer.answer
    error = "not asked" if answer is None else answer.error
    is_cut = answer is not None and answer.finish_reason == "length"
    return {"text": text, "error": error, "cut": is_cut, "scores": found}


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(paths: Mapping[str, Path], budget: int) -> tuple[dict[str, str], list[str]]:
    """{name: base64 of a small JPEG} of what can be read and has room, and what is to be said of the others."""
    each = budget / max(1, len(paths))
    side = next(side for least, side in SIDES if each >= least)
    found: dict[str, str] = {}
    unreadable = without_room = used = 0
    with ThreadPoolExecutor() as pool:
        for name, picture in zip(paths, pool.map(lambda path: thumbnail(path, side), paths.values()), strict=True):
            if picture is None:
                unreadable += 1
            elif used + len(picture) > budget:
                without_room += 1
            else:
                used += len(picture)
                found[name] = base64.b64encode(picture).decode()
    return found, list(_picture_notes(unreadable, without_room))


def _picture_notes(unreadable: int, without_room: int) -> Iterator[str]:
    if unreadable:
        yield f"{unreadable} picture{'s' if unreadable > 1 else ''} can't be read any more"
    if without_room:
        yield f"{without_room} picture{'s' if without_room > 1 else ''} left out: the file would become too large"


def thumbnail(path: Path, side: int) -> bytes | None:
    """A JPEG whose longer side has at most `side` pixels; None where nothing can be decoded."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))
            image.thumbnail((side, side))
            out = io.BytesIO()
            _on_white(ImageOps.exif_transpose(image)).save(out, "JPEG", quality=75)
            return out.getvalue()
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        return None


def _on_white(image: Image.Image) -> Image.Image:
    """Diagrams with a transparent ground have black lines."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return ground.convert("RGB")
