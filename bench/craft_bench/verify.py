"""No speed-up of an op whose tests are red: its tests run before it is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from craft_fast.errors import EnvironmentProblem

FORCE = "CRAFT_KERNELS_IMPL"
INTERPRET = "TRITON_INTERPRET"
TIMEOUT_S = 300.0
_CORES_A_RUN = 4
_BAD = ("failure", "error")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an op may show speed-ups.

    Args:
        checked: ``tests``, or ``self-check`` where no tests are: then each case's own check decides.
        green: nothing failed.
        detail: for a person: how many passed in which time, or what failed.
    """

    checked: Literal["tests", "self-check"]
    green: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.checked} {'green' if self.green else 'RED'}, {self.detail}"


def refuse_a_forced_form(device_type: str) -> None:
    """Every row would name one form and time another.

    Raises:
        EnvironmentProblem: ``CRAFT_KERNELS_IMPL`` is set, or on a GPU Triton's interpreter is asked for.
    """
    reasons = {FORCE: "it comes before the form that a benchmark asks for, so every row would be false"}
    if device_type == "cuda":
        reasons[INTERPRET] = "kernels would run in Triton's interpreter, thousands of times slower"
    for name, why in reasons.items():
        value = os.environ.get(name, "")
        if value and not (name == INTERPRET and value == "0"):
            raise EnvironmentProblem(
                "The ops' forms cannot be compared while one is forced",
                where=f"{name}={value}",
                why=why,
                hint=f"unset {name}",
            )


def tests_folder() -> Path | None:
    """``tests/kernels`` of the checkout that the ops are imported from; None for an installed wheel."""
    import craft_kernels

    folder = Path(craft_kernels.__path__[0]).resolve().parents[1] / "tests" / "kernels"
    return folder if folder.is_dir() else None


def verdicts(
    ops: Sequence[str],
    device_type: str,
    *,
    folder: Path | None,
    log: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Verdict]:
    """Run the tests of the ops, each op's in a process of its own, some at a time.

    A process of its own, since an illegal memory access fails whatever comes after it; some at a time, since on a GPU
    most of the time goes into compiling kernels, on one core. Where an op's tests ran out of memory beside others'
    (some need tens of GiB), they run again alone; no other failure is tried twice.

    Args:
        ops: names of ops.
        device_type: ``cuda`` runs the tests marked ``gpu``, ``cpu`` those that run by default.
        folder: where ``test_<op>*.py`` are, from ``tests_folder``.
        log: file that gets what pytest says.
        timeout_s: longest time for the whole.

    Returns:
        One verdict an op.
    """
    files = {op: sorted(folder.glob(f"test_{op}*.py")) if folder is not None else [] for op in ops}
    tested = [op for op in ops if files[op]]
    found = {op: Verdict("self-check", True, "no tests are here: each case's own check decides") for op in ops}
    if not tested or folder is None:
        return found
    ends = time.monotonic() + timeout_s

    def run(op: str) -> _Outcome:
        return _run(files[op], device_type, folder, log, max(1.0, ends - time.monotonic()))

    workers = min(max(1, (os.cpu_count() or 1) // _CORES_A_RUN), len(tested))
    with ThreadPoolExecutor(workers) as pool:
        outcomes = dict(zip(tested, pool.map(run, tested), strict=True))
    for op, outcome in outcomes.items():
        found[op] = _verdict(run(op) if workers > 1 and outcome.out_of_memory else outcome)
    return found


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a pytest process said: for each test its name, how it ended and how long it took."""

    exit_code: int
    timed_out: bool
    tests: list[tuple[str, str, float]]
    last_line: str
    out_of_memory: bool


def _run(files: Sequence[Path], device_type: str, folder: Path, log: Path | None, timeout_s: float) -> _Outcome:
    root = folder.parents[1]
    with tempfile.TemporaryDirectory(prefix="craft-bench-") as scratch:
        report = Path(scratch) / "report.xml"
        marks = ["-m", "gpu"] if device_type == "cuda" else []
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *marks),
            *(str(path) for path in files),
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CRAFT_", "PYTEST_"))}
        timed_out = False
        try:
            done = subprocess.run(
                command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                encoding="utf-8", errors="replace", timeout=timeout_s, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            exit_code, said = done.returncode, done.stdout
        except subprocess.TimeoutExpired as expired:
            exit_code, timed_out = -1, True
            output = expired.stdout or b""
            said = output.decode("utf-8", "replace") if isinstance(output, bytes) else output
        if log is not None:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ {' '.join(command)}\n{said}\nexit code {exit_code}\n\n")
        tests = _read(report)
        failed = any(ending in _BAD for _, ending, _ in tests)
        short = failed and "out of memory" in said.lower()
        return _Outcome(exit_code, timed_out, tests, (said.strip().splitlines() or [""])[-1], short)


def _read(report: Path) -> list[tuple[str, str, float]]:
    try:
        # Our own file of a moment ago, and the standard parser loads no entity from outside.
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    endings = (*_BAD, "skipped")
    return [
        (
            case.get("name", ""),
            next((ending for ending in endings if case.find(ending) is not None), "passed"),
            float(case.get("time", 0)),
        )
        for case in cases
    ]


def _verdict(outcome: _Outcome) -> Verdict:
    if outcome.timed_out:
        return Verdict("tests", False, "the tests did not end in time")
    bad = [name for name, ending, _ in outcome.tests if ending in _BAD]
    if bad:
        return Verdict("tests", False, f"{len(bad)} of {len(outcome.tests)} failed: {bad[0]}")
    passed = [seconds for _, ending, seconds in outcome.tests if ending == "passed"]
    if passed and outcome.exit_code == 0:
        return Verdict("tests", True, f"{len(passed)} passed in {sum(passed):.0f} s")
    if outcome.tests or outcome.exit_code == 5:
        return Verdict("tests", False, "none of the tests ran on this device")
    return Verdict("tests", False, f"pytest ended with {outcome.exit_code}: {outcome.last_line}"[:200])
