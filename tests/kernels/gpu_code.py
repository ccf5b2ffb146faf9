"""Compile what a test module launches for GPUs that are not here, and say what came out. Run as a script.

    python tests/kernels/gpu_code.py tests/kernels/test_weighted_noise_loss.py

The module's ``launches()`` yields (name, function) pairs; the functions call the launchers of ``kernel.py`` on CPU
tensors. Nothing is launched: each kernel is compiled for the exact arguments (dtypes, alignment, constants) and
disassembled. One JSON object a line: ``name, kernel, arch, registers, spilled_bytes, shared_bytes, ops`` (how often
each SASS instruction occurs, with its modifiers), ``fused`` (fused multiply-adds that the compiler was handed in PTX;
SASS has more, inside of roots and divisions).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 120)


class Elsewhere:
    """The driver of a GPU that is not in this machine: enough of one to compile for it."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, _: int) -> int:
        return 0


def tool(name: str, path: Path) -> str:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([program, *(["-res-usage"] if name == "cuobjdump" else []), path],
                          capture_output=True, text=True, check=True).stdout  # fmt: skip


def described(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = tool("cuobjdump", path), tool("nvdisasm", path)
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    ops = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE))
    return {
        "registers": number["REG"],
        "spilled_bytes": number["STACK"] + number["LOCAL"],
        "shared_bytes": number["SHARED"],
        "ops": dict(ops),
    }


def main(path: str) -> None:
    import triton
    from triton.runtime.jit import JITFunction

    spec = importlib.util.spec_from_file_location("launched", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    for arch in ARCHITECTURES:
        triton.runtime.driver.set_active(Elsewhere(arch))
        for name, function in module.launches():
            compiled.clear()
            function()
            for kernel, result in compiled:
                row = {"name": name, "kernel": kernel, "arch": arch, "fused": result.asm["ptx"].count("fma."),
                       **described(result.asm["cubin"])}  # fmt: skip
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    main(sys.argv[1])
