"""The doctor's checks, each given a machine that lacks something.

What no machine of the tests has (a driver, a slow or full disk, another package's version) is put in its place at the
edge where the operating system answers; ``tests/cli/test_doctor.py`` runs all of it for real.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from craft_fast.config import RewardSettings
from craft_fast.doctor import examine, gpu, machine, weights
from craft_fast.doctor.found import GIB, Found, Patient
from craft_fast.errors import EnvironmentProblem, IntegrityError
from craft_fast.settings_io import load_settings

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def patient(tmp_path: Path, *overrides: str, preset: str = "tiny") -> Patient:
    return Patient(load_settings(preset, None, overrides), tmp_path / "runs")


class WithGpu(Patient):
    """A patient whose GPU nothing computes on."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def with_gpu(tmp_path: Path, *overrides: str) -> WithGpu:
    return WithGpu(load_settings("tiny", None, overrides), tmp_path / "runs")


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``smi(script)`` puts a program nvidia-smi first on the path."""

    def put(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return put


DRIVER = (
    'case "$1" in --query-gpu*) echo 535.104.05;; *) echo "| Driver Version: 535.104.05   CUDA Version: 12.2 |";; esac'
)

# ---- the list as a whole


def test_a_check_that_breaks_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Patient) -> Found:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(machine, "memory", breaks)
    found = {one.check: one for one in examine(load_settings("tiny", None, ["model.device=cpu"]), tmp_path)}
    assert found["memory"].result == "fail"
    assert "ZeroDivisionError: two lines" in found["memory"].found
    assert found["triton"].result == "ok"


def test_without_torch_the_list_ends_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    *before, last = examine(load_settings(), tmp_path)
    assert [one.check for one in before] == ["python", "packages", "memory", "disk", "fsync"]
    assert (last.check, last.result) == ("torch", "fail")
    assert "pip install" in last.fix


def test_a_missing_package_of_a_check_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    first = next(iter(examine(load_settings(), tmp_path)))
    assert (first.check, first.result, first.fix) == ("python", "fail", "pip install packaging.specifiers")


# ---- the machine


@pytest.mark.parametrize(
    ("needs", "result", "said", "fix"),
    [
        (["numpy>=2.0,<3"], "ok", f"numpy {metadata.version('numpy')}", ""),
        (["numpy>=99"], "fail", "is outside >=99", "pip install 'numpy>=99'"),
        (["numpy<2"], "warn", "is outside <2", "pip install 'numpy<2'"),
        (
            ["no-such-package-here>=1"],
            "fail",
            "no-such-package-here is missing",
            "pip install 'no-such-package-here>=1'",
        ),
        (["numpy>=2", 'no-such-package-here>=1; extra == "gpu"'], "ok", "numpy", ""),
        (['numpy>=99; extra == "gpu"'], "fail", "is outside >=99", "pip install 'numpy>=99'"),
        (['no-such-package-here; sys_platform == "plan9"'], "ok", "", ""),
    ],
)
def test_versions_against_their_ranges(
    needs: list[str], result: str, said: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.metadata, "requires", lambda _: needs)
    found = machine.packages(patient(tmp_path))
    assert (found.result, found.fix) == (result, fix)
    assert said in found.found


def test_an_interpreter_outside_of_the_range_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.python(patient(tmp_path)).result == "ok"
    monkeypatch.setattr(machine.platform, "python_version", lambda: "3.9.1")
    found = machine.python(patient(tmp_path))
    assert found.result == "fail"
    assert "3.9.1" in found.found


@pytest.mark.parametrize(("free_gib", "tiny", "full"), [(30, "ok", "ok"), (5, "ok", "warn"), (1, "warn", "warn")])
def test_main_memory(free_gib: int, tiny: str, full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total, free = machine._memory_bytes()
    assert 0 < free <= total
    monkeypatch.setattr(machine, "_memory_bytes", lambda: (64 * GIB, free_gib * GIB))
    assert machine.memory(patient(tmp_path)).result == tiny
    assert machine.memory(patient(tmp_path, preset="sdxl")).result == full


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(gib: float) -> None:
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(gib * GIB)))

    for room, preset, result in (
        (1, "tiny", "ok"), (0.05, "tiny", "fail"), (1, "sdxl", "warn"), (4, "sdxl", "ok"),
        (20, "sdxl-paper", "warn"), (40, "sdxl-paper", "ok"),
    ):  # fmt: skip
        free(room)
        assert machine.disk(patient(tmp_path, preset=preset)).result == result, (room, preset)
    assert list(tmp_path.iterdir()) == []


def test_a_network_filesystem_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._filesystem(Path("/proc/self")) == "proc"
    monkeypatch.setattr(machine, "_filesystem", lambda _: "nfs4")
    found = machine.disk(patient(tmp_path))
    assert found.result == "warn"
    assert "(nfs4): a network filesystem" in found.found


def test_a_slow_disk_is_told_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "fsync", lambda _: time.sleep(0.03))
    monkeypatch.setattr(machine, "_FSYNC_LIMIT_S", 0.1)
    found = machine.fsync(patient(tmp_path))
    assert found is not None
    assert found.result == "warn"
    assert int(found.found.partition("median of ")[2].partition(",")[0]) < 10


def test_threads_that_are_in_one_anothers_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = patient(tmp_path, "model.device=cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert machine.threads(here) == Found("ok", found_text(machine.threads(here)))
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert "unset OMP_WAIT_POLICY" in fix_text(machine.threads(here))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert "OMP_NUM_THREADS=" in fix_text(machine.threads(here))
    assert machine.threads(with_gpu(tmp_path)) is None


def found_text(found: Found | None) -> str:
    assert found is not None
    return found.found


def fix_text(found: Found | None) -> str:
    assert found is not None
    assert found.result == "warn"
    return found.fix


# ---- the GPU


@NO_GPU
def test_why_torch_sees_no_gpu(smi: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = patient(tmp_path)
    smi("exit 9")
    assert "none found" in gpu.driver(here).found
    smi(DRIVER)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = gpu.driver(here)
    assert found.result == "warn"
    assert found.found.startswith("535.104.05, for CUDA up to 12.2; this torch")
    assert "built without CUDA" in found.found
    assert "pip install" in found.fix
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "torch is built for CUDA 13.0" in gpu.driver(here).found
    assert "update NVIDIA's driver" in gpu.driver(here).fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.driver(here).fix == "unset CUDA_VISIBLE_DEVICES"
    assert gpu.driver(patient(tmp_path, "model.device=cuda")).result == "fail"
    assert gpu.driver(patient(tmp_path, "model.device=cpu")).result == "ok"


def test_a_driver_that_hangs_is_not_waited_for(
    smi: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi("exec sleep 60")
    monkeypatch.setattr(gpu, "_SMI_LIMIT_S", 0.3)
    started = time.monotonic()
    gpu.driver(patient(tmp_path))
    assert time.monotonic() - started < 10


def test_other_programs_on_the_gpu_are_named(smi: Callable[[str], None]) -> None:
    smi(f"echo '{os.getpid()}, /usr/bin/python, 99'; echo '12, /opt/a, b/blender, 345'; echo '13, C:\\x.exe, [N/A]'")
    assert gpu._others() == ["blender (pid 12, 345 MiB)", "C:\\x.exe (pid 13)"]
    smi("exit 1")
    assert gpu._others() == []


def test_windows_spills_unless_there_is_a_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.spill(patient(tmp_path, "model.device=cpu")) is None
    monkeypatch.setattr(gpu, "under_windows", lambda: True)
    assert "Sysmem Fallback" in fix_text(gpu.spill(with_gpu(tmp_path)))
    assert "caps this at 8 GiB" in found_text(gpu.spill(with_gpu(tmp_path, "engine.vram_gib=8")))
    monkeypatch.setattr(gpu, "under_windows", lambda: False)
    assert "an error, not a slow run" in found_text(gpu.spill(with_gpu(tmp_path)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arithmetic_is_computed_and_compared(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = patient(tmp_path, "model.device=cpu", f"model.dtype={dtype}")
    assert gpu.arithmetic(here).found.startswith(f"{dtype} on cpu: right")
    # The bound is far from both: a hundredth of it is still met in float32, a thousandth not in bfloat16.
    monkeypatch.setitem(gpu._ERROR, dtype, gpu._ERROR[dtype] * {"float32": 1e-2, "bfloat16": 1e-3}[dtype])
    assert gpu.arithmetic(here).result == {"float32": "ok", "bfloat16": "fail"}[dtype]


def test_bitsandbytes_that_does_not_load_or_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = patient(tmp_path, "model.device=cpu")
    assert gpu.bitsandbytes(here).result == "ok"
    from craft_fast.quiet import import_bitsandbytes

    functional = import_bitsandbytes().functional
    true = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a: true(*a) * 0.5)
    assert "is wrong by 0.5" in gpu.bitsandbytes(here).found
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = gpu.bitsandbytes(here)
    assert found.result == "fail"
    assert "pip install --force-reinstall bitsandbytes" in found.fix


def test_xformers_is_only_missed_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.xformers(patient(tmp_path, "model.device=cpu")).result == "ok"
    asked = gpu.xformers(patient(tmp_path, "model.device=cpu", "engine.attention=xformers"))
    assert (asked.result, asked.fix) == ("fail", "--set engine.attention=sdpa")
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    assert gpu.xformers(with_gpu(tmp_path)).result == "ok"
    assert gpu.xformers(with_gpu(tmp_path, "engine.attention=xformers")).result == "fail"


def test_tritons_version_against_torchs_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("CRAFT_KERNELS_IMPL", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu.metadata, "requires", lambda _: ['triton==0.0.1; platform_system == "Linux"', "sympy>=1"])
    found = gpu.triton(patient(tmp_path, "model.device=cpu"))
    assert (found.result, found.fix) == ("warn", "pip install triton==0.0.1")


# ---- models


def test_an_expanders_server_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("expand.kind=openai", "expand.model=m", "expand.api_key_env=CRAFT_TEST_KEY")
    monkeypatch.delenv("CRAFT_TEST_KEY", raising=False)
    assert found_text(weights.expander(patient(tmp_path, *asked))).endswith("CRAFT_TEST_KEY is not set")
    away = (*asked, "expand.base_url=https://example.org/v1")
    assert fix_text(weights.expander(patient(tmp_path, *away))) == "export CRAFT_TEST_KEY=..."
    monkeypatch.setenv("CRAFT_TEST_KEY", "k")
    assert "not asked now" in found_text(weights.expander(patient(tmp_path, *away)))
    assert weights.expander(patient(tmp_path)) is None


def test_room_for_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = patient(tmp_path)
    assert weights.hub_cache(here) is None
    here.to_fetch = {"a/b": 6.5, "c/d": 4.0}
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=9 * GIB))
    assert "HF_HUB_CACHE" in fix_text(weights.hub_cache(here))
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=19 * GIB))
    assert "about 10 GiB are to be fetched" in found_text(weights.hub_cache(here))


# ---- published reward models


@pytest.fixture
def shelved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Path]]:
    """``shelved(name)`` puts files of the right names and sizes onto a shelf, and holds the catalog to their sha256."""
    from craft_fast.rewards import catalog, shelf

    monkeypatch.setenv("CRAFT_FAST_REWARDS", str(tmp_path / "shelf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name: str) -> dict[str, Path]:
        paths, assets = {}, []
        for asset in catalog.OFFICIALS[name].assets:
            path = shelf.place(asset)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(asset.file.encode())
            paths[asset.name] = path
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assets.append(replace(asset, size=path.stat().st_size, sha256=digest, also=()))
        monkeypatch.setitem(catalog.OFFICIALS, name, replace(catalog.OFFICIALS[name], assets=tuple(assets)))
        return paths

    return put


def h_of(here: Patient) -> Found:
    return weights.reward(here, name="h", spec=here.settings.rewards["h"])


def test_a_published_judge_on_the_shelf(shelved: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    paths = shelved("hpsv2.1")
    here = patient(tmp_path, preset="sdxl")
    found = h_of(here)
    assert (found.result, found.fix) == ("ok", "")
    assert found.found.startswith("Human Preference Score v2.1, ")
    assert str(paths["HPS_v2.1_compressed.pt"].parent) in found.found
    assert here.to_shelve == {}
    assert weights.reward_shelf(here) is None


@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "vocab.json"])
def test_another_file_in_a_published_ones_place(
    name: str, shelved: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    path = shelved("hpsv2.1")[name]
    path.write_bytes(path.read_bytes()[::-1])  # as large, and no pointer or page
    with pytest.raises(IntegrityError, match="not the published one") as caught:
        h_of(patient(tmp_path, preset="sdxl"))
    assert caught.value.where == str(path)
    assert "craft-fast rewards fetch hpsv2.1" in caught.value.hint


def test_a_pointer_in_a_published_files_place(shelved: Callable[[str], dict[str, Path]], tmp_path: Path) -> None:
    path = shelved("hpsv2.1")["HPS_v2.1_compressed.pt"]
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(IntegrityError) as caught:
        h_of(patient(tmp_path, preset="sdxl"))
    assert "Git LFS" in caught.value.why


def test_what_is_missing_of_a_judge_is_counted_once(
    shelved: Callable[[str], dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelved("hpsv2.1")["merges.txt"].unlink()
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    here = patient(tmp_path, preset="sdxl")
    for _ in range(2):
        assert fix_text(h_of(here)) == "craft-fast rewards fetch hpsv2.1"
    assert len(here.to_shelve) == 1
    here.to_shelve = {"x": 5 * GIB}
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * GIB))
    assert "CRAFT_FAST_REWARDS" in fix_text(weights.reward_shelf(here))
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=6 * GIB))
    assert "5.0 GiB are to be fetched" in found_text(weights.reward_shelf(here))


def test_a_plugins_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RewardSettings(kind="sharpness", held_out=True)
    with pytest.raises(EnvironmentProblem, match="not installed"):
        weights.reward(patient(tmp_path), name="own", spec=spec)
    info = tmp_path / "sharp_reward-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sharp-reward\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[craft_fast.rewards]\nsharpness = sharp_reward:Sharpness\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = weights.reward(patient(tmp_path), name="own", spec=spec)
    assert (found.result, found.found) == ("ok", "sharp-reward 1.2, sharp_reward:Sharpness")
