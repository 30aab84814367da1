"""Requests that wait together are generated together, by one thread.

A batch begins with the request that waits longest and takes all others that wait, up to max_num_seqs; streaming or not
makes no difference. It ends with its longest answer: who comes later waits for it. Each answer is handed over as soon
as it ends, and one whose client has left ends at the next token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from vlmsft.generation.generate import Answer, OnAnswer, OnText, Prompt, Sampling
from vlmsft.serving.api_error import OVERLOADED, SERVER_ERROR, ApiError, internal
from vlmsft.serving.metrics import Metrics

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""nginx's number for an answer that nobody waits for any more; HTTP has none."""


class Generates(Protocol):
    """What vlmsft.generation.generate.Generator does, as far as it is needed here."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sequence[Sampling],
        *,
        cancel: Sequence[threading.Event],
        on_text: OnText,
        on_answer: OnAnswer,
    ) -> Any:
        """Calls on_answer once for each prompt, after the last on_text for it."""
        ...


class Job:
    """One answer on its way from the thread that generates to the event loop that made the job.

    num_prompt_tokens: text tokens of the prompt, one for each image among them
    """

    def __init__(self, prompt: Prompt, sampling: Sampling, num_prompt_tokens: int):
        self.prompt, self.sampling, self.num_prompt_tokens = prompt, sampling, num_prompt_tokens
        self.created = time.monotonic()
        self.has_text = False
        self.status = CLIENT_LEFT  # as long as it hasn't ended
        self.cancelled = threading.Event()
        self._is_over = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Answer | ApiError] = asyncio.Queue()

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for more of it."""
        return self._is_over or self.cancelled.is_set()

    async def event(self) -> str | Answer:
        """The next piece of text, or the end. Raises ApiError where generation failed."""
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    def cancel(self) -> None:
        """Nobody waits for the answer any more; safe from any thread."""
        self.cancelled.set()

    def send(self, event: str | Answer | ApiError) -> None:
        """From any thread; nothing comes after the end or an error."""
        if self._is_over:
            return
        if not isinstance(event, str):
            self._is_over = True
            self.status = event.status if isinstance(event, ApiError) else 200
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone, and the client with it
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Scheduler:
    """Owns the thread that generates.

    max_num_seqs: most requests of a batch
    max_waiting: most requests beside those; more are refused
    gather_seconds: how long a request that finds the engine idle waits for others to join it
    """

    def __init__(
        self, generator: Generates, max_num_seqs: int, max_waiting: int, gather_seconds: float, metrics: Metrics
    ):
        self.generator, self.max_num_seqs, self.max_waiting = generator, max_num_seqs, max_waiting
        self.gather_seconds, self.metrics = gather_seconds, metrics
        self._num_admitted = 0
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.running.set_function(lambda: sum(not job.is_over for job in self._running))
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_closing

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """A place for one request, from its first byte to its answer's last. Raises ApiError (429, 503)."""
        if not self.is_alive:
            raise _stopping()
        limit = self.max_num_seqs + self.max_waiting
        if self._num_admitted >= limit:
            message = f"{limit} requests are running or waiting, which is this server's limit: try again later"
            raise ApiError(429, message, kind=OVERLOADED, code="queue_full", retry_after_seconds=1)
        self._num_admitted += 1
        try:
            yield
        finally:
            self._num_admitted -= 1

    def submit(self, job: Job) -> None:
        """Raises ApiError (503) when the server is stopping."""
        with self._changed:
            if self._is_closing:
                raise _stopping()
            self._waiting.append(job)
            self._changed.notify()

    def close(self, timeout_seconds: float = 10) -> None:
        """Ends the thread, and with an error what is still on its way."""
        with self._changed:
            self._is_closing = True
            for job in [*self._waiting, *self._running]:
                job.send(_stopping())
                job.cancel()
            self._changed.notify()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._is_closing:
            batch = self._next_batch()
            if not batch:
                continue
            self._running = batch
            try:
                self._generate(batch)
            except Exception:
                logger.exception("generating %d answer(s) failed", len(batch))
            for job in batch:
                job.send(internal())  # one that has ended doesn't hear it
            self._running = []

    def _next_batch(self) -> list[Job]:
        """Waits for work; empty where the client left, or the server closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            is_full = lambda: len(self._waiting) >= self.max_num_seqs or self._is_closing  # noqa: E731
            self._changed.wait_for(is_full, self.gather_seconds)
            batch: list[Job] = []
            while self._waiting and len(batch) < self.max_num_seqs:
                job = self._waiting.popleft()
                if not job.is_over:
                    batch.append(job)
            return batch

    def _generate(self, batch: list[Job]) -> None:
        now = time.monotonic()
        self.metrics.batch_requests.observe(len(batch))
        for job in batch:
            self.metrics.queue_seconds.observe(now - job.created)

        def on_text(number: int, text: str) -> None:
            job = batch[number]
            if not job.has_text:
                job.has_text = True
                self.metrics.first_text_seconds.observe(time.monotonic() - job.created)
            job.send(text)

        def on_answer(number: int, answer: Answer) -> None:
            self.metrics.generated_tokens.inc(answer.num_tokens)
            self.metrics.answer_tokens.observe(answer.num_tokens)
            batch[number].send(answer)

        self.generator.generate(
            [job.prompt for job in batch],
            [job.sampling for job in batch],
            cancel=[job.cancelled for job in batch],
            on_text=on_text,
            on_answer=on_answer,
        )


def _stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", kind=SERVER_ERROR, retry_after_seconds=5)
