"""Runs the command line in forked children and kills them on order; imports the heavy packages once for all.

Reads one JSON order a line: {"argv", "output", "kill_after": seconds or null, "sabotage": name or null}.
Answers one JSON line: {"code": exit code, or minus the signal, "seconds"}.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def import_everything() -> None:
    from craft_fast.quiet import quiet_third_party

    quiet_third_party()
    import diffusers
    import peft  # noqa: F401
    import torch
    import transformers
    from PIL import Image
    from torch.utils import tensorboard  # noqa: F401

    import craft_fast
    from craft_cli.main import main  # noqa: F401
    from craft_fast.qlora.nf4 import import_bitsandbytes

    for module in pkgutil.walk_packages(craft_fast.__path__, "craft_fast."):
        importlib.import_module(module.name)
    Image.init()
    for name in ("AutoencoderKL", "UNet2DConditionModel", "StableDiffusionXLPipeline", "DPMSolverMultistepScheduler"):
        getattr(diffusers, name)
    for name in ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"):
        getattr(transformers, name)
    import_bitsandbytes()
    torch.set_num_threads(1)
    # What is frozen is never looked at again: children collect their own garbage alone.
    gc.collect()
    gc.freeze()


# ---- sabotage: what the checks must find, or they prove nothing


def rows_first() -> None:
    """Candidates are recorded before their files are written."""
    from craft_fast import candidates
    from craft_fast.store import atomic

    write, write_bytes, write_safetensors = candidates._write, atomic.Batch.write_bytes, atomic.Batch.write_safetensors

    def rows_then_files(run: Any, *args: Any) -> Any:
        held: list[Callable[[], Any]] = []

        def hold(method: Callable[..., atomic.Written]) -> Callable[..., atomic.Written]:
            def later(batch: atomic.Batch, name: str, *args: Any) -> atomic.Written:
                held.append(lambda: method(batch, name, *args))
                written = method(batch, name + ".measured", *args)
                (batch.folder / f"{name}.measured").unlink()
                return written

            return later

        atomic.Batch.write_bytes = hold(write_bytes)  # type: ignore[method-assign,assignment]
        atomic.Batch.write_safetensors = hold(write_safetensors)  # type: ignore[method-assign,assignment]
        try:
            rows = write(run, *args)
        finally:
            atomic.Batch.write_bytes = write_bytes  # type: ignore[method-assign]
            atomic.Batch.write_safetensors = write_safetensors  # type: ignore[method-assign]
        run.manifest.put_candidates(args[-1], rows)
        for do in held:
            time.sleep(0.1)
            do()
        return rows

    candidates._write = rows_then_files


def counted_draws() -> None:
    """Training draws follow a counter of the process instead of the step: a hidden state that a kill loses."""
    from craft_fast import train

    draw, counter = train.draw_batch, iter(range(10**9))

    def draw_counted(*args: Any, step: int, **options: Any) -> Any:
        return draw(*args, step=next(counter), **options)

    train.draw_batch = draw_counted


def full_disk(room: int) -> None:
    """The disk takes ``room`` more bytes; the write that does not fit falls short, those after it fail."""
    import errno

    from craft_fast.store import atomic

    left = room

    def write(fd: int, data: memoryview) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = os.write(fd, data[:left])
        left -= done
        return done

    atomic._write = write


def file_limit(size: int) -> None:
    """The kernel lets no file grow beyond ``size`` bytes, the manifest's own among them."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


SABOTAGE: dict[str, Callable[..., None]] = {
    "rows_first": rows_first,
    "counted_draws": counted_draws,
    "full_disk": full_disk,
    "file_limit": file_limit,
}


# ---- children


def child(order: dict[str, Any]) -> int:
    """Runs in the forked process."""
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sabotage = order.get("sabotage")
    if sabotage:
        name, *number = sabotage.split(":")
        SABOTAGE[name](*map(int, number))
    sys.argv = ["craft-fast", *order["argv"]]
    from craft_cli.main import main

    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def carry_out(order: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 98
        with contextlib.suppress(BaseException):
            code = child(order)
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    deadline = start + order["kill_after"] if order.get("kill_after") is not None else float("inf")
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            break
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}


if __name__ == "__main__":
    import_everything()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), flush=True)
    # Not the interpreter's own way out: it would complain of what it cannot free.
    os._exit(0)
