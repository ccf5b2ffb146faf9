"""What is spoken with a package's process, and what happens when it dies, babbles, fails or wants the network."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_fast.config import RewardSettings
from craft_fast.errors import ConfigError, CraftError, EnvironmentProblem, IntegrityError, ResourceError
from craft_fast.rewards import catalog
from craft_fast.rewards.loaders import RewardSource
from craft_fast.rewards.packages import environments
from craft_fast.rewards.packages.client import PackageReward, load_package_reward, package_key, package_provenance
from craft_fast.rewards.packages.connection import Connection
from craft_fast.rewards.pixels import Pictures
from tests.unit.stand_in import finish, make_stand_in

Open = Callable[[str], Connection]
SETTINGS = RewardSettings(kind="hpsv2.1", backend="package")


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Open]:
    made: list[Connection] = []

    def start(img_score: str) -> Connection:
        folder = make_stand_in(tmp_path / "hpsv2-x", img_score)
        made.append(Connection("hpsv2", folder / "bin" / "python", where="reward h"))
        return made[-1]

    yield start
    for one in made:
        one.close()


def load(connection: Connection) -> None:
    connection.ask("load", files={"weights": "x"}, device="cpu", dtype="auto", hps_version="v2.1", tokenizer=None)


def test_the_worker_says_what_is_installed_there(connect: Open) -> None:
    connection = connect("")
    assert connection.versions["hpsv2x"] == "1.2.0"
    assert connection.versions["torch"] == torch.__version__.partition("+")[0] or "+" in connection.versions["torch"]
    with pytest.raises(CraftError, match="package hpsv2 failed") as caught:
        connection.ask("dance")
    assert "no such operation: dance" in caught.value.why
    with pytest.raises(CraftError, match="package hpsv2 failed") as caught:
        connection.ask("score", prompts=[])
    assert "score before load" in caught.value.why
    assert connection.alive


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        ("import os; print('last words'); os.write(1, b'noise\\n'); os._exit(3)", CraftError, "exit code 3"),
        ("import os; print('last words'); os.kill(os.getpid(), 9)", ResourceError, "signal SIGKILL"),
        ("print('last words'); import a_module_that_is_not_there", EnvironmentProblem, "a_module_that_is_not_there"),
        ("import socket; socket.getaddrinfo('localhost', 80)", CraftError, "the package asked for the network"),
        ("import socket; socket.socket().connect(('127.0.0.1', 9))", CraftError, "the package asked for the network"),
        ("import os; raise ValueError(sorted(n for n in os.environ if 'TOKEN' in n))", CraftError, "ValueError: []"),
    ],
    ids=["exit", "killed", "import", "look-up", "connect", "secrets"],
)
def test_what_goes_wrong_there_has_a_name_here(
    code: str, kind: type[CraftError], told: str, connect: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    connection = connect(code)
    with pytest.raises(CraftError) as caught:
        load(connection)
    assert type(caught.value) is kind
    # TOKENIZERS_PARALLELISM is ours; nothing of the user's with that word in it comes through.
    assert told.replace("[]", "['TOKENIZERS_PARALLELISM']") in caught.value.why
    assert caught.value.where == "reward h"
    assert caught.value.hint
    if "last words" in code:
        assert "last words" in caught.value.why


def test_prints_do_not_disturb_the_answers(connect: Open) -> None:
    connection = connect(
        "import os; print('{\"ok\": true}'); os.write(1, b'{\"ok\": true}\\n'); raise RuntimeError('x')"
    )
    with pytest.raises(CraftError, match="package hpsv2 failed") as caught:
        load(connection)
    assert caught.value.why == "RuntimeError: x"
    assert connection.ask("hello")["package"] == "hpsv2"


@pytest.mark.parametrize(
    "answer", ["hello, world", '{"ok": "yes"}', "[" * 5000, '{"ok": true, "protocol": 99}', '{"ok": true}', "\\0\\0"]
)
def test_an_answer_that_is_none_ends_it(answer: str, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\nread line\nprintf '{answer}\\n'\nsleep 60\n")
    script.chmod(0o755)
    with pytest.raises(IntegrityError, match="no answer") as caught:
        Connection("hpsv2", script, where="reward h")
    assert "rewards install hpsv2 --force" in caught.value.hint


def test_an_interpreter_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="does not start") as caught:
        Connection("hpsv2", tmp_path / "bin" / "python", where="reward h")
    assert caught.value.hint == "craft-fast rewards install hpsv2 --force"


def test_the_worker_ends_when_nobody_is_left_to_ask(connect: Open) -> None:
    connection = connect("")
    process = connection._process
    assert os.getsid(process.pid) == process.pid, "a Ctrl-C in the terminal must not reach it"
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
    with pytest.raises(CraftError, match="ended by itself"):
        connection.ask("hello")


# ---- the reward


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> RewardSource:
    weights = tmp_path_factory.mktemp("files") / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {"scale": torch.tensor(2.0)}}, weights)
    return RewardSource(catalog.get("hpsv2.1").spec, {"weights": weights}, None, "hpsv2.1")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> environments.Environment:
    folder = make_stand_in(tmp_path_factory.mktemp("packages") / "hpsv2-x")
    finish(folder)
    found = environments.read(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def reward(source: RewardSource, environment: environments.Environment) -> Iterator[PackageReward]:
    """One process for the tests of what it scores: it imports torch, which takes two seconds."""
    made = load_package_reward("h", SETTINGS, source, environment=environment)
    yield made
    made.close()


def pictures(*values: int) -> torch.Tensor:
    return torch.stack([torch.full((3, 6, 8), value, dtype=torch.uint8) for value in values])


def test_it_scores_each_picture_with_its_prompt(reward: PackageReward) -> None:
    # Ten pictures, of which the stand-in takes four at once: what it says of memory halves what it is given.
    prompts = ["x" * (1 + index % 3) for index in range(10)]
    found = reward.score(pictures(*range(0, 250, 25)), prompts)
    expected = [25 * index / 255 * len(prompt) * 2 for index, prompt in enumerate(prompts)]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    assert reward._chunk < 5
    mixed = Pictures.of([pictures(255)[0], torch.full((3, 3, 50), 51, dtype=torch.uint8)])
    assert reward.score_pictures(mixed, ["ab", "c"]).tolist() == pytest.approx([4.0, 0.4], rel=1e-6)
    assert reward.seconds > 0


def test_colours_arrive_as_they_were_sent(reward: PackageReward) -> None:
    picture = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    picture[0, 0, 0, 1], picture[0, 2, 1, 0] = 120, 12
    assert reward.score(picture, ["a"]).item() == pytest.approx(2 * (120 + 3 * 12) / 4 / 6 / 255, rel=1e-6)


def test_its_own_score_is_called_with_the_version(reward: PackageReward) -> None:
    assert reward.score_own(list(pictures(1, 2)), ["abc", ""]).tolist() == [3.5, 0.5]


@pytest.mark.parametrize(
    ("prompt", "told"), [("a nan", "nan from the package hpsv2x 1.2.0"), ("fail", "ValueError: the")]
)
def test_a_score_that_is_none_is_told_and_the_next_is_made(reward: PackageReward, prompt: str, told: str) -> None:
    with pytest.raises(CraftError) as caught:
        reward.score(pictures(1, 2), ["fine", prompt])
    assert told in caught.value.why
    assert "reward h" in caught.value.where
    assert reward.score(pictures(255), ["a"]).tolist() == [2.0]


def test_it_comes_back_after_it_was_killed_and_after_rest(reward: PackageReward) -> None:
    assert reward.score(pictures(255), ["a"]).tolist() == [2.0]
    assert reward._connection is not None
    process = reward._connection._process
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ResourceError, match="ended by itself"):
        reward.score(pictures(255), ["a"])
    assert reward.score(pictures(255), ["ab"]).tolist() == [4.0]
    assert reward._connection._process.pid != process.pid
    second = reward._connection._process
    reward.rest()
    assert second.poll() is not None, "its memory is given back"


def test_what_cannot_be_scored_is_refused(source: RewardSource, environment: environments.Environment) -> None:
    reward = load_package_reward("h", SETTINGS, source, environment=environment)
    with pytest.raises(CraftError, match="differ in number"):
        reward.score(pictures(1), ["a", "b"])
    reward.close()
    with pytest.raises(CraftError, match="closed"):
        reward.score(pictures(1), ["a"])


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_a_pickle_that_runs_code_never_reaches_the_package(
    tmp_path: Path, source: RewardSource, environment: environments.Environment
) -> None:
    os.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    bad = RewardSource(source.spec, {"weights": tmp_path / "evil.pt"}, None, "hpsv2.1")
    reward = load_package_reward("h", SETTINGS, bad, environment=environment)
    with pytest.raises(IntegrityError, match=r"evil\.pt|mkdir"):
        reward.score(pictures(1), ["a"])
    assert reward._connection is None
    assert not (tmp_path / "evil").exists()


def test_provenance_and_key_tell_the_package_apart(
    source: RewardSource, environment: environments.Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CRAFT_FAST_PACKAGES", str(environment.folder.parent))
    made = load_package_reward("h", SETTINGS, source)
    assert made.provenance.backend == "package hpsv2x 1.2.0 (torch 2.14.1)"
    assert made.provenance.note == "hps_version v2.1"
    assert made.provenance == package_provenance("h", SETTINGS, source, "cpu")
    assert package_provenance("h", SETTINGS, source, "cuda").precision == "autocast float16"
    assert package_key("h", SETTINGS, source) == made.key
    assert package_key("h", SETTINGS, source, dtype="float32") != made.key
    with pytest.raises(ConfigError, match="No package computes pickscore"):
        load_package_reward("p", RewardSettings(kind="pickscore", backend="package"), source)
    monkeypatch.setenv("CRAFT_FAST_PACKAGES", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="not there") as caught:
        package_key("h", SETTINGS, source)
    assert caught.value.hint == "craft-fast rewards install hpsv2"
