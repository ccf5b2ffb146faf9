"""An op's tests decide whether its speed-ups may be shown; each verdict comes from a real run of pytest."""

from __future__ import annotations

from pathlib import Path

import pytest

from craft_bench import verify
from craft_bench.verify import Verdict, refuse_a_forced_form, verdicts
from craft_fast.errors import EnvironmentProblem

GREEN = "def test_one():\n    assert True\n\ndef test_two():\n    assert True\n"
RED = "def test_one():\n    assert 1 + 1 == 2\n\ndef test_two():\n    assert 1 + 1 == 3\n"
SKIPPED = "import pytest\n\n@pytest.mark.skip(reason='no device')\ndef test_one():\n    pass\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tests" / "kernels"
    path.mkdir(parents=True)
    return path


def judged(folder: Path, *ops: str, timeout_s: float = 60) -> dict[str, Verdict]:
    return verdicts(ops, "cpu", folder=folder, log=folder / "log.txt", timeout_s=timeout_s)


def test_green_and_red_are_told_apart(folder: Path) -> None:
    (folder / "test_good.py").write_text(GREEN)
    (folder / "test_bad.py").write_text(RED)
    (folder / "test_bad_more.py").write_text(GREEN)
    found = judged(folder, "good", "bad", "untested")
    assert (found["good"].checked, found["good"].green) == ("tests", True)
    assert found["good"].detail.startswith("2 passed in")
    assert (found["bad"].checked, found["bad"].green) == ("tests", False)
    assert found["bad"].detail == "1 of 4 failed: test_two"
    assert (found["untested"].checked, found["untested"].green) == ("self-check", True)
    assert "1 + 1 == 3" in (folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module_here\n", "failed"),
        (SKIPPED, "none of the tests ran"),
        ("import os\n\ndef test_one():\n    os._exit(3)\n", "pytest ended with 3"),
        ("", "none of the tests ran"),
    ],
)
def test_tests_that_show_nothing_are_red(text: str, said: str, folder: Path) -> None:
    (folder / "test_op.py").write_text(text)
    verdict = judged(folder, "op")["op"]
    assert not verdict.green
    assert said in verdict.detail


def test_tests_that_do_not_end_are_red(folder: Path) -> None:
    (folder / "test_op.py").write_text("import time\n\ndef test_one():\n    time.sleep(60)\n")
    verdict = judged(folder, "op", timeout_s=2)["op"]
    assert verdict == Verdict("tests", False, "the tests did not end in time")


def test_an_op_that_takes_the_process_down_does_not_condemn_the_others(folder: Path) -> None:
    (folder / "test_a.py").write_text("import os\n\ndef test_one():\n    os._exit(3)\n")
    (folder / "test_b.py").write_text(GREEN)
    found = judged(folder, "a", "b")
    assert (found["a"].green, found["b"].green) == (False, True)


FIRST_TIME = """
from pathlib import Path

def test_one():
    seen = Path(__file__).with_name("seen")
    if not seen.exists():
        seen.touch()
        raise RuntimeError("{message}")
"""


@pytest.mark.parametrize(("message", "green"), [("CUDA out of memory", True), ("wrong by 3", False)])
def test_only_a_shortage_of_memory_beside_others_is_tried_again_alone(
    message: str, green: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 16)
    (folder / "test_a.py").write_text(FIRST_TIME.format(message=message))
    (folder / "test_b.py").write_text(GREEN)
    found = judged(folder, "a", "b")
    assert (found["a"].green, found["b"].green) == (green, True)


def test_the_checkouts_tests_are_found_and_a_wheel_has_none() -> None:
    assert verify.tests_folder() == Path(__file__).parents[1] / "kernels"
    found = verdicts(["geglu"], "cpu", folder=None)
    assert (found["geglu"].checked, found["geglu"].green) == ("self-check", True)


@pytest.mark.parametrize(
    ("name", "value", "device", "refused"),
    [
        ("CRAFT_KERNELS_IMPL", "torch", "cpu", True),
        ("CRAFT_KERNELS_IMPL", "", "cpu", False),
        ("TRITON_INTERPRET", "1", "cuda", True),
        ("TRITON_INTERPRET", "0", "cuda", False),
        ("TRITON_INTERPRET", "1", "cpu", False),
    ],
)
def test_a_forced_form_is_refused(
    name: str, value: str, device: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(name, value)
    if not refused:
        refuse_a_forced_form(device)
        return
    with pytest.raises(EnvironmentProblem) as told:
        refuse_a_forced_form(device)
    assert told.value.where == f"{name}={value}"
    assert told.value.hint == f"unset {name}"
