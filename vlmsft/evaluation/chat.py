"""Requests to OpenAI-compatible servers. The openai client does the retries: connection errors, timeouts, 408, 409, 429
and 5xx, with exponential waits or as long as the server's Retry-After says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmsft.data.records import IMAGE_MARKER

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class Reply(NamedTuple):
    """num_tokens: of the text, as the server counted them; None where it doesn't say"""

    text: str
    finish_reason: str | None
    num_tokens: int | None


class NoReply(Exception):
    """A response that holds no answer."""


def client_of(base_url: str, api_key: str, timeout_seconds: float, num_attempts: int) -> AsyncOpenAI:
    """timeout_seconds: of an attempt"""
    from openai import AsyncOpenAI

    return AsyncOpenAI(
        base_url=base_url, api_key=api_key, timeout=timeout_seconds, max_retries=max(0, num_attempts - 1)
    )


async def chat(client: AsyncOpenAI, **request: Any) -> Reply:
    """Raises what the client raises after its last attempt, and NoReply."""
    completion = await client.chat.completions.create(**request)
    choices = getattr(completion, "choices", None)
    if not choices:
        raise NoReply(f"no chat completion: {str(completion)[:200]!r}")
    message, usage = choices[0].message, completion.usage
    if message.content is None:
        raise NoReply(f"no text (finish_reason {choices[0].finish_reason})")
    return Reply(message.content, choices[0].finish_reason, usage.completion_tokens if usage else None)


def error_text(error: BaseException) -> str:
    """One line that names the error: 'APITimeoutError: Request timed out.'"""
    cause = f" ({error.__cause__})" if error.__cause__ is not None and str(error.__cause__) else ""
    return " ".join(f"{type(error).__name__}: {error}{cause}".split())[:500]


def is_of_server(error: BaseException) -> bool:
    """Whether another question would fare no better: no connection, no right to ask, an overloaded or broken server."""
    import openai

    kinds = (
        openai.APIConnectionError,
        openai.InternalServerError,
        openai.RateLimitError,
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    )
    return isinstance(error, kinds)


def content_parts(text: str, images: Sequence[str]) -> list[dict[str, Any]]:
    """A message's content with each <image> of `text` as the next of the data URLs `images`."""
    parts: list[dict[str, Any]] = []
    urls = iter(images)
    for number, piece in enumerate(text.split(IMAGE_MARKER)):
        if number:
            parts.append({"type": "image_url", "image_url": {"url": next(urls)}})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
