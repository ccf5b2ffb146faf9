"""Checks of torch, the driver and the GPU, and of what computes there: each is made to compute something."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

from craft_fast.budget import check_cap
from craft_fast.doctor.found import GIB, Found, Patient, Result, gib

_SMI_LIMIT_S = 5.0
_WITHOUT = "--set model.device=cpu"
# A matmul's largest error, relative to the largest true value, is far below these and far above them when wrong.
_ERROR = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


def torch_itself(patient: Patient) -> Found:
    """Whether torch can be imported, and what it was built for."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        return Found("fail", f"cannot be imported: {str(error).splitlines()[0]}", "pip install --force-reinstall torch")
    cuda, hip = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "the CPU alone"
    return Found("ok", f"{torch.__version__}, built for {built}")


def _smi(*arguments: str) -> str | None:
    """What nvidia-smi prints; None where it is not there or fails."""
    # Under Windows' Linux it lies outside of the usual folders.
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, errors="replace", timeout=_SMI_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def driver(patient: Patient) -> Found:
    """The driver beside what torch was built for; where torch sees no GPU, why that is."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = torch.cuda.is_available()
    version = (_smi("--query-gpu=driver_version", "--format=csv,noheader") or "").strip().splitlines()
    knows = re.search(r"CUDA Version:\s*([\d.]+)", _smi() or "") if version else None
    here = (version[0] if version else "none found") + (f", for CUDA up to {knows[1]}" if knows else "")
    if seen or patient.settings.model.device == "cpu":
        return Found("ok", here if seen else f"{here}; not needed, model.device is cpu")
    bad: Result = "fail" if patient.wants_gpu else "warn"
    if not version:
        return Found(bad, f"{here}: nvidia-smi is not there or fails", f"install NVIDIA's driver; or {_WITHOUT}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        wanted = f" of CUDA {knows[1]} or earlier" if knows else ""
        fix = f"pip install --force-reinstall torch, from the index{wanted} that pytorch.org/get-started names"
        return Found(bad, f"{here}; this torch ({torch.__version__}) is built without CUDA", fix)
    if hidden is not None and not re.match(r"\d|GPU-|MIG-", hidden.strip()):
        return Found(bad, f"{here}; CUDA_VISIBLE_DEVICES={hidden!r} hides all GPUs", "unset CUDA_VISIBLE_DEVICES")
    why = str(caught[-1].message).splitlines()[0] if caught else "torch does not say why it cannot use it"
    fix = f"update NVIDIA's driver to one for CUDA {torch.version.cuda}, or install a torch for the driver's CUDA"
    return Found(bad, f"{here}; torch is built for CUDA {torch.version.cuda}: {why}", fix)


def card(patient: Patient) -> Found:
    """The GPU that a run would use: name, compute capability, memory."""
    import torch

    gpu, wanted = patient.gpu, patient.settings.model.device
    if gpu is None:
        if wanted == "cpu":
            return Found("ok", "none used, model.device is cpu")
        if patient.wants_gpu:
            return Found("fail", f"model.device is {wanted}; torch sees {torch.cuda.device_count()} GPUs", _WITHOUT)
        slow = "far too slow for an SDXL of this size" if patient.full_size else "enough for the embedded default"
        return Found("warn", f"none: all work is done on the CPU, {slow}", f"{_WITHOUT}, if that is meant")
    major, minor = torch.cuda.get_device_capability(gpu)
    total = torch.cuda.get_device_properties(gpu).total_memory
    here = f"{torch.cuda.get_device_name(gpu)}, compute capability {major}.{minor}, {gib(total)}"
    if major < 7:
        return Found("warn", f"{here}: too old for Triton, so the ops take their slower form")
    return Found("ok", here)


def memory(patient: Patient) -> Found | None:
    """The GPU's free memory, who else uses it, and whether the cap of the settings has room."""
    import torch

    if patient.gpu is None:
        return None
    check_cap(patient.gpu, patient.settings.engine)
    free, total = torch.cuda.mem_get_info(patient.gpu)
    others = _others()
    here = f"{gib(free)} of {gib(total)} free" + (f"; in use by {', '.join(others)}" if others else "")
    cap = patient.settings.engine.vram_gib
    if cap is not None and cap * GIB > free:
        fix = f"close other programs on the GPU, or --vram {free / GIB * 0.97:.1f}"
        return Found("warn", f"{here}; engine.vram_gib allows {cap:g} GiB", fix)
    if cap is None and free < 0.85 * total:
        return Found("warn", here, f"close other programs on the GPU, or --vram {free / GIB * 0.97:.1f}")
    return Found("ok", here)


def _others() -> list[str]:
    """Programs that compute on a GPU, as nvidia-smi lists them: ``name (pid 12, 345 MiB)``."""
    listed = _smi("--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits") or ""
    found = []
    for line in listed.strip().splitlines():
        pid, _, rest = (part.strip() for part in line.partition(","))
        name, _, used = (part.strip() for part in rest.rpartition(","))
        if pid.isdigit() and int(pid) != os.getpid():
            size = f", {used} MiB" if used.isdigit() else ""
            found.append(f"{Path(name).name} (pid {pid}{size})")
    return found[:5]


def under_windows() -> bool:
    """Whether this is Windows, or Linux under it."""
    if sys.platform == "win32":
        return True
    try:
        return "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        return False


def spill(patient: Patient) -> Found | None:
    """Whether the driver may move GPU memory into main memory instead of running out; a step then takes minutes.

    Users report 39 to 295 s a step where about 1 s is usual: kohya_ss issues 1730, 1524 and 3296.
    """
    if patient.gpu is None:
        return None
    if not under_windows():
        return Found("ok", "no Windows driver: a full GPU is an error, not a slow run")
    if patient.settings.engine.vram_gib is not None:
        return Found("ok", f"a Windows driver; engine.vram_gib caps this at {patient.settings.engine.vram_gib:g} GiB")
    return Found(
        "warn",
        "a Windows driver puts what the GPU cannot hold into main memory, and a step takes minutes",
        "NVIDIA Control Panel, Manage 3D settings, CUDA - Sysmem Fallback Policy: Prefer No Sysmem Fallback; or --vram",
    )


def arithmetic(patient: Patient) -> Found:
    """One matrix product in the dtype that the model would have, compared with float64 on the CPU."""
    import torch

    from craft_fast.sdxl.load import pick_dtype

    device = patient.device
    dtype = pick_dtype(patient.settings.model.dtype, device)
    name = str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator, dtype=torch.float64) for _ in range(2))
    started = time.perf_counter()
    product = (a.to(device, dtype) @ b.to(device, dtype)).cpu().double()
    took_ms, true = (time.perf_counter() - started) * 1e3, a @ b
    error = float((product - true).abs().max() / true.abs().max())
    if not error < _ERROR[name]:
        fix = "update NVIDIA's driver and torch; if it stays, the GPU or its memory is faulty"
        return Found("fail", f"a product in {name} on {device} is wrong by {error:.1%}", fix)
    here = f"{name} on {device}: right, {took_ms:.1f} ms the first time"
    if device.type == "cuda" and patient.settings.model.dtype == "auto" and dtype == torch.float32:
        fix = "--set model.dtype=float16 halves the memory, at the risk of overflow; RTX 30 series and later have it"
        return Found("warn", f"{here}; this GPU has no bfloat16, so everything takes twice the memory", fix)
    return Found("ok", here)


def bitsandbytes(patient: Patient) -> Found:
    """One block of 64 values to NF4 and back on the device."""
    import torch

    from craft_fast.quiet import import_bitsandbytes

    fix = "pip install --force-reinstall bitsandbytes; then python -m bitsandbytes tells more"
    device = patient.device
    try:
        functional = import_bitsandbytes().functional
        values = torch.linspace(-1.0, 1.0, 64, device=device)
        codes, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
        error = float((functional.dequantize_4bit(codes, state) - values).abs().max())
    except Exception as failure:  # a native library: a missing symbol, a wrong CUDA, no kernel for the card
        text = " ".join(str(failure).split())[:200]
        return Found("fail", f"does not work on {device}: {type(failure).__name__}: {text}", fix)
    # The widest gap of the code is 0.304, between -1 and -0.696.
    if not 0.0 < error < 0.16:
        return Found("fail", f"NF4 on {device} is wrong by {error:.2f} of the largest value", fix)
    return Found("ok", f"{metadata.version('bitsandbytes')}, NF4 works on {device}")


def xformers(patient: Patient) -> Found:
    """Whether xformers' attention runs, where it is installed or asked for."""
    import torch

    from craft_fast.sdxl.attention import attention_ms

    asked = patient.settings.engine.attention == "xformers"
    instead = "--set engine.attention=sdpa"
    if patient.gpu is None:
        told = "needs a GPU" if asked else "not needed without a GPU"
        return Found("fail" if asked else "ok", told, instead if asked else "")
    if importlib.util.find_spec("xformers") is None:
        if asked:
            return Found("fail", "not installed", f"pip install xformers, or {instead}")
        return Found("ok", "not installed; not needed, PyTorch's own attention is used")
    try:
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
        query = torch.ones(1, 64, 2, 64, dtype=torch.float16, device=patient.gpu)
        right = bool(torch.isfinite(attention(query, query, query)).all())
        why = "" if right else "its result is not finite"
    except Exception as error:  # its wheels fit one torch each, and break in many ways with another
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if why:
        return Found("fail" if asked else "warn", f"does not work: {why}", f"pip uninstall xformers, or {instead}")
    # A setting that costs time is no use; which of the two is faster differs by card and release.
    theirs, torchs = (attention_ms(kind, device=patient.gpu, dtype=torch.float16) for kind in ("xformers", "sdpa"))
    times = f"{theirs:.2f} ms, PyTorch's own {torchs:.2f} ms (4096 tokens, forward and backward)"
    if asked and theirs > 1.05 * torchs:
        return Found("warn", f"slower here: {times}", instead)
    return Found("ok", f"{metadata.version('xformers')}, attention works on {patient.gpu}: {times}")


def triton(patient: Patient) -> Found:
    """Triton's version against torch's wish, and one kernel compiled and run."""
    import torch

    from craft_kernels import dispatch

    forced = os.environ.get(dispatch.FORCE)
    try:
        if forced not in (None, "auto"):  # auto would run the kernel here already
            dispatch.choose("auto", torch.empty(0, device=patient.device))
    except ValueError as error:
        return Found("fail", str(error), f"unset {dispatch.FORCE}")
    if forced == "triton" and patient.gpu is None and not dispatch.HAS_TRITON:
        return Found("fail", f"{dispatch.FORCE}=triton, and triton is not installed", f"unset {dispatch.FORCE}")
    version = metadata.version("triton") if dispatch.HAS_TRITON else ""
    if patient.gpu is None and os.environ.get("TRITON_INTERPRET") != "1":
        return Found("ok", f"{version or 'not installed'}; not needed without a GPU")
    if not version:
        return Found("warn", "not installed: the ops take their slower form", "pip install 'craft-fast[gpu]'")
    wish = _wish()
    if wish and version != wish:
        return Found("warn", f"{version}; this torch was built for {wish}", f"pip install triton=={wish}")
    started = time.perf_counter()
    try:
        from craft_kernels.probe import add_one

        add_one(patient.device)
    except Exception as error:  # a missing compiler, a driver, an assertion inside of Triton
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fix = "install a C compiler and Python's headers (apt install build-essential python3-dev)"
        return Found("warn", f"{version}; no kernel runs, so the ops take their slower form: {text}", fix)
    return Found("ok", f"{version}; a kernel was compiled and ran in {time.perf_counter() - started:.1f} s")


def _wish() -> str:
    """The version of Triton that the installed torch asks for; empty where it asks for none, as CPU builds do."""
    for text in metadata.requires("torch") or []:
        if found := re.match(r"triton\s*==\s*([\w.]+)", text):
            return found[1]
    return ""
