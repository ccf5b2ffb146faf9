"""Checks of what is no GPU: Python, packages, memory, disk, threads."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from craft_fast.doctor.found import GIB, Found, Patient, gib

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_OURS = "craft-fast"
_WRITES, _WRITE_BYTES, _SLOW_MS, _FSYNC_LIMIT_S = 64, 4096, 20.0, 3.0
# SQLite's write-ahead log needs shared memory between processes, and locks that hold; these have neither for certain.
_NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse.ceph", "fuse.glusterfs", "fuse.sshfs", "gfs2", "lustre",
    "nfs", "nfs4", "smb3", "smbfs",
}  # fmt: skip
# A whole UNet in bf16 and its 8-bit states: two times 5.14 GB.
_FULL_CHECKPOINT_GIB, _FULL_EXPORT_GIB = 9.6, 9.6


def python(patient: Patient) -> Found:
    """The interpreter's version against the range that the package names."""
    here = f"{platform.python_version()} ({sys.executable})"
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata(_OURS)["Requires-Python"]
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        return Found("ok", here)
    return Found(
        "fail", f"{here}; {_OURS} needs {wanted}", f"python3.12 -m venv .venv && .venv/bin/pip install {_OURS}"
    )


def packages(patient: Patient) -> Found:
    """Installed versions against the ranges that the package names; optional ones only where they are there."""
    from packaging.version import Version

    missing: list[Requirement] = []
    old: list[Requirement] = []
    new: list[Requirement] = []
    there: list[str] = []
    for requirement, optional in _requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing += [] if optional else [requirement]
            continue
        there.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            least = [Version(spec.version) for spec in requirement.specifier if spec.operator == ">="]
            (old if least and Version(version) < min(least) else new).append(requirement)
    wrong = [*missing, *old, *new]
    if not wrong:
        return Found("ok", ", ".join(there))
    told = [f"{requirement.name} is missing" for requirement in missing]
    told += [f"{r.name} {metadata.version(r.name)} is outside {r.specifier}" for r in (*old, *new)]
    wanted = [f"{requirement.name}{requirement.specifier}" for requirement in wrong]
    # One that is newer than was tried may well work; one that is older lacks what is called.
    return Found("fail" if missing or old else "warn", "; ".join(told), shlex.join(["pip", "install", *wanted]))


def _requirements() -> Iterator[tuple[Requirement, bool]]:
    """What the package needs on this machine, and whether that is optional."""
    from packaging.requirements import Requirement

    for text in metadata.requires(_OURS) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement, False
        elif any(requirement.marker.evaluate({"extra": extra}) for extra in ("gpu", "xformers")):
            yield requirement, True


def memory(patient: Patient) -> Found:
    """Main memory: total, and what is free for new work, the container's limit considered."""
    total, free = _memory_bytes()
    here = f"{gib(total)}, {gib(free)} available"
    on_cpu = patient.settings.model.device == "cpu"
    # Weights pass through main memory one network at a time: the largest takes 4.8 GiB in bf16, 9.6 in float32.
    need = (24.0 if on_cpu else 8.0) if patient.full_size else 2.0
    if free >= need * GIB:
        return Found("ok", here)
    return Found("warn", f"{here}; about {need:.0f} GiB are needed", "close other programs, or add swap")


def _memory_bytes() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        free = int(lines["MemAvailable"].split()[0]) * 1024  # counts what the kernel can drop, too
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(0, limit - used))
    except (OSError, ValueError):
        pass
    return total, free


def nearest_folder(path: Path) -> Path:
    """``path`` itself, or the nearest of its parents that exists; it may be a file."""
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def disk(patient: Patient) -> Found:
    """Free space where the runs are, and whether a file can be made there."""
    folder = nearest_folder(patient.runs)
    elsewhere = "--runs DIR, or CRAFT_RUNS=DIR, on another disk"
    try:
        with _temporary(folder):
            pass
    except OSError as error:
        return Found("fail", f"no file can be made at {folder}: {error.strerror}", elsewhere)
    free = shutil.disk_usage(folder).free
    kind = _filesystem(folder)
    here = f"{gib(free)} free at {patient.runs.absolute()}" + (f" ({kind})" if kind else "")
    need = _run_gib(patient)
    if free < 0.1 * GIB:
        return Found("fail", here, f"free some space; or {elsewhere}")
    if kind in _NETWORK:
        return Found("warn", f"{here}: a network filesystem, on which SQLite's locks may not hold", elsewhere)
    if free < need * GIB:
        return Found("warn", f"{here}; a run takes about {need:.1f} GiB", f"free some space; or {elsewhere}")
    return Found("ok", here)


def _run_gib(patient: Patient) -> float:
    train = patient.settings.train
    if not patient.full_size:
        return 0.2
    if train.method == "full":
        # One more than is kept: a checkpoint is whole before an older one goes.
        return (train.keep_checkpoints + 1) * _FULL_CHECKPOINT_GIB + _FULL_EXPORT_GIB
    return 3.0


def _filesystem(path: Path) -> str:
    """The kind of filesystem that ``path`` is on, as the kernel names it; empty where it does not say."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    holding = [(len(m[1]), m[2]) for m in mounts if len(m) > 2 and path.is_relative_to(m[1].replace("\\040", " "))]
    return max(holding, default=(0, ""))[1]


class _temporary:  # noqa: N801 - used like a function
    """A temporary file in a folder, open for writing; removed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> int:
        self.file, self.name = tempfile.mkstemp(prefix=".craft-doctor-", dir=self.folder)
        return self.file

    def __exit__(self, *_: object) -> None:
        os.close(self.file)
        os.unlink(self.name)


def fsync(patient: Patient) -> Found | None:
    """How long it takes until 4 KiB are safely on the disk: each candidate and each step's record waits for it."""
    folder = nearest_folder(patient.runs)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return None  # the check of the disk has said so
    took_ms: list[float] = []
    with _temporary(folder) as file:
        begun = time.monotonic()
        for _ in range(_WRITES):
            started = time.perf_counter()
            os.write(file, b"\0" * _WRITE_BYTES)
            os.fsync(file)
            took_ms.append((time.perf_counter() - started) * 1e3)
            if time.monotonic() - begun > _FSYNC_LIMIT_S:
                break
    took_ms.sort()
    middle = took_ms[len(took_ms) // 2]
    here = f"{middle:.2f} ms for 4 KiB (median of {len(took_ms)}, longest {took_ms[-1]:.1f} ms)"
    if middle > _SLOW_MS:
        return Found("warn", f"{here}: a slow disk", "--runs DIR, or CRAFT_RUNS=DIR, on a local SSD")
    return Found("ok", here)


def threads(patient: Patient) -> Found | None:
    """Threads of the CPU's arithmetic, where a run works on the CPU."""
    import torch

    if patient.gpu is not None:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count, policy = torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY", "")
    here = f"{count} on {cores} cores, OMP_WAIT_POLICY={policy or 'not set'}"
    if count > cores:
        return Found("warn", f"{here}: more threads than cores wait for one another", f"export OMP_NUM_THREADS={cores}")
    if policy.upper() == "ACTIVE":
        # Measured 90x slower on a busy machine: see craft_fast.quiet.
        return Found("warn", f"{here}: threads that wait take the core from those that work", "unset OMP_WAIT_POLICY")
    return Found("ok", here)
