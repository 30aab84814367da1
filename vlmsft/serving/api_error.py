"""What a client did wrong, or what went wrong on the way, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

SERVER_ERROR = "server_error"
INVALID_REQUEST = "invalid_request_error"
AUTHENTICATION = "authentication_error"
OVERLOADED = "rate_limit_error"


class ApiError(Exception):
    """Answers a request.

    status: of HTTP
    param: the request's key that is wrong, as OpenAI names it: "messages[0].content[1].image_url"
    code: for programs, e.g. "context_length_exceeded"
    retry_after_seconds: when the client may try again
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID_REQUEST,
        retry_after_seconds: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = status, message, param, code, kind
        self.retry_after_seconds = retry_after_seconds

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        seconds = self.retry_after_seconds
        return {} if seconds is None else {"Retry-After": str(seconds)}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request can't be answered as it is."""
    return ApiError(400, message, param=param, code=code)


def internal() -> ApiError:
    """500: the server's log holds what happened; the client is told no more than that."""
    return ApiError(500, "the server failed while it generated the answer; its log says why", kind=SERVER_ERROR)
