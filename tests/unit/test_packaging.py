"""What lands in the wheel, what the names import, and what an import costs."""

from __future__ import annotations

import configparser
import os
import pkgutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import craft_fast

ROOT = Path(__file__).parents[2]
TORCH_FREE = [
    "craft_fast",
    "craft_fast.errors",
    "craft_fast.config",
    "craft_fast.records",
    "craft_fast.rng",
    "craft_fast.progress",
    "craft_fast.prompts",
    "craft_fast.report",
    "craft_fast.settings_io",
    "craft_fast.store.manifest",
    "craft_cli",
    "craft_cli.main",
    "craft_bench",
    "craft_bench.gates",
    "craft_bench.registry",
    "craft_bench.rows",
    "craft_bench.verify",
]
HEAVY = ("torch", "diffusers", "transformers", "peft", "bitsandbytes", "numpy")


def python(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """This interpreter in a fresh process; ``path`` goes first on its module search path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the tracked sources so that the checkout gets no build folder."""
    source = tmp_path_factory.mktemp("source")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("the list of sources comes from git, and this is no git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    built = python(
        *("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)),
        cwd=source,
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("craft_fast-*.whl")
    return path


def test_wheel_holds_four_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "craft_fast",
        "craft_kernels",
        "craft_cli",
        "craft_bench",
        f"craft_fast-{craft_fast.__version__}.dist-info",
    }
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyc", ".orig"))]


def test_wheel_holds_every_module_and_data_file_of_the_sources(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    roots = {"craft_fast": ROOT, "craft_kernels": ROOT / "kernels", "craft_cli": ROOT / "cli"}
    roots |= {"craft_bench": ROOT / "bench"}
    wanted = set()
    for package, root in roots.items():
        files = [path for path in (root / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {path.relative_to(root).as_posix() for path in files if path.suffix in {".py", ".typed", ".yaml"}}
        wanted |= {path.relative_to(root).as_posix() for path in files if "assets" in path.parts}
    assert wanted <= inside, sorted(wanted - inside)


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"craft_fast-{craft_fast.__version__}.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.11" in metadata
    assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")
    assert "craft-fast = craft_cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_wheel_imports_from_a_fresh_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    packages = "craft_fast", "craft_kernels", "craft_cli", "craft_bench"
    code = f"import {', '.join(packages)}\nfor m in ({', '.join(packages)}): print(m.__file__)"
    done = python("-c", code, cwd=elsewhere, path=site)
    assert done.returncode == 0, done.stderr
    assert [Path(line).parent.parent for line in done.stdout.split()] == [site] * 4


@pytest.mark.parametrize("folder", [".", "kernels", "cli", "bench", "craft_fast", "tests"])
def test_the_kernels_package_of_others_is_never_shadowed(folder: str) -> None:
    code = (
        "import kernels, craft_kernels, craft_fast, craft_cli, craft_bench\n"
        "print(kernels.get_kernel.__module__.split('.')[0], kernels.__file__)"
    )
    done = python("-c", code, cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    name, path = done.stdout.split(maxsplit=1)
    assert name == "kernels"
    assert ROOT / "kernels" not in Path(path).parents


def test_source_roots_hold_no_package_of_their_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "cli" / "__init__.py").exists()
    assert not (ROOT / "bench" / "__init__.py").exists()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_load_no_heavy_package(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_module_is_under_the_import_rules() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    layers = parser["importlinter:contract:layers"]["layers"]
    placed = {name.strip(" ()") for name in layers.replace("|", ":").replace("\n", ":").split(":")}
    modules = {f"craft_fast.{module.name}" for module in pkgutil.iter_modules(craft_fast.__path__)}
    assert modules <= placed, f"give these a layer in .importlinter: {sorted(modules - placed)}"
    kept_from_hugging_face = set(parser["importlinter:contract:hugging-face"]["source_modules"].split())
    free = {
        f"craft_fast.{name}" for name in ("sdxl", "qlora", "lora", "rewards", "export", "expanders", "tiny", "quiet")
    }
    assert modules - free <= kept_from_hugging_face


def test_constraints_pin_every_requirement_exactly_and_inside_its_range() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["dev"], *extras["tensorboard"], *extras["gpu"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower().replace("_", "-")]), text
