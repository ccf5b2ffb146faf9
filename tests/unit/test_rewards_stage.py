"""Function rewards, and the scoring stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from craft_fast.config import RewardSettings, ScoreSettings
from craft_fast.errors import CraftError, EnvironmentProblem, IntegrityError, Interrupted
from craft_fast.progress import Silent
from craft_fast.records import Candidate, Provenance
from craft_fast.rewards import composite, pixels
from craft_fast.rewards.composite import score_candidates, score_key
from craft_fast.rewards.pixels import Pictures, PixelForm
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

NOW = Provenance("test", "0" * 64, "none/8", precision="float32")
SETTINGS = ScoreSettings(batch_size=2)


class Counting:
    """A reward that tells how it was asked; the score is the picture's mean and the text's length."""

    def __init__(self, name: str = "r", key: str = "k", provenance: Provenance = NOW) -> None:
        self.name, self.held_out, self.key, self.provenance = name, False, key, provenance
        self.batches: list[int] = []
        self.texts: list[str] = []
        self.rested = 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.batches.append(len(prompts))
        self.texts += prompts
        return images.float().mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])

    def cost(self) -> float:
        return 0.0

    def memory_bytes(self, images: int) -> int:
        return 0

    def rest(self) -> None:
        self.rested += 1

    def close(self) -> None:
        return None


class Mates(Counting):
    """A reward whose scores depend on the pictures beside them, as the last bits of a network's do."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        found = super().score(images, prompts)
        return found + 0.01 * found.mean()


class Failing(Mates):
    """Does what it was told to at its n-th call."""

    def __init__(self, at: int, wrong: Callable[[Tensor], Any], **more: Any) -> None:
        super().__init__(**more)
        self.at, self.wrong = at, wrong

    def score(self, images: Tensor, prompts: Sequence[str]) -> Any:
        found = super().score(images, prompts)
        return self.wrong(found) if len(self.batches) - 1 == self.at else found


def kill(_: Tensor) -> Tensor:
    raise KeyboardInterrupt


def candidates(run: Run, n: int, key: str = "generate") -> list[Candidate]:
    rows = []
    for i in range(n):
        path = run.path("candidates", f"{i}.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(path)
        ref, name = run.ref(path), f"{key}-{i}"
        rows.append(Candidate(name, f"p{i // 2}", i % 2, f"base {i // 2}", f"base {i // 2}, sharp", 0, ref, ref))
    run.manifest.put_candidates(key, rows)
    return rows


def found(run: Run, settings: ScoreSettings = SETTINGS) -> dict[str, float]:
    """Scores of the reward r, by candidate."""
    scores = run.manifest.scores({"r": score_key("k", settings)})
    return {name: values["r"] for name, values in scores.items()}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


def test_scores_are_kept_and_not_made_again(run: Run) -> None:
    rows, reward = candidates(run, 5), Counting()
    score_candidates(run, rows, [reward], settings=SETTINGS)
    assert found(run) == {f"generate-{i}": pytest.approx(i + 6.0) for i in range(5)}
    assert run.manifest.provenances({"r": score_key("k", SETTINGS)}) == {"r": {NOW: 5}}
    assert (reward.batches, reward.rested) == ([2, 2, 1], 1)
    score_candidates(run, rows, [reward], settings=SETTINGS)
    assert reward.batches == [2, 2, 1]


def test_rewards_see_the_base_prompt_or_the_expanded_one(run: Run) -> None:
    rows = candidates(run, 2)
    for prompt in ("base", "expanded"):
        reward = Counting()
        score_candidates(run, rows, [reward], settings=ScoreSettings(prompt=prompt))
        assert reward.texts == (["base 0"] * 2 if prompt == "base" else ["base 0, sharp"] * 2)
    assert score_key("k", ScoreSettings(prompt="base")) != score_key("k", ScoreSettings(prompt="expanded"))


def test_an_incomplete_chunk_is_scored_as_a_whole(run: Run, tmp_path: Path) -> None:
    rows, settings = candidates(run, 6), ScoreSettings(batch_size=3)
    score_candidates(run, rows[:4], [Mates()], settings=settings)
    later = Mates()
    score_candidates(run, rows, [later], settings=settings)
    assert later.batches == [3]
    with open_run(tmp_path / "at once", create=True) as other:
        score_candidates(other, candidates(other, 6), [Mates()], settings=settings)
        assert found(other, settings) == found(run, settings)


@pytest.mark.parametrize("calls", range(3))
def test_a_run_that_was_killed_ends_in_the_bits_of_one_that_was_not(calls: int, run: Run, tmp_path: Path) -> None:
    rows = candidates(run, 5)
    with pytest.raises(KeyboardInterrupt):
        score_candidates(run, rows, [Failing(calls, kill)], settings=SETTINGS)
    assert len(found(run)) == 2 * calls
    score_candidates(run, rows, [Mates()], settings=SETTINGS)
    with open_run(tmp_path / "undisturbed", create=True) as other:
        score_candidates(other, candidates(other, 5), [Mates()], settings=SETTINGS)
        assert found(other) == found(run)
        assert other.manifest._all("SELECT * FROM judgements") == run.manifest._all("SELECT * FROM judgements")


def test_a_picture_is_judged_once_with_a_text_whatever_candidate_it_is(run: Run) -> None:
    score_candidates(run, candidates(run, 4), [Mates()], settings=SETTINGS)
    again, expanded, other = Mates(), Mates(), Mates(key="other")
    rows = candidates(run, 5, "again")
    score_candidates(run, rows, [again], settings=SETTINGS)
    assert again.batches == [1]
    assert [found(run)[f"again-{i}"] for i in range(4)] == [found(run)[f"generate-{i}"] for i in range(4)]
    score_candidates(run, rows, [expanded], settings=ScoreSettings(batch_size=2, prompt="expanded"))
    score_candidates(run, rows, [other], settings=SETTINGS)
    assert (expanded.batches, other.batches) == ([2, 2, 1], [2, 2, 1])


def test_a_damaged_picture_stops_the_stage_and_keeps_what_is_done(run: Run) -> None:
    rows = candidates(run, 4)
    run.path(rows[3].image.path).write_bytes(b"not a picture")
    with pytest.raises(IntegrityError):
        score_candidates(run, rows, [Counting()], settings=SETTINGS)
    assert set(found(run)) == {"generate-0", "generate-1"}


def test_another_picture_under_a_recorded_name_is_not_judged(run: Run) -> None:
    rows = candidates(run, 2)
    run.path(rows[1].image.path).write_bytes(run.path(rows[0].image.path).read_bytes())
    with pytest.raises(IntegrityError, match="not what was written"):
        score_candidates(run, rows, [Counting()], settings=SETTINGS)
    assert run.manifest._all("SELECT * FROM judgements") == []


def failing(_: Tensor) -> Tensor:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda scores: scores * float("nan"), "NaN or infinity"),
        (lambda scores: scores / 0, "NaN or infinity"),
        (lambda scores: scores[:1], "wrong number of scores"),
        (failing, "A reward failed"),
    ],
)
def test_what_a_reward_does_wrong_is_named_and_leaves_nothing_half_written(
    wrong: Callable[[Tensor], Any], said: str, run: Run
) -> None:
    rows = candidates(run, 4)
    with pytest.raises(CraftError, match=said) as caught:
        score_candidates(run, rows, [Failing(1, wrong)], settings=SETTINGS)
    assert "reward r" in caught.value.where
    assert set(found(run)) == {"generate-0", "generate-1"}
    assert len(run.manifest._all("SELECT * FROM judgements")) == 2
    mended = Mates()
    score_candidates(run, rows, [mended], settings=SETTINGS)
    assert (mended.batches, len(found(run))) == ([2], 4)


def test_a_missing_picture_is_named(run: Run) -> None:
    rows = candidates(run, 4)
    kept = run.path(rows[2].image.path)
    content = kept.read_bytes()
    kept.unlink()
    with pytest.raises(EnvironmentProblem) as caught:
        score_candidates(run, rows, [Counting()], settings=SETTINGS)
    assert "2.png" in caught.value.where
    kept.write_bytes(content)
    score_candidates(run, rows, [Counting()], settings=SETTINGS)
    assert len(found(run)) == 4


def test_a_stop_comes_between_chunks(run: Run) -> None:
    rows, answers = candidates(run, 6), iter([False, False, True])
    with pytest.raises(Interrupted):
        score_candidates(run, rows, [Counting()], settings=SETTINGS, should_stop=lambda: next(answers))
    assert len(found(run)) == 4


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, message: str) -> None:
        self.lines.append(message)


def test_scores_that_came_about_in_another_way_are_made_again(run: Run) -> None:
    rows, said = candidates(run, 4), Said()
    score_candidates(run, rows, [Counting()], settings=SETTINGS)
    half = Counting(provenance=replace(NOW, precision="float16"))
    score_candidates(run, rows, [half], settings=SETTINGS, progress=said)
    assert half.batches == [2, 2]
    assert said.lines == [
        "4 scores of r came about in another way and are made again: precision: float32, float16",
    ]
    assert run.manifest.provenances({"r": score_key("k", SETTINGS)}) == {"r": {half.provenance: 4}}
    back = Counting()
    score_candidates(run, rows, [back], settings=SETTINGS)
    assert back.batches == []  # what it said before is still known


# ---- pictures are shared


class Pixels(Counting):
    """A reward that looks at pixels of a form, as a network does."""

    def __init__(self, name: str, form: PixelForm) -> None:
        super().__init__(name, name)
        self.form = form

    def score_pictures(self, pictures: Pictures, prompts: Sequence[str]) -> Tensor:
        self.batches.append(len(pictures))
        return pictures.pixels(self.form).float().mean((1, 2, 3))


@pytest.mark.parametrize(("room", "decoded", "shaped"), [(512 * 1024**2, 5, 2 * 3), (0, 5 * 4, 3 * 3)])
def test_pictures_are_decoded_once_and_shaped_once_a_form(
    room: int, decoded: int, shaped: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, calls = candidates(run, 5), Counter[str]()

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*values: Any) -> Any:
            calls[name] += 1
            return function(*values)

        return counted

    monkeypatch.setattr(composite, "_KEEP_BYTES", room)
    monkeypatch.setattr(composite, "read_image", count("decoded", composite.read_image))
    monkeypatch.setattr(pixels, "shape", count("shaped", pixels.shape))
    small, large = PixelForm(4, "crop"), PixelForm(16, "crop")
    judges = [Pixels("a", small), Counting("b", "b"), Pixels("c", small), Pixels("d", large)]
    score_candidates(run, rows, judges, settings=SETTINGS)
    assert dict(calls) == {"decoded": decoded, "shaped": shaped}
    scores = run.manifest.scores({judge.name: score_key(judge.key, SETTINGS) for judge in judges})
    assert scores["generate-3"] == {"a": 3.0, "b": 9.0, "c": 3.0, "d": 3.0}


def test_a_chunk_of_which_some_pixels_are_there_has_them_in_its_own_order(run: Run) -> None:
    rows = candidates(run, 6)
    shelf = composite._Shelf(run, shared=True)
    form = PixelForm(4, "crop")
    shelf.pixels([rows[1], rows[4]], form, torch.device("cpu"))
    found = shelf.pixels([rows[5], rows[4], rows[0], rows[1]], form, torch.device("cpu"))
    assert found.float().mean((1, 2, 3)).tolist() == [5.0, 4.0, 0.0, 1.0]


def test_a_chunk_is_recorded_whole_or_not_at_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = candidates(run, 2)
    monkeypatch.setattr(run.manifest, "put_judgements", lambda *_: kill(torch.zeros(0)))
    with pytest.raises(KeyboardInterrupt):
        score_candidates(run, rows, [Counting()], settings=SETTINGS)
    assert found(run) == {}
