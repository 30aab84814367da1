"""W&B's own files on this machine, read without its server: what an offline run holds, and how to upload it.

Imports neither torch nor Lightning, and `wandb` itself only where there is a file to read.
"""

from __future__ import annotations

import json
import netrc
import os
import shlex
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_HOST = "api.wandb.ai"
SCORES = "evaluation/"
"""Before an evaluation's "<task>/<metric>" among a run's numbers."""
BLOCK = 32 * 1024
HEADER = b":W&B"
HEADER_BYTES = 7


@dataclass
class WandbLog:
    """One start of a run, as its run-<id>.wandb file has it.

    rows: W&B's history in its order, W&B's own keys (_step, _timestamp, _runtime) included
    exit_code: None where the file has no end: the run goes on, or was killed
    is_cut: the last record is not whole
    """

    path: Path
    run_id: str = ""
    project: str = ""
    entity: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    exit_code: int | None = None
    is_cut: bool = False


def log_files(folder: Path) -> list[Path]:
    """Every start's *.wandb file in a folder of W&B's, or above some, in the order of the starts: W&B's folders have
    their time in their names. Its link latest-run, which a copy may have made a folder, is none of them."""
    files = [path for path in folder.rglob("*.wandb") if path.parent.name.startswith(("run-", "offline-run-"))]
    return sorted(files, key=lambda path: (path.parent.name.removeprefix("offline-"), path.name))


def read_log(path: Path) -> WandbLog:
    """Raises ValueError where the file is not W&B's."""
    log = WandbLog(path)
    for record in _records(path, log):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            log.run_id, log.project, log.entity, log.name = run.run_id, run.project, run.entity, run.display_name
            log.group, log.job_type, log.tags = run.run_group, run.job_type, list(run.tags)
            _update(log.config, run.config.update)
        elif kind == "config":
            _update(log.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            log.rows.append(row)
        elif kind == "artifact":
            log.artifacts.append(f"{record.artifact.type}/{record.artifact.name}")
        elif kind == "exit":
            log.exit_code = record.exit.exit_code
    return log


def _update(tree: dict[str, Any], items: Iterable[Any]) -> None:
    for item in items:
        keys = list(item.nested_key) or [item.key]
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = json.loads(item.value_json)


def _records(path: Path, log: WandbLog) -> Iterator[Any]:
    """W&B's records: protobuf messages in LevelDB's log format (blocks of 32 KiB; before each piece crc, length, type).

    wandb 0.31 has no reader of it in Python.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    if not data.startswith(HEADER):
        raise ValueError(f"{path} is no file of W&B's")
    position, pieces = HEADER_BYTES, []
    while position < len(data):
        if BLOCK - position % BLOCK < HEADER_BYTES:  # a block's end too short for a header is padding
            position += BLOCK - position % BLOCK
            continue
        if position + HEADER_BYTES > len(data):
            break
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + HEADER_BYTES : position + HEADER_BYTES + length]
        if len(piece) < length or kind not in (1, 2, 3, 4):
            break
        pieces.append(piece)
        position += HEADER_BYTES + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue] # made at import
            try:
                record.ParseFromString(b"".join(pieces))
            except DecodeError:
                break
            pieces = []
            yield record
    log.is_cut = position < len(data) or bool(pieces)


def unsynced_folders(run_dir: Path) -> list[Path]:
    """The offline folders of a run folder that were not uploaded, in the order of the starts. `wandb sync` leaves a
    mark beside what it has uploaded."""
    files = log_files(run_dir / "wandb") if (run_dir / "wandb").is_dir() else log_files(run_dir)
    offline = [path for path in files if path.parent.name.startswith("offline-run-")]
    return [path.parent for path in offline if not path.with_name(f"{path.name}.synced").exists()]


def sync_command(folders: Iterable[Path]) -> str:
    """What uploads them. One command for all: W&B then uploads the starts of one run one after the other."""
    here = Path.cwd()
    names = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in folders]
    return f"wandb sync {shlex.join(names)}"


def has_key() -> bool:
    """Whether W&B can log in without asking: WANDB_API_KEY, an identity token, or `wandb login`'s netrc entry."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", f"https://{DEFAULT_HOST}")).netloc
    candidates = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        try:
            if netrc.netrc(os.path.expanduser(candidate)).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
