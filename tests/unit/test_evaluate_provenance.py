"""Evaluation: pictures are judged once, in one way, and what goes wrong is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from torch import Tensor

from craft_fast.errors import CraftError, IntegrityError
from craft_fast.pairs import paired_rows
from craft_fast.progress import Silent
from craft_fast.records import Provenance
from craft_fast.sdxl.load import SdxlModel
from craft_fast.store.run import Run, open_run
from tests.unit.evaluations import PROMPTS, Brightness, do, write_lora

CPU = Provenance("test", "0" * 64, precision="float32")
GPU = replace(CPU, precision="float16")
KEY = "k" * 64


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, message: str) -> None:
        self.lines.append(message)


@dataclass
class Fickle(Brightness):
    """Another precision from its second question on."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.provenance = GPU
        return super().score(images, prompts)


@dataclass
class Moody(Brightness):
    """Raises at its second question."""

    cut: dict[str, int] = field(default_factory=lambda: {PROMPTS[1].text: 3, "of another stage": 1})

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.calls == 1:
            self.calls += 1
            raise ZeroDivisionError("no light")
        return super().score(images, prompts)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


@pytest.fixture
def lora(run: Run, sdxl_folder: Path) -> Path:
    return write_lora(run, sdxl_folder)


def test_scores_of_several_ways_are_not_compared() -> None:
    scores = {"a": [1.0, 2.0]}
    options = {"bootstrap_samples": 100, "seed": 0}
    for ways in ({"a": [CPU]}, {"a": [None]}, {"b": [CPU, GPU]}, None):
        assert paired_rows(scores, scores, {"a": False}, provenances=ways, **options)  # type: ignore[arg-type]
    for other, said in ((GPU, "precision: float32, float16"), (None, "not recorded")):
        with pytest.raises(IntegrityError, match="not compared") as caught:
            paired_rows(scores, scores, {"a": False}, provenances={"a": {CPU: 2, other: 2}}, **options)  # type: ignore[arg-type]
        assert said in caught.value.why
        assert "reward a" in caught.value.where


def test_a_reward_that_changes_between_the_sides_is_refused(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    with pytest.raises(IntegrityError, match="not compared"):
        do(run, sdxl, lora, [Fickle()])
    assert run.manifest.eval_rows(KEY) == []
    # The same command again judges the base pictures as it now judges the tuned ones.
    assert do(run, sdxl, lora, [Brightness(provenance=GPU)]) == run.manifest.eval_rows(KEY)


def test_a_run_that_moved_judges_the_base_pictures_again(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    do(run, sdxl, lora, [Brightness()])
    moved, said = Brightness(provenance=GPU), Said()
    do(run, sdxl, lora, [moved], key="other", progress=said)
    assert moved.calls == 2
    assert said.lines == ["12 scores of brightness had come about in another way and were made again"]
    assert run.manifest.eval_provenances(KEY) == {"brightness": {CPU: 12}}
    assert run.manifest.eval_provenances("other") == {"brightness": {GPU: 12}}
    back = Brightness()
    do(run, sdxl, lora, [back], key="third", progress=said)
    assert (back.calls, len(said.lines)) == (0, 1)


def test_what_scoring_has_judged_is_not_judged_again(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    do(run, sdxl, lora, [Brightness()])
    files = {side: run.manifest.files(f"eval_{side}", KEY) for side in ("base", "tuned")}
    for refs in files.values():
        told = {(refs[prompt.prompt_id].sha256, prompt.text): 0.25 for prompt in PROMPTS}
        run.manifest.put_judgements("told", CPU, told)
    reward = Brightness("told", key="told")
    [row] = do(run, sdxl, lora, [reward], key="other")
    assert (row.base_mean, row.tuned_mean, reward.calls) == (0.25, 0.25, 0)


def test_a_reward_that_raises_is_named_and_the_rest_is_kept(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    moody, said = Moody("moody"), Said()
    with pytest.raises(CraftError, match="A reward failed") as caught:
        do(run, sdxl, lora, [moody])
    assert "reward moody" in caught.value.where
    assert "no light" in caught.value.why
    do(run, sdxl, lora, [moody], progress=said)
    assert moody.calls == 3  # the base side, the failure, the tuned side
    assert said.lines == ["moody: 1 prompt is longer than it reads; it judged by the beginning"]


def test_a_picture_that_was_altered_is_not_judged(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    do(run, sdxl, lora, [Brightness()])
    path = run.path(run.manifest.files("eval_tuned", KEY)["h2"].path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CraftError) as caught:
        do(run, sdxl, lora, [Brightness(key="new")])
    assert path.name in caught.value.where
    assert caught.value.exit_code == 6
