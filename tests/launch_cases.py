"""Helpers of the launch targets' tests: a repository to launch from, and a job that needs no NeMo."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import os
import subprocess
import tarfile
import zlib
from pathlib import Path

import nemo_run as run
from config_cases import commands_in, compose

from vlmsft.config_files import root
from vlmsft.recipe import translate
from vlmsft.runtime import job

TARGETS = sorted(path.stem for path in (root() / "launch").glob("*.yaml"))
SENTINELS = {
    "WANDB_API_KEY": "5entinel0wandb0000000000000000000000000f",
    "HF_TOKEN": "hf_5entinelHuggingFaceAAAAAAAAAAAA",
    "HUGGING_FACE_HUB_TOKEN": "hf_5entinelHubBBBBBBBBBBBBBBBBBBBB",
    "DGXCLOUD_CLIENT_SECRET": "5entinel-dgxcloud-secret",
}
"""Tokens in the environment that is launched from; none may be written anywhere."""
KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
users: [{name: u, user: {}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
"""


def make_repository(folder: Path) -> Path:
    """A git repository with one commit."""
    folder.mkdir()
    (folder / "code.py").write_text("x = 1\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "code"]):
        subprocess.run([*git, *arguments], cwd=folder, check=True)
    return folder


@functools.cache
def command_of(target: str) -> tuple[str, ...]:
    """The overrides of the first command in the target's header."""
    return tuple(commands_in((root() / "launch" / f"{target}.yaml").read_text())[0][1])


def made_job(
    target: str, run_dir: Path, *overrides: str, function: str = "write_rank"
) -> tuple[job.Job, run.Config | None]:
    """A job of job_toys, and the executor of the target's own command, with the run folder elsewhere.

    executor: None for launch=local
    """
    import job_toys

    run_dir.mkdir(parents=True, exist_ok=True)
    given = [override for override in command_of(target) if not override.startswith("run_dir=")]
    cfg = compose(*given, f"run_dir={run_dir}", "name=toys", "id=one", *overrides)
    recipe = run.Partial(getattr(job_toys, function), folder=str(run_dir))
    return job.Job(recipe, str(run_dir), "toys", "one"), translate(cfg.launch)["executor"]


def files_with(texts: list[str], *folders: Path) -> list[str]:
    """Files below the folders that hold one of the texts: in clear, in NeMo-Run's packed form or in an archive."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        content = b"\n".join(_contents(path.read_bytes()))
        found += [f"{path}: {text}" for text in texts if text.encode() in content]
    return found


def _contents(raw: bytes) -> list[bytes]:
    contents = [raw]
    for word in raw.split():
        with contextlib.suppress(ValueError, zlib.error):
            contents.append(zlib.decompress(base64.urlsafe_b64decode(word)))
    with contextlib.suppress(tarfile.TarError, EOFError, OSError), tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        contents += [archive.extractfile(member).read() for member in archive if member.isfile()]  # type: ignore[union-attr]
    return contents


def normalised(text: str, replacements: dict[str, str]) -> str:
    """The text without what differs from machine to machine; longest first."""
    for found in sorted(replacements, key=len, reverse=True):
        text = text.replace(found, replacements[found])
    return text


def environment_bin() -> str:
    import sys

    return os.path.dirname(sys.executable)
