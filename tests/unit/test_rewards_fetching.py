"""Files over HTTP onto the shelf: whole, resumed, refused. The server is real, on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from craft_fast.errors import ConfigError, EnvironmentProblem, IntegrityError, Interrupted, ResourceError
from craft_fast.progress import Silent
from craft_fast.rewards import fetching, shelf
from craft_fast.rewards.catalog import Asset
from craft_fast.rewards.transfer import part_of
from tests.unit.file_server import COMMIT, Served, Server, running

DATA = bytes(range(256)) * 1200  # 300 kB, in several pieces
SHA = hashlib.sha256(DATA).hexdigest()
URL = "/own/model/resolve/main/weights.bin"
ASSET = Asset("weights", "own/model", "weights.bin", len(DATA), True, SHA)
LOOSE = Asset("weights", "own/model", "weights.bin", len(DATA))


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.fixture
def server(one_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    one_server.files.clear()
    one_server.requests.clear()
    one_server.go_on.clear()
    monkeypatch.setenv("CRAFT_FAST_REWARDS", str(tmp_path / "shelf"))
    monkeypatch.setenv("HF_ENDPOINT", one_server.address + "/")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return one_server


class Log(Silent):
    """What was told: a line for every info, a sum for every task."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tasks: list[list[Any]] = []

    def info(self, message: str) -> None:
        self.lines.append(message)

    @contextmanager
    def task(self, label: str, total: int | None, unit: str) -> Iterator[Any]:
        row = [label, total, unit, 0]
        self.tasks.append(row)

        class Task:
            def advance(self, n: int = 1, **_metrics: float) -> None:
                row[3] += n

        yield Task()


def get(asset: Asset = ASSET, pauses: list[float] | None = None, **more: Any) -> Path:
    slept = pauses if pauses is not None else []
    return fetching.fetch([asset], sleep=slept.append, **more)[0]


def left_over() -> list[str]:
    return sorted(path.name for path in shelf.place(ASSET).parent.iterdir() if not path.name.endswith(".lock"))


def begin(count: int, data: bytes = DATA, identity: str = f"{SHA} {len(DATA)}") -> None:
    part = part_of(shelf.place(ASSET))
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(data[:count])
    part.with_name(part.name + ".json").write_text(json.dumps({"file": identity}))


def test_a_file_comes_whole_and_is_recorded(server: Server) -> None:
    server.add(URL, Served(DATA))
    log = Log()
    path = get(progress=log)
    assert path == shelf.shelf() / "own--model" / "weights.bin"
    assert path.read_bytes() == DATA
    assert left_over() == ["weights.bin"]
    entry = json.loads((shelf.shelf() / "known.json").read_text())["own--model/weights.bin"]
    assert (entry["sha256"], entry["size"], entry["checked"], entry["revision"]) == (SHA, len(DATA), "pinned", COMMIT)
    assert log.tasks == [["own/model weights.bin", 308, "kB", 308]]
    assert get() == path
    assert len(server.requests) == 1  # what is there is not asked for again


def test_a_broken_connection_is_taken_up_where_it_broke(server: Server) -> None:
    served = server.add(URL, Served(DATA, cuts=[100_000, 50_000]))
    log, pauses = Log(), []
    assert get(pauses=pauses, progress=log).read_bytes() == DATA
    assert server.ranges() == [None, "bytes=100000-", "bytes=150000-"]
    assert pauses == [1.0, 2.0]
    assert "ended after 100,000 of 307,200 bytes" in log.lines[0]
    assert served.cuts == []


def test_a_stop_keeps_what_came_and_the_same_call_goes_on(server: Server) -> None:
    server.add(URL, Served(DATA))
    with pytest.raises(Interrupted) as stopped:
        get(should_stop=lambda: True)
    assert "same command continues" in stopped.value.hint
    came = part_of(shelf.place(ASSET)).stat().st_size
    assert 0 < came < len(DATA)
    assert not shelf.place(ASSET).exists()
    assert get().read_bytes() == DATA
    assert server.ranges() == [None, f"bytes={came}-"]


def test_a_server_without_ranges_begins_anew(server: Server) -> None:
    server.add(URL, Served(DATA, ranges=False))
    begin(1000)
    assert get().read_bytes() == DATA
    assert server.ranges() == ["bytes=1000-"]


def test_another_file_on_the_server_begins_anew(server: Server) -> None:
    other = DATA[::-1]
    server.add(URL, Served(other))
    begin(1000)
    pauses: list[float] = []
    assert get(LOOSE, pauses=pauses).read_bytes() == other
    assert server.ranges() == ["bytes=1000-", None]
    assert len(pauses) == 1


def test_a_changed_file_is_not_sewn_to_the_old_one_where_no_sha256_is_known(server: Server) -> None:
    other = DATA[::-1]
    server.add(URL, Served(other, etag="second", linked=False))
    begin(1000, identity=f'"first" {len(DATA)}')
    assert get(LOOSE).read_bytes() == other
    shelf.place(LOOSE).unlink()
    begin(1000, other, identity=f'"second" {len(DATA)}')
    assert get(LOOSE).read_bytes() == other
    assert server.ranges() == ["bytes=1000-", None, "bytes=1000-"]


@pytest.mark.parametrize("count", [len(DATA), len(DATA) + 5])
def test_a_part_that_reaches_the_end(server: Server, count: int) -> None:
    server.add(URL, Served(DATA))
    begin(count, DATA + b"extra")
    assert get().read_bytes() == DATA
    assert server.ranges() == ([f"bytes={count}-"] if count == len(DATA) else [f"bytes={count}-", None])


def test_a_part_with_wrong_bytes_is_found_out_and_made_anew(server: Server) -> None:
    server.add(URL, Served(DATA))
    begin(1000, bytes(1000))
    assert get().read_bytes() == DATA
    assert server.ranges() == ["bytes=1000-", None]


def test_a_part_of_unknown_origin_is_not_used(server: Server) -> None:
    server.add(URL, Served(DATA))
    begin(1000)
    part = part_of(shelf.place(ASSET))
    part.with_name(part.name + ".json").write_text("[")
    assert get().read_bytes() == DATA
    assert server.ranges() == [None]


def test_a_wrong_sha256_leaves_nothing(server: Server) -> None:
    wrong = DATA[:-1] + b"?"
    server.add(URL, Served(wrong))
    with pytest.raises(IntegrityError) as found:
        get()
    assert SHA in found.value.why
    assert hashlib.sha256(wrong).hexdigest() in found.value.why
    assert left_over() == []
    assert not (shelf.shelf() / "known.json").exists()


def test_without_a_pin_the_servers_own_sha256_is_checked(server: Server) -> None:
    served = server.add(URL, Served(DATA, etag="0" * 64))
    with pytest.raises(IntegrityError, match="wrong sha256"):
        get(LOOSE)
    served.etag = SHA
    get(LOOSE)
    assert json.loads((shelf.shelf() / "known.json").read_text())["own--model/weights.bin"]["checked"] == "server"
    shelf.place(LOOSE).unlink()
    served.linked, served.etag = False, "0" * 64  # an etag of the storage is no sha256
    get(LOOSE)
    assert json.loads((shelf.shelf() / "known.json").read_text())["own--model/weights.bin"]["checked"] == "nothing"


def test_another_size_is_refused_before_it_comes(server: Server) -> None:
    server.add(URL, Served(DATA + b"more"))
    with pytest.raises(IntegrityError, match="not the published one"):
        get()
    assert left_over() == []


@pytest.mark.parametrize(
    ("served", "said"),
    [
        (Served(b"<html>log in</html>" * 9, kind="text/html; charset=utf-8"), "web page"),
        (Served(b"please log in", kind="text/html"), "web page"),
        (Served(b" \n<!DOCTYPE html><p>log in"), "web page"),
        (Served(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
        (Served(DATA, statuses=[404] * 9), "404"),
        (Served(DATA, statuses=[401] * 9), "export HF_TOKEN"),
        (Served(DATA, redirect="ftp://127.0.0.1/weights.bin"), "not safe: ftp:"),
        (Served(DATA, redirect="file:///etc/passwd"), "answered 302"),
    ],
)  # fmt: skip
def test_what_cannot_help_itself_is_not_tried_again(server: Server, served: Served, said: str) -> None:
    server.add(URL, served)
    with pytest.raises(EnvironmentProblem) as refused:
        get(LOOSE)
    assert said in str(refused.value)
    assert f"put it at {shelf.place(LOOSE)}" in refused.value.why
    assert server.address + URL in refused.value.why
    assert len(server.requests) == 1
    assert left_over() == []


def test_a_busy_server_is_waited_for_but_not_for_ever(server: Server) -> None:
    served = server.add(URL, Served(DATA, statuses=[503, 429]))
    pauses: list[float] = []
    get(pauses=pauses)
    assert pauses == [1.0, 1.0]  # as it asked
    shelf.place(ASSET).unlink()
    served.statuses = [500] * 9
    with pytest.raises(EnvironmentProblem, match="not on this machine") as refused:
        get()
    assert f"500 Internal Server Error, {fetching.TRIES} times in a row" in refused.value.why
    assert len(served.statuses) == 9 - fetching.TRIES


def test_no_network_lists_every_missing_file(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    second = Asset("config", "own/other@abc", "sub/config.json", 100)
    with pytest.raises(EnvironmentProblem) as refused:
        fetching.fetch([ASSET, second], sleep=lambda _s: None)
    assert "cannot be reached" in refused.value.why
    for url, place in (
        ("http://127.0.0.1:9" + URL, shelf.place(ASSET)),
        ("http://127.0.0.1:9/own/other/resolve/abc/sub/config.json", shelf.shelf() / "own--other" / "sub/config.json"),
    ):
        assert f"{url}\n      put it at {place}\n" in refused.value.why + "\n"


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_asks_nothing(server: Server, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    server.add(URL, Served(DATA))
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentProblem, match="not on this machine") as refused:
        get(offline=how == "argument")
    assert "may not be asked" in refused.value.why
    assert str(shelf.place(ASSET)) in refused.value.why
    assert server.requests == []
    shelf.place(ASSET).parent.mkdir(parents=True)
    shelf.place(ASSET).write_bytes(DATA)
    assert get(offline=True) == shelf.place(ASSET)  # nothing is missing, so nothing is wrong


def test_the_token_stays_with_its_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running() as elsewhere:
        elsewhere.add("/blob", Served(DATA))
        server.add("/own/new/weights.bin", Served(DATA, redirect=f"{elsewhere.address}/blob"))
        server.add(URL, Served(DATA, redirect=f"{server.address}/own/new/weights.bin"))
        begin(1000)
        assert get().read_bytes() == DATA
        assert [headers.get("Authorization") for _, headers in server.requests] == ["Bearer hf_secret"] * 2
        ((_, headers),) = elsewhere.requests
        assert "Authorization" not in headers
        assert headers["Range"] == "bytes=1000-"


def test_the_token_is_not_sent_in_the_clear_nor_to_github(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    assert fetching.hub_token("https://hub.example/x") == "hf_secret"
    assert fetching.hub_token("http://hub.example/x") is None
    monkeypatch.setenv("HF_TOKEN", "hf_\nsecret")
    with pytest.raises(ConfigError):
        fetching.hub_token("https://hub.example/x")


def test_files_of_github_go_without_the_token(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(fetching, "_GITHUB", server.address)
    server.add("/own/head/v1/a%2Bb.pth", Served(DATA))
    asset = Asset("head", "github:own/head@v1", "a+b.pth", len(DATA), True, SHA)
    assert get(asset) == shelf.shelf() / "own--head" / "a+b.pth"
    assert "Authorization" not in server.requests[0][1]


def test_a_proxy_is_obeyed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    server.add("http://hub.example" + URL, Served(DATA))
    assert get().read_bytes() == DATA


def test_an_endpoint_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "file:///srv/models")
    with pytest.raises(ConfigError, match="address"):
        fetching.hub_endpoint()


def test_two_at_once_fetch_once(server: Server) -> None:
    server.add(URL, Served(DATA, cuts=[1000], pause_s=20))
    log, errors = Log(), []

    def fetch(progress: Silent) -> None:
        try:
            get(progress=progress)
        except BaseException as error:  # told below: a thread's own would be lost
            errors.append(error)

    first = threading.Thread(target=fetch, args=(Silent(),))
    first.start()
    wait_for(lambda: bool(server.requests))
    second = threading.Thread(target=fetch, args=(log,))
    second.start()
    wait_for(lambda: bool(log.lines))
    assert "another process" in log.lines[0]
    server.go_on.set()
    first.join(20)
    second.join(20)
    assert errors == []
    assert shelf.place(ASSET).read_bytes() == DATA
    assert len(server.requests) == 1


def wait_for(true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if true():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen")


def test_room_is_looked_for_before_the_first_byte(server: Server) -> None:
    server.add(URL, Served(DATA))
    with pytest.raises(ResourceError, match="no room"):
        get(Asset("weights", "own/model", "weights.bin", 10**18))
    assert server.requests == []


def test_a_full_disk_keeps_what_came(server: Server) -> None:
    server.add(URL, Served(DATA))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ResourceError, match="disk is full"):
            get()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert part_of(shelf.place(ASSET)).stat().st_size == 200_000
    assert get().read_bytes() == DATA
    assert server.ranges() == [None, "bytes=200000-"]


def test_a_shelf_that_cannot_be_written_is_told(server: Server, tmp_path: Path) -> None:
    server.add(URL, Served(DATA))
    (tmp_path / "shelf").write_text("a file")
    with pytest.raises((ResourceError, EnvironmentProblem)) as refused:
        get()
    assert os.fspath(tmp_path / "shelf") in str(refused.value)
