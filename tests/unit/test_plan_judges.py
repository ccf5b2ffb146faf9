"""What plan says of scoring: published models by name without their files, half precision, what is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from craft_fast.budget import GIB, Machine, ModelShape, with_changes
from craft_fast.config import OFFICIAL_REWARDS, RewardSettings, Settings
from craft_fast.plan import plan
from craft_fast.plan.amounts import Amounts, disk_bytes, fetched, seconds
from craft_fast.plan.fit import over, ways_to_fit
from craft_fast.plan.judges import at_once, judges, scoring_bytes, shaping_bytes, to_fetch
from craft_fast.plan.stages import Costs
from craft_fast.rewards import published
from craft_fast.rewards.catalog import OFFICIALS
from craft_fast.rewards.network_reward import Need
from craft_fast.rewards.shelf import place
from craft_fast.sdxl import published as sdxl
from craft_fast.settings_io import load_settings
from tests.unit.test_plan import probe_of

SDXL = ModelShape(sdxl.UNET, sdxl.VAE, sdxl.TEXT_ENCODER, sdxl.TEXT_ENCODER_2)
TRAINING = ("h", "p", "a")


@pytest.fixture(autouse=True)
def _empty_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CRAFT_FAST_REWARDS", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def card(gib: float) -> Machine:
    return Machine(f"a card of {gib} GiB", True, int(gib * GIB))


def settings(preset: str = "sdxl", **changes: Any) -> Settings:
    resolved = {"train.method": "qlora", "engine.resident": "never", "generate.unet": "nf4"}
    return with_changes(load_settings(preset), {**resolved, **changes})


def costs(gib: float, preset: str = "sdxl", **changes: Any) -> Costs:
    return Costs.of(settings(preset, **changes), card(gib), SDXL)


def scoring(found: Costs) -> int:
    peak = found.peaks()["score"]
    assert peak is not None
    return peak.allocated


# ---- memory


def test_every_published_model_is_known_without_its_files() -> None:
    wanted = {f"r{index}": RewardSettings(kind=kind) for index, kind in enumerate(OFFICIAL_REWARDS)}
    found, apart = judges(wanted, held_out=True, element=2)
    assert apart == []
    for name, spec in wanted.items():
        judge = found[name]
        assert judge is not None
        assert {asset.key for asset in judge.fetch} == {asset.key for asset in OFFICIALS[spec.kind].assets}
        assert judge.need.image_bytes > 10**6
        assert judge.need.image_gflop > 5
    h, a, mps = (found[f"r{OFFICIAL_REWARDS.index(kind)}"] for kind in ("hpsv2.1", "aesthetic-v2", "mps"))
    assert h is not None
    assert a is not None
    assert mps is not None
    # 986.1 M weights in float16; LAION's tower without the text half.
    assert h.need.weight_bytes / GIB == pytest.approx(1.837, abs=0.001)
    assert a.need.weight_bytes / GIB == pytest.approx(0.570, abs=0.001)
    assert mps.need.weight_bytes / GIB == pytest.approx(2.058, abs=0.001)


def test_three_training_rewards_need_2_5_gib_at_most_one_at_a_time() -> None:
    """The issue's figure, at batch 16 and still at 64; and not because nothing is counted."""
    for batch in (16, 64):
        found = costs(24, **{"score.batch_size": batch})
        assert {"h", "p", "a"} == set(found.judges(held_out=False))
        assert 2.0 * GIB < scoring(found) <= 2.5 * GIB
    assert "reward h" in costs(24).peaks()["score"].what  # type: ignore[union-attr]


def test_scoring_fits_the_card_of_4_gb_in_half_precision_alone() -> None:
    least = settings("sdxl-4gb")
    assert least.engine.vram_gib == 3.5
    found = Costs.of(least, card(3.86), SDXL)
    assert over(found) == {}
    wide = Costs.of(with_changes(least, {"score.dtype": "float32"}), card(3.86), SDXL)
    assert set(over(wide)) == {"score", "evaluate"}
    # Twice the weights in float32: 3.67 GiB.
    assert scoring(wide) - scoring(found) > 1.8 * GIB
    changes, fits = ways_to_fit(wide)
    assert fits
    assert [change.options() for change in changes] == [["--set score.dtype=auto"]]


def test_precision_follows_the_device() -> None:
    elements = {
        (device, dtype): Costs.of(settings(**{"score.dtype": dtype}), machine, SDXL).score_element
        for device, machine in (("gpu", card(24)), ("cpu", Machine("CPU", False, 24 * GIB)))
        for dtype in ("auto", "float32", "float16", "bfloat16")
    }
    assert [elements["gpu", dtype] for dtype in ("auto", "float32", "float16", "bfloat16")] == [2, 4, 2, 2]
    assert [elements["cpu", dtype] for dtype in ("auto", "float32", "float16", "bfloat16")] == [4, 4, 2, 2]


def test_rewards_stay_together_only_where_models_stay_and_all_have_room() -> None:
    goes, stays = costs(24), costs(24, **{"engine.resident": "always"})
    h, p, a = (stays.judges(held_out=False)[name] for name in TRAINING)
    assert h is not None
    assert p is not None
    assert a is not None
    others = p.need.weight_bytes + a.need.weight_bytes
    beside = stays.text_weights() + stays.unet_weights() + stays.decode(tiled=True).weight_bytes
    assert scoring(stays) == scoring(goes) + beside + others
    assert "all rewards stay" in stays.peaks()["score"].what  # type: ignore[union-attr]
    tight = costs(6, **{"engine.resident": "always"})
    assert scoring(tight) == scoring(goes) + beside
    assert "stay" not in tight.peaks()["score"].what  # type: ignore[union-attr]


def test_fewer_pictures_at_once_where_memory_is_short() -> None:
    """As ``NetworkReward`` does, so that a large batch is no reason not to fit."""
    need = Need(weight_bytes=1000, image_bytes=100, image_gflop=1.0)
    assert [at_once(need, 64, room) for room in (10**6, 1000 + 6400, 1000 + 800, 1099, 0)] == [64, 64, 8, 1, 1]
    large = {"score.batch_size": 4096, "generate.height_px": 224, "generate.width_px": 224}
    assert scoring(costs(4, **large)) < scoring(costs(80, **large)) / 2
    size = {"height_px": 224, "width_px": 224, "side_px": 224, "pads": False, "gpu": True}
    one, many = (scoring_bytes(need, images=256, images_at_once=n, **size) for n in (1, 10**6))
    assert many - one == 100 * (10**6 - 1) - max(0, 256 * 3 * 224**2 - 100)


def test_shaping_takes_some_pictures_at_a_time() -> None:
    size = {"height_px": 1024, "width_px": 1024, "side_px": 224}
    for pads in (True, False):
        few, many, more = (shaping_bytes(n, **size, pads=pads) for n in (1, 64, 128))
        assert few < many / 5
        # Beyond what is worked on at once only the small pixels grow.
        assert more - many == 64 * 3 * 224**2 * (4 if pads else 1)


def test_a_package_is_a_process_of_its_own_with_float32_weights() -> None:
    native = settings()
    data = native.model_dump()
    data["rewards"]["h"]["backend"] = "package"
    found = Costs.of(Settings.model_validate(data), card(24), SDXL)
    judge = found.judges(held_out=False)["h"]
    assert judge is not None
    assert judge.package
    assert scoring(found) > 3.67 * GIB + 0.4 * GIB
    assert found.peaks()["score"].what == "reward h by its package"  # type: ignore[union-attr]


# ---- what is fetched


def test_missing_files_are_named_and_counted_on_the_disk(tmp_path: Path) -> None:
    found = plan(tmp_path / "run", settings(), machine=card(24))
    note = next(note for note in found.notes if "to be fetched first" in note)
    assert "9.4 GB in 11 files" in note
    assert "craft-fast rewards fetch hpsv2.1 pickscore aesthetic-v2 image-reward" in note
    assert str(tmp_path / "cache" / "craft-fast" / "rewards") in note
    rows = {stage.name: stage for stage in found.stages}
    # The held-out one is needed at the end alone.
    assert rows["score"].disk_gib == pytest.approx((1.97 + 3.94 + 1.71) / 1.0737, abs=0.05)
    assert rows["evaluate"].disk_gib > 1.79 / 1.0737
    assert found.disk_gib > 8.5


def test_what_two_models_share_is_fetched_once() -> None:
    wanted = {"a": RewardSettings(kind="aesthetic-v2"), "c": RewardSettings(kind="clipscore-l14", held_out=True)}
    found = judges(wanted, held_out=True, element=2)[0]
    assert sum(asset.role == "weights" for asset in to_fetch(found).values()) == 1


def test_files_on_the_shelf_are_not_fetched_again(tmp_path: Path) -> None:
    for asset in OFFICIALS["hpsv2.1"].assets:
        path = place(asset)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    wanted = costs(24)
    judge = wanted.judges(held_out=False)["h"]
    assert judge is not None
    assert judge.fetch == ()
    assert {asset.source for asset in fetched(wanted)["score"]}.isdisjoint({OFFICIALS["hpsv2.1"].assets[0].source})
    made = Amounts(1, 1, 1, 1, 1, ())
    assert disk_bytes(wanted, made, fetch=False)["score"] == 0


def test_sizes_of_the_users_own_files_count(tmp_path: Path) -> None:
    config = json.loads(json.dumps(published.CLIP_VIT_B32))
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = {"p": RewardSettings(kind="pickscore", path=str(tmp_path))}
    small = judges(wanted, held_out=True, element=2)[0]["p"]
    assert small is not None
    assert small.need.weight_bytes / GIB == pytest.approx(0.282, abs=0.001)


# ---- what cannot be known


def test_a_familys_folder_that_is_not_here_is_named_unknown(tmp_path: Path) -> None:
    data = settings().model_dump()
    data["rewards"]["h"] = {"kind": "clip", "path": "nobody/h"}
    found = plan(tmp_path / "run", Settings.model_validate(data), machine=card(24))
    rows = {stage.name: stage for stage in found.stages}
    assert rows["score"].peak_gib is None
    assert rows["score"].fits
    assert any(note.startswith("rewards h are not on this machine") for note in found.notes)


def test_a_broken_configuration_is_unknown_and_no_crash(tmp_path: Path) -> None:
    from craft_fast.store.run import resolve_uri

    shutil.copytree(Path(resolve_uri("package:craft_fast.tiny/assets/rewards/h")), tmp_path / "h")
    wanted = {"h": RewardSettings(kind="clip", path=str(tmp_path / "h"))}
    assert judges(wanted, held_out=True, element=2)[0]["h"] is not None
    for text in ("{", "[]", '{"vision_config": 3}'):
        (tmp_path / "h" / "config.json").write_text(text)
        assert judges(wanted, held_out=True, element=2)[0]["h"] is None


def test_functions_take_nothing_and_plugins_are_told(tmp_path: Path) -> None:
    wanted = {"f": RewardSettings(kind="function", path="a:b"), "own": RewardSettings(kind="sharpness")}
    assert judges(wanted, held_out=True, element=2) == ({}, ["own"])
    data = settings().model_dump()
    data["rewards"]["own"] = {"kind": "sharpness", "held_out": True}
    found = plan(tmp_path / "run", Settings.model_validate(data), machine=card(24))
    assert any("own are plug-ins" in note for note in found.notes)


# ---- time


def test_time_counts_operations_and_reading_the_networks_for_each_block() -> None:
    made = Amounts(groups=16, images=80, accepted=20, texts=21, pairs=4, notes=())
    found = costs(24, **{"filter.block_groups": 8})
    once = costs(24, **{"filter.block_groups": 16})
    spent, less = (seconds(one, made, probe_of(rate_flops=100e12))["score"] for one in (found, once))
    # h and p 335, a 162 GFLOP a picture; 7.6 GB read twice, at 1.5 GB/s.
    assert less is not None
    assert spent is not None
    assert spent - less == pytest.approx(7.62 / 1.5, rel=0.02)
    assert less == pytest.approx(80 * 0.831 / 100 + 7.62 / 1.5, rel=0.02)
