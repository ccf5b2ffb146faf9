"""Phases: where models do not stay in memory, one is there at a time, and every result is the same bit for bit."""

from __future__ import annotations

import functools
import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from craft_fast.budget import Machine, machine_of
from craft_fast.config import Settings
from craft_fast.errors import CraftError, IntegrityError, Interrupted
from craft_fast.pipeline import run_pipeline
from craft_fast.plan.stages import Costs
from craft_fast.rewards.networks import AestheticReward, ClipReward, ImageReward
from craft_fast.sdxl.costs import CUBLAS_BYTES, FRAGMENTATION
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import open_run
from craft_fast.tiny.random_rewards import build_random_rewards
from craft_fast.workbench import Workbench

PHASE_OF = {
    transformers.CLIPTextModel: "text",
    transformers.CLIPTextModelWithProjection: "text",
    diffusers.UNet2DConditionModel: "unet",
    diffusers.AutoencoderKL: "vae",
    transformers.CLIPModel: "reward",
    ClipReward: "reward",
    AestheticReward: "reward",
    ImageReward: "reward",
}


class Alive:
    """Knows of every network that is made, by weak reference, and which phases' networks are there together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.networks: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self.made: list[str] = []
        self.together: set[frozenset[str]] = set()
        self.depth = 0
        for cls in PHASE_OF:
            monkeypatch.setattr(cls, "__init__", self._watched(cls, cls.__init__))

    def _watched(self, cls: type, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def watched(network: Any, *args: Any, **options: Any) -> None:
            self.depth += 1
            try:
                init(network, *args, **options)
            finally:
                self.depth -= 1
            # A reward's own towers are CLIP models as well; they are no phase of their own.
            if type(network) is cls and self.depth == 0:
                self.networks[network] = PHASE_OF[cls]
                self.made.append(PHASE_OF[cls])
                self.together.add(self.phases())

        return watched

    def phases(self) -> frozenset[str]:
        """Phases of which a network is in memory now."""
        return frozenset(self.networks.values())


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    return Alive(monkeypatch)


@pytest.fixture(scope="module")
def settings(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("phases")
    build_random_rewards(folder / "rewards")
    (folder / "train.txt").write_text("red circle\nblue square\ngreen star\n")
    (folder / "heldout.txt").write_text("orange circle\npurple star\nred heart\n")
    kinds = {"h": "clip", "a": "aesthetic", "image_reward": "image_reward"}
    rewards = {
        name: {"kind": kind, "path": str(folder / "rewards" / name), "held_out": name == "image_reward"}
        for name, kind in kinds.items()
    }
    return Settings.model_validate(
        {
            "model": {"path": str(sdxl_folder), "device": "cpu"},
            "prompts": {"file": str(folder / "train.txt"), "heldout_file": str(folder / "heldout.txt")},
            "expand": {"variants": 2, "templates": ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"]},
            "generate": {"num_inference_steps": 2, "batch_size": 3},
            "rewards": rewards,
            "filter": {"rewards": ["h"], "target_samples": 100, "block_groups": 2},
            "train": {"rank": 2, "steps": 2, "micro_batch_size": 2, "checkpoint_every": 2, "sample_every": 0}
            | {"weighting": "uniform", "warmup_steps": 1},
            "evaluate": {"prompts": 3, "bootstrap_samples": 100},
        }
    )


def resident(settings: Settings, choice: str) -> Settings:
    tree = settings.model_dump()
    tree["engine"]["resident"] = choice
    return Settings.model_validate(tree)


def results(root: Path) -> dict[str, str]:
    """Digest of every picture, latents file, text entry and LoRA of a run."""
    kept = [path for path in root.rglob("*") if path.suffix in (".png", ".safetensors")]
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in kept if "checkpoints" not in path.parts}


def evaluation(root: Path) -> list[Any]:
    with open_run(root, read_only=True) as run:
        row = run.manifest.stage("evaluate")
        assert row is not None
        return run.manifest.eval_rows(row.key)


def test_a_whole_run_in_phases_is_the_same_bit_for_bit(settings: Settings, alive: Alive, tmp_path: Path) -> None:
    run_pipeline(tmp_path / "apart", resident(settings, "never"))
    assert alive.together == {frozenset({phase}) for phase in ("text", "unet", "vae", "reward")}
    gc.collect()
    assert alive.phases() == set()
    run_pipeline(tmp_path / "together", resident(settings, "always"))
    # The instrument sees it when they are not apart.
    assert frozenset({"text", "unet", "vae", "reward"}) in alive.together
    apart, together = results(tmp_path / "apart"), results(tmp_path / "together")
    assert apart == together
    assert sum(name.startswith("candidates/") and name.endswith(".png") for name in apart) == 9
    assert sum(name.startswith("samples/eval/") for name in apart) == 6
    assert "lora/craft.safetensors" in apart
    assert not any(name.startswith("denoised/") for name in apart)
    assert evaluation(tmp_path / "apart") == evaluation(tmp_path / "together")


def test_sample_pictures_in_phases_leave_training_as_it_was(settings: Settings, alive: Alive, tmp_path: Path) -> None:
    tree = resident(settings, "never").model_dump()
    tree["train"] |= {"sample_every": 1, "sample_prompts": 2}
    drawing = Settings.model_validate(tree)
    run_pipeline(tmp_path / "drawing", drawing, until="train")
    # The trained UNet stays while the VAE comes and goes; nothing else is ever beside it.
    assert alive.together == {frozenset(s) for s in ({"text"}, {"unet"}, {"vae"}, {"reward"}, {"unet", "vae"})}
    run_pipeline(tmp_path / "together", resident(drawing, "always"), until="train")
    apart, together = results(tmp_path / "drawing"), results(tmp_path / "together")
    assert apart == together
    assert sum(name.startswith("samples/train/") for name in apart) == 4


class Stop:
    """Asks to stop at the nth time it is asked."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_run_in_phases_that_was_stopped_ends_the_same(settings: Settings, tmp_path: Path) -> None:
    apart = resident(settings, "never")
    for polls in (2, 4):
        with pytest.raises(Interrupted):
            run_pipeline(tmp_path / "stopped", apart, until="generate", should_stop=Stop(polls))
    run_pipeline(tmp_path / "stopped", apart, until="generate")
    run_pipeline(tmp_path / "whole", apart, until="generate")
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


@pytest.fixture
def bench(settings: Settings) -> Iterator[Workbench]:
    bench = Workbench(resident(settings, "never"))
    yield bench
    bench.close()


def test_model_and_rewards_make_room_for_one_another(bench: Workbench, alive: Alive) -> None:
    model = bench.model()
    assert alive.phases() == set()
    model.use("unet")
    assert alive.phases() == {"unet"}
    judges = {reward.name: reward for reward in bench.rewards(held_out=True)}
    assert alive.phases() == set()
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    first = judges["h"].score(images, ["a star"])
    assert alive.phases() == {"reward"}
    assert bench.model() is model
    assert alive.phases() == set()
    assert torch.equal(judges["h"].score(images, ["a star"]), first)
    judges["h"].close()
    with pytest.raises(CraftError, match="closed"):
        judges["h"].score(images, ["a star"])


def test_rewards_that_stay_are_read_once(settings: Settings, alive: Alive) -> None:
    bench = Workbench(resident(settings, "always"))
    [h, a] = bench.rewards(held_out=False)
    made = alive.made.count("reward")
    assert made >= 2
    bench.model()
    for reward in (h, a, h):
        reward.score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a star"])
        reward.rest()
    assert alive.made.count("reward") == made
    bench.close()
    gc.collect()
    assert alive.phases() == set()


def test_concessions_are_one_for_the_whole_run(bench: Workbench) -> None:
    bench.concessions().images_at_once = 1
    assert bench.concessions().images_at_once == 1


def with_score(settings: Settings, **changes: Any) -> Settings:
    tree = settings.model_dump()
    tree["score"] |= changes
    return Settings.model_validate(tree)


def test_rewards_are_told_precision_and_memory_and_stay_on_a_gpu_where_all_have_room(settings: Settings) -> None:
    bench = Workbench(with_score(resident(settings, "always"), dtype="float16", batch_size=16))
    judges: list[Any] = bench.rewards(held_out=True)
    assert {judge.dtype for judge in judges} == {torch.float16}
    here = machine_of(torch.device("cpu"))
    model = Costs.of(bench.settings, here)
    kept = model.text_weights() + model.unet_weights() + model.decode(tiled=True).weight_bytes
    assert {judge.memory_budget for judge in judges} == {here.budget(bench.settings.engine) - kept}
    assert not any(judge.stay for judge in judges)

    weights = [judge.need.weight_bytes for judge in judges]
    most = max(judge.need.image_bytes for judge in judges) * 16
    assert min(weights) > 10_000
    assert most > 10_000
    large = Machine("card", gpu=True, total_bytes=16 * 1024**3)
    bench._share_memory(judges, large)
    assert all(judge.stay for judge in judges)
    room, beside_drawing = bench._room_for_rewards(large)
    # Each has what the weights of the others leave.
    assert [judge.memory_budget for judge in judges] == [room - sum(weights) + own for own in weights]
    # What the SDXL draws with is more than what they score with here, so it decides: a card with room for exactly all
    # of it, and one that is smaller by a little.
    spare = beside_drawing - sum(weights)
    assert 0 < spare < room - sum(weights) - most
    for less, stays in ((-100_000, True), (100_000, False)):
        card = Machine("card", gpu=True, total_bytes=large.total_bytes - int(spare * (1 + FRAGMENTATION)) - less)
        bench._share_memory(judges, card)
        assert {judge.stay for judge in judges} == {stays}
    assert {judge.memory_budget for judge in judges} == {bench._room_for_rewards(card)[0]}
    # A chunk so large that it would have no room beside all weights.
    bench.settings = with_score(bench.settings, batch_size=(room - sum(weights)) // (most // 16) + 1)
    bench._share_memory(judges, large)
    assert not any(judge.stay for judge in judges)
    bench.settings = with_score(bench.settings, batch_size=16)
    # Those that are not asked now make room for those that are.
    bench._share_memory(judges[:1], large)
    assert [judge.stay for judge in judges] == [True, False, False]
    bench.close()


def test_networks_that_are_read_for_each_phase_have_the_whole_device_and_never_stay(bench: Workbench) -> None:
    judges: list[Any] = bench.rewards(held_out=True)
    card = Machine("card", gpu=True, total_bytes=16 * 1024**3)
    bench._share_memory(judges, card)
    assert not any(judge.stay for judge in judges)
    whole = int(card.budget(bench.settings.engine) / (1 + FRAGMENTATION)) - CUBLAS_BYTES
    assert {judge.memory_budget for judge in judges} == {whole}


def test_a_reward_that_cannot_be_loaded_names_itself(settings: Settings, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(settings.rewards["a"].path, tmp_path / "broken"))
    (folder / "model.safetensors").write_bytes(b"PK" + bytes(100))
    tree = settings.model_dump()
    tree["rewards"]["a"]["path"] = str(folder)
    bench = Workbench(Settings.model_validate(tree))
    with pytest.raises(IntegrityError) as caught:
        bench.rewards(held_out=False)
    assert caught.value.where.startswith("reward a: ")
    bench.close()
