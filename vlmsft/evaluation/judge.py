"""Judges: many requests at once, each verdict kept in a SQLite file so that no question is paid for twice.

The cache's key holds judge, prompt and parameters. Failures are not kept: they are missing, and the next start asks.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmsft.evaluation.chat import chat, client_of, error_text
from vlmsft.evaluation.runner import JudgeSettings
from vlmsft.runtime.bar import Bar

Messages = list[dict[str, str]]
OfReply = Callable[[str], float | None]


@dataclass(frozen=True)
class Verdict:
    """score: None where there is none, and `error` says why; reply: the judge's words; cached: not asked anew"""

    score: float | None
    reply: str | None = None
    error: str | None = None
    cached: bool = False


class Cache:
    """Replies by key; several processes may use one file at once."""

    def __init__(self, path: str | Path):
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, timeout=60)
        with self._connection:
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, judge TEXT, reply TEXT)"
            )

    def get(self, key: str) -> str | None:
        row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, judge: str, reply: str) -> None:
        """On disk when this returns."""
        with self._connection:
            self._connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (key, judge, reply))

    def close(self) -> None:
        self._connection.close()


def cache_key(messages: Messages, settings: JudgeSettings) -> str:
    asked = {"base_url": settings.base_url, **request(messages, settings)}
    return hashlib.sha256(
        json.dumps(asked, sort_keys=True, ensure_ascii=False).encode("utf-8", "backslashreplace")
    ).hexdigest()


def request(messages: Messages, settings: JudgeSettings) -> dict[str, Any]:
    """What a verdict depends on."""
    return {
        "model": settings.model,
        "messages": messages,
        "temperature": settings.temperature,
        "max_tokens": settings.max_tokens,
        "seed": settings.seed,
    }


def num_uncached(requests: Sequence[Messages], settings: JudgeSettings) -> int:
    """How many of the requests would be made; no file is made."""
    if not Path(settings.cache).expanduser().exists():
        return len(requests)
    with closing(Cache(settings.cache)) as cache:
        return sum(cache.get(cache_key(messages, settings)) is None for messages in requests)


def ask_judge(requests: Sequence[Messages], of_reply: OfReply, settings: JudgeSettings) -> list[Verdict]:
    """A verdict for each request, in order; equal requests are made once.

    of_reply: the verdict in a reply, None for nonsense, which is asked again up to num_attempts times
    """
    distinct = list({cache_key(messages, settings): messages for messages in requests}.items())
    with closing(Cache(settings.cache)) as cache, Bar("judge", len(distinct)) as bar:
        found = asyncio.run(_ask_all(distinct, of_reply, settings, cache, bar))
    return [found[cache_key(messages, settings)] for messages in requests]


async def _ask_all(
    requests: Sequence[tuple[str, Messages]], of_reply: OfReply, settings: JudgeSettings, cache: Cache, bar: Bar
) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    places = asyncio.Semaphore(settings.concurrency)
    async with client_of(
        settings.base_url, settings.api_key, settings.timeout_seconds, settings.num_attempts
    ) as client:

        async def ask(key: str, messages: Messages) -> None:
            async with places:
                found[key] = await _ask(client, key, messages, of_reply, settings, cache)
            missing = sum(verdict.score is None for verdict in found.values())
            bar.advance(missing=missing)

        await asyncio.gather(*(ask(key, messages) for key, messages in requests))
    return found


async def _ask(
    client: Any, key: str, messages: Messages, of_reply: OfReply, settings: JudgeSettings, cache: Cache
) -> Verdict:
    kept = cache.get(key)
    if kept is not None and (score := of_reply(kept)) is not None:
        return Verdict(score, kept, cached=True)
    error = ""
    for _ in range(settings.num_attempts):
        try:
            reply = (await chat(client, **request(messages, settings))).text
        except Exception as failed:  # the openai client has tried several times
            return Verdict(None, error=f"the judge failed: {error_text(failed)}")
        score = of_reply(reply)
        if score is not None:
            cache.put(key, settings.model, reply)
            return Verdict(score, reply)
        error = f"no verdict in the judge's reply: {reply[:200]!r}"
    return Verdict(None, error=error)
