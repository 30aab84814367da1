"""What a run folder says about where its numbers come from, and what it must never say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlmsft.config_files import root
from vlmsft.errors import UserError
from vlmsft.runtime import provenance
from vlmsft.runtime.provenance import (
    Scrubber,
    code_state,
    data_fingerprint,
    file_fingerprint,
    image_names,
    write_run_folder,
)

CONFIG = "name: demo\noptim:\n  max_lr: 0.001\n  betas: [0.9, 0.95]\ntrainer: {max_steps: 10}\n"
# built here, so that no scanner takes this file's text for a leaked key
HF_KEY = "hf_" + "Ab1" * 10
WANDB_KEY = "0123456789" * 4


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = tmp_path / "repository"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "a.py").write_text("x = 1\n")
    (folder / ".gitignore").write_text("ignored.py\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def everything_in(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.rglob("*")) if path.is_file())


# ----------------------------------------------------------------------------------------------------------- folder


def test_first_start(tmp_path):
    run = write_run_folder(tmp_path / "run", CONFIG, ["optim.max_lr=0.001"], command=["train", "optim.max_lr=0.001"])
    assert (run.path, run.resume_number, run.config_changes) == (tmp_path / "run", 0, {})
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == yaml.safe_load(CONFIG)
    assert yaml.safe_load((run.path / "overrides.yaml").read_text()) == ["optim.max_lr=0.001"]
    saved = json.loads((run.path / "provenance.json").read_text())
    assert saved["command"] == ["train", "optim.max_lr=0.001"]
    assert saved["packages"]["hydra-core"] == "1.3.2"
    assert saved["packages"]["cuda"] not in ("unknown", "not installed", ""), "read from torch/version.py"
    assert saved["machine"]["host"]


def test_later_starts_add_and_never_overwrite(tmp_path):
    write_run_folder(tmp_path, CONFIG, [])
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = CONFIG.replace("0.001", "0.002").replace("max_steps: 10", "devices: 2") + "seed: 7\n"
    second = write_run_folder(tmp_path, changed, ["seed=7"])
    third = write_run_folder(tmp_path, CONFIG, [])

    assert {path: path.read_bytes() for path in first} == first
    assert (second.path.name, third.path.name) == ("resume-1", "resume-2")
    assert second.config_changes == {
        "optim.max_lr": (0.001, 0.002),
        "trainer.max_steps": (10, None),
        "trainer.devices": (None, 2),
        "seed": (None, 7),
    }
    assert third.config_changes == {}, "compared with the first start, not with the one before"
    saved = json.loads((second.path / "provenance.json").read_text())
    assert saved["resume_number"] == 1
    assert saved["config_changes"]["optim.max_lr"] == {"first": 0.001, "now": 0.002}


def test_imports_neither_torch_nor_nemo(tmp_path):
    code = (
        "import sys; from vlmsft.runtime.provenance import write_run_folder;"
        f"write_run_folder({str(tmp_path)!r}, 'a: 1', []);"
        "print([name for name in ('torch', 'nemo', 'lightning') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------- code


def test_clean_repository(repository):
    state, patch = code_state(repository / "code")
    assert state == {"commit": git(repository, "rev-parse", "HEAD").strip(), "dirty": False}
    assert patch == ""


def test_a_change_between_two_starts_of_a_process_is_recorded(repository, tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    write_run_folder(first, CONFIG, [], code_dir=repository / "code")
    (repository / "code" / "a.py").write_text("x = 3\n")
    write_run_folder(second, CONFIG, [], code_dir=repository / "code")
    assert not (first / "diff.patch").exists() and "+x = 3" in (second / "diff.patch").read_text()


def test_patch_rebuilds_the_working_tree(repository, tmp_path):
    (repository / "code" / "a.py").write_text("x = 2\n")
    (repository / "code" / "new file.py").write_text("y = 'ü'\n")
    (repository / "staged.yaml").write_text("z: 1\n")
    git(repository, "add", "staged.yaml")
    (repository / "ignored.py").write_text("no\n")
    (repository / "photo.jpg").write_bytes(b"\xff\xd8")
    (repository / ".env").write_text("no\n")
    (repository / "huge.py").write_text("#" * 300_000)
    index = (repository / ".git" / "index").read_bytes()

    state, patch = code_state(repository / "code")

    assert state["dirty"] is True
    assert sorted(state["untracked_not_in_patch"]) == [
        ".env (may hold a secret)",
        "huge.py (300000 bytes)",
        "photo.jpg (not code)",
    ]
    assert (repository / ".git" / "index").read_bytes() == index, "the user's index stays as it is"
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(repository), str(clone))
    (tmp_path / "diff.patch").write_text(patch)
    git(clone, "apply", str(tmp_path / "diff.patch"))
    assert (clone / "code" / "a.py").read_text() == "x = 2\n"
    assert (clone / "code" / "new file.py").read_text() == "y = 'ü'\n"
    assert (clone / "staged.yaml").read_text() == "z: 1\n"


def test_large_patch_is_cut_and_says_so(repository, monkeypatch):
    monkeypatch.setattr(provenance, "MAX_DIFF_BYTES", 1000)
    (repository / "code" / "a.py").write_text("".join(f"x = {i}\n" for i in range(1000)))
    state, patch = code_state(repository / "code")
    assert len(patch) < 1100 and "# cut here: the whole patch has" in patch
    assert state["patch_cut"].startswith("diff.patch holds the first 1000 of ")


def test_outside_git(tmp_path):
    state, patch = code_state(tmp_path)
    assert (state["commit"], state["dirty"], patch) == ("unknown", "unknown", "")
    assert "not a git repository" in state["reason"]


def test_installed_into_an_environment_inside_a_foreign_repository(repository):
    installed = repository / "venv" / "vlmsft"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    state, patch = code_state(installed)
    assert (state["commit"], patch) == ("unknown", ""), "the commit of somebody's project says nothing about our code"
    assert state["reason"] == "git does not track vlmsft"


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_state(tmp_path)[0]["reason"] == "git is not installed"
    write_run_folder(tmp_path / "run", CONFIG, [])


# ---------------------------------------------------------------------------------------------------------- secrets


def test_no_secret_in_any_file(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("OPENAI_TOKEN", "an-odd-secret-value")
    (repository / "code" / "b.py").write_text(f"key = '{HF_KEY}'\nother = 'an-odd-secret-value'\n")
    config = yaml.safe_dump(
        {
            "judge": {"api_key": "plain-secret-1", "url": "https://me:plain-secret-2@example.org/x"},
            "hub": {"token": "plain-secret-3", "nested": [{"password": "plain-secret-4"}]},
            "log": {"note": f"from the environment: {WANDB_KEY}"},
        }
    )
    overrides = ["+judge.api_key=plain-secret-1", f"log.note={WANDB_KEY}", "hub.token=plain-secret-3"]
    for _ in range(2):
        write_run_folder(tmp_path / "run", config, overrides, command=["train", *overrides], code_dir=repository)
    text = everything_in(tmp_path / "run")
    # NeMo would write both with what the command line and `git diff` hold; it leaves them alone where they are there
    assert (tmp_path / "run" / "cmd-args.log").exists() and (tmp_path / "run" / "git-info.log").exists()
    for secret in (WANDB_KEY, HF_KEY, "an-odd-secret-value", "plain-secret"):
        assert secret not in text, secret
    assert "https://<hidden>@example.org/x" in text
    assert "+judge.api_key=<hidden>" in text
    assert "key = '<hidden>'" in (tmp_path / "run" / "diff.patch").read_text()


def test_what_only_looks_like_a_secret_stays():
    config = {
        "pad_token": "<|finetune_right_pad_id|>",
        "image_token": "<|image|>",
        "tokenizer": "models/tokenizer",
        "num_tokens": "12",
        "decoder_seq_length": 2048,
        "key": "value",
        "monitor": "val_loss",
        "token": "",
    }
    assert Scrubber().tree(config) == config
    assert Scrubber().override("optim.max_lr=1e-5") == "optim.max_lr=1e-5"


def test_short_environment_values_and_paths_are_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", "1")
    monkeypatch.setenv("GIT_TOKEN_FOLDER", str(tmp_path))
    assert Scrubber.from_environment().text(f"step 1 in {tmp_path}") == f"step 1 in {tmp_path}"


# ------------------------------------------------------------------------------------------------------------- data


def record(*images: str, key: str = "image", text: str = "") -> dict:
    """LLaVA's form; one image stands by itself, several in a list."""
    turns = [{"from": "human", "value": "<image>" * len(images) + f"{text}?"}, {"from": "gpt", "value": "!"}]
    return {key: images[0] if len(images) == 1 else list(images), "conversations": turns}


@pytest.fixture
def dataset(tmp_path) -> Path:
    folder = tmp_path / "here"
    (folder / "images" / "sub").mkdir(parents=True)
    for name, size in (("a.jpg", 10), ("sub/b.jpg", 20), ("not-named.jpg", 5)):
        (folder / "images" / name).write_bytes(b"x" * size)
    records = [record("a.jpg"), record("a.jpg", "sub/b.jpg"), record(text="no image")]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    (folder / "val.json").write_text(json.dumps([record("gone.jpg")]) + "\n")
    return folder


def fingerprint(folder: Path) -> dict:
    return data_fingerprint([folder / "train.jsonl", folder / "val.json"], folder / "images")


def test_fingerprint_counts(dataset):
    result = fingerprint(dataset)
    train = result["files"][str(dataset / "train.jsonl")]
    assert (train["bytes"], train["lines"]) == ((dataset / "train.jsonl").stat().st_size, 3)
    images = result["images"]
    assert (images["files"], images["missing"], images["bytes"]) == (3, 1, 30), "only what the records name"


def test_fingerprint_is_the_same_elsewhere_and_sees_changes(dataset, tmp_path):
    def hashes(folder):
        result = fingerprint(folder)
        return [entry["sha256"] for entry in result["files"].values()], result["images"]["sha256_of_names_and_sizes"]

    files, images = hashes(dataset)
    shutil.copytree(dataset, tmp_path / "there")
    assert hashes(tmp_path / "there") == (files, images)
    (dataset / "images" / "not-named.jpg").write_bytes(b"")
    assert hashes(dataset)[1] == images
    (dataset / "images" / "a.jpg").write_bytes(b"x" * 11)
    assert hashes(dataset)[1] != images
    (dataset / "train.jsonl").write_text((dataset / "train.jsonl").read_text().replace("no image", "No image"))
    assert hashes(dataset)[0] != files


def test_missing_and_broken_files_do_not_stop_a_start(dataset):
    assert file_fingerprint(dataset / "gone.jsonl") == {"missing": True}
    (dataset / "train.jsonl").write_text(json.dumps(record("a.jpg")) + '\n{broken\n[1]\n{"image": "no turns.jpg"}\n')
    (dataset / "val.json").write_text("[broken")
    assert fingerprint(dataset)["images"]["files"] == 1


def test_images_of_all_forms_of_records_are_found(tmp_path):
    parts = [{"type": "image", "path": "part.jpg"}, {"type": "text", "text": "?"}]
    messages = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "!"}]}
    records = [record("one.jpg"), record("list-1.jpg", "list-2.jpg", key="images"), messages]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(one) for one in records))
    assert list(image_names(tmp_path / "records.jsonl")) == ["one.jpg", "list-1.jpg", "list-2.jpg", "part.jpg"]


def test_a_launcher_can_import_it_without_torch():
    code = "import sys, vlmsft.runtime.provenance; sys.exit(any(m in sys.modules for m in ('torch', 'nemo', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root())}).returncode == 0


def test_fingerprint_of_a_folder_of_shards(dataset):
    result = file_fingerprint(dataset / "images")
    assert (result["files"], result["missing"], result["bytes"]) == (3, 0, 35)


def test_fingerprint_of_shards_with_metadata(tmp_path):
    """Metadata and indices by content, wherever the folder lies; its other files don't matter."""
    for name in ("one", "two"):
        (tmp_path / name / "shards" / ".nv-meta").mkdir(parents=True)
        (tmp_path / name / "shards" / ".nv-meta" / "split.yaml").write_text("split_parts: {}")
        (tmp_path / name / "shards" / "train-00000.tar").write_text("tar")
        (tmp_path / name / "shards" / "train-00000.tar.idx").write_text("index")
    (tmp_path / "two" / "notes.txt").write_text("x")

    def fingerprint(name):
        (found,) = data_fingerprint([tmp_path / name], None)["files"].values()
        return found

    assert fingerprint("one") == fingerprint("two") and fingerprint("one")["files"] == 1
    (tmp_path / "two" / "shards" / "train-00000.tar.idx").write_text("other")
    assert fingerprint("one") != fingerprint("two")


def test_fingerprint_of_files_with_image_folders_of_their_own(dataset):
    files = [str(dataset / "train.jsonl"), str(dataset / "val.json")]
    shared = data_fingerprint(files, str(dataset / "images"))
    assert data_fingerprint(files, dict.fromkeys(files, str(dataset / "images"))) == shared
    apart = data_fingerprint(files, {files[0]: str(dataset / "images"), files[1]: str(dataset)})
    assert [images["folder"] for images in apart["images"]] == [str(dataset / "images"), str(dataset)]
    assert "images" not in data_fingerprint(files, dict.fromkeys(files))


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError) as error:
        write_run_folder(tmp_path / "run", CONFIG, [])
    (problem,) = error.value.problems
    assert problem.where == "run_dir" and "File exists" in problem.found
