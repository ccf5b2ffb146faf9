"""Progress is readable by a person, by a log, by a script; and says nothing when asked to."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from craft_cli.ui.meter import Meter, memory_gib
from craft_cli.ui.output import make_sink, progress
from craft_cli.ui.sinks import JsonLines, Plain, Quiet
from craft_cli.ui.text import ASCII, UNICODE, clean, duration, figure, marks, table, write_line
from craft_fast.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


STORY = """
import sys, time
from craft_fast.progress import Progress
from craft_cli.ui.output import progress

with progress(sys.argv[1]) as sink:
    sink.info("run: runs/tiny")
    sink.stage("expand", 1, 9, "nothing to do")
    for block in range(2):
        sink.stage("generate", 2, 9)
        with sink.task("generate", 64, "images") as task:
            for _ in range(4):
                time.sleep(0.05)
                task.advance(16)
        sink.stage("score", 3, 9)
        with sink.task("h", None, "images") as task:
            task.advance(64, mean=float("nan"))
    sink.warn("few \\x1b[2J accepted \\u2028 \\U0001f600")
    sink.stage("train", 6, 9)
    with sink.task("train", 10, "steps") as task:
        for step in range(10):
            time.sleep(0.05)
            task.advance(1, loss=0.5, peak_gib=1.25)
    if sys.argv[2:]:
        raise SystemExit(3)
"""


def test_meter_knows_rate_and_time_left() -> None:
    clock = Clock()
    meter = Meter("h", 40, "images", clock)
    assert (meter.rate, meter.left_s) == (None, None)
    clock.now += 4
    meter.advance(8, {"loss": 0.125})
    assert (meter.rate, meter.left_s) == (2.0, 16.0)
    assert meter.line() == "h: 8/40 images, 2 images/s, loss 0.125, 0:16 left"
    clock.now += 8
    meter.advance(8, {})
    assert (meter.rate, meter.left_s) == (1.0, 24.0)
    meter.advance(24, {})
    assert "left" not in meter.line()
    assert Meter("x", None, "images", clock).line() == "x: 0 images"
    assert Meter("x", 2, "images", clock).line("x") == "0/2 images"


def test_what_a_resumed_task_begins_with_is_not_speed() -> None:
    clock = Clock()
    meter = Meter("train", 300, "steps", clock)
    meter.advance(200, {})
    assert meter.rate is None
    for _ in range(10):
        clock.now += 0.5
        meter.advance(1, {})
    assert (meter.rate, meter.left_s) == (2.0, 45.0)


def test_memory_is_that_of_this_process() -> None:
    before = memory_gib()
    block = bytearray(os.urandom(1) * (200 << 20))
    after = memory_gib()
    assert before is not None
    assert after is not None
    assert after[0] - before[0] > 0.15
    assert after[1] >= after[0]
    assert len(block) == 200 << 20


def test_plain_lines_are_few() -> None:
    clock, stream = Clock(), io.StringIO()
    sink = Plain(stream, every_s=5, clock=clock)
    for _ in range(3):
        sink.stage("generate", 2, 9)
        with sink.task("images", 100, "images") as task:
            for _ in range(100):
                clock.now += 0.125
                task.advance()
        sink.stage("score", 3, 9)
        with sink.task("h", 100, "images") as task:
            task.advance(100)
    lines = stream.getvalue().splitlines()
    assert lines.count("[2/9] generate") == 1
    assert lines.count("[3/9] score") == 1
    told = [line for line in lines if "images/s" in line]
    assert 6 <= len(told) <= 9
    assert told[0].startswith("[2/9] generate: 40/100 images, 8 images/s, 7.5 s left, memory ")


def test_a_skipped_stage_says_so() -> None:
    stream = io.StringIO()
    sink = Plain(stream)
    sink.stage("cache", 5, 9, "up to date")
    sink.warn("careful")
    assert stream.getvalue() == "[5/9] cache: up to date\nwarning: careful\n"


def test_every_json_line_parses_strictly() -> None:
    stream = io.StringIO()
    sink = JsonLines(stream)
    sink.stage("train", 6, 9)
    with sink.task("train", 3, "steps") as task:
        task.advance(1, loss=float("nan"), grad=float("inf"))
        sink.stopping("SIGINT: stopping")
        task.advance(2, loss=0.5)
    sink.warn("line\u2028one\ntwo \x1b[2J")

    def refuse(text: str) -> float:
        raise AssertionError(text)

    rows = [json.loads(line, parse_constant=refuse) for line in stream.getvalue().split("\n")[:-1]]
    assert [row["event"] for row in rows] == ["stage", "progress", "stopping", "progress", "warning"]
    assert rows[1]["metrics"] == {"loss": None, "grad": None}
    assert (rows[3]["stage"], rows[3]["done"], rows[3]["total"], rows[3]["unit"]) == ("train", 3, 3, "steps")
    assert rows[3]["peak_gib"] > 0
    assert rows[3]["left_s"] == 0
    assert rows[4]["message"] == "line\u2028one\ntwo \x1b[2J"


def test_sinks_are_what_stages_expect(capsys: pytest.CaptureFixture[str]) -> None:
    """Each sink goes through the whole protocol; mypy checks the signatures, this the behaviour."""
    sinks: list[Progress] = [Quiet(), Plain(sys.stderr), JsonLines(sys.stdout)]
    for sink in sinks:
        sink.stage("train", 1, 2, "note")
        with sink.task("train", 2, "steps") as task:
            task.advance()
            task.advance(1, loss=1.0)
        sink.info("hello")
        sink.warn("hm")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5
    assert len(err.splitlines()) == 3


def test_the_sink_fits_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_sink("human"), Plain)
    assert isinstance(make_sink("json"), JsonLines)
    assert isinstance(make_sink("quiet"), Quiet)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_sink("human"), Plain)


def test_a_reader_that_went_away_does_not_stop_the_work() -> None:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    sink = JsonLines(stream)
    for _ in range(3):
        sink.info("x" * 100)
    with suppress(BrokenPipeError):
        stream.close()


def test_text_for_any_terminal() -> None:
    assert clean("a\x1b[31m\x07\u202eb\tc\nd é") == "a\\x1b[31m\\x07\\u202eb\tc\nd é"
    assert [duration(s) for s in (0.04, 9.94, 9.96, 61, 3600, 36_061)] == [
        "0.0 s",
        "9.9 s",
        "0:10",
        "1:01",
        "1:00:00",
        "10:01:01",
    ]
    assert figure("peak_gib", 1.25) == "peak 1.25 GiB"
    assert figure("images_per_s", 6.0) == "images 6/s"
    assert figure("learning_rate", 1e-4) == "learning rate 0.0001"
    assert table([["a", "1.5"], ["bcd", "10"]], right=[1]) == ["a    1.5", "bcd   10"]
    assert table([]) == []


def test_an_ascii_terminal_gets_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    assert marks(stream) is ASCII
    write_line(stream, "é ✓")
    assert raw.getvalue() == b"\\xe9 \\u2713\n"
    assert marks(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) is UNICODE


Terminal = Callable[..., tuple[int, str]]


@pytest.fixture
def terminal(craft_env: dict[str, str], tmp_path: Path) -> Terminal:
    """Run the story with stderr on a terminal of 100 columns; its exit code and what the terminal got."""
    fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))

    def run(*args: str, **env: str) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-c", STORY, *args],
            cwd=tmp_path,
            stderr=theirs,
            stdout=subprocess.DEVNULL,
            env={**craft_env, "TERM": "xterm-256color", **env},
        )
        os.close(theirs)
        got = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the terminal's other end is closed
                break
            if not chunk:
                break
            got += chunk
        os.close(ours)
        return process.wait(timeout=30), got.decode("utf-8")

    return run


def test_bars_on_a_terminal(terminal: Terminal) -> None:
    code, text = terminal("human")
    assert code == 0
    for part in (
        "run: runs/tiny",
        "2/9 generate",
        "/64 images",
        "images/s",
        "loss 0.5",
        "peak 1.25 GiB",
        "left",
        "memory",
        "elapsed",
        "━",
        "nothing to do",
    ):
        assert part in text, part
    assert "few \\x1b[2J accepted" in text
    assert "\x1b[2J" not in text
    last = text[text.rindex("1/9 expand") :]
    assert "128 images" in last
    assert "10 steps" in last
    assert "━" not in last
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_bars_after_an_error_show_where_it_stopped(terminal: Terminal) -> None:
    code, text = terminal("human", "fail")
    assert code == 3
    last = text[text.rindex("1/9 expand") :]
    assert last.count("✓") == 2
    assert last.count("✗") == 1
    assert last.index("✗") < last.index("6/9 train")
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_bars_on_an_ascii_terminal(terminal: Terminal) -> None:
    code, text = terminal("human", PYTHONIOENCODING="ascii")
    assert code == 0
    assert text.isascii()
    assert "6/9 train" in text


def test_progress_says_how_it_ended() -> None:
    with pytest.raises(ZeroDivisionError), progress("quiet"):
        _ = 1 / 0
