"""The whole preparation, step by step; each step leaves alone what an earlier start finished.

output/manifest.json                     see vlmsft.data.prepare.manifest
       training.jsonl validation.jsonl   prepared records
       dropped.jsonl                     records left out, and why, if there are any
       images/                           what was unpacked, or stood in the records
       shards/                           see vlmsft.data.prepare.shards and .energon
       downloads/                        the archive, if it came from the web
       .work/                            until all is finished: records.jsonl (all of them, in the source's order)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import numpy as np

from vlmsft.data.prepare import manifest, shards, split
from vlmsft.data.prepare.archive import unpack
from vlmsft.data.prepare.download import download
from vlmsft.data.prepare.files import PARTIAL_SUFFIX, full_disk_named, sha256_of, written_aside
from vlmsft.data.prepare.progress import say, step
from vlmsft.data.prepare.settings import Settings
from vlmsft.data.prepare.sources import Normaliser, Source, open_source
from vlmsft.data.prepare.threads import in_threads
from vlmsft.data.records import RecordFile, RecordProblem, image_path, named
from vlmsft.errors import Problem, UserError

STOPPED = "the preparation stopped; what is finished stays, and the same command goes on from there"
MAX_SHOWN = 20
SPLITS = {"training": "train", "validation": "val"}
"""Name of the record file and prefix of the shards."""


def prepare(settings: Settings) -> dict[str, Any]:
    """Makes the output folder, or finishes it, or finds it finished; returns the manifest.

    Raises UserError for whatever the user can put right: records and images that can't be used, an archive that is
    damaged, a full disk, a folder that other parameters made. What was finished before stays in any case.
    """
    if problems := settings.problems():
        raise UserError(problems)
    before = manifest.read(settings.output)
    if before is not None and (before["finished"] or _has_begun(settings)):
        _raise_other_parameters(settings, before)
    settings.output.mkdir(parents=True, exist_ok=True)
    with _locked(settings.output), full_disk_named(settings.output, lambda: _finished_shards(settings)):
        if before is not None and before["finished"] and _is_whole(settings, before):
            return before
        if before is None or before["parameters"] != settings.parameters():
            if not _has_begun(settings):
                shutil.rmtree(settings.work, ignore_errors=True)
            manifest.write(settings.output, {"finished": False, "parameters": settings.parameters()})
        return _Preparation(settings, {} if before is None else before.get("inputs", {})).run()


def _has_begun(settings: Settings) -> bool:
    """Whether something lies in the output that other parameters would make otherwise."""
    files = (folder / f"{name}.jsonl" for name in SPLITS for folder in (settings.output, settings.work))
    return any(path.exists() for path in (*files, settings.output / "images", settings.shard_folder))


def _raise_other_parameters(settings: Settings, before: dict[str, Any]) -> None:
    now, then = settings.parameters(), dict(before["parameters"])
    if not before["finished"]:  # after a look at what is wrong, one may choose to drop it
        now.pop("on_problem")
        then.pop("on_problem", None)
    manifest.raise_other_parameters(settings.output, then, now)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    path = output / ".lock"
    try:
        with filelock.FileLock(path, timeout=0):
            yield
            path.unlink(missing_ok=True)
    except filelock.Timeout:
        raise UserError(Problem("output", f"{output}, where another prepare is at work", "one at a time")) from None


def _finished_shards(settings: Settings) -> str:
    folder = settings.shard_folder
    count = len(shards.file_names(folder)) if folder.is_dir() else 0
    return f"{STOPPED} ({count} finished shards)" if count else STOPPED


def _is_whole(settings: Settings, before: dict[str, Any]) -> bool:
    """Whether all outputs of a finished folder are there. Raises UserError for changed inputs and changed outputs."""
    manifest.raise_changed_inputs(settings.output, before["inputs"], _local_inputs(settings))
    sizes = {name: _size(settings.output / name) for name in before["outputs"]}
    remedy = "Delete it to have it made again"
    problems = [
        Problem(str(settings.output / name), f"{sizes[name]} bytes", f"{facts['bytes']} as it was written", remedy)
        for name, facts in before["outputs"].items()
        if sizes[name] not in (None, facts["bytes"])
    ]
    if problems:
        raise UserError(problems, "nothing was changed")
    return None not in sizes.values()


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _local_inputs(settings: Settings) -> dict[str, dict[str, Any]]:
    """The inputs that can be looked at in seconds: files of conversations by content, a local archive by size."""
    inputs = _local_conversations(settings)
    if settings.images is not None and Path(settings.images).is_file():
        inputs["images"] = {"bytes": Path(settings.images).stat().st_size}
    files = [path for name in SPLITS if (path := settings.output / f"{name}.jsonl").is_file()]
    if not settings.fills_image_folder and files:
        names = [shards.image_names(record) for path in files for record in _all(RecordFile(path))]
        inputs["images"] = folder_facts(settings.image_folder, _distinct(names))
    return inputs


def _local_conversations(settings: Settings) -> dict[str, dict[str, Any]]:
    named = (("conversations", settings.conversations), ("validation", settings.validation))
    return {
        key: open_source(name, None, settings.hub_split).identity()
        for key, name in named
        if name is not None and Path(name).is_file()
    }


class _Preparation:
    """One start of `prepare`, step by step.

    dropped: what is wrong with records that are left out, by their number in records.jsonl
    bad_images: what is wrong with images that can't be used, by name
    """

    def __init__(self, settings: Settings, inputs: dict[str, Any]):
        self.settings = settings
        self.inputs = dict(inputs)
        self.dropped: dict[int, Problem] = {}
        self.bad_images: dict[str, Problem] = {}
        self.num_of_sources: list[int] = []

    def run(self) -> dict[str, Any]:
        settings = self.settings
        settings.work.mkdir(exist_ok=True)
        for leftover in settings.output.glob(f"shards/*{PARTIAL_SUFFIX}"):  # of a start that was killed
            leftover.unlink()
        self.forget_changed_conversations()
        records = self.read_conversations()
        names = [shards.image_names(record) if record else [] for record in _all(records)]
        self.fetch_images(names)
        self.check_images(names)
        self.drop_or_raise(names)
        files = self.write_splits(records, names)
        outputs = {**self.describe(files), **self.write_shards(files)}
        result = self.finished_manifest(names, files, outputs)
        manifest.write(settings.output, result)
        self.clean_up()
        return result

    # --- conversations

    def forget_changed_conversations(self) -> None:
        """Files that were edited since an earlier start read them are read again; raises UserError where records of the
        old text are written already."""
        work, settings = self.settings.work, self.settings
        if not (work / "sources.json").is_file():
            return
        before, now = _read_json(work / "sources.json"), _local_conversations(settings)
        if all(before.get(key, {}).get(name) == value for key, facts in now.items() for name, value in facts.items()):
            return
        if any((folder / f"{name}.jsonl").exists() for name in SPLITS for folder in (settings.output, work)):
            manifest.raise_changed_inputs(settings.output, before, now)
        say("the conversations have changed since they were read: reading them again")
        for name in ("records.jsonl", "dropped.json", "bad_images.json", "sources.json"):
            (work / name).unlink(missing_ok=True)

    def read_conversations(self) -> RecordFile:
        """All records, prepared, one on each line; null for one that can't be used."""
        work, settings = self.settings.work, self.settings
        if not (work / "records.jsonl").is_file():
            names = [name for name in (settings.conversations, settings.validation) if name is not None]
            sources = [open_source(name, settings.revision, settings.hub_split) for name in names]
            with written_aside(work / "records.jsonl") as file:
                for source in sources:
                    self._normalise(source, file)
                self._raise_records()
                _write_json(work / "dropped.json", {n: _plain(problem) for n, problem in self.dropped.items()})
                identities = [source.identity() for source in sources]
                facts = [{**facts, "records": len(source)} for facts, source in zip(identities, sources, strict=True)]
                _write_json(work / "sources.json", dict(zip(("conversations", "validation"), facts, strict=False)))
        sources_read = _read_json(work / "sources.json")
        self.dropped = {int(n): RecordProblem(**problem) for n, problem in _read_json(work / "dropped.json").items()}
        self._raise_records()  # dropped by an earlier start, which had on_problem=drop
        self.inputs |= sources_read
        self.num_of_sources = [facts["records"] for facts in sources_read.values()]
        return RecordFile(work / "records.jsonl")

    def _normalise(self, source: Source, file: Any) -> None:
        normalise = Normaliser(self.settings.output / "images", inside=self.settings.fills_image_folder)
        first = file.tell() and sum(self.num_of_sources)
        with step("reading conversations", len(source)) as advance:
            for index, raw in enumerate(source):
                try:
                    record = normalise(raw)
                except UserError as error:
                    record = None
                    self.dropped[first + index] = named(error.problems, source.where(index))[0]
                file.write(_json_line(record))
                advance(1)
        self.num_of_sources.append(len(source))

    def _raise_records(self) -> None:
        if self.dropped and self.settings.on_problem == "raise":
            _raise([*self.dropped.values()], "records", "Mend them, or leave them out with on_problem=drop")

    # --- images

    def fetch_images(self, names: Sequence[Sequence[str]]) -> None:
        """Unpacks what isn't there yet; downloads the archive only for that."""
        settings, folder = self.settings, self.settings.image_folder
        if (settings.work / "archive.json").is_file():
            self.inputs["images"] = _read_json(settings.work / "archive.json")
        missing = [name for name in _distinct(names) if not image_path(name, folder).is_file()]
        if settings.images is None or not settings.fills_image_folder or not missing:
            return
        archive = self._archive(settings.images)
        self.inputs["images"] = self._archive_facts(archive)
        with step("unpacking images", len(missing)) as advance:
            self.bad_images, cut = unpack(archive, missing, folder, advance)
        if cut is not None and self.bad_images:
            say(f"{cut}")

    def _archive(self, images: str) -> Path:
        """The local file, downloaded if `images` is a URL."""
        if "://" not in images:
            if not Path(images).is_file():
                raise UserError(Problem("dataset.images", f"no file {images}", "a folder, a zip or tar file, or a URL"))
            return Path(images)
        path = self.settings.download_folder / (os.path.basename(urlsplit(images).path) or "archive")
        if not path.is_file():
            done = 0
            with step(f"downloading {path.name}", None, is_bytes=True) as advance:

                def progress(here: int, total: int | None) -> None:
                    nonlocal done
                    advance(here - done, total)
                    done = here

                download(images, path, num_attempts=self.settings.download_attempts, progress=progress)
        return path

    def _archive_facts(self, archive: Path) -> dict[str, Any]:
        """Origin, size and hash of the archive, hashed once. Raises UserError where the hash isn't the expected one."""
        settings, known = self.settings, self.settings.work / "archive.json"
        if not known.is_file():
            size = archive.stat().st_size
            with step(f"hashing {archive.name}", size, is_bytes=True) as advance:
                facts = {"archive": settings.images, "bytes": size, "sha256": sha256_of(archive, advance)}
            if settings.images_sha256 not in (None, facts["sha256"]):
                remedy = f"Delete {archive} and get it again, or correct dataset.images_sha256"
                found, expected = f"sha256 {facts['sha256']}", f"{settings.images_sha256} (dataset.images_sha256)"
                raise UserError(Problem(str(archive), found, expected, remedy), STOPPED)
            _write_json(known, facts)
        return _read_json(known)

    def check_images(self, names: Sequence[Sequence[str]]) -> None:
        """Whether all images are there and, with verify_images, decode to their last row."""
        known = self.settings.work / "bad_images.json"
        if known.is_file():
            self.bad_images |= {name: RecordProblem(**problem) for name, problem in _read_json(known).items()}
            return
        distinct = [name for name in _distinct(names) if name not in self.bad_images]
        with step("checking images", len(distinct)) as advance:
            found = in_threads(self._image_problem, distinct, self.settings.num_threads)
            for name, problem in zip(distinct, found, strict=True):
                if problem is not None:
                    self.bad_images[name] = problem
                advance(1)

    def _image_problem(self, name: str) -> Problem | None:
        path = image_path(name, self.settings.image_folder)
        if not path.is_file():
            remedy = "Set dataset.images" if self.settings.images is None else "Check dataset.images and the name"
            return Problem(f"image {name}", "no such image", f"a file {path}", remedy)
        reason = decoding_error(path) if self.settings.verify_images else None
        return None if reason is None else Problem(str(path), f"a damaged image ({reason})", "a whole image file")

    def drop_or_raise(self, names: Sequence[Sequence[str]]) -> None:
        """Leaves out the records of bad images, or raises UserError for the images."""
        if self.bad_images and self.settings.on_problem == "raise":
            remedy = "Put whole files in their place, or leave their records out with on_problem=drop"
            _raise([*self.bad_images.values()], "images", remedy)
        _write_json(
            self.settings.work / "bad_images.json", {n: _plain(problem) for n, problem in self.bad_images.items()}
        )
        for index, of_record in enumerate(names):
            bad = [name for name in of_record if name in self.bad_images]
            if bad:
                self.dropped.setdefault(index, self.bad_images[bad[0]])

    # --- outputs

    def write_splits(self, records: RecordFile, names: Sequence[Sequence[str]]) -> dict[str, RecordFile]:
        """training.jsonl and validation.jsonl (none where validation is empty), and dropped.jsonl."""
        settings = self.settings
        files = {}
        for split_name, numbers in zip(SPLITS, self._split(names), strict=True):
            path = settings.jsonl_folder / f"{split_name}.jsonl"
            kept = [int(number) for number in numbers if int(number) not in self.dropped]
            if not kept and split_name == "validation":
                continue
            if not kept:
                reasons = "; ".join(f"{count} {reason}" for reason, count in self._reasons().items())
                expected = "at least one. Lower validation_fraction" if not reasons else "at least one"
                raise UserError(Problem(split_name, f"no record left ({reasons})", expected), STOPPED)
            if not path.is_file():
                with written_aside(path) as file:
                    file.writelines(records.line(number) + b"\n" for number in kept)
            files[split_name] = RecordFile(path)
        if self.dropped:
            with written_aside(settings.output / "dropped.jsonl") as file:
                for number, problem in sorted(self.dropped.items()):
                    file.write(_json_line({"record": number, **_plain(problem)}))
        return files

    def _split(self, names: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the training and validation records, dropped ones still among them: what is dropped doesn't move
        the others."""
        settings = self.settings
        if settings.validation is not None:
            numbers = np.arange(len(names))
            return numbers[: self.num_of_sources[0]], numbers[self.num_of_sources[0] :]
        if settings.split_by == "image":
            return split.by_image(names, settings.validation_fraction, settings.seed)
        return split.by_record(len(names), settings.validation_fraction, settings.seed)

    def describe(self, files: dict[str, RecordFile]) -> dict[str, dict[str, Any]]:
        """The manifest's lines of the record files."""
        if "jsonl" not in self.settings.formats:
            return {}
        described = {
            file.path.name: {"records": len(file), "bytes": file.path.stat().st_size, "sha256": file.sha256}
            for file in files.values()
        }
        dropped = self.settings.output / "dropped.jsonl"
        return {**described, **({dropped.name: _describe(dropped)} if self.dropped else {})}

    def write_shards(self, files: dict[str, RecordFile]) -> dict[str, dict[str, Any]]:
        """Shards and Energon's metadata; the manifest's lines of them."""
        settings, folder = self.settings, self.settings.shard_folder
        if "energon" not in settings.formats:
            return {}
        plan = [shard for split_name, file in files.items() for shard in self._plan(split_name, file)]
        todo = sum(len(shard.indices) for shard in shards.unfinished(plan))
        written: dict[str, shards.WrittenShard] = {}
        with step("writing shards", todo) as advance:
            is_new = {shard.path.name for shard in shards.unfinished(plan)}
            for shard in shards.write_all(plan, settings.num_threads):
                written[shard.name] = shard
                advance(shard.num_records if shard.name in is_new else 0)
        from vlmsft.data.prepare import energon  # imports torch

        num_records = {shard.name: shard.num_records for shard in written.values()}
        if not energon.is_finished(folder, num_records):
            say("indexing shards for Energon")
            energon.write_metadata(folder, num_records, min(settings.num_threads, len(plan)))
        described = {
            f"shards/{shard.name}": {"records": shard.num_records, "bytes": shard.num_bytes, "sha256": shard.sha256}
            for shard in written.values()
        }
        metadata = energon.file_names(num_records)
        return {**described, **{f"shards/{name}": _describe(folder / name) for name in metadata}}

    def _plan(self, split_name: str, file: RecordFile) -> list[shards.Shard]:
        settings = self.settings
        return shards.plan(
            settings.shard_folder,
            SPLITS[split_name],
            file,
            settings.image_folder,
            max_mb=settings.shard_size_mb,
            max_records=settings.shard_max_records,
            shuffle_seed=settings.seed if settings.shuffle and split_name == "training" else None,
        )

    def finished_manifest(
        self, names: Sequence[Sequence[str]], files: dict[str, RecordFile], outputs: dict[str, dict[str, Any]]
    ) -> dict[str, Any]:
        kept = [of_record for number, of_record in enumerate(names) if number not in self.dropped]
        counts = {
            "records": len(names),
            **{split_name: len(file) for split_name, file in files.items()},
            "text_only": sum(not of_record for of_record in kept),
            "multi_image": sum(len(of_record) > 1 for of_record in kept),
            "images": len(_distinct(kept)),
            "dropped": self._reasons(),
        }
        if not self.settings.fills_image_folder:
            self.inputs["images"] = folder_facts(self.settings.image_folder, _distinct(kept))
        return {
            "finished": True,
            "parameters": self.settings.parameters(),
            "inputs": self.inputs,
            "counts": counts,
            "outputs": outputs,
        }

    def _reasons(self) -> dict[str, int]:
        """How many records were dropped, by kind."""
        return dict(Counter(_kind(problem) for problem in self.dropped.values()).most_common())

    def clean_up(self) -> None:
        shutil.rmtree(self.settings.work)
        is_url = self.settings.images is not None and "://" in self.settings.images
        if is_url and not self.settings.keep_archive:
            shutil.rmtree(self.settings.download_folder, ignore_errors=True)


def decoding_error(path: Path) -> str | None:
    """What Pillow says where it can't decode an image to its last row."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        return f"{type(error).__name__}: {error}"
    return None


def folder_facts(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """A folder of images for the manifest: a hash over names and sizes, which costs seconds."""
    from vlmsft.runtime.provenance import name_size_fingerprint

    return {"folder": str(folder), **name_size_fingerprint(folder, sorted(names))}


def _all(records: RecordFile) -> Iterator[Any]:
    return (records[index] for index in range(len(records)))


def _distinct(names: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for of_record in names for name in of_record))


def _raise(problems: list[Problem], what: str, remedy: str) -> None:
    in_all = Problem(what, f"{len(problems)} problems in all", "none", remedy)
    raise UserError([*problems[:MAX_SHOWN], in_all], STOPPED)


def _kind(problem: Problem) -> str:
    """What a problem is counted as; of an image or archive what was found, without the library's text."""
    kind = problem.kind if isinstance(problem, RecordProblem) else ""
    return kind or problem.found.split(" (")[0]


def _plain(problem: Problem) -> dict[str, str]:
    return {**asdict(problem), "kind": _kind(problem)}


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _json_line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _write_json(path: Path, value: Any) -> None:
    with written_aside(path) as file:
        file.write(_json_line(value))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
