"""The presets: what each is for, and how one builds on another."""

from __future__ import annotations

from pathlib import Path

import pytest

from craft_fast import settings_io
from craft_fast.errors import ConfigError
from craft_fast.settings_io import load_settings, preset_names

QUALITY = {"sharp", "vivid", "clean"}
SIZES = {"sdxl-4gb": 4, "sdxl-6gb": 6, "sdxl-8gb": 8, "sdxl-12gb": 12, "sdxl-24gb": 24}
PRESETS = ["sdxl", *SIZES, "sdxl-paper", "tiny"]


def failing(**arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(**arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_presets_load_and_are_named() -> None:
    assert preset_names() == PRESETS
    assert load_settings("sdxl").generate.height_px == 1024
    assert load_settings().model.path == "package:craft_fast.tiny/assets/sdxl"


def test_unknown_preset_is_said_alone_with_the_closest_and_the_known_ones() -> None:
    text = failing(preset="sdxl-8bg", overrides=["filter.rewards=[h]"])
    assert text.startswith("A setting is not right.")
    assert "found 'sdxl-8bg'" in text
    assert "sdxl-paper, tiny, none" in text
    assert "did you mean sdxl-8gb?" in text


def test_a_preset_of_a_card_changes_how_sdxl_is_worked_and_not_what_is_made() -> None:
    base = load_settings("sdxl")
    for name in SIZES:
        found = load_settings(name)
        assert (found.model, found.prompts, found.expand, found.rewards) == (
            base.model, base.prompts, base.expand, base.rewards,
        )  # fmt: skip
        assert found.filter == base.filter
        other = {"batch_size", "unet"}
        assert found.generate.model_dump(exclude=other) == base.generate.model_dump(exclude=other)
        assert found.train.micro_batch_size * found.train.grad_accum_steps == 16
        assert found.train.learning_rate == base.train.learning_rate


def test_presets_of_cards_stay_below_the_card_and_grow_with_it() -> None:
    caps = []
    for name, card_gib in SIZES.items():
        cap = load_settings(name).engine.vram_gib
        assert cap is not None
        assert 0.87 * card_gib <= cap < card_gib
        caps.append(cap)
    assert caps == sorted(caps)
    least, less, small, middle, large = (load_settings(name) for name in SIZES)
    for smallest in (least, less):
        assert (smallest.train.method, smallest.train.nf4_convs, smallest.train.rank) == ("qlora", True, 16)
        assert smallest.generate.unet == "nf4"
        assert (smallest.engine.resident, smallest.engine.vae_tiling) == ("never", "always")
    assert (least.train.gradient_checkpointing, less.train.gradient_checkpointing) == ("all", "auto")
    assert {one.generate.unet for one in (small, middle, large)} == {"dense"}
    assert (small.train.method, small.train.nf4_convs) == ("qlora", False)
    assert (middle.train.method, large.train.method) == ("lora", "lora")
    assert large.train.micro_batch_size >= 4


@pytest.mark.parametrize(("name", "card_gib"), [*SIZES.items(), ("sdxl-paper", 24)])
def test_a_preset_fits_its_card_by_the_plans_formulas(
    name: str, card_gib: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formulas are no measurement; what they say must not already be too much. No reward's file is here."""
    from craft_fast.budget import GIB, Machine
    from craft_fast.plan.stages import Costs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = load_settings(name)
    card = Machine("a card", gpu=True, total_bytes=int(0.965 * card_gib * GIB))  # less than its name says
    card.check_cap(settings.engine)
    costs = Costs.of(settings, card)
    known = costs.peaks()
    peaks = {stage: peak.reserved for stage, peak in known.items() if peak is not None}
    assert len(peaks) == len(known)
    assert 1.9 * GIB < peaks["score"] <= peaks["evaluate"]  # ViT-H/14 in float16: 1.84
    assert peaks["generate"] > (1.3 if settings.generate.unet == "nf4" else 4.8) * GIB  # the UNet: 1.24 or 4.78
    assert peaks["train"] > 1.5 * GIB
    assert max(peaks.values()) <= costs.budget, {stage: round(peak / GIB, 2) for stage, peak in peaks.items()}


def test_on_6_gib_drawing_in_nf4_leaves_half_of_the_memory() -> None:
    """What the dense UNet can not: a cap that leaves a desktop its part."""
    from craft_fast.budget import GIB, Machine, with_changes
    from craft_fast.plan.stages import Costs

    settings, card = load_settings("sdxl-6gb"), Machine("a card", gpu=True, total_bytes=int(0.965 * 6 * GIB))
    assert settings.engine.vram_gib == 5.25
    costs = Costs.of(settings, card)
    assert 0.4 * costs.budget < costs.drawing_peak().reserved < 0.6 * costs.budget
    dense = with_changes(settings, {"generate.unet": "dense", "generate.batch_size": 1})
    assert Costs.of(dense, card).drawing_peak().reserved > costs.budget


def test_three_judges_are_trained_on_and_one_is_held_out_all_by_name() -> None:
    """A run fetches what is missing: nothing is converted, no path is typed."""
    rewards = load_settings("sdxl").rewards
    assert {name: (one.kind, one.held_out) for name, one in rewards.items()} == {
        "h": ("hpsv2.1", False), "p": ("pickscore", False), "a": ("aesthetic-v2", False),
        "image_reward": ("image-reward", True),
    }  # fmt: skip
    assert all(one.path == "" and one.backend == "native" for one in rewards.values())


def test_the_papers_preset_is_the_papers_recipe() -> None:
    """design.md section 1: full UNet, AdamW, lr 5e-5, batch 128, 200 steps, 100 samples, I_hpa."""
    found = load_settings("sdxl-paper")
    train, chosen = found.train, found.filter
    assert (train.method, train.learning_rate, train.steps) == ("full", 5e-5, 200)
    assert train.micro_batch_size * train.grad_accum_steps == 128
    assert train.steps * 128 == 25_600
    assert (chosen.rewards, chosen.target_samples) == (["h", "p", "a"], 100)
    assert (train.min_snr_gamma, train.prompt_dropout, train.warmup_steps) == (None, 0.0, 0)


def presets_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(settings_io, "_presets", lambda: folder)


REWARD = "rewards: {h: {kind: clip, path: x}}\nfilter: {rewards: [h]}\n"


def test_a_preset_builds_on_another_and_goes_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presets_in(
        tmp_path, monkeypatch,
        low=REWARD + "seed: 1\ntrain: {rank: 1, steps: 1}", mid="preset: low\ntrain: {rank: 2}\nseed: 2",
        top="preset: mid\nseed: 3",
    )  # fmt: skip
    found = load_settings("top")
    assert (found.seed, found.train.rank, found.train.steps) == (3, 2, 1)
    assert load_settings("mid").seed == 2


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({"a": "preset: b", "b": "preset: a"}, "preset: found 'a' (preset b); it builds on itself: a -> b -> a"),
        ({"a": "preset: a"}, "it builds on itself: a -> a"),
        ({"a": "preset: lo", "low": REWARD}, "preset: found 'lo' (preset a); must be one of a, low, none; did you"),
        ({"a": "preset: b", "b": REWARD + "train: {rnk: 3}"}, "train.rnk: unknown key (preset b, line 3)"),
    ],
)
def test_presets_that_cannot_build_are_said(
    texts: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    presets_in(tmp_path, monkeypatch, **texts)
    assert said in failing(preset="a")


def test_tiny_templates_each_hold_two_words_of_quality_in_varied_order() -> None:
    expand = load_settings().expand
    orders = [tuple(w for w in template.replace(",", "").split() if w in QUALITY) for template in expand.templates]
    assert len(orders) >= 6
    assert all(len(order) >= 2 for order in orders)
    assert len(set(orders)) == len(orders)
    assert expand.variants == 3


def test_tiny_trains_on_h_p_a_and_holds_out_the_rest() -> None:
    settings = load_settings()
    assert [n for n, r in settings.rewards.items() if not r.held_out] == ["h", "p", "a"]
    assert {n for n, r in settings.rewards.items() if r.held_out} == {
        "image_reward",
        "oracle_alignment",
        "oracle_clean",
        "oracle",
    }
