"""``craft-fast --help`` answers at once: nothing heavy is imported before a command needs it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 0.3
HEAVY = {"torch", "rich", "yaml", "numpy", "PIL", "sqlite3.dbapi2", "diffusers", "transformers", "click"}


def _modules_after(args: list[str], env: dict[str, str], cwd: Path) -> set[str]:
    """Names of all modules in a process that ran the command."""
    code = (
        "import sys\nfrom craft_cli.main import app\n"
        f"try: app(prog_name='craft-fast', args={args!r})\nexcept SystemExit: pass\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["run", "--help"], ["trian"]])
def test_help_imports_nothing_heavy(args: list[str], craft_env: dict[str, str], tmp_path: Path) -> None:
    modules = _modules_after(args, craft_env, tmp_path)
    assert "craft_cli.main" in modules
    assert not modules & HEAVY
    # Typer itself takes pydantic to convert a command's options where it is installed, but not for these two.
    assert "pydantic" not in modules or args in (["run", "--help"], ["trian"])


def test_settings_are_read_without_torch(craft_env: dict[str, str], tmp_path: Path) -> None:
    modules = _modules_after(["init"], craft_env, tmp_path)
    assert (tmp_path / "craft.yaml").exists()
    assert "pydantic" in modules
    assert "torch" not in modules


# A command's own help builds its options, for which Typer loads pydantic: 0.2 s idle, 0.31 s seen on a busy machine.
@pytest.mark.parametrize(("args", "limit_s"), [(["--help"], LIMIT_S), (["run", "--help"], 2 * LIMIT_S)])
def test_help_is_quick(args: list[str], limit_s: float, craft_env: dict[str, str], tmp_path: Path) -> None:
    """Best of 5; processor seconds, since on a busy machine the wall clock would time the neighbours."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "craft_cli", *args], env=craft_env, cwd=tmp_path, capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert 0 < min(seconds) < limit_s, f"best of 5: {min(seconds):.3f} s"
