"""Evaluation: its arithmetic by hand, its pictures against diffusers' pipeline, and what it does not do twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from craft_fast import rng
from craft_fast.config import (
    EvaluateSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)
from craft_fast.errors import ConfigError, CraftError, Interrupted
from craft_fast.evaluate import evaluate
from craft_fast.export import export_lora
from craft_fast.pairs import bootstrap_interval, paired_rows
from craft_fast.qlora.lora import add_lora
from craft_fast.qlora.nf4 import quantize_nf4
from craft_fast.records import FileRef
from craft_fast.sdxl import drawing
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.sampling import Denoiser, make_scheduler
from craft_fast.sdxl.unet import is_pristine
from craft_fast.store.run import Run, open_run, read_log
from craft_fast.store.safe_load import read_image
from tests.unit.evaluations import EVALUATE, GENERATE, PROMPTS, Brightness, do, write_lora


@dataclass
class Broken(Brightness):
    """Returns NaN."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return super().score(images, prompts) * float("nan")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


@pytest.fixture
def lora(run: Run, sdxl_folder: Path) -> Path:
    return write_lora(run, sdxl_folder)


def pictures(run: Run, side: str, key: str = "k" * 64) -> dict[str, Tensor]:
    return {name: read_image(run.path(ref.path)) for name, ref in run.manifest.files(f"eval_{side}", key).items()}


# ---- arithmetic


def test_rows_by_hand() -> None:
    base = {"a": [1.0, 2.0, 3.0, 4.0], "b": [0.0, 0.0, 0.0, 0.0]}
    tuned = {"a": [2.0, 2.0, 2.0, 8.0], "b": [0.0, 0.0, 0.0, 0.0]}
    rows = paired_rows(base, tuned, {"b": True, "a": False}, bootstrap_samples=500, seed=0)
    assert [row.metric for row in rows] == ["b", "a"]
    b, a = rows
    assert (a.base_mean, a.tuned_mean, a.n, a.held_out) == (2.5, 3.5, 4, False)
    assert a.win_rate == (2 + 0.5) / 4
    assert a.ci_low <= 1.0 <= a.ci_high
    assert (b.win_rate, b.ci_low, b.ci_high, b.held_out) == (0.5, 0.0, 0.0, True)


def test_the_interval_of_a_constant_difference_is_a_point() -> None:
    assert bootstrap_interval(np.full(7, 0.25), samples=100, seed=1) == (0.25, 0.25)


def test_the_interval_of_two_values_is_known() -> None:
    # The mean of two draws from {0, 1} is 0, 0.5 or 1 with chances 1/4, 1/2, 1/4: the 95 % interval is [0, 1].
    assert bootstrap_interval(np.array([0.0, 1.0]), samples=4000, seed=1) == (0.0, 1.0)


def test_the_interval_agrees_with_the_normal_one_for_many_values() -> None:
    difference = np.random.default_rng(0).normal(0.3, 1.0, 2000)
    low, high = bootstrap_interval(difference, samples=4000, seed=2)
    half = 1.96 * difference.std() / np.sqrt(difference.size)
    assert low == pytest.approx(difference.mean() - half, abs=0.005)
    assert high == pytest.approx(difference.mean() + half, abs=0.005)


def test_the_interval_is_a_function_of_the_seed() -> None:
    difference = np.random.default_rng(0).normal(size=50)
    first = bootstrap_interval(difference, samples=300, seed=1)
    assert bootstrap_interval(difference, samples=300, seed=1) == first
    assert bootstrap_interval(difference, samples=300, seed=2) != first


def test_unequal_or_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="a: 1 base scores, 2 tuned"):
        paired_rows({"a": [1.0]}, {"a": [1.0, 2.0]}, {"a": False}, bootstrap_samples=100, seed=0)
    with pytest.raises(ValueError, match="not 0"):
        paired_rows({"a": []}, {"a": []}, {"a": False}, bootstrap_samples=100, seed=0)


# ---- pictures and scores


def test_the_lora_reproduces_the_evaluated_pictures_in_diffusers(
    run: Run, sdxl: SdxlModel, sdxl_folder: Path, lora: Path
) -> None:
    do(run, sdxl, lora, [Brightness()])
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler(sdxl, GENERATE.scheduler)
    noise = [rng.normal((4, 16, 16), rng.derive_seed(3, "evaluate", prompt.prompt_id)) for prompt in PROMPTS]

    def draw() -> Tensor:
        images = pipe(
            [prompt.text for prompt in PROMPTS], latents=torch.stack(noise), num_inference_steps=3, guidance_scale=2.0,
            output_type="np",
        ).images  # fmt: skip
        return torch.from_numpy(images * 255).round().permute(0, 3, 1, 2)

    base, tuned = (torch.stack(list(pictures(run, side).values())).float() for side in ("base", "tuned"))
    assert (draw() - base).abs().max() <= 2
    pipe.load_lora_weights(lora)
    drawn = draw()
    # Their VAE and rounding to 8 bits; the UNet's output is the same to the bit (test_export.py).
    assert (drawn - tuned).abs().max() <= 2
    assert (base - tuned).abs().max() > 10
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora.with_name("mine-diffusers.safetensors"))
    assert torch.equal(draw(), drawn)


def test_rows_scores_and_log(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    red, blue = Brightness("red", 0), Brightness("blue", 2, held_out=True, key="b2")
    rows = do(run, sdxl, lora, [red, blue], extra={"note": "hello"})
    assert rows == run.manifest.eval_rows("k" * 64)
    assert [(row.metric, row.held_out, row.n) for row in rows] == [("red", False, 6), ("blue", True, 6)]
    scores = run.manifest.eval_scores("k" * 64)
    assert len(scores) == 2 * 2 * 6
    for side, mean in (("base", rows[1].base_mean), ("tuned", rows[1].tuned_mean)):
        shown = pictures(run, side)
        expected = {name: float(image[2].float().mean()) for name, image in shown.items()}
        found = {row[1]: row[3] for row in scores if row[0] == side and row[2] == "blue"}
        assert found == pytest.approx(expected)
        assert np.mean(list(expected.values())) == pytest.approx(mean)
    assert red.seen[:6] == [prompt.text for prompt in PROMPTS]
    assert (red.rests, blue.rests) == (1, 1)
    [event] = [event for event in read_log(run) if event["event"] == "evaluate"]
    assert event["extra"] == {"note": "hello"}
    assert event["summary"]["red"] == [rows[0].base_mean, rows[0].tuned_mean, rows[0].win_rate]
    assert is_pristine(sdxl.unet)


def count_forwards(model: SdxlModel) -> tuple[list[int], Any]:
    forwards: list[int] = []
    return forwards, model.unet.register_forward_pre_hook(lambda module, args: forwards.append(args[0].shape[0]))


def test_base_pictures_and_scores_are_used_again(run: Run, sdxl: SdxlModel, sdxl_folder: Path, lora: Path) -> None:
    reward = Brightness()
    do(run, sdxl, lora, [reward])
    before = pictures(run, "base")
    calls = reward.calls
    forwards, hook = count_forwards(sdxl)
    try:
        do(run, sdxl, write_lora(run, sdxl_folder, 0.5), [reward], key="other")
    finally:
        hook.remove()
    assert forwards == [8, 8, 8, 4, 4, 4]  # the tuned side alone: batches of 4 and 2, doubled, three steps each
    assert reward.calls == calls + 1
    assert all(torch.equal(image, before[name]) for name, image in pictures(run, "base", "other").items())
    assert len(pictures(run, "base", "other")) == 6


def test_nothing_is_done_twice_and_another_reward_draws_nothing(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    reward = Brightness()
    rows = do(run, sdxl, lora, [reward])
    forwards, hook = count_forwards(sdxl)
    try:
        assert do(run, sdxl, lora, [reward]) == rows
        assert reward.calls == 2
        changed = Brightness(key="b2")
        do(run, sdxl, lora, [changed])
        assert changed.calls == 2
    finally:
        hook.remove()
    assert forwards == []


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"generate_settings": GENERATE.model_copy(update={"guidance_scale": 3.0})}]
)
def test_other_seeds_and_settings_make_other_base_pictures(
    run: Run, sdxl: SdxlModel, lora: Path, change: dict[str, Any]
) -> None:
    do(run, sdxl, lora, [Brightness()])
    first = pictures(run, "base")
    do(run, sdxl, lora, [Brightness()], key="other", **change)
    second = pictures(run, "base", "other")
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_an_interrupted_evaluation_ends_the_same(run: Run, sdxl: SdxlModel, lora: Path, tmp_path: Path) -> None:
    answers = iter([False, False, True])
    with pytest.raises(Interrupted):
        do(run, sdxl, lora, [Brightness()], should_stop=lambda: next(answers))
    assert is_pristine(sdxl.unet)
    assert len(pictures(run, "base")) == 6
    damaged = run.path(run.manifest.files("eval_base", "k" * 64)["h1"].path)
    kept = damaged.read_bytes()
    damaged.unlink()
    rows = do(run, sdxl, lora, [Brightness()])
    assert damaged.read_bytes() == kept
    with open_run(tmp_path / "second", create=True) as fresh:
        assert do(fresh, sdxl, lora, [Brightness()]) == rows
        for side in ("base", "tuned"):
            a, b = (opened.manifest.files(f"eval_{side}", "k" * 64) for opened in (run, fresh))
            assert {name: ref.sha256 for name, ref in a.items()} == {name: ref.sha256 for name, ref in b.items()}


def test_a_model_that_training_has_changed_gives_the_same(
    run: Run, sdxl: SdxlModel, sdxl_folder: Path, lora: Path
) -> None:
    rows = do(run, sdxl, lora, [Brightness()])
    trained = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    quantize_nf4(trained.unet, compute_dtype=torch.float32)
    add_lora(trained.unet, rank=2, lora_alpha=2.0, target_modules=["to_q"], seed=9)
    with open_run(run.root.parent / "second", create=True) as fresh:
        assert do(fresh, trained, lora, [Brightness()]) == rows


def test_a_fully_trained_unet(run: Run, sdxl_folder: Path) -> None:
    settings = Settings(model=ModelSettings(path=str(sdxl_folder)), train=TrainSettings(method="full"))
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    state = {name: p + 0.02 * rng.normal(p.shape, 1) for name, p in model.unet.named_parameters()}
    ref: FileRef = export_lora(run, state, settings=settings, metadata={})
    [row] = do(run, model, run.path(ref.path), [Brightness()])
    assert row.base_mean != row.tuned_mean
    with open_run(run.root.parent / "second", create=True) as fresh:
        [again] = do(fresh, model, run.path(ref.path), [Brightness()])
    assert again == row


def test_too_few_prompts_are_said_and_none_is_an_error(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    [row] = do(run, sdxl, lora, [Brightness()], settings=EvaluateSettings(prompts=2, bootstrap_samples=100))
    assert row.n == 2
    with pytest.raises(ConfigError, match="held-out"):
        evaluate(run, sdxl, lora, [], [Brightness()], settings=EVALUATE, generate_settings=GENERATE, seed=0, key="none")


def test_scores_that_are_not_finite_are_an_error(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    with pytest.raises(CraftError, match="NaN"):
        do(run, sdxl, lora, [Broken()])
    assert run.manifest.eval_rows("k" * 64) == []


# ---- phases


@dataclass
class Alone(Brightness):
    """A judge that wants the device to itself."""

    model: Any = None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        assert self.model.loaded == ()
        return super().score(images, prompts)


def shas(run: Run, side: str, key: str = "k" * 64) -> dict[str, str]:
    return {name: ref.sha256 for name, ref in run.manifest.files(f"eval_{side}", key).items()}


def test_phases_give_the_same(run: Run, sdxl: SdxlModel, apart: SdxlModel, lora: Path) -> None:
    rows = do(run, sdxl, lora, [Brightness()])
    with open_run(run.root.parent / "apart", create=True) as other:
        assert do(other, apart, lora, [Alone(model=apart)]) == rows
        for side in ("base", "tuned"):
            assert shas(other, side) == shas(run, side)
        assert list(other.path(drawing.FOLDER).iterdir()) == []


def test_text_is_encoded_once_for_both_sides(
    run: Run, apart: SdxlModel, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = drawing.encode_prompts

    def spy(model: SdxlModel, prompts: list[str]) -> Any:
        assert model.loaded == ("text_encoder", "text_encoder_2")
        encoded.append(len(prompts))
        return encode(model, prompts)

    monkeypatch.setattr(drawing, "encode_prompts", spy)
    do(run, apart, lora, [Brightness()])
    assert encoded == [4, 2, 1]
    do(run, apart, lora, [Brightness()])
    assert encoded == [4, 2, 1]


def test_denoised_pictures_survive_the_process(
    run: Run, apart: SdxlModel, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(run.root.parent / "whole", create=True) as whole:
        rows = do(whole, apart, lora, [Brightness()])
        expected = shas(whole, "base")

    def die(*_: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing, "decode_latents", die)
    with pytest.raises(KeyboardInterrupt):
        do(run, apart, lora, [Brightness()])
    monkeypatch.undo()
    drawn: list[int] = []
    draw_of = Denoiser.draw

    def spy(self: Denoiser, embeds: Any, *args: Any) -> Tensor:
        drawn.append(len(embeds))
        return draw_of(self, embeds, *args)

    monkeypatch.setattr(Denoiser, "draw", spy)
    assert do(run, apart, lora, [Brightness()]) == rows
    assert drawn == [4, 2]  # the tuned side alone
    assert shas(run, "base") == expected


def test_a_fully_trained_unet_in_phases(run: Run, sdxl_folder: Path, apart: SdxlModel) -> None:
    settings = Settings(model=ModelSettings(path=str(sdxl_folder)), train=TrainSettings(method="full"))
    unet = load_sdxl(sdxl_folder, device="cpu", dtype="float32").unet
    state = {name: p + 0.02 * rng.normal(p.shape, 1) for name, p in unet.named_parameters()}
    ref: FileRef = export_lora(run, state, settings=settings, metadata={})
    [row] = do(run, apart, run.path(ref.path), [Alone(model=apart)])
    assert row.base_mean != row.tuned_mean


def test_the_guidance_interval_makes_other_pictures(run: Run, sdxl: SdxlModel, lora: Path) -> None:
    do(run, sdxl, lora, [Brightness()])
    interval = GENERATE.model_copy(update={"guidance_interval": [0.5, 1.0]})
    do(run, sdxl, lora, [Brightness()], key="other", generate_settings=interval)
    assert shas(run, "base") != shas(run, "base", "other")
