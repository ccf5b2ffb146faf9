"""One case in a process of its own: memory caps and shortages cannot spoil what is measured after it.

``python -m craft_bench.sdxl.worker REQUEST RESULT``: JSON files, ``Request`` in, a row's fields out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from craft_bench.rows import Row
from craft_bench.sdxl.cases import StepCase

TIMEOUT_S = 240.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Request:
    """What the process is to measure.

    Attributes:
        case: the case.
        size: name of the size.
        device: ``cpu`` or ``cuda``.
        quick: short timing.
        matmul_tflops: the card's rate, measured before.
    """

    case: StepCase
    size: str
    device: str
    quick: bool
    matmul_tflops: float


def measure_apart(request: Request, *, check: Callable[[], None], timeout_s: float = TIMEOUT_S) -> Row:
    """Measure in another process.

    Args:
        request: what.
        check: asked while it runs; what it raises ends the process and comes out here.
        timeout_s: the process is ended after this.

    Returns:
        Fields of the row; ``failed`` says why where nothing was measured.
    """
    with tempfile.TemporaryDirectory(prefix="craft-bench-") as folder:
        asked, answer, log = Path(folder, "request.json"), Path(folder, "result.json"), Path(folder, "log")
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        # The source roots are found here however they were found in this process.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "craft_bench.sdxl.worker", str(asked), str(answer)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
            try:
                late = _wait(process, check, timeout_s)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if late:
            return {"failed": f"took more than {timeout_s:.0f} s"}
        if answer.exists():
            fields: Row = json.loads(answer.read_text("utf-8"))
            return fields
        said = log.read_text("utf-8", "replace").strip().splitlines()
        last = said[-1][:300] if said else "no output"
        return {"failed": f"its process ended with code {process.returncode}: {last}"}


def _wait(process: subprocess.Popen[bytes], check: Callable[[], None], timeout_s: float) -> bool:
    """Whether the time ran out."""
    end = time.monotonic() + timeout_s
    while process.poll() is None:
        check()
        if time.monotonic() >= end:
            return True
        time.sleep(_POLL_S)
    return False


def main(asked: str, answer: str) -> None:
    """Measure what ``asked`` says and write it to ``answer``."""
    from craft_fast.quiet import quiet_third_party

    quiet_third_party()
    import torch

    from craft_bench.sdxl import measure, stepping
    from craft_bench.sdxl.problem import default_dtype, make_size

    request: dict[str, Any] = json.loads(Path(asked).read_text("utf-8"))
    device = torch.device(request["device"])
    work = stepping.Work(
        make_size(request["size"]), device, default_dtype(device),
        measure.QUICK if request["quick"] else measure.FULL, request["matmul_tflops"],
    )  # fmt: skip
    try:
        fields = stepping.measure_ours(StepCase(**request["case"]), work, None)
    except Exception as error:  # whatever it is becomes the case's row
        fields = {"failed": stepping.reason(error)}
    Path(answer).write_text(json.dumps(fields), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
