"""Makes the environments of the authors' packages. No torch here.

A virtual environment cannot be moved, so it is made where it will stay, and ``COMPLETE.json`` is written last: without
it the environment counts as not there, and the next ``install`` makes it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from craft_fast.errors import CraftError, EnvironmentProblem, Interrupted, ResourceError, UsageError
from craft_fast.progress import Progress, Silent
from craft_fast.rewards.packages import environments, table
from craft_fast.rewards.packages.connection import probe
from craft_fast.store import atomic

# Measured with torch 2.14.1 and its CUDA libraries: 5.9 GiB for hpsv2, 6.0 for image-reward, and some room to unpack.
FULL_BYTES = int(6.6 * 1024**3)
# torch without CUDA libraries and what the packages need: less cannot work.
LEAST_BYTES = int(1.5 * 1024**3)
# These would put the packages elsewhere, or let this toolkit's own into the new environment.
_DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER")
_TOLD = ("Collecting ", "Downloading ", "Building ", "Installing collected", "ERROR", "error:")


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``install`` will do.

    Attributes:
        package: which one.
        folder: of the environment.
        torch: release, None where the system's packages give it.
        requirements: all pins.
        commands: in their order.
    """

    package: table.Package
    folder: Path
    torch: str | None
    requirements: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


def installed(package: str) -> str | None:
    """What is installed of a package, such as ``hpsv2x 1.2.0 (torch 2.14.1)``; None: nothing that is finished."""
    found = environments.find(package)
    return found.label.removeprefix("package ") if found is not None else None


def environment(package: str) -> Path:
    """Interpreter of a package's environment.

    Raises:
        EnvironmentProblem: there is none; the hint makes it.
    """
    return environments.need(package).python


def make_plan(
    name: str,
    *,
    python: Path | None = None,
    torch: str | None = None,
    find_links: Path | str | None = None,
    system_site_packages: bool = False,
) -> Plan:
    """What ``install`` would do.

    Args:
        name: ``hpsv2`` or ``image-reward``.
        python: interpreter to make the environment from; None: this one.
        torch: its release; None: the one in use here.
        find_links: folder or page with more wheels, for pip.
        system_site_packages: torch and torchvision come from the interpreter's own packages.

    Raises:
        UsageError: unknown package or torch, or both torch and system_site_packages.
        EnvironmentProblem: the interpreter does not run.
    """
    package = table.get(name)
    if system_site_packages and torch is not None:
        raise UsageError("--torch and --system-site-packages exclude each other", hint="leave one of them out")
    release = None if system_site_packages else torch or importlib.metadata.version("torch").partition("+")[0]
    base = str(python) if python is not None else sys.executable
    folder = table.folder(package, release, _version_of(base))
    pins = table.requirements(package, release)
    venv = [base, "-m", "venv", *(["--system-site-packages"] if system_site_packages else []), str(folder)]
    pip = [str(environments.interpreter(folder)), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    pip += ["--progress-bar", "off", *(["--find-links", str(find_links)] if find_links is not None else []), *pins]
    return Plan(package, folder, release, tuple(pins), (tuple(venv), tuple(pip)))


def _version_of(python: str) -> str:
    if python == sys.executable:
        return f"{sys.version_info[0]}.{sys.version_info[1]}"
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentProblem(
            "The interpreter does not run.", where=python, why=str(error), hint="check --python"
        ) from None
    return done.stdout.strip()


def install(
    plan: Plan,
    *,
    force: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> environments.Environment:
    """Make an environment, or find it made.

    Args:
        plan: of ``make_plan``.
        force: make it anew although it is there.
        progress: told each step of pip.
        should_stop: asked several times a second.

    Raises:
        EnvironmentProblem: pip failed, or the package cannot be imported there; the last lines are told.
        ResourceError: the disk is too small.
        Interrupted: asked to stop; what was made so far is removed.
    """
    progress = progress or Silent()
    atomic.make_folder(plan.folder.parent)
    with _alone(plan):
        there = environments.read(plan.folder)
        if there is not None and not force:
            progress.info(f"{plan.folder} is there already")
            return there
        began = time.monotonic()
        remove(plan.folder)
        _check_disk(plan, progress)
        try:
            _run_all(plan, progress, should_stop)
            progress.info(f"importing {plan.package.name} there")
            versions = _probe(plan, should_stop)
        except BaseException:
            remove(plan.folder)
            raise
        record = {
            "package": plan.package.name,
            "pins": table.pins_digest(plan.package),
            "requirements": list(plan.requirements),
            "versions": versions,
            "made": time.time(),
            "seconds": round(time.monotonic() - began, 1),
            "bytes": size(plan.folder),
        }
        atomic.write_json(plan.folder / environments.COMPLETE, record)
    made = environments.read(plan.folder)
    if made is None:
        raise CraftError("A finished environment cannot be read again.", where=str(plan.folder))
    return made


def remove(folder: Path) -> None:
    """Remove an environment: its ``COMPLETE.json`` first, so that half of it never counts as there."""
    (folder / environments.COMPLETE).unlink(missing_ok=True)
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def size(folder: Path) -> int:
    """Bytes that a folder takes on its disk."""
    files = (os.lstat(os.path.join(where, name)) for where, _, names in os.walk(folder) for name in names)
    return sum(stat.st_blocks * 512 for stat in files)


def log_of(plan: Plan) -> Path:
    """Where everything that pip said is kept."""
    return plan.folder.with_name(plan.folder.name + ".log")


@contextlib.contextmanager
def _alone(plan: Plan) -> Iterator[None]:
    with open(plan.folder.with_name(plan.folder.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentProblem(
                f"The environment of {plan.package.name} is being made by another process.",
                where=str(plan.folder),
                hint="wait for it, then type the same command again",
            ) from None
        yield


def _check_disk(plan: Plan, progress: Progress) -> None:
    free = shutil.disk_usage(plan.folder.parent).free
    text = f"about {FULL_BYTES / 1024**3:.1f} GiB with torch's CUDA libraries, {free / 1024**3:.1f} GiB are free"
    if free < LEAST_BYTES and plan.torch is not None:
        raise ResourceError(
            "The disk is too small for a package's environment.",
            where=str(plan.folder.parent),
            why=f"it takes {text}",
            hint="free some space, or set CRAFT_FAST_PACKAGES to a folder on another disk",
        )
    (progress.info if free >= FULL_BYTES or plan.torch is None else progress.warn)(f"{plan.folder}: {text}")


def _run_all(plan: Plan, progress: Progress, should_stop: Callable[[], bool]) -> None:
    log_of(plan).unlink(missing_ok=True)
    for command in plan.commands:
        code, tail = _run(command, log_of(plan), progress, should_stop)
        if should_stop():
            raise Interrupted("Stopped; the half-made environment is removed", hint="the same command begins anew")
        if code:
            raise _failed(plan, command, code, tail)


def _run(
    command: Sequence[str], log: Path, progress: Progress, should_stop: Callable[[], bool]
) -> tuple[int, list[str]]:
    """Run a command; its exit code and last lines. Asked to stop, its whole process group is ended."""
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env=kept, start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read_into, args=(process, lines), daemon=True)
    reader.start()
    tail: deque[str] = deque(maxlen=40)
    try:
        with open(log, "a", encoding="utf-8", buffering=1) as file:
            while not should_stop():
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=0.2)
                    if line is None:
                        break
                    file.write(line)
                    tail.append(line.rstrip())
                    if line.lstrip().startswith(_TOLD):
                        progress.info(line.strip()[:160])
    finally:
        if should_stop() or sys.exc_info()[0] is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
        code = process.wait()
        reader.join()
    return code, list(tail)


def _read_into(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _failed(plan: Plan, command: Sequence[str], code: int, tail: list[str]) -> CraftError:
    said = " | ".join(line for line in tail if line)[-1500:]
    if any("No space left on device" in line or "Disk quota exceeded" in line for line in tail):
        hint = "free some space, or set CRAFT_FAST_PACKAGES to a folder on another disk"
        return ResourceError("The disk is full.", where=str(plan.folder), why=said, hint=hint)
    if "venv" in command:
        hint = "install Python's venv module (Debian: python3-venv), or name another interpreter with --python"
    else:
        hint = f"another torch: craft-fast rewards install {plan.package.name} --torch {other_torch(plan)}"
    return EnvironmentProblem(
        f"The environment of {plan.package.name} could not be made.",
        where=f"{log_of(plan)} holds all that was said",
        why=f"exit code {code}: {said}",
        hint=hint,
    )


def other_torch(plan: Plan) -> str:
    """A release to try where this plan's did not work."""
    tried = "2.14.1"
    return tried if plan.torch != tried else "2.13.0"


def _probe(plan: Plan, should_stop: Callable[[], bool]) -> dict[str, str]:
    try:
        return dict(probe(plan.package.name, environments.interpreter(plan.folder)))
    except EnvironmentProblem as error:
        if should_stop():
            raise Interrupted(
                "Stopped; the half-made environment is removed", hint="the same command begins anew"
            ) from None
        error.where = f"{error.where}; {log_of(plan)} holds all that pip said"
        error.hint = f"another torch: craft-fast rewards install {plan.package.name} --torch {other_torch(plan)}"
        raise
