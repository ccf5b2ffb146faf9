"""The openai expander against a real HTTP server on 127.0.0.1."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from craft_fast.config import ExpandSettings
from craft_fast.expanders.openai import OpenAIExpander
from craft_fast.prompt_lines import prompt_id
from craft_fast.records import Prompt


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(prompt_id(text), text, "train", i + 1) for i, text in enumerate(texts)]


class Server:
    """A chat-completions server on 127.0.0.1 whose answers a test decides; counts what it is asked."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], tuple[int, bytes]] = lambda body, n: (200, chat("x one\nx two"))
        self.headers: dict[str, str] = {"Content-Type": "application/json"}
        self.asked: list[dict[str, Any]] = []
        self.seen: list[dict[str, str]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                server.seen.append(dict(self.headers))
                status, data = server.reply(body, len(server.asked))
                try:
                    self.send_response(status)
                    for name, value in server.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                return None

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def chat(text: str, **message: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text, **message}}]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=lambda: found.http.serve_forever(poll_interval=0.01))
    thread.start()
    yield found
    found.http.shutdown()
    thread.join()
    found.http.server_close()


def client(server: Server, folder: Path, **changes: Any) -> OpenAIExpander:
    settings = ExpandSettings(
        **{"kind": "openai", "base_url": server.url, "model": "m", "timeout_s": 5.0, "retries": 0, **changes}
    )
    return OpenAIExpander(settings, folder, backoff_s=0.01)


def test_a_good_answer_is_asked_once_and_then_kept(server: Server, tmp_path: Path) -> None:
    [first] = client(server, tmp_path).expand(prompts("x"), 2, 0)
    [second] = client(server, tmp_path).expand(prompts("x"), 2, 0)
    assert first == second
    assert first.variants == ("x one", "x two")
    assert len(server.asked) == 1
    assert server.asked[0]["model"] == "m"
    assert "2 richer versions" in server.asked[0]["messages"][0]["content"]
    assert [len(path.stem) for path in tmp_path.iterdir()] == [64]


def test_another_seed_number_or_model_is_asked_anew(server: Server, tmp_path: Path) -> None:
    list(client(server, tmp_path).expand(prompts("x"), 2, 0))
    list(client(server, tmp_path).expand(prompts("x"), 2, 1))
    list(client(server, tmp_path).expand(prompts("x"), 1, 0))
    list(client(server, tmp_path, model="other").expand(prompts("x"), 2, 0))
    assert len(server.asked) == 4


def test_a_damaged_kept_answer_is_asked_again(server: Server, tmp_path: Path) -> None:
    list(client(server, tmp_path).expand(prompts("x"), 2, 0))
    [entry] = tmp_path.iterdir()
    entry.write_bytes(b"\x00{")
    [again] = client(server, tmp_path).expand(prompts("x"), 2, 0)
    assert again.problem is None
    assert len(server.asked) == 2


def test_the_key_comes_from_the_environment_and_is_not_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "very-secret")
    list(client(server, tmp_path, api_key_env="MY_KEY").expand(prompts("x"), 2, 0))
    assert server.seen[0]["Authorization"] == "Bearer very-secret"
    assert not any(b"very-secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_a_passing_error_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body, n: (500, b"broken") if n < 3 else (200, chat("x one\nx two"))
    [found] = client(server, tmp_path, retries=2).expand(prompts("x"), 2, 0)
    assert found.variants == ("x one", "x two")
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "data", "said", "tries"),
    [
        (500, b"out of\x1b memory", "the server answered 500: out of\\x1b memory", 2),
        (429, b"slow down", "the server answered 429", 2),
        (401, b"no key", "is OPENAI_API_KEY set?", 1),
        (404, b"no model", "the server answered 404", 1),
        (200, b"<html>", "not a chat completion", 2),
        (200, b'{"choices": []}', "not a chat completion", 2),
        (200, b"[" * 100_000, "not a chat completion", 2),
        (200, chat("x", content=None), "holds no text", 2),
        (200, chat("", refusal="I can not"), "the model refused: I can not", 1),
        (200, chat("I'm sorry, I can't help with that."), "the model refused: I'm sorry", 1),
        (200, chat("one line only"), "1 usable versions", 1),
        (200, b"x" * (2 << 20), "an answer of more than", 1),
    ],
)
def test_failures_are_problems_of_their_prompt_and_never_fatal(
    server: Server, tmp_path: Path, status: int, data: bytes, said: str, tries: int
) -> None:
    server.headers["Retry-After"] = "0"
    server.reply = lambda body, n: (status, data) if "bad" in str(body) else (200, chat("x one\nx two"))
    bad, good = client(server, tmp_path, retries=1).expand(prompts("bad", "good"), 2, 0)
    assert said in (bad.problem or "")
    assert bad.variants == ()
    assert good.problem is None
    assert len(server.asked) == tries + 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_redirect_is_not_followed_with_the_key(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "very-secret")
    server.headers["Location"] = f"{server.url}/elsewhere"
    server.reply = lambda body, n: (302, b"")
    [found] = client(server, tmp_path).expand(prompts("x"), 2, 0)
    assert "answered 302" in (found.problem or "")
    assert len(server.asked) == 1


def test_a_slow_server_is_given_up_in_time(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body, n: (time.sleep(1.0), (200, chat("late")))[1]
    start = time.monotonic()
    [found] = client(server, tmp_path, timeout_s=0.2).expand(prompts("x"), 2, 0)
    assert found.problem == "no answer within 0.2 s"
    assert time.monotonic() - start < 0.9


def test_a_server_that_is_not_there_is_asked_for_five_prompts_only(tmp_path: Path) -> None:
    settings = ExpandSettings(kind="openai", base_url="http://127.0.0.1:9/v1", model="m", retries=0)
    found = list(OpenAIExpander(settings, tmp_path).expand(prompts(*"abcdefgh"), 2, 0))
    assert all("refused" in (e.problem or "") for e in found)
    assert [(e.problem or "").startswith("not asked, the server failed 5 times") for e in found] == [False] * 5 + [
        True
    ] * 3


def test_refusals_do_not_count_as_a_failing_server(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body, n: (200, chat("", refusal="no"))
    found = list(client(server, tmp_path).expand(prompts(*"abcdefgh"), 2, 0))
    assert len(server.asked) == 8
    assert all("refused" in (e.problem or "") for e in found)
