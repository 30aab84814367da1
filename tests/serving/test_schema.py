"""Reading a request: what would change the answer is obeyed or refused by name."""

from __future__ import annotations

import json

import pytest

from vlmsft.data.records import IMAGE, Turn
from vlmsft.serving.api_error import ApiError
from vlmsft.serving.schema import NEUTRAL, Defaults, parse

DEFAULTS = Defaults(temperature=0.25, top_p=0.75)
HELLO = [{"role": "user", "content": "hello"}]


def read(messages=HELLO, **fields):
    return parse(json.dumps({"model": "m", "messages": messages, **fields}).encode(), DEFAULTS)


def refused(body=None, **fields):
    with pytest.raises(ApiError) as error:
        read(**fields) if body is None else parse(body, DEFAULTS)
    assert error.value.status == 400
    return error.value


def test_least_request_has_the_servers_defaults():
    request = read()
    assert (request.temperature, request.top_p, request.max_tokens, request.seed) == (0.25, 0.75, None, None)
    assert (request.stop, request.stream, request.include_usage) == ((), False, False)
    assert request.turns == (Turn("user", ("hello",)),)


def test_null_is_not_given():
    names = ("temperature", "top_p", "max_tokens", "seed", "stop", "stream", "stream_options", "tools", "unheard_of")
    assert read(**dict.fromkeys(names)) == read()


def test_parts_and_images_in_order():
    url = {"type": "image_url", "image_url": {"url": "data:a", "detail": "high"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [url, {"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": "data:b"}]},
    ]
    request = read(messages)
    assert [turn.role for turn in request.turns] == ["system", "user", "assistant", "user"]
    assert [turn.parts for turn in request.turns[1::2]] == [(IMAGE, "one"), ("two", IMAGE)]
    assert request.image_urls == (
        ("messages[1].content[0].image_url", "data:a"),
        ("messages[3].content[1].image_url", "data:b"),
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": "\ud83d"}, "stop"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}]}, "messages[0].content[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [*HELLO, {"role": "system", "content": "x"}]}, "messages[1].role"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
    ],
)
def test_wrong_values_are_named(fields, param):
    error = refused(**fields)
    assert error.param == param


def test_images_stand_in_user_messages():
    part = {"type": "image_url", "image_url": {"url": "data:a"}}
    assert refused(messages=[{"role": "system", "content": [part]}, *HELLO]).param == "messages[0].content"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"5": 100}),
        ("logprobs", True),
        ("top_k", 5),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("repetition_penalty", 1.1),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(name, value):
    error = refused(**{name: value})
    assert (error.param, error.code) == (name, "unsupported_value") and name in error.message


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_asks_for_nothing_is_taken(name):
    for value in NEUTRAL[name]:
        assert read(**{name: value}) == read()


@pytest.mark.parametrize("name", ["user", "metadata", "store", "service_tier"])
def test_what_cannot_change_the_answer_is_taken(name):
    assert read(**{name: "anything"}) == read()


def test_unknown_names_its_neighbour():
    error = refused(max_token=5)
    assert error.code == "unknown_parameter" and "'max_token'" in error.message and "'max_tokens'" in error.message


@pytest.mark.parametrize("body", [b"", b"hello", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_no_json_object(body):
    assert "body" in refused(body).message
