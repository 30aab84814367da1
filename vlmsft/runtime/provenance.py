"""What a run folder says about where its numbers come from: config, code, packages, machine and data.

    runs/<name>/<id>/config.yaml      the resolved config
                     overrides.yaml   what the command line changed
                     provenance.json  code version, packages, machine, command, data fingerprint
                     diff.patch       changes that were not committed, new files included (`git apply` takes it)
                     resume-1/        the same four for the first later start in this folder, and so on

Nothing here imports torch or NeMo, so a launcher can call it. Only one process (global rank 0) may.

No secret reaches a file: see `Scrubber`. The environment is never written.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmsft import yaml_text
from vlmsft.data.records import RecordFile, parse
from vlmsft.errors import Problem, UserError

PACKAGES = (
    "vlmsft",
    "torch",
    "torchvision",
    "nemo_toolkit",
    "nemo_run",
    "megatron-core",
    "megatron-energon",
    "transformer-engine",
    "lightning",
    "transformers",
    "hydra-core",
    "omegaconf",
    "numpy",
    "pillow",
    "wandb",
)
CODE_SUFFIXES = {".py", ".pyi", ".yaml", ".yml", ".toml", ".sh", ".cfg", ".ini", ".md", ".js", ".css", ".html"}
MAX_UNTRACKED_FILE_BYTES = 256 * 1024
MAX_DIFF_BYTES = 4 * 1024 * 1024
MASK = "<hidden>"


@dataclass(frozen=True)
class RunFolder:
    """What `write_run_folder` wrote.

    path: the folder of this start's files: the run folder itself, or its resume-N
    resume_number: 0 for the first start, N for resume-N
    config_changes: key -> (value of the first start, value now); None stands for a key that is not there
    """

    path: Path
    resume_number: int
    config_changes: dict[str, tuple[Any, Any]]


def write_run_folder(
    run_dir: str | os.PathLike[str],
    config_yaml: str,
    overrides: Sequence[str],
    data_files: Sequence[str | os.PathLike[str]] = (),
    image_folder: str | os.PathLike[str] | Mapping[str, str | None] | None = None,
    command: Sequence[str] | None = None,
    code_dir: str | os.PathLike[str] | None = None,
) -> RunFolder:
    """Write this start's files; a later start in the same folder adds resume-N and never touches an earlier file.

    config_yaml: the resolved config as YAML text
    overrides: the command line's overrides, `key=value` each
    data_files: record files (JSON, JSONL) or folders (energon) to fingerprint; missing ones are named as such
    image_folder: where the records' images lie, or a mapping that says it for each data file; None where the data files
        hold their images themselves
    command: the command line; sys.argv where None
    code_dir: a folder of the code whose git state is kept; this package's folder where None
    """
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = f"{str(run_dir)!r}, where none can be made: {error.strerror}"
        raise UserError(Problem("run_dir", found, "a folder that exists or can be made")) from error
    scrubber = Scrubber.from_environment()
    folder, number = _next_folder(run_dir)
    config = scrubber.tree(yaml_text.load(config_yaml))
    changes = _changes_to_first(run_dir, config) if number else {}
    code, patch = _code_state_now(Path(code_dir) if code_dir else Path(__file__).resolve().parent)

    _write(folder / "config.yaml", yaml_text.dump(config))
    _write(folder / "overrides.yaml", yaml_text.dump([scrubber.override(override) for override in overrides]))
    if patch:
        _write(folder / "diff.patch", scrubber.text(patch))
    command = [scrubber.override(part) for part in (sys.argv if command is None else command)]
    if number == 0:
        _keep_nemo_from_writing(run_dir, command, code)
    provenance = {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "working_directory": os.getcwd(),
        "resume_number": number,
        "config_changes": {key: {"first": old, "now": new} for key, (old, new) in changes.items()},
        "code": code,
        "packages": package_versions(),
        "machine": machine(),
        "data": data_fingerprint(data_files, image_folder),
    }
    # last, and by rename: a folder with a provenance.json is complete
    _write(folder / "provenance.json", scrubber.text(json.dumps(provenance, indent=2, ensure_ascii=False)) + "\n")
    return RunFolder(folder, number, changes)


def _keep_nemo_from_writing(run_dir: Path, command: Sequence[str], code: Mapping[str, Any]) -> None:
    """NeMo's ModelCheckpoint writes the command line and `git diff` into these two with any secret in them.

    It leaves files alone that are there (nemo/lightning/pytorch/callbacks/model_checkpoint.py, on_train_start).
    """
    _write(run_dir / "cmd-args.log", " ".join(command))
    _write(
        run_dir / "git-info.log", f"commit hash: {code['commit']}\nuncommitted changes: diff.patch, if there were any\n"
    )


def _next_folder(run_dir: Path) -> tuple[Path, int]:
    if not (run_dir / "provenance.json").exists():
        return run_dir, 0
    number = 1
    while True:
        folder = run_dir / f"resume-{number}"
        try:
            folder.mkdir()
            return folder, number
        except FileExistsError:
            number += 1


def _changes_to_first(run_dir: Path, config: Any) -> dict[str, tuple[Any, Any]]:
    first = flatten(yaml_text.load((run_dir / "config.yaml").read_text(encoding="utf-8")))
    now = flatten(config)
    keys = [*first, *(key for key in now if key not in first)]
    return {key: (first.get(key), now.get(key)) for key in keys if first.get(key) != now.get(key)}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested mappings; a list is compared as one value, since its indices say little."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------- secrets


class Scrubber:
    """Hides secrets by three signs: the key's name, the value's format, and the value of a secret environment variable.

    A value that came in through `${oc.env:...}` stands in clear in a resolved config, hence the third.
    """

    _KEY = re.compile(r"(?i)(api_?key|access_?key|private_?key|secret|passw(or)?d|credentials?|(^|_|\.)token|bearer)$")
    # a tokenizer's special tokens are no secrets
    _TOKENIZER_KEY = re.compile(r"(?i)(pad|bos|eos|unk|sep|cls|mask|image|video|audio|special|stop|start|end)_token$")
    _ENVIRONMENT_NAME = re.compile(r"(?i)(key|token|secret|passw(or)?d|credential)")
    _FORMAT = re.compile(
        r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
        r"|nvapi-[\w-]{20,}|AKIA[A-Z0-9]{16}|wandb_v1_\w{20,}|(?<![A-Za-z0-9])local-[0-9a-f]{40}"
        r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    )
    _URL_LOGIN = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")

    def __init__(self, secret_values: Iterable[str] = ()):
        # short values ("1", "true") would blank innocent text
        self._values = sorted({value for value in secret_values if len(value) >= 8}, key=len, reverse=True)

    @classmethod
    def from_environment(cls) -> Scrubber:
        return cls(
            value
            for name, value in os.environ.items()
            if cls._ENVIRONMENT_NAME.search(name) and not os.path.exists(value)
        )

    @classmethod
    def is_secret_key(cls, key: str) -> bool:
        """Whether the last part of a dotted key names a secret."""
        last = key.rsplit(".", 1)[-1]
        return bool(cls._KEY.search(last)) and not cls._TOKENIZER_KEY.search(last)

    def text(self, text: str) -> str:
        """The text without the secrets that a value shows by itself."""
        for value in self._values:
            text = text.replace(value, MASK)
        return self._URL_LOGIN.sub(MASK, self._FORMAT.sub(MASK, text))

    def tree(self, node: Any, key: str = "") -> Any:
        """A copy of nested mappings and lists without secrets."""
        if isinstance(node, Mapping):
            return {name: self.tree(value, str(name)) for name, value in node.items()}
        if isinstance(node, list):
            return [self.tree(value, key) for value in node]
        if isinstance(node, str):
            return MASK if node and self.is_secret_key(key) else self.text(node)
        return node

    def override(self, override: str) -> str:
        """`key=value` without a secret value; other words as they are."""
        key, equals, value = override.partition("=")
        if equals and value and self.is_secret_key(key.lstrip("+~-")):
            return f"{key}={MASK}"
        return self.text(override)


# ------------------------------------------------------------------------------------------------------------- code


def _code_state_now(code_dir: Path) -> tuple[dict[str, Any], str]:
    """code_state, asked for anew only where a file of the code has changed: a sweep's launcher keeps many records."""
    changed = [path.stat().st_mtime_ns for path in code_dir.rglob("*.py")]
    return _code_state_of(code_dir, len(changed), max(changed, default=0))


@functools.lru_cache(maxsize=1)
def _code_state_of(code_dir: Path, num_files: int, last_changed: int) -> tuple[dict[str, Any], str]:
    return code_state(code_dir)


def code_state(code_dir: Path) -> tuple[dict[str, Any], str]:
    """Git commit of the repository that tracks `code_dir`, and its uncommitted changes as a patch ("" if none).

    Outside git, or where git doesn't track the code (a wheel in some project's venv), the commit is that of a
    `pip install git+https://...` if it was one, else "unknown" with the reason.
    """
    try:
        top = Path(_git(code_dir, "rev-parse", "--show-toplevel").strip())
        if not _git(code_dir, "ls-files", "--", ".").strip():
            return _installed_code_state(f"git does not track {code_dir.name}"), ""
        commit = _git(top, "rev-parse", "HEAD").strip()
        status = _git(top, "status", "--porcelain", "--untracked-files=all", "-z")
        untracked = [entry[3:] for entry in status.split("\0") if entry.startswith("?? ")]
        kept, left_out = _choose_untracked(top, untracked)
        patch, cut_at = _bounded(_diff(top, kept))
    except (OSError, subprocess.SubprocessError) as error:
        return _installed_code_state(_reason(error)), ""
    state: dict[str, Any] = {"commit": commit, "dirty": bool(status.strip("\0"))}
    if left_out:
        state["untracked_not_in_patch"] = left_out
    if cut_at:
        state["patch_cut"] = f"diff.patch holds the first {MAX_DIFF_BYTES} of {cut_at} bytes"
    return state, patch


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "git is not installed"
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr or str(error)).strip().splitlines()[0]
    return str(error)


def _git(directory: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    return subprocess.run(
        ["git", "-C", str(directory), *arguments],
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=60,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", **(environment or {})},
    ).stdout


def _installed_code_state(reason: str) -> dict[str, Any]:
    state: dict[str, Any] = {"commit": "unknown", "dirty": "unknown", "reason": reason}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, json.JSONDecodeError):
        # PEP 610: how pip got the package
        origin = json.loads(importlib.metadata.distribution("vlmsft").read_text("direct_url.json") or "{}")
        if "vcs_info" in origin:
            state["commit"] = origin["vcs_info"]["commit_id"]
            state["dirty"] = False
    return state


def _choose_untracked(top: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """New files that are code and small; the others are named with the reason."""
    kept, left_out = [], []
    for name in names:
        path = top / name
        if re.search(r"(?i)(^|/)\.env|secret|credential|\.pem$|\.key$|netrc", name):
            left_out.append(f"{name} (may hold a secret)")
        elif path.suffix not in CODE_SUFFIXES:
            left_out.append(f"{name} (not code)")
        elif path.is_symlink() or not path.is_file():
            left_out.append(f"{name} (not a plain file)")
        elif path.stat().st_size > MAX_UNTRACKED_FILE_BYTES:
            left_out.append(f"{name} ({path.stat().st_size} bytes)")
        else:
            kept.append(name)
    if len(left_out) > 50:
        left_out = [*left_out[:50], f"and {len(left_out) - 50} more"]
    return kept, left_out


def _diff(top: Path, untracked: Sequence[str]) -> str:
    """`git diff HEAD` with the untracked files as new ones, through a copy of the index: the user's stays as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        index = Path(scratch) / "index"
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(
                Path(_git(top, "rev-parse", "--absolute-git-dir").strip()) / "index", index
            )  # git looks at its mtime
        environment = {"GIT_INDEX_FILE": str(index)}
        for start in range(0, len(untracked), 100):
            names = [f":(literal){name}" for name in untracked[start : start + 100]]
            _git(top, "add", "--intent-to-add", "--", *names, environment=environment)
        return _git(top, "diff", "HEAD", "--no-ext-diff", "--no-color", environment=environment)


def _bounded(patch: str) -> tuple[str, int]:
    """The patch, or its beginning and its full size in bytes where it is too large."""
    data = patch.encode("utf-8")
    if len(data) <= MAX_DIFF_BYTES:
        return patch, 0
    start = data[:MAX_DIFF_BYTES].decode("utf-8", errors="ignore")
    return f"{start}\n# cut here: the whole patch has {len(data)} bytes\n", len(data)


# --------------------------------------------------------------------------------------------------------- machine


@functools.cache
def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["cuda"] = _torch_cuda_version()
    return versions


def _torch_cuda_version() -> str:
    """The CUDA version that torch was built for, read from its version.py: importing torch would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "not installed"
    version_file = Path(next(iter(spec.submodule_search_locations))) / "version.py"
    match = re.search(r"^cuda(?:: [^=]+)? = (.+)$", version_file.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1).strip("'\"") if match else "unknown"


@functools.cache
def machine() -> dict[str, Any]:
    return {"host": socket.gethostname(), "platform": platform.platform(), "cpus": os.cpu_count(), "gpus": _gpus()}


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return [f"unknown: {error}"]


# ------------------------------------------------------------------------------------------------------------ data


def data_fingerprint(
    data_files: Sequence[str | os.PathLike[str]], image_folder: str | os.PathLike[str] | Mapping[str, str | None] | None
) -> dict[str, Any]:
    """Content hash of each record file, and a hash over names and sizes of the images that they name; of a folder of
    shards the content hash of its metadata and indices, and a hash over names and sizes of the shards.

    image_folder: of all files, or of each; where there are several, `images` is a list

    Images are not read: 118,000 of them would take minutes. The hash knows their relative names and sizes only, so it
    is the same wherever the folder lies; an image replaced by one of the same size goes unnoticed.
    """
    fingerprint: dict[str, Any] = {"files": {os.fspath(path): file_fingerprint(path) for path in data_files}}
    by_folder: dict[str, set[str]] = {}
    for path in data_files:
        folder = image_folder.get(os.fspath(path)) if isinstance(image_folder, Mapping) else image_folder
        if folder is not None:
            names = by_folder.setdefault(os.fspath(folder), set())
            names.update(image_names(path) if os.path.isfile(path) else ())
    images = [{"folder": f, **name_size_fingerprint(f, sorted(names))} for f, names in by_folder.items()]
    if images:
        fingerprint["images"] = images[0] if len(images) == 1 else images
    return fingerprint


def file_fingerprint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """sha256, bytes and lines of a file; names and sizes for a folder."""
    if os.path.isdir(path):
        root = Path(path)
        for shards in (root, root / "shards"):
            if (shards / ".nv-meta").is_dir():
                return _shards_fingerprint(shards)
        names = sorted(entry.relative_to(root).as_posix() for entry in root.rglob("*") if entry.is_file())
        return name_size_fingerprint(root, names)
    if not os.path.exists(path):
        return {"missing": True}
    digest, size, lines, last = hashlib.sha256(), 0, 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return {"sha256": digest.hexdigest(), "bytes": size, "lines": lines + (last != b"\n")}


def _shards_fingerprint(folder: Path) -> dict[str, Any]:
    """Energon's metadata and indices by content, shards by name and size: they may be terabytes."""
    metadata = sorted([*(folder / ".nv-meta").iterdir(), *folder.glob("*.tar.idx")])
    digest = hashlib.sha256()
    for path in metadata:
        digest.update(f"{path.relative_to(folder).as_posix()}\t{path.stat().st_size}\n".encode() + path.read_bytes())
    shards = sorted(path.name for path in folder.glob("*.tar"))
    return {"sha256_of_metadata": digest.hexdigest(), **name_size_fingerprint(folder, shards)}


def name_size_fingerprint(folder: str | os.PathLike[str], names: Sequence[str]) -> dict[str, Any]:
    """Number of files, bytes, and sha256 over "name<TAB>size" lines in the names' order; size -1 for a missing file."""
    root = os.fspath(folder)
    parts = [names[start : start + 1024] for start in range(0, len(names), 1024)]
    with ThreadPoolExecutor(16) as pool:  # on a network file system, waiting for stat is all there is
        sizes = [size for part in pool.map(lambda part: _sizes(root, part), parts) for size in part]
    digest = hashlib.sha256()
    for name, size in zip(names, sizes, strict=True):
        digest.update(f"{name}\t{size}\n".encode("utf-8", "surrogateescape"))
    return {
        "files": len(names),
        "missing": sizes.count(-1),
        "bytes": sum(size for size in sizes if size >= 0),
        "sha256_of_names_and_sizes": digest.hexdigest(),
    }


def _sizes(root: str, names: Sequence[str]) -> list[int]:
    sizes = []
    for name in names:
        try:
            sizes.append(os.stat(os.path.join(root, name)).st_size)
        except OSError:
            sizes.append(-1)
    return sizes


def image_names(path: str | os.PathLike[str]) -> Iterator[str]:
    """The images that the records of a JSON or JSONL file name, as vlmsft.data.records understands them.

    Records and files that can't be understood are passed over here: naming them is the data module's task.
    """
    with contextlib.suppress(UserError):
        records = RecordFile(path)
        for index in range(len(records)):
            with contextlib.suppress(UserError):
                yield from parse(records[index]).images
