"""Rating pictures: batches, what is known, what cannot be read, rewards that fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from craft_fast.errors import CraftError, IntegrityError, Interrupted, ResourceError
from craft_fast.picture_folders import Picture, find_pictures, give_prompts
from craft_fast.records import Provenance
from craft_fast.rewards import rating_pictures
from craft_fast.rewards.memory import ScoreMemory
from craft_fast.rewards.pixels import Pictures, PixelForm, shape
from craft_fast.rewards.rating import Rating, rate
from craft_fast.rewards.rating_pictures import Darkroom, hash_picture
from craft_fast.store.safe_load import read_image

CROP = PixelForm(16, "crop")
STRETCH = PixelForm(24, "stretch")


class Whole:
    """A reward of whole pictures in one tensor, as functions are: mean of the green, and the text's size."""

    held_out = False

    def __init__(self, name: str = "whole", spoil: Callable[[list[float]], list[float]] = lambda found: found) -> None:
        self.name = name
        self.key = f"key of {name}"
        self.provenance = Provenance("native", "c" * 64)
        self.seen: list[list[str]] = []
        self.rests = 0
        self.cut: dict[str, int] = {}
        self._spoil = spoil

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(list(prompts))
        self.cut |= {text: len(text) - 10 for text in prompts if len(text) > 10}
        found = [float(image[1].float().mean()) + len(text) for image, text in zip(images, prompts, strict=True)]
        return torch.tensor(self._spoil(found), dtype=torch.float32)

    def memory_bytes(self, images: int) -> int:
        return 0

    def cost(self) -> float:
        return 0.0

    def rest(self) -> None:
        self.rests += 1

    def close(self) -> None:
        pass


class Formed(Whole):
    """The same of pictures in a form, as network rewards are."""

    def __init__(self, name: str, form: PixelForm) -> None:
        super().__init__(name)
        self.pixel_form = form

    def score_pictures(self, pictures: Pictures, prompts: Sequence[str]) -> Tensor:
        assert len(pictures) == len(prompts)
        return self.score(pictures.pixels(self.pixel_form, "cpu"), prompts)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[ScoreMemory]:
    with ScoreMemory(tmp_path / "cache" / "scores.sqlite") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine pictures of three sizes."""
    made = tmp_path / "p"
    made.mkdir()
    draw = np.random.default_rng(0)
    for n in range(9):
        height, width = ((16, 16), (40, 30), (20, 50))[n % 3]
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(made / f"{n}.png")
    return made


def pictures(folder: Path, *prompts: str) -> list[Picture]:
    found = find_pictures([folder])
    give_prompts(found, prompts=prompts or ["text"])
    return found.pictures


def table(rating: Rating) -> dict[tuple[str, str, str], float]:
    return {(row.picture.name, row.prompt, row.judge.name): row.judgement.score for row in rating.rows}


def test_every_picture_meets_every_text_and_every_reward(folder: Path, memory: ScoreMemory) -> None:
    rewards = [Whole(), Formed("crop", CROP), Formed("stretch", STRETCH)]
    rating = rate(pictures(folder, "a", "bcd"), rewards, memory=memory, batch_size=4)
    found = table(rating)
    assert list(found)[:7] == [
        *(("0.png", text, name) for text in ("a", "bcd") for name in ("whole", "crop", "stretch")),
        ("1.png", "a", "whole"),
    ]
    assert len(found) == 9 * 2 * 3
    for name, text, reward in found:
        image = read_image(folder / name)
        if reward != "whole":
            image = shape(image[None], CROP if reward == "crop" else STRETCH)[0]
        assert found[name, text, reward] == float(np.float32(float(image[1].float().mean()) + len(text)))
    row = rating.rows[3]
    assert (row.judgement.width_px, row.judgement.height_px, row.sha256) == (
        16, 16, hash_picture(folder / "0.png").sha256,
    )  # fmt: skip
    assert rating.rows[-1].judgement[2:] == (50, 20)
    assert [reward.rests for reward in rewards] == [1, 1, 1]
    assert all(max(map(len, reward.seen)) <= 4 for reward in rewards)


def test_pictures_are_decoded_once_for_all_networks(folder: Path, memory: ScoreMemory) -> None:
    rewards = [Formed("one", CROP), Formed("two", STRETCH), Formed("three", CROP)]
    assert rate(pictures(folder), rewards, memory=memory, batch_size=2).decoded == 9


def test_pictures_that_later_rewards_know_are_not_kept_for_them(
    folder: Path, memory: ScoreMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate(pictures(folder), [Formed("two", STRETCH)], memory=memory)
    kept: list[PixelForm] = []
    keep = Darkroom._keep
    monkeypatch.setattr(Darkroom, "_keep", lambda self, sha, forms: (kept.extend(forms), keep(self, sha, forms))[1])
    rate(pictures(folder), [Formed("one", CROP), Formed("two", STRETCH)], memory=memory)
    assert kept == []


def test_what_has_no_room_is_decoded_again(folder: Path, memory: ScoreMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = [Formed("one", CROP), Formed("two", STRETCH)]
    enough = table(rate(pictures(folder), rewards, memory=memory, batch_size=2))
    monkeypatch.setattr(Darkroom.__init__, "__kwdefaults__", {"kept_bytes": 4 * 24 * 24 * 3})
    rating = rate(pictures(folder), rewards, memory=memory, batch_size=2, fresh=True)
    assert rating.decoded == 9 + 9 - 4
    assert table(rating) == enough


def test_all_that_is_known_costs_nothing(folder: Path, memory: ScoreMemory) -> None:
    first = rate(pictures(folder, "a", "something longer"), [Whole()], memory=memory)
    again = Whole()
    second = rate(pictures(folder, "a", "something longer"), [again], memory=memory)
    assert second.rows == first.rows  # sizes and what was cut among them
    assert {row.judgement.tokens_cut for row in second.rows} == {0, 6}
    assert (again.seen, second.decoded, second.known, second.made) == ([], 0, 18, 0)
    assert rate(pictures(folder, "a"), [again], memory=memory, fresh=True).made == 9


def test_another_provenance_is_not_known(folder: Path, memory: ScoreMemory) -> None:
    rate(pictures(folder), [Whole()], memory=memory)
    other = Whole()
    other.provenance = Provenance("native", "c" * 64, precision="float16")
    assert rate(pictures(folder), [other], memory=memory).known == 0


def test_a_command_that_was_stopped_goes_on_with_the_same_batches(folder: Path, memory: ScoreMemory) -> None:
    (folder / "1b.png").write_bytes(b"broken")
    for make in (lambda: Whole(), lambda: Formed("crop", CROP)):
        calm, texts = make(), [f"{n}" for n in range(3)]
        whole = rate(pictures(folder, *texts), [calm], memory=memory, batch_size=5, fresh=True)
        memory_two = ScoreMemory(None)
        hurried = make()
        with pytest.raises(Interrupted, match="every finished batch is kept"):
            rate(
                pictures(folder, *texts), [hurried], memory=memory_two, batch_size=5,
                should_stop=lambda hurried=hurried: len(hurried.seen) > 2,
            )  # fmt: skip
        before = len(hurried.seen)
        assert 2 < before < len(calm.seen)
        continued = rate(pictures(folder, *texts), [hurried], memory=memory_two, batch_size=5)
        assert hurried.seen == calm.seen
        assert continued.rows == whole.rows
        assert continued.known == sum(map(len, calm.seen[:before]))
        memory_two.close()


def test_new_pictures_among_known_ones_share_batches(folder: Path, memory: ScoreMemory) -> None:
    reward = Formed("crop", CROP)
    every_third = [picture for at, picture in enumerate(pictures(folder)) if at % 3]
    rate(every_third, [reward], memory=memory)
    reward.seen.clear()
    rate(pictures(folder), [reward], memory=memory, batch_size=3)
    assert list(map(len, reward.seen)) == [3]


def test_the_same_content_is_judged_once(folder: Path, memory: ScoreMemory) -> None:
    (folder / "0 again.png").write_bytes((folder / "0.png").read_bytes())
    rating = rate(pictures(folder), [Whole()], memory=memory)
    assert (len(rating.rows), rating.made, rating.decoded) == (10, 9, 9)
    found = table(rating)
    assert found["0 again.png", "text", "whole"] == found["0.png", "text", "whole"]


def test_a_reward_that_looks_at_no_text_judges_a_picture_once(folder: Path, memory: ScoreMemory) -> None:
    reward = Whole()
    rating = rate(pictures(folder, "a", "bc", "def"), [reward], memory=memory, blind={"whole"})
    assert rating.made == 9
    assert {text for batch in reward.seen for text in batch} == {""}
    assert [row.prompt for row in rating.rows[:3]] == ["a", "bc", "def"]
    assert len({row.judgement.score for row in rating.rows[:3]}) == 1


# ---- pictures that cannot be rated


def test_what_cannot_be_read_is_named_and_the_others_are_rated(
    folder: Path, memory: ScoreMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rating_pictures, "MAX_FILE_BYTES", 10_000_000)
    (folder / "a-broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "b-empty.png").write_bytes(b"")
    with open(folder / "c-giant.png", "wb") as file:
        file.truncate(10_000_001)
    Image.new("L", (9000, 9000)).save(folder / "d-wide.png")
    listed = [*pictures(folder), Picture("e-gone.png", folder / "gone.png", ("text",))]
    listed.append(Picture("f-folder", folder, ("text",)))
    for reward in (Whole(), Formed("crop", CROP)):
        rating = rate(listed, [reward], memory=memory, batch_size=4)
        assert [one.image for one in rating.failures] == [
            "a-broken.png", "b-empty.png", "c-giant.png", "d-wide.png", "e-gone.png", "f-folder",
        ]  # fmt: skip
        said = [one.why for one in rating.failures]
        assert "damaged" in said[0]
        assert said[1].endswith("it is empty")
        assert "10,000,001 bytes" in said[2]
        assert "64 megapixels" in said[3]
        assert said[4].endswith("there is no such file")
        assert said[5].endswith("a folder or a device")
        assert [row.picture.name for row in rating.rows] == [f"{n}.png" for n in range(9)]
        for what in ("a-broken.png", "c-giant.png", "gone.png"):
            strictly = [picture for picture in listed if picture.path.name == what]
            with pytest.raises(IntegrityError, match=what):
                rate(strictly, [reward], memory=memory, strict=True)


def test_a_picture_that_changes_meanwhile_gets_no_score(folder: Path, memory: ScoreMemory) -> None:
    class Meddler(Whole):
        def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            Image.new("RGB", (16, 16)).save(folder / "8.png")
            return super().score(images, prompts)

    rating = rate(pictures(folder), [Meddler("first"), Whole()], memory=memory, batch_size=16)
    assert [one.image for one in rating.failures] == ["8.png"]
    assert "changed while" in rating.failures[0].why
    assert len(rating.rows) == 8 * 2
    assert rate(pictures(folder), [Whole()], memory=memory).known == 8


def test_a_picture_of_a_size_that_a_reward_does_not_take_is_named(folder: Path, memory: ScoreMemory) -> None:
    rating = rate(pictures(folder), [Formed("crop", CROP), Formed("none", PixelForm(16, "none"))], memory=memory)
    assert [row.picture.name for row in rating.rows[::2]] == ["0.png", "3.png", "6.png"]
    assert len(rating.failures) == 6
    assert "30x40 px, the reward takes 16x16" in rating.failures[0].why


# ---- rewards that fail


def test_a_score_that_is_no_number_names_reward_and_picture(folder: Path, memory: ScoreMemory) -> None:
    for n in range(9):
        Image.new("RGB", (16, 16), (0, n, 0)).save(folder / f"{n}.png")
    bad = Whole(spoil=lambda found: [math.nan if value == 6 else value for value in found])  # green 2 and four letters
    with pytest.raises(CraftError, match="not a number") as caught:
        rate(pictures(folder), [bad], memory=memory, batch_size=4)
    assert caught.value.where == "reward whole, picture 2.png"
    assert "the same command continues" in caught.value.hint
    mended = Whole()
    rating = rate(pictures(folder), [mended], memory=memory, batch_size=4)
    assert (rating.known, rating.made) == (2, 7)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda found: found[1:], "wrong number of scores"),
        (lambda found: found[10**9], "IndexError"),
        (lambda found: [math.inf] * len(found), "not a number"),
    ],
)
def test_what_a_reward_does_wrong_is_said(
    folder: Path, memory: ScoreMemory, spoil: Callable[[list[float]], list[float]], said: str
) -> None:
    with pytest.raises(CraftError, match=said) as caught:
        rate(pictures(folder), [Whole("first"), Whole("second", spoil)], memory=memory)
    assert "reward second" in str(caught.value)
    assert rate(pictures(folder), [Whole("first")], memory=memory).known == 9


def test_no_memory_is_not_blamed_on_a_picture(folder: Path, memory: ScoreMemory) -> None:
    def full(found: list[float]) -> list[float]:
        raise ResourceError("A reward does not fit the memory")

    reward = Whole(spoil=full)
    with pytest.raises(ResourceError, match="does not fit") as caught:
        rate(pictures(folder), [reward], memory=memory)
    assert caught.value.where == ""
    assert len(reward.seen) == 1
