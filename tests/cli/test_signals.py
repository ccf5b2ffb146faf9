"""The first signal asks the run to stop, the second one ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from craft_cli.signals import StopRequest

WAIT = """
import sys, time
from craft_cli.signals import StopRequest
from craft_cli.ui.sinks import Plain
stop = StopRequest(Plain(sys.stderr).stopping)
with stop.installed():
    print("ready", flush=True)
    while not stop():
        time.sleep(0.01)
    print("stopping", flush=True)
    if len(sys.argv) > 1:
        time.sleep(30)
sys.exit(int(stop.exit_code))
"""


@pytest.fixture
def waiting(craft_env: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    def start(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WAIT, *args],
            env=craft_env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    return start


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_asks(number: int, code: int, waiting: Callable[..., subprocess.Popen[str]]) -> None:
    process = waiting()
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code
    assert out == "stopping\n"
    assert "stopping after this step" in err


def test_the_second_signal_ends_at_once(waiting: Callable[..., subprocess.Popen[str]]) -> None:
    process = waiting("stay")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "stopped at once" in err


def test_old_handlers_come_back() -> None:
    heard: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest(heard.append)
    with stop.installed():
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(heard) == 1
    assert stop.exit_code == 143
