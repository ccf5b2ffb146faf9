"""A worker process and the messages that go to and fro; ``worker.py`` says how they look.

The worker has its own session, so that Ctrl-C reaches this process alone; it ends when its stdin does, so it never
outlives us. No torch here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError, ResourceError

WORKER = Path(__file__).with_name("worker.py")
_PROTOCOL = 1
_LONGEST_LINE = 1 << 20
# What a package's process may see of ours: the machine's libraries, devices and threads; no tokens, no PYTHON*.
_KEPT = ("PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "SYSTEMROOT")
_KEPT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_")
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch.load of the package's own code: tensors only, whatever it asks for.
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
}


def clean_environment(folder: Path) -> dict[str, str]:
    """The variables that a worker gets; ``HPS_ROOT`` keeps hpsv2 from making a folder in the user's cache."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    return {**kept, **_OFFLINE, "HPS_ROOT": str(folder), "VIRTUAL_ENV": str(folder)}


class Connection:
    """A running worker.

    Args:
        package: which one.
        python: interpreter of its environment.
        where: whose it is, told in errors: ``reward h``.

    Raises:
        EnvironmentProblem: the interpreter does not start, or is no worker of this version.
    """

    def __init__(self, package: str, python: Path, *, where: str) -> None:
        self.package = package
        self.where = where
        # A file: a pipe that nobody reads would block a talkative package.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        command = [str(python), "-I", "-u", str(WORKER), package]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                env=clean_environment(python.parent.parent), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise EnvironmentProblem(
                f"The environment of the package {package} does not start.",
                where=str(python),
                why=str(error),
                hint=f"craft-fast rewards install {package} --force",
            ) from error
        try:
            self.versions: dict[str, str] = dict(self.ask("hello").get("versions") or self._no_answer(b"no versions"))
        except BaseException:
            self.close()
            raise

    def ask(self, operation: str, data: bytes = b"", **message: Any) -> dict[str, Any]:
        """Send a message and wait for its answer, for as long as the worker lives.

        Args:
            operation: ``hello``, ``load``, ``score`` or ``score_own``.
            data: safetensors.
            message: further fields.

        Raises:
            CraftError: the worker died, answered what is no answer, or tells an error; its last words are told.
        """
        line = json.dumps({"op": operation, "bytes": len(data), **message}).encode() + b"\n"
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None
        assert sink is not None
        try:
            sink.write(line)
            sink.write(data)
            sink.flush()
            reply = source.readline(_LONGEST_LINE)
        except (OSError, ValueError) as error:  # ValueError: closed before
            raise self._died(str(error)) from error
        except BaseException:  # whatever interrupts us leaves an answer that nobody would wait for
            self.kill()
            raise
        if not reply:
            raise self._died("it closed its output")
        answer = self._parsed(reply)
        if not answer["ok"]:
            raise self._told(str(answer.get("kind")), str(answer.get("error")))
        return answer

    def _parsed(self, reply: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(reply)
            good = isinstance(answer, dict) and isinstance(answer.get("ok"), bool)
        except (ValueError, RecursionError):
            answer, good = {}, False
        if good and answer.get("protocol", _PROTOCOL) == _PROTOCOL:
            return dict(answer)
        self._no_answer(reply)

    def _no_answer(self, reply: bytes) -> NoReturn:
        self.kill()
        raise IntegrityError(
            f"The package {self.package} answered something that is no answer.",
            where=self.where,
            why=f"{reply[:200].decode(errors='replace')!r}{self._last_words()}",
            hint=f"craft-fast rewards install {self.package} --force",
        )

    def _died(self, reason: str) -> CraftError:
        code = self.kill()
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        memory = -code == signal.SIGKILL
        kind = ResourceError if memory else CraftError
        return kind(
            f"The process of the package {self.package} ended by itself.",
            where=self.where,
            why=f"{how}, {reason}{self._last_words()}",
            hint="the machine ran out of memory, most likely: a smaller score.batch_size, or backend: native"
            if memory
            else f"run again; if it stays, craft-fast rewards install {self.package} --force",
        )

    def _told(self, kind: str, error: str) -> CraftError:
        what = f"The package {self.package} failed."
        if kind == "memory":
            return ResourceError(what, where=self.where, why=error, hint="a smaller score.batch_size")
        if kind == "weights":
            return IntegrityError(what, where=self.where, why=error, hint="its files must be the published ones")
        if kind == "import":
            again = f"craft-fast rewards install {self.package} --force"
            return EnvironmentProblem(what, where=self.where, why=error + self._last_words(), hint=again)
        return CraftError(what, where=self.where, why=error, hint="backend: native scores without the package")

    def _last_words(self, lines: int = 6) -> str:
        with contextlib.suppress(OSError, ValueError):
            size = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, size - 4096))
            said = self._errors.read().decode(errors="replace").strip().splitlines()[-lines:]
            if said:
                return "; it said: " + " | ".join(said)
        return ""

    @property
    def alive(self) -> bool:
        """Whether the worker still runs."""
        return self._process.poll() is None

    def kill(self) -> int:
        """End the worker whatever it does; its exit code."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        return self._reap()

    def close(self) -> None:
        """Ask the worker to end, and wait until its memory is free."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps({"op": "bye"}).encode() + b"\n")
                self._process.stdin.close()
                self._process.wait(10)
        self.kill()
        self._errors.close()

    def _reap(self) -> int:
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return code


def probe(package: str, python: Path) -> Mapping[str, str]:
    """Import a package in its environment; the versions found there.

    Raises:
        EnvironmentProblem: it cannot be imported; the last lines of what Python said are told.
    """
    done = subprocess.run(
        [str(python), "-I", "-u", str(WORKER), "--probe", package],
        env=clean_environment(python.parent.parent), capture_output=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        if done.returncode == 0:
            return {str(name): str(version) for name, version in json.loads(done.stdout).items()}
    except (ValueError, AttributeError):
        pass
    said = done.stderr.decode(errors="replace").strip().splitlines()[-4:]
    raise EnvironmentProblem(
        f"The package {package} cannot be imported in its environment.", where=str(python), why=" | ".join(said)[-1500:]
    )
