"""Function rewards, and the scoring stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from craft_fast.config import RewardSettings, ScoreSettings
from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError
from craft_fast.records import Candidate
from craft_fast.rewards.composite import score_candidates, score_key
from craft_fast.rewards.registry import load_reward, reward_key
from craft_fast.store.run import Run, open_run


def pictures(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# ---- functions


def write_module(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / f"{name}.py").write_text(body)
    monkeypatch.chdir(folder)
    return name


def test_a_function_of_the_working_folder_is_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    body = (
        "def bright(images, prompts):\n    return [float(i.float().mean()) + len(p) for i, p in zip(images, prompts)]\n"
    )
    name = write_module(tmp_path, "my_reward_one", body, monkeypatch)
    before = list(sys.path)
    settings = RewardSettings(kind="function", path=f"{name}:bright", held_out=True)
    reward = load_reward("bright", settings)
    images = pictures(2)
    found = reward.score(images, ["ab", "c"])
    assert found.tolist() == pytest.approx([float(images[0].float().mean()) + 2, float(images[1].float().mean()) + 1])
    assert reward.key == reward_key("bright", settings)
    assert sys.path == before


def test_the_key_of_a_function_follows_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_module(
        tmp_path, "my_reward_two", "def f(i, p): return [0] * len(p)\ndef g(i, p): return [1]\n", monkeypatch
    )
    one = reward_key("f", RewardSettings(kind="function", path=f"{name}:f"))
    assert reward_key("g", RewardSettings(kind="function", path=f"{name}:g")) != one
    (tmp_path / f"{name}.py").write_text("def f(i, p): return [2] * len(p)\n")
    assert reward_key("f", RewardSettings(kind="function", path=f"{name}:f")) != one


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def f(i, p): return [1.0]", "wrong number of scores"),
        ("def f(i, p): return [float('nan')] * len(p)", "not a number"),
        ("def f(i, p): raise KeyError('x')", "function failed"),
        ("def f(i, p): return 'abc'", "function failed"),
    ],
)
def test_what_a_function_does_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    name = write_module(tmp_path, f"bad_reward_{abs(hash(body)) % 10**9}", body, monkeypatch)
    reward = load_reward("f", RewardSettings(kind="function", path=f"{name}:f"))
    with pytest.raises(CraftError, match=said):
        reward.score(pictures(2), ["a", "b"])


@pytest.mark.parametrize("path", ["no_such_module_here:f", "json:no_such_function", "json:__name__"])
def test_a_function_that_is_not_there(path: str) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        reward_key("f", RewardSettings(kind="function", path=path))
    assert caught.value.exit_code == 4


def test_the_worlds_own_functions_are_rewards() -> None:
    for function in ("alignment", "clean", "passed"):
        reward = load_reward("o", RewardSettings(kind="function", path=f"craft_fast.tiny.oracle:{function}"))
        found = reward.score(pictures(3), ["a red circle"] * 3)
        assert bool(((found >= 0) & (found <= 1)).all())


# ---- the stage


class Counting:
    """A reward that tells how it was asked; the score is the picture's mean and the text's length."""

    def __init__(self, name: str = "r", key: str = "k") -> None:
        self.name, self.held_out, self.key = name, False, key
        self.batches: list[int] = []
        self.texts: list[str] = []
        self.rested = 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.batches.append(len(prompts))
        self.texts += prompts
        return images.float().mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])

    def rest(self) -> None:
        self.rested += 1

    def close(self) -> None:
        return None


def candidates(run: Run, n: int) -> list[Candidate]:
    rows = []
    for i in range(n):
        path = run.path("candidates", f"{i}.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(path)
        ref = run.ref(path)
        rows.append(Candidate(f"c{i}", f"p{i // 2}", i % 2, f"base {i // 2}", f"base {i // 2}, sharp", 0, ref, ref))
    run.manifest.put_candidates("generate", rows)
    return rows


def test_scores_are_kept_and_not_made_again(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", create=True) as run:
        rows = candidates(run, 5)
        reward, settings = Counting(), ScoreSettings(batch_size=2)
        score_candidates(run, rows, [reward], settings=settings)
        found = run.manifest.scores({"r": score_key("k", settings)})
        assert found == {f"c{i}": {"r": pytest.approx(i + 6.0)} for i in range(5)}
        assert (reward.batches, reward.rested) == ([2, 2, 1], 1)
        score_candidates(run, rows, [reward], settings=settings)
        assert reward.batches == [2, 2, 1]


def test_rewards_see_the_base_prompt_or_the_expanded_one(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", create=True) as run:
        rows = candidates(run, 2)
        for prompt in ("base", "expanded"):
            reward = Counting()
            score_candidates(run, rows, [reward], settings=ScoreSettings(prompt=prompt))
            assert reward.texts == (["base 0"] * 2 if prompt == "base" else ["base 0, sharp"] * 2)
    assert score_key("k", ScoreSettings(prompt="base")) != score_key("k", ScoreSettings(prompt="expanded"))


def test_an_incomplete_chunk_is_scored_as_a_whole(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", create=True) as run:
        rows = candidates(run, 6)
        settings = ScoreSettings(batch_size=3)
        score_candidates(run, rows[:4], [Counting()], settings=settings)
        later = Counting()
        score_candidates(run, rows, [later], settings=settings)
        assert later.batches == [3]


def test_a_damaged_picture_stops_the_stage_and_keeps_what_is_done(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", create=True) as run:
        rows = candidates(run, 4)
        run.path(rows[3].image.path).write_bytes(b"not a picture")
        settings = ScoreSettings(batch_size=2)
        with pytest.raises(IntegrityError):
            score_candidates(run, rows, [Counting()], settings=settings)
        assert set(run.manifest.scores({"r": score_key("k", settings)})) == {"c0", "c1"}
