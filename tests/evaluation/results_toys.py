"""An evaluation's folder as evaluate leaves it, without asking anything."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vlmsft.evaluation.store import Answer, Sample, Score, Store

MODELS = ("base", "sft", "sft_energon")
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def manifest(models=MODELS, tasks=("heron", "vqa"), repeats=1, **more):
    facts = {"engine": "vlmsft builtin", "engine_version": "0.1.0", "transformers": "4.57.6", "dtype": "bfloat16"}
    judge = {"base_url": "http://judge", "model": "gpt-4o", "temperature": 0.0, "max_tokens": 1024, "seed": 0}
    return {
        "id": "0123456789ab",
        "base": "base",
        "generation": {"max_new_tokens": 1024, "temperature": 0.0, "top_p": 1.0, "seed": 1234, "stop": []},
        "limit": None,
        "repeats": repeats,
        "tasks": {task: {"judge": judge if task == "heron" else None} for task in tasks},
        "models": {model: facts for model in models},
        "code": {"answers": "a", "scores": "b", "commit": "c", "dirty": False},
        **more,
    }


def make(folder: Path, num: int = 12, repeats: int = 1, num_pictures: int = 3, side: int = 400, **more) -> Store:
    """num questions of each task; sft is better than base by 10 of 100, sft_energon's are missing for two questions."""
    store = Store(folder)
    generator = np.random.default_rng(0)
    paths = [picture(folder / f"{index}.jpg", index, side) for index in range(num_pictures)]
    given = manifest(repeats=repeats, **more)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(given))
    scores = []
    for task in given["tasks"]:
        samples = [
            Sample(
                id=f"{task}-{index}",
                prompt=f"<image>質問 {index}: 何が写っていますか?",
                images=(str(paths[index % num_pictures]),),
                references=(f"正解 {index}",),
                turns=({"role": "user", "text": f"<image>質問 {index}: 何が写っていますか?"},),
            )
            for index in range(num)
        ]
        store.write_samples(task, samples)
        for model in given["models"]:
            for index, sample in enumerate(samples):
                for repeat in range(repeats):
                    has_none = model == "sft_energon" and index < 2
                    text = HOSTILE if index == 3 else f"{model} の答え {index} " + "とても長い答え。" * (index % 5 * 20)
                    error = "APITimeoutError: Request timed out." if has_none else None
                    finish = "length" if index == 5 else "stop"
                    store.add_answer(
                        model, task, Answer(sample.id, repeat, None if has_none else text, error, 0.5, finish, 10)
                    )
                    plain = float(generator.integers(0, 90)) + 10 * (model == "sft")
                    reason = f"no answer: {error}" if has_none else None
                    scores.append(Score(model, task, sample.id, repeat, "rougel", None if has_none else plain, reason))
                    if task == "heron":
                        points = None if has_none or index == 7 else 3.0 + (model != "base") * (index % 3)
                        of = None if points is None else 8.0
                        reason = "no verdict in the judge's reply: 'I can't'" if points is None else '{"score": 3}'
                        group = ("conv", "detail", "complex")[index % 3]
                        scores.append(Score(model, task, sample.id, repeat, "heron-bench", points, reason, of, group))
    store.write_scores(scores)
    return store


def picture(path: Path, seed: int, side: int) -> Path:
    """Noise over a gradient: about as many bytes as a photograph's thumbnail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, side)[None, :, None] + np.zeros((side, 1, 3)) + [0, 20, 40]
    noise = generator.normal(0, 12, (side, side, 3))
    Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)).save(path, quality=85)
    return path
