import os

import pytest

from vlmsft.data.prepare.download import download
from vlmsft.errors import UserError

CONTENT = os.urandom(1 << 20)


@pytest.fixture
def fetch(server, tmp_path):
    server.content = CONTENT
    target = tmp_path / "downloads" / "train2017.zip"

    def fetch(num_attempts=3):
        seen = []
        download(
            server.url, target, num_attempts=num_attempts, progress=lambda *now: seen.append(now), wait_seconds=0.001
        )
        return target.read_bytes(), seen

    fetch.partial = target.with_name("train2017.zip.partial")
    return fetch


def test_cut_connections_are_taken_up_where_they_ended(server, fetch):
    server.cut_after = 300_000
    content, seen = fetch(num_attempts=2)  # more cuts than attempts: each brings something
    assert content == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert fetch.partial.parent.joinpath("train2017.zip") in list(fetch.partial.parent.iterdir())
    assert len(list(fetch.partial.parent.iterdir())) == 1
    fetch()
    assert len(server.requests) == 4  # nothing to do


def test_another_start_goes_on(server, fetch):
    server.cut_after = 300_000
    server.num_errors = 0
    fetch.partial.parent.mkdir()
    fetch.partial.write_bytes(CONTENT[:5000])
    fetch.partial.with_name("train2017.zip.partial.json").write_text('"\\"1\\""')
    assert fetch()[0] == CONTENT
    assert server.requests[0] == "bytes=5000-"


@pytest.mark.parametrize("change", ["etag", "no ranges"])
def test_a_file_that_changed_on_the_server_is_fetched_from_its_beginning(server, fetch, change):
    fetch.partial.parent.mkdir()
    fetch.partial.write_bytes(b"old" * 1000)
    fetch.partial.with_name("train2017.zip.partial.json").write_text('"\\"0\\""')
    server.has_ranges = change == "etag"
    assert fetch()[0] == CONTENT


def test_a_busy_server_is_asked_again(server, fetch):
    server.num_errors = 2
    assert fetch()[0] == CONTENT
    assert len(server.requests) == 3


def test_it_gives_up_in_the_end_and_keeps_what_came(server, fetch):
    server.cut_after = 0
    with pytest.raises(
        UserError, match=r"3 failures in a row.*CutOff|3 failures in a row.*RemoteProtocolError"
    ) as error:
        fetch()
    assert "bytes stay" in error.value.state
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_said_at_once(server, fetch, status):
    server.status = status
    with pytest.raises(UserError, match=f"HTTP {status}"):
        fetch()
    assert len(server.requests) == 1


def test_no_server(tmp_path):
    with pytest.raises(UserError, match="ConnectError"):
        download("http://127.0.0.1:9/x", tmp_path / "x", num_attempts=1, progress=lambda *_: None, wait_seconds=0.001)
