"""Runs side by side: what may be compared, what is refused with the way out, and the page."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from craft_fast.errors import ExitCode
from craft_fast.pairs import bootstrap_interval
from craft_fast.report.compare_inputs import SIDES
from craft_fast.rng import derive_seed
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import open_run
from tests.cli.small_pair import HOSTILE, craft, result


@pytest.fixture(scope="module")
def together(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs ``one`` and ``two`` after what the refusal of ``two`` says was typed; and ``apart``, as it was."""
    root = tmp_path_factory.mktemp("together")
    shutil.copytree(pair / "runs", root / "runs")
    shutil.copytree(pair / "runs" / "two", root / "runs" / "apart")
    refused = craft("compare", "one", "two", "--runs", str(root / "runs"), "-o", str(root / "c.html"))
    assert refused.exit_code == ExitCode.USAGE
    assert "the seeds of their evaluations are 0 and 5" in refused.stderr
    assert not (root / "c.html").exists()
    [hint] = re.findall(r"hint: craft-fast (evaluate .*); then compare again", refused.stderr)
    typed = shlex.split(hint)
    assert typed[-2:] == ["--set", "evaluate.seed=0"]
    mended = craft(*typed, "--json")
    assert mended.exit_code == 0, mended.output
    # The pictures alone depend on it.
    stages = {row["name"]: row["key"] for row in result(mended)["stages"]}
    with open_run(pair / "runs" / "two", read_only=True) as run:
        before = {row.name: row.key for row in run.manifest.stages()}
    assert {name for name in stages if stages[name] != before[name]} == {"evaluate"}
    return root


def compare(root: Path, *args: str) -> Any:
    return craft("compare", "--runs", str(root / "runs"), "--output", str(root / "c.html"), *args)


def files(root: Path) -> dict[str, str]:
    # Its index beside the manifest is there while one is open.
    return {str(path): sha256_file(path) for path in root.rglob("*") if path.is_file() and path.suffix != ".sqlite-shm"}


def scores(root: Path, name: str, reward: str) -> dict[str, np.ndarray]:
    with open_run(root / "runs" / name, read_only=True) as run:
        row = run.manifest.stage("evaluate")
        assert row is not None
        found = run.manifest.eval_scores(row.key)
    return {side: np.array([value for s, _, r, value in found if (s, r) == (side, reward)]) for side in SIDES}


def test_figures_are_those_of_the_scores(together: Path) -> None:
    before = files(together / "runs")
    found = result(compare(together, "one", "two", "--json"))
    assert files(together / "runs") == before
    assert (found["prompts"], found["prompts_equal_but_for_rounding"], found["left_out"]) == (7, 0, [])
    assert [row["name"] for row in found["runs"]] == ["one", "two"]
    rewards = {row["reward"]: row for row in found["rewards"]}
    assert list(rewards) == ["h", "image_reward"]
    for name, row in rewards.items():
        one, two = scores(together, "one", name), scores(together, "two", name)
        np.testing.assert_array_equal(one["base"], two["base"])
        change = two["tuned"] - one["tuned"]
        [pair] = row["pairs"]
        low, high = bootstrap_interval(change, samples=100, seed=derive_seed(0, "bootstrap"))
        assert (pair["ci_low"], pair["ci_high"]) == (low, high)
        assert pair["difference"] == pytest.approx(change.mean(), rel=1e-9)
        assert pair["win_rate"] == np.mean(change > 0) + 0.5 * np.mean(change == 0)
        assert row["base_mean"] == pytest.approx(one["base"].mean())
        assert row["means"] == pytest.approx({"one": one["tuned"].mean(), "two": two["tuned"].mean()})
    assert rewards["image_reward"]["held_out"] == {"one": True, "two": True}
    assert rewards["h"]["held_out"] == {"one": False, "two": False}
    assert found["settings"] == {
        "seed": {"one": 0, "two": 5},
        "evaluate.seed": {"one": None, "two": 0},
    }
    assert {row["prompt"] for row in found["pictures"]} > {HOSTILE}


def test_the_first_runs_figures_are_those_of_its_report(together: Path) -> None:
    found = result(compare(together, "one", "two", "--json"))
    with open_run(together / "runs" / "one", read_only=True) as run:
        row = run.manifest.stage("evaluate")
        assert row is not None
        rows = {one.metric: one for one in run.manifest.eval_rows(row.key)}
    for reward in found["rewards"]:
        own, ours = rows[reward["reward"]], reward["against_base"]["one"]
        assert (ours["ci_low"], ours["ci_high"], ours["win_rate"]) == (own.ci_low, own.ci_high, own.win_rate)


def test_the_page_is_whole_and_a_hostile_prompt_stays_text(together: Path) -> None:
    done = compare(together, "one", "two", "--prompts", "2")
    assert done.exit_code == 0, done.output
    assert f"page: {together / 'c.html'}" in done.stdout
    assert "over 7 shared prompts" in done.stdout
    text = (together / "c.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "default-src 'none'" in text
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)\w", text)
    assert "://" not in re.sub(r"data:image/[^\"]*", "", text)
    # Two from the first, and five of the others: base, one and two of each.
    assert text.count("<img ") == 7 * 3
    # Written again over itself.
    assert compare(together, "one", "two", "--quiet").exit_code == 0


def test_three_runs_need_one_seed_too(together: Path) -> None:
    done = compare(together, "one", "two", "apart")
    assert done.exit_code == ExitCode.USAGE
    assert "one and apart" in done.stderr
    assert "--name apart" in done.stderr


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("one",), "At least two runs"),
        (("one", "one"), "not compared with itself"),
        (("one", "tow"), "did you mean two?"),
        (("one", "no-such-thing-at-all"), "there are: apart, one, two"),
    ],
)
def test_what_is_no_pair_of_runs(together: Path, names: tuple[str, ...], said: str) -> None:
    done = compare(together, *names)
    assert done.exit_code == ExitCode.USAGE
    assert said in done.stderr


def test_a_run_that_is_being_worked_on_is_read_all_the_same(together: Path) -> None:
    with open_run(together / "runs" / "two"):
        assert compare(together, "one", "two", "--quiet").exit_code == 0


def test_a_folder_stands_for_a_run(together: Path) -> None:
    found = result(craft("compare", *(str(together / "runs" / one) for one in ("one", "two")), "--json",
                         "-o", str(together / "c.html")))  # fmt: skip
    assert [row["name"] for row in found["runs"]] == ["one", "two"]


def test_other_files_are_kept(together: Path, tmp_path: Path) -> None:
    mine = tmp_path / "notes.html"
    mine.write_text("mine")
    inside = together / "runs" / "one" / "report.html"
    before = inside.read_bytes()
    for target, said in ((mine, "is kept"), (tmp_path, "a folder"), (inside, "Nothing is written into the runs")):
        done = compare(together, "one", "two", "-o", str(target))
        assert done.exit_code == ExitCode.USAGE
        assert said in done.stderr
    assert (mine.read_text(), inside.read_bytes()) == ("mine", before)


def test_an_evaluation_must_be_finished_and_of_the_saved_settings(together: Path, tmp_path: Path) -> None:
    shutil.copytree(together / "runs", tmp_path / "runs")
    config = tmp_path / "runs" / "two" / "config.yaml"
    config.write_text(config.read_text() + "\n")
    edited = compare(tmp_path, "one", "two")
    assert (edited.exit_code, "not of its settings" in edited.stderr) == (ExitCode.USAGE, True)
    with open_run(tmp_path / "runs" / "one") as run:
        row = run.manifest.stage("evaluate")
        assert row is not None
        run.manifest.begin_stage("evaluate", "another key")
    unfinished = compare(tmp_path, "one", "two")
    assert unfinished.exit_code == ExitCode.USAGE
    assert f"craft-fast evaluate --name one --runs {tmp_path / 'runs'}" in unfinished.stderr
    with open_run(tmp_path / "runs" / "one") as run:
        run.manifest.finish_stage("evaluate", "another key", 1.0, None)
    stale = compare(tmp_path, "one", "two", "--json")
    assert stale.exit_code == ExitCode.USAGE
    assert "settings or inputs have changed since" in stale.stderr


def test_a_damaged_manifest_is_an_integrity_error(together: Path, tmp_path: Path) -> None:
    shutil.copytree(together / "runs", tmp_path / "runs")
    manifest = tmp_path / "runs" / "two" / "manifest.sqlite"
    manifest.write_bytes(b"not a database, not at all" * 100)
    assert compare(tmp_path, "one", "two").exit_code == ExitCode.INTEGRITY
