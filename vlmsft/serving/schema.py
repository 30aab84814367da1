"""The request of /v1/chat/completions: read, checked, and refused by name where it asks for what isn't there.

A parameter that would change the answer is obeyed or refused, never ignored. Those that can't change it (who asks, how
it is to be stored or billed) are taken and left alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vlmsft.data.records import IMAGE, Turn
from vlmsft.errors import nearest
from vlmsft.serving.api_error import invalid

WITHOUT_EFFECT = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "service_tier", "store", "user",
}  # fmt: skip

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "min_p": (0,),
    "top_k": (-1, 0),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
"""Parameters of OpenAI and vLLM that this server doesn't have, and the values that ask for nothing."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_STOPS = 4
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class ChatRequest:
    """A request that makes sense in itself.

    turns: with IMAGE where an image stands
    image_urls: (where it stands in the request, URL) in the order of the turns' images
    max_tokens: of the answer; None = as many as fit
    seed: None = another answer each time
    """

    turns: tuple[Turn, ...]
    image_urls: tuple[tuple[str, str], ...]
    model: str
    temperature: float
    top_p: float
    max_tokens: int | None
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    include_usage: bool


@dataclass(frozen=True)
class Defaults:
    """For requests that don't say."""

    temperature: float
    top_p: float


def parse(body: bytes, defaults: Defaults) -> ChatRequest:
    """Raises ApiError (400), naming the parameter."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object")
    given = _Fields({name: value for name, value in fields.items() if value is not None})
    model = given.take("model", str, "a string", None)
    if model is None:
        raise invalid("you must name a model; GET /v1/models lists them", "model")
    turns, image_urls = _conversation(given.take("messages", list, "a list", None))
    stream = given.take("stream", bool, "true or false", False)
    options = _Fields(given.take("stream_options", dict, "an object", {}), "stream_options.")
    if options and not stream:
        raise invalid("stream_options needs stream=true", "stream_options")
    request = ChatRequest(
        turns=turns,
        image_urls=image_urls,
        model=model,
        temperature=given.number("temperature", 0, 2, defaults.temperature),
        top_p=_top_p(given.number("top_p", 0, 1, defaults.top_p)),
        max_tokens=_max_tokens(given),
        stop=_stops(given.take("stop", (str, list), "a string or a list of strings", [])),
        seed=given.whole("seed", -MAX_SEED - 1, MAX_SEED),
        stream=stream,
        include_usage=options.take("include_usage", bool, "true or false", False),
    )
    options.pop("include_obfuscation", None)  # pads the chunks against eavesdroppers: none is added here
    if options:
        raise invalid(f"stream_options has no {next(iter(options))!r}", f"stream_options.{next(iter(options))}")
    _refuse_the_rest(given)
    return request


class _Fields(dict):
    """Parameters that were given and not read yet."""

    def __init__(self, fields: dict[str, Any], prefix: str = ""):
        super().__init__(fields)
        self.prefix = prefix

    def take(self, name: str, types: type | tuple[type, ...], expected: str, default: Any) -> Any:
        value = self.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, types):
            raise invalid(f"{self.prefix}{name} must be {expected}, not {_shown(value)}", self.prefix + name)
        return value

    def number(self, name: str, least: float, most: float, default: float) -> float:
        value = self.take(name, (int, float), "a number", default)
        if isinstance(value, bool) or not least <= value <= most:
            raise invalid(f"{name} must be a number from {least} to {most}, not {_shown(value)}", name)
        return float(value)

    def whole(self, name: str, least: int, most: int | None = None) -> int | None:
        value = self.take(name, int, "a whole number", None)
        if value is None:
            return None
        if isinstance(value, bool) or value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise invalid(f"{name} must be a whole number {limits}, not {_shown(value)}", name)
        return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _top_p(top_p: float) -> float:
    if top_p == 0:
        raise invalid("top_p must be over 0; the likeliest token each time is temperature=0", "top_p")
    return top_p


def _max_tokens(given: _Fields) -> int | None:
    old, new = given.whole("max_tokens", 1), given.whole("max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens and max_completion_tokens differ: give one of them", "max_completion_tokens")
    return new if new is not None else old


def _stops(stop: str | list) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if len(stops) > MAX_STOPS or not all(isinstance(text, str) and text for text in stops):
        raise invalid(f"stop must be up to {MAX_STOPS} strings, none of them empty", "stop")
    return tuple(_whole_characters(text, "stop") for text in stops)


def _whole_characters(text: str, where: str) -> str:
    """JSON can hold half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(f"{where} holds half of a surrogate pair, which is no character", where) from None
    return text


def _refuse_the_rest(given: _Fields) -> None:
    for name, value in given.items():
        if name in WITHOUT_EFFECT or any(_equals(value, neutral) for neutral in NEUTRAL.get(name, ())):
            continue
        if name in NEUTRAL:
            wanted = " or ".join(_shown(neutral) for neutral in NEUTRAL[name])
            raise invalid(f"this server has no {name}: leave it out, or set it to {wanted}", name, "unsupported_value")
        hint = nearest(name, ["temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "stream"])
        raise invalid(f"unknown parameter {name!r}. {hint}".rstrip(), name, "unknown_parameter")


def _equals(value: Any, neutral: Any) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _conversation(messages: Any) -> tuple[tuple[Turn, ...], tuple[tuple[str, str], ...]]:
    if not messages:
        raise invalid("messages must hold at least one message", "messages")
    image_urls: list[tuple[str, str]] = []
    turns = tuple(_turn(message, f"messages[{i}]", image_urls) for i, message in enumerate(messages))
    for i, turn in enumerate(turns):
        if turn.role == "system" and i > 0:
            raise invalid("a system message must be the first", f"messages[{i}].role")
    if turns[-1].role != "user":
        raise invalid("the last message must be the user's", f"messages[{len(turns) - 1}].role")
    return turns, tuple(image_urls)


def _turn(message: Any, where: str, image_urls: list[tuple[str, str]]) -> Turn:
    if not isinstance(message, dict):
        raise invalid(f"{where} must be an object", where)
    role = ROLES.get(str(message.get("role")))
    if role is None:
        known = ", ".join(ROLES)
        raise invalid(f"{where}.role must be one of {known}, not {_shown(message.get('role'))}", f"{where}.role")
    for name in ("tool_calls", "function_call", "audio"):
        if message.get(name):
            raise invalid(f"{where}.{name}: this server has no such thing", f"{where}.{name}")
    content = message.get("content")
    if isinstance(content, str):
        return Turn(role, (_whole_characters(content, f"{where}.content"),))
    if not isinstance(content, list) or not content:
        raise invalid(f"{where}.content must be a string or a list of parts", f"{where}.content")
    before = len(image_urls)
    parts = tuple(_part(part, f"{where}.content[{i}]", image_urls) for i, part in enumerate(content))
    if role != "user" and len(image_urls) > before:
        raise invalid(f"{where}: images stand in user messages", f"{where}.content")
    return Turn(role, parts)


def _part(part: Any, where: str, image_urls: list[tuple[str, str]]) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _whole_characters(part["text"], where)
    if kind == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str):
            raise invalid(f"{where}.image_url.url must be a string", f"{where}.image_url")
        image_urls.append((f"{where}.image_url", _whole_characters(url, f"{where}.image_url")))
        return IMAGE
    raise invalid(f"{where} must be a text part or an image_url part, not {_shown(part)}", where)
