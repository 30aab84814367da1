"""A large file from the web: resumed where it was cut, tried again, checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import tenacity

from vlmsft.data.prepare.files import PARTIAL_SUFFIX
from vlmsft.errors import Problem, UserError

TIMEOUT_SECONDS = 60.0


class CutOff(Exception):
    """The server ended before the file did."""


def download(
    url: str,
    path: Path,
    *,
    num_attempts: int,
    progress: Callable[[int, int | None], None],
    wait_seconds: float = 2.0,
) -> None:
    """Brings `url` to `path`; does nothing where that file is. What came so far lies in <path>.partial.

    num_attempts: failures in a row, without a byte between them, until it gives up; the wait doubles up to a minute
    progress: called with (bytes here, bytes of the whole file, None if the server doesn't say)
    Raises UserError for an answer that trying again won't change, and at the end of the attempts
    """
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type((httpx.TransportError, CutOff)),
        stop=_after_failures_without_progress(partial, num_attempts),
        wait=tenacity.wait_exponential(wait_seconds, max=60),
        reraise=True,
    )
    try:
        retrying(_go_on, url, partial, progress)
    except (httpx.TransportError, CutOff) as error:
        found = f"{num_attempts} failures in a row, the last one {type(error).__name__}: {error}"
        remedy = "Start the same command again: it goes on from there. With no network, dataset.images=FILE or FOLDER"
        raise UserError(Problem(url, found, "a server that answers", remedy), f"{_size(partial)} bytes stay") from None
    partial.replace(path)
    _validator_file(partial).unlink(missing_ok=True)


def _after_failures_without_progress(partial: Path, num_attempts: int) -> Callable[[tenacity.RetryCallState], bool]:
    failures, size_before = 0, _size(partial)

    def stop(state: tenacity.RetryCallState) -> bool:
        nonlocal failures, size_before
        size = _size(partial)
        failures = 1 if size > size_before else failures + 1
        size_before = size
        return failures >= num_attempts

    return stop


def _go_on(url: str, partial: Path, progress: Callable[[int, int | None], None]) -> None:
    """One request for what is missing."""
    start, headers = _size(partial), {"Accept-Encoding": "identity"}
    validator = json.loads(_validator_file(partial).read_text()) if _validator_file(partial).is_file() else None
    if start and validator:  # without one, a file that changed on the server would be glued to the old one's beginning
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == 416 and _range_total(response) == start:
            return
        if response.status_code >= 500 or response.status_code in (408, 416, 429):
            if response.status_code == 416:
                partial.unlink()
            raise CutOff(f"the server said {response.status_code}")
        if response.status_code not in (200, 206):
            expected = "200 OK or 206 Partial Content"
            raise UserError(Problem(url, f"HTTP {response.status_code} {response.reason_phrase}", expected))
        if response.status_code == 200:
            start = 0
        total = _total(response, start)
        _validator_file(partial).write_text(json.dumps(_validator(response)))
        with open(partial, "ab" if start else "wb") as file:
            for chunk in response.iter_raw():  # as they come: a collected chunk would be lost in a cut
                file.write(chunk)
                start += len(chunk)
                progress(start, total)
    if total is not None and start != total:
        raise CutOff(f"{start} of {total} bytes came")


def _validator(response: httpx.Response) -> str | None:
    """A strong ETag, else the date: what If-Range takes."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _validator_file(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _total(response: httpx.Response, start: int) -> int | None:
    if response.status_code == 206:
        return _range_total(response)
    length = response.headers.get("Content-Length")
    return start + int(length) if length else None


def _range_total(response: httpx.Response) -> int | None:
    """The whole file's bytes, from "bytes 5-9/10" or "bytes */10"."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
