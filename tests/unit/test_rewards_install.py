"""How the environments of the authors' packages are made, found, and removed when they were not finished."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from craft_fast.errors import CraftError, EnvironmentProblem, Interrupted, ResourceError, UsageError
from craft_fast.rewards.packages import environments, install, table
from tests.unit.stand_in import finish, make_stand_in

HPS = table.get("hpsv2")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRAFT_FAST_PACKAGES", str(tmp_path / "packages"))
    return tmp_path / "packages"


def plan_of(root: Path, code: str) -> install.Plan:
    """A plan whose one command is this interpreter with ``code``; FOLDER in it is the environment's."""
    folder = table.folder(HPS, None, "3.11")
    code = code.replace("FOLDER", repr(str(folder)))
    return install.Plan(HPS, folder, None, HPS.pins, ((sys.executable, "-c", code),))


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("2.13.0", ("torch==2.13.0", "torchvision==0.28.0")),
        ("2.14.1+cu130", ("torch==2.14.1", "torchvision==0.29.1")),
        ("2.10", ("torch==2.10.0", "torchvision==0.25.0")),
        ("2.11.2", ("torch==2.11.2", "torchvision==0.26.2")),
    ],
)
def test_each_torch_has_its_torchvision(torch: str, expected: tuple[str, str]) -> None:
    assert table.torch_pins(torch) == expected


@pytest.mark.parametrize("torch", ["2.9.1", "3.0", "", "2.13.0.1", "2.13.x", "latest"])
def test_a_torch_whose_torchvision_is_not_known_is_refused(torch: str) -> None:
    with pytest.raises(UsageError, match="not known") as caught:
        table.torch_pins(torch)
    assert "--torch 2.14.1" in caught.value.hint


def test_the_place_follows_what_is_in_it(root: Path) -> None:
    places = {
        table.folder(package, torch, python)
        for package in table.PACKAGES.values()
        for torch in (None, "2.13.0", "2.14.1")
        for python in ("3.11", "3.12")
    }
    assert len(places) == 12
    assert {place.parent for place in places} == {root}
    plan = install.make_plan("hpsv2", torch="2.14.1", find_links="wheels")
    pip = plan.commands[1]
    assert plan.folder == table.folder(HPS, "2.14.1", f"3.{sys.version_info[1]}")
    assert pip[0] == str(plan.folder / "bin" / "python")
    assert pip[pip.index("--find-links") + 1] == "wheels"
    assert {"hpsv2x==1.2.0", "torch==2.14.1", "torchvision==0.29.1"} <= set(pip)
    system = install.make_plan("hpsv2", system_site_packages=True)
    assert "--system-site-packages" in system.commands[0]
    assert not [part for part in system.commands[1] if part.startswith("torch")]
    with pytest.raises(UsageError, match="exclude each other"):
        install.make_plan("hpsv2", torch="2.14.1", system_site_packages=True)
    with pytest.raises(EnvironmentProblem, match="interpreter does not run"):
        install.make_plan("hpsv2", python=root / "python")


def test_only_a_finished_environment_of_todays_pins_is_there(root: Path) -> None:
    assert install.installed("hpsv2") is None
    with pytest.raises(EnvironmentProblem, match="not there") as caught:
        install.environment("hpsv2")
    assert caught.value.hint == "craft-fast rewards install hpsv2"
    half, old, good = (make_stand_in(root / f"hpsv2-{name}") for name in ("half", "old", "good"))
    assert install.installed("hpsv2") is None, f"{half} was never finished"
    finish(old, pins="other")
    assert install.installed("hpsv2") is None
    finish(good)
    assert install.installed("hpsv2") == "hpsv2x 1.2.0 (torch 2.14.1)"
    assert install.environment("hpsv2") == good / "bin" / "python"
    assert install.installed("image-reward") is None
    newer = make_stand_in(root / "hpsv2-newer")
    finish(newer)
    assert [one.folder for one in environments.all_of("hpsv2")] == [newer, good]
    (newer / "bin" / "python").unlink()
    assert install.environment("hpsv2") == good / "bin" / "python"
    for text in ("", "{", "[]", "null", '{"package": "hpsv2"}', '{"package": ["hpsv2"]}'):
        (good / environments.COMPLETE).write_text(text)
        assert install.installed("hpsv2") is None


BUILD = (
    "import sys; from pathlib import Path; "
    f"sys.path[:0] = {[str(Path(__file__).parents[2])]!r}; print('Collecting hpsv2x'); "
    "from tests.unit.stand_in import make_stand_in; make_stand_in(Path(FOLDER), IMPORT)"
)


def test_it_is_made_once_and_anew_by_force(root: Path) -> None:
    plan = plan_of(root, BUILD.replace("IMPORT", "'model_dict = {}'"))
    made = install.install(plan)
    assert made.folder == plan.folder
    assert made.versions["hpsv2x"] == "1.2.0"
    assert "torch" in made.versions
    assert made.bytes > 0
    record = json.loads((plan.folder / environments.COMPLETE).read_text())
    assert record["requirements"] == list(HPS.pins)
    assert "Collecting hpsv2x" in install.log_of(plan).read_text()
    assert install.install(plan).made == made.made, "it is there"
    time.sleep(0.01)
    assert install.install(plan, force=True).made > made.made
    # A kill in the middle leaves no COMPLETE.json: made anew.
    (plan.folder / environments.COMPLETE).unlink()
    (plan.folder / "rest of a killed pip").touch()
    assert install.install(plan).made > made.made
    assert not (plan.folder / "rest of a killed pip").exists()


def test_a_package_that_does_not_import_is_not_there(root: Path) -> None:
    plan = plan_of(root, BUILD.replace("IMPORT", "'raise RuntimeError(\"operator torchvision::nms does not exist\")'"))
    with pytest.raises(EnvironmentProblem, match="cannot be imported") as caught:
        install.install(plan)
    assert "torchvision::nms" in caught.value.why
    assert caught.value.hint == "another torch: craft-fast rewards install hpsv2 --torch 2.14.1"
    assert not plan.folder.exists(), "6 GiB that serve nobody"
    assert install.installed("hpsv2") is None


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        ("ERROR: No matching distribution found for hpsv2x", EnvironmentProblem, "No matching distribution"),
        ("OSError: [Errno 28] No space left on device", ResourceError, "No space left"),
    ],
)
def test_what_pip_said_last_is_told(said: str, kind: type[CraftError], told: str, root: Path) -> None:
    plan = plan_of(root, f"import os; os.mkdir(FOLDER); print({said!r}); raise SystemExit(1)")
    with pytest.raises(CraftError) as caught:
        install.install(plan)
    assert type(caught.value) is kind
    assert told in caught.value.why
    assert caught.value.hint
    assert not plan.folder.exists()


def test_a_stop_ends_pip_and_leaves_nothing(root: Path) -> None:
    code = "import os, time; os.mkdir(FOLDER); print('Collecting', os.getpid(), flush=True); time.sleep(300)"
    plan, log = plan_of(root, code), install.log_of(plan_of(root, code))

    def stop() -> bool:
        return log.exists() and "Collecting" in log.read_text()

    began = time.monotonic()
    # The log is written through at the end of a line.
    with pytest.raises(Interrupted, match="half-made"):
        install.install(plan, should_stop=stop)
    assert time.monotonic() - began < 60
    assert not plan.folder.exists()
    number = int(log.read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_two_do_not_make_the_same(root: Path) -> None:
    plan = plan_of(root, "pass")
    root.mkdir()
    with install._alone(plan), pytest.raises(EnvironmentProblem, match="by another process"):
        install.install(plan)
