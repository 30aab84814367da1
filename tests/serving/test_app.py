"""The endpoint, asked by OpenAI's own client; faults by a generator that fails on demand."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from conftest import MODEL_NAME, wait_for
from serving_toys import ToyGenerator, client, data_url, image_part, picture, png, text_part, user, web_server

from vlmsft.data.records import Turn
from vlmsft.generation.generate import Prompt, Sampling

QUESTION = [user(text_part("何が見えますか？"))]


def ask(url, messages=QUESTION, **keywords):
    keywords = {"model": MODEL_NAME, "max_tokens": 12, **keywords}
    return client(url).chat.completions.create(messages=messages, **keywords)


def text_of(answer):
    return answer.choices[0].message.content


def direct(generator, messages, images=(), **sampling):
    """The same question without a server."""
    turns = tuple(
        Turn(m["role"], tuple(p["text"] if p["type"] == "text" else None for p in m["content"])) for m in messages
    )
    return generator.generate([Prompt(turns, tuple(images))], Sampling(**{"max_new_tokens": 12, **sampling}))[0]


def number(url, name):
    """A sample of /metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_text_alone(url, generator):
    answer, expected = ask(url), direct(generator, QUESTION)
    assert text_of(answer) == expected.text and expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.num_prompt_tokens, expected.num_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.model == MODEL_NAME and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_a_string_is_one_text_part(url):
    assert text_of(ask(url, [{"role": "user", "content": "何が見えますか？"}])) == text_of(ask(url))


def test_images_by_data_http_and_file(url, generator, settings):
    data = png()
    (settings.images.image_root / "photo.png").write_bytes(data)
    question = text_part("何色？")
    expected = direct(generator, [user(image_part(""), question)], [picture()]).text
    other = direct(generator, [user(image_part(""), question)], [picture((10, 200, 90))]).text
    assert expected != other, "the picture doesn't matter: the comparisons below would show nothing"
    with web_server(lambda path: (200, {"Content-Type": "image/png"}, data)) as web:
        for source in (data_url(data), f"{web}/photo.png", f"file://{settings.images.image_root}/photo.png"):
            assert text_of(ask(url, [user(image_part(source), question)])) == expected


def test_several_images_and_turns(url, generator):
    first, second = png(), png((20, 90, 200), (60, 200))
    messages = [
        {"role": "system", "content": [text_part("短く。")]},
        user(image_part(data_url(first)), text_part("一枚目")),
        {"role": "assistant", "content": [text_part("はい")]},
        user(text_part("次は"), image_part(data_url(second)), text_part("違いは？")),
    ]
    expected = direct(generator, messages, [picture(), picture((20, 90, 200), (60, 200))])
    answer = ask(url, messages)
    assert text_of(answer) == expected.text
    assert answer.usage.prompt_tokens == expected.num_prompt_tokens


def test_streaming_gives_the_same(url):
    whole = ask(url, max_tokens=60)
    chunks = list(ask(url, max_tokens=60, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece for piece in pieces if piece) == text_of(whole)
    assert len(pieces) > 5, "it came in pieces"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_is_whole_lines_of_utf8_that_end_with_done(url):
    body = {"model": MODEL_NAME, "messages": QUESTION, "max_tokens": 60, "stream": True}
    raw = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.content.decode("utf-8").split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    contents = [json.loads(e.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for e in events[:-2]]
    assert "".join(contents) == text_of(ask(url, max_tokens=60))
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


def test_stop(url):
    whole = text_of(ask(url, max_tokens=30))
    stop = whole[4:6]
    answer = ask(url, max_tokens=30, stop=[stop, "never said"])
    assert text_of(answer) == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
    chunks = ask(url, max_tokens=30, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text_of(answer)


def test_seed_and_temperature(url):
    hot = {"temperature": 1.5, "top_p": 0.95, "max_tokens": 20}
    one = text_of(ask(url, seed=1, **hot))
    assert one == text_of(ask(url, seed=1, **hot))
    assert one != text_of(ask(url, seed=2, **hot))
    assert text_of(ask(url, **hot)) != text_of(ask(url, **hot)), "without a seed each answer is another"


def test_sixteen_at_once_answer_as_alone(url):
    requests = []
    for i in range(16):
        color, size = (16 * i, 255 - 10 * i, 40), (60 + 20 * i, 90)
        images = [image_part(data_url(png(color, size)))] * (i % 3)
        messages = [user(*images, text_part("何が写っていますか？" * (1 + i % 4)))]
        requests.append({"messages": messages, "max_tokens": 4 + 3 * (i % 5)})
    alone = [text_of(ask(url, **request)) for request in requests]
    assert len(set(alone)) > 10, "they differ"
    batches = number(url, "vlmsft_batch_requests_count")

    def streamed_or_not(i):
        if i % 2:
            return text_of(ask(url, **requests[i]))
        return "".join(c.choices[0].delta.content or "" for c in ask(url, stream=True, **requests[i]))

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(streamed_or_not, range(16)))
    assert together == alone
    assert number(url, "vlmsft_batch_requests_count") - batches <= 8, "they were not batched"


def test_models(url):
    models = client(url).models.list().data
    assert [(model.id, model.object) for model in models] == [(MODEL_NAME, "model")]
    assert client(url).models.retrieve(MODEL_NAME).id == MODEL_NAME
    with pytest.raises(openai.NotFoundError):
        client(url).models.retrieve("other")


def test_health_and_metrics(url):
    assert httpx.get(f"{url}/health").status_code == 200
    names = ('vlmsft_requests_total{status="200"}', "vlmsft_prompt_tokens_total", "vlmsft_generated_tokens_total")
    before = [number(url, name) for name in names]
    usage = ask(url, max_tokens=7).usage
    wait_for(lambda: number(url, names[0]) > before[0])
    after = [number(url, name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, usage.prompt_tokens, usage.completion_tokens]
    assert number(url, "vlmsft_requests_running") == number(url, "vlmsft_requests_waiting") == 0
    for name in ("vlmsft_request_seconds_count", "vlmsft_first_text_seconds_count", "vlmsft_queue_seconds_count"):
        assert number(url, name) > 0


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(url, kind=openai.BadRequestError, **keywords):
    with pytest.raises(kind) as error:
        ask(url, **keywords)
    assert set(error.value.response.json()["error"]) == {"message", "type", "param", "code"}
    return error.value


def test_other_model(url):
    error = refused(url, openai.NotFoundError, model="gpt-4o")
    assert error.code == "model_not_found" and "'gpt-4o'" in error.message and f"'{MODEL_NAME}'" in error.message


def test_too_long_says_the_numbers(url, settings):
    length = ask(url).usage.prompt_tokens
    error = refused(url, max_tokens=settings.max_model_len - length + 1)
    assert error.code == "context_length_exceeded" and error.param == "max_tokens"
    for count in (length, settings.max_model_len - length + 1, settings.max_model_len):
        assert str(count) in error.message
    error = refused(url, messages=[user(text_part("長い" * 400))], max_tokens=1)
    assert error.param == "messages" and str(settings.max_model_len) in error.message


def test_bad_image_names_its_part(url):
    error = refused(url, messages=[user(text_part("?"), image_part("data:image/png;base64,AAAA"))])
    assert error.param == "messages[0].content[1].image_url" and "image" in error.message


def test_unknown_paths_and_methods_are_openai_shaped(url):
    for response in (httpx.get(f"{url}/v1/nothing"), httpx.get(f"{url}/v1/chat/completions")):
        assert response.status_code in (404, 405) and response.json()["error"]["type"] == "invalid_request_error"


def test_body_limit(url, settings):
    big = b'{"model": "' + b"x" * settings.max_body_bytes + b'"}'
    response = httpx.post(f"{url}/v1/chat/completions", content=big)
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"

    def pieces():  # without a length in front
        for _ in range(3):
            yield b" " * (settings.max_body_bytes // 2)

    assert httpx.post(f"{url}/v1/chat/completions", content=pieces()).status_code == 413


def test_key(serving):
    with serving(ToyGenerator(), api_key="right") as url:
        for key in ("wrong", "ri\u00e9ght"):
            response = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            ask(url)
        answer = client(url, "right").chat.completions.create(model=MODEL_NAME, messages=QUESTION, max_tokens=2)
        assert text_of(answer) == "word word "
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/metrics").status_code == 200


def test_full_queue(serving):
    hold = threading.Event()
    toy = ToyGenerator(hold=hold)
    with serving(toy, max_num_seqs=1, max_waiting=1, gather_seconds=0) as url, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, url)]
        wait_for(lambda: toy.batches)
        running.append(pool.submit(ask, url))
        wait_for(lambda: number(url, "vlmsft_requests_waiting") == 1)
        with pytest.raises(openai.RateLimitError) as error:
            ask(url)
        assert error.value.code == "queue_full" and int(error.value.response.headers["Retry-After"]) >= 1
        hold.set()
        assert [text_of(answer.result(10)) for answer in running] == ["word " * 12] * 2
        assert text_of(ask(url)) == "word " * 12, "its place is free again"


# --- faults -----------------------------------------------------------------------------------------------------------


def test_failure_before_the_first_text(serving):
    toy = ToyGenerator(fail_at=0)
    with serving(toy) as url:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as error:
                ask(url, stream=stream)
            assert error.value.response.json()["error"]["type"] == "server_error"
            assert "memory" not in str(error.value), "what went wrong inside is for the log"
        toy.fail_at = None
        assert text_of(ask(url)) == "word " * 12, "the next request is answered"


def test_failure_in_the_middle(serving):
    with serving(ToyGenerator(fail_at=3)) as url:
        with pytest.raises(openai.InternalServerError):
            ask(url)
        pieces = []
        with pytest.raises(openai.APIError, match="its log says why"):
            pieces += [chunk.choices[0].delta.content for chunk in ask(url, stream=True)]
        wait_for(lambda: number(url, 'vlmsft_requests_total{status="500"}') == 2)


def connection(url):
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))


def raw_request(fields) -> bytes:
    body = json.dumps({"model": MODEL_NAME, "messages": QUESTION, **fields}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(serving, stream):
    toy = ToyGenerator(pause_seconds=0.02)
    with serving(toy) as url:
        with connection(url) as client:
            client.sendall(raw_request({"max_tokens": 380, "stream": stream}))
            wait_for(lambda: toy.batches)
            if stream:
                assert client.recv(1000).startswith(b"HTTP/1.1 200")
        wait_for(lambda: toy.cancelled_at)
        assert toy.cancelled_at[0] < 200
        wait_for(lambda: number(url, 'vlmsft_requests_total{status="499"}') == 1)
        assert number(url, "vlmsft_requests_running") == 0
        assert text_of(ask(url, max_tokens=2)) == "word word "


def test_one_that_leaves_while_waiting_is_not_generated(serving):
    hold = threading.Event()
    toy = ToyGenerator(hold=hold)
    with serving(toy, max_num_seqs=1, gather_seconds=0) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, url)
        wait_for(lambda: toy.batches)
        with connection(url) as client:
            client.sendall(raw_request({}))
            wait_for(lambda: number(url, "vlmsft_requests_waiting") == 1)
        wait_for(lambda: number(url, 'vlmsft_requests_total{status="499"}') == 1)
        hold.set()
        first.result(10)
        ask(url)
        assert toy.batches == [1, 1]


def test_one_that_leaves_within_its_request(serving):
    with serving(ToyGenerator()) as url:
        with connection(url) as client:
            client.sendall(raw_request({})[:-10])
            time.sleep(0.1)
        wait_for(lambda: number(url, 'vlmsft_requests_total{status="499"}') == 1)


def test_waiting_requests_share_a_batch(serving):
    hold = threading.Event()
    toy = ToyGenerator(hold=hold)
    with serving(toy, max_num_seqs=4, gather_seconds=0) as url, ThreadPoolExecutor(7) as pool:
        first = pool.submit(ask, url)
        wait_for(lambda: toy.batches)
        others = [pool.submit(ask, url, max_tokens=i + 1) for i in range(6)]
        wait_for(lambda: number(url, "vlmsft_requests_waiting") == 6)
        hold.set()
        assert sorted(len(text_of(o.result(10)).split()) for o in others) == [1, 2, 3, 4, 5, 6]
        first.result(10)
    assert toy.batches == [1, 4, 2]


def test_a_short_answer_does_not_wait_for_its_batch(serving):
    toy = ToyGenerator(pause_seconds=0.02)
    with serving(toy, max_num_seqs=2, gather_seconds=20) as url, ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, url, max_tokens=100)
        short = pool.submit(ask, url, max_tokens=1)
        short.result(10)
        assert not long.done() and toy.batches == [2]


def test_the_end_of_the_server_ends_answers(serving):
    toy = ToyGenerator(pause_seconds=0.05)
    with ThreadPoolExecutor(1) as pool:
        with serving(toy) as url:
            answer = pool.submit(ask, url, max_tokens=40)
            wait_for(lambda: toy.batches)
            start = time.monotonic()
        assert text_of(answer.result(1)) == "word " * 40, "what runs may end"
        assert time.monotonic() - start < 5


def test_defaults_and_given_values_reach_the_generator(serving):
    toy = ToyGenerator()
    with serving(toy) as url:
        ask(url)
        ask(url, temperature=0.5, top_p=0.9, seed=7, stop="x", max_tokens=openai.NOT_GIVEN, max_completion_tokens=3)
        ask(url, max_tokens=None)
    first, second, third = toy.samplings
    assert (first.temperature, first.top_p, first.max_new_tokens, first.stop) == (0.0, 1.0, 12, ())
    assert second == Sampling(max_new_tokens=3, temperature=0.5, top_p=0.9, seed=7, stop=("x",))
    assert third.max_new_tokens == 390, "all that fits"
