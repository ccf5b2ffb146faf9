"""Own pictures in a run: what makes which stage stale, and how they come in after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from craft_fast.config import Settings
from craft_fast.errors import ConfigError, IntegrityError, ResourceError
from craft_fast.own_folder import read_folder
from craft_fast.own_groups import own_groups
from craft_fast.own_images import bring_in
from craft_fast.pipeline import STAGES
from craft_fast.pipeline_keys import input_keys, output_keys
from craft_fast.pipeline_own import own_sizes, parted
from craft_fast.plan.amounts import amounts
from craft_fast.plan.states import settings_by_stage
from craft_fast.records import Candidate
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.vae import encode_images
from craft_fast.store.digest import digest_json
from craft_fast.store.run import Run, open_run
from craft_fast.store.safe_load import load_safetensors, read_image
from tests.unit.small_runs import changed

KEY = digest_json("generate")
NUMBER = 9  # one more than comes in at a time


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of three captions, with weights."""
    root = tmp_path_factory.mktemp("own")
    rows = []
    for number in range(NUMBER):
        size = [(64, 64), (100, 60), (60, 100)][number // 3]
        Image.effect_noise(size, 60).convert("RGB").save(root / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"caption {number % 3}", "weight": number + 1})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "heldout.txt").write_text("another\n")
    return root


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "own"))


def settings_of(folder: Path, model: Path | None = None, **images: Any) -> Settings:
    tree: dict[str, Any] = {
        "images": {"folder": str(folder), **images},
        "prompts": {"heldout_file": str(folder / "heldout.txt")},
        "rewards": {"r": {"kind": "function", "path": "builtins:len"}},
        "filter": {"rewards": ["r"]},
    }
    return Settings.model_validate({**tree, **({"model": {"path": str(model)}} if model else {})})


# ---- keys


def rewritten(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    change(rows)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def another_weight(folder: Path) -> None:
    rewritten(folder, lambda rows: rows[3].update(weight=0.25))


def another_caption(folder: Path) -> None:
    rewritten(folder, lambda rows: rows[3].update(text="caption 9"))


def another_picture(folder: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(folder / "3.png")


def one_more(folder: Path) -> None:
    shutil.copy(folder / "3.png", folder / "99.png")
    rewritten(folder, lambda rows: rows.append({"file_name": "99.png", "text": "caption 0", "weight": 1}))


def other_prompts(folder: Path) -> None:
    (folder / "heldout.txt").write_text("yet another\n")


def other_names(folder: Path) -> None:
    for number in range(NUMBER):
        (folder / f"{number}.png").rename(folder / f"b{number}.png")
    rewritten(folder, lambda rows: [row.update(file_name=f"b{row['file_name']}") for row in rows] and None)


def all_keys(settings: Settings, tmp_path: Path) -> dict[str, str]:
    found = input_keys(settings, tmp_path / "expansions")
    # What follows from the candidates' ids and weights is told by the selection.
    return {name: value for name, value in vars(found).items() if name in STAGES} | vars(
        output_keys(settings, found, "selection")
    )


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        (another_weight, {"expand", "filter"}),
        (another_caption, {"expand", "generate", "score", "filter"}),
        (another_picture, {"expand", "generate", "score", "filter"}),
        (one_more, {"expand", "generate", "score", "filter"}),
        (other_prompts, {"expand", "filter"}),
        (other_names, set()),
    ],
)
def test_what_changes_in_the_folder_makes_the_right_stages_stale(
    change: Callable[[Path], None], stale: set[str], folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    settings = settings_of(folder, sdxl_folder)
    before = all_keys(settings, tmp_path)
    change(folder)
    after = all_keys(settings, tmp_path)
    assert {name for name in STAGES[:4] if before[name] != after[name]} == stale


def test_where_the_folder_is_changes_nothing(folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    before = all_keys(settings_of(folder, sdxl_folder), tmp_path)
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    after = all_keys(settings_of(moved, sdxl_folder), tmp_path)
    # The report shows the settings, paths among them.
    assert {name for name in STAGES if before[name] != after[name]} == {"report"}


@pytest.mark.parametrize(
    ("section", "key", "value", "stale"),
    [
        ("images", "weights", "score", STAGES[:4]),
        ("images", "bucket_step_px", 32, STAGES[:4]),
        ("images", "max_aspect", 1.5, STAGES[:4]),
        ("images", "max_enlargement", 1.2, ("expand", "filter")),
        ("generate", "width_px", 128, STAGES[:4]),
        ("generate", "num_inference_steps", 3, ("generate", "score", "filter")),
        ("prompts", "limit", 2, ("expand", "filter")),
        ("prompts", "file", "other.txt", ()),
        ("expand", "variants", 7, ()),
        ("engine", "graph", False, ()),
    ],
)
def test_settings_make_the_right_stages_stale_and_plan_says_the_same(
    section: str, key: str, value: Any, stale: tuple[str, ...], folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    one = settings_of(folder, sdxl_folder)
    other = changed(one, **{section: {key: value}})
    before, after = all_keys(one, tmp_path), all_keys(other, tmp_path)
    assert [name for name in STAGES[:4] if before[name] != after[name]] == list(stale)
    planned, then = settings_by_stage(one), settings_by_stage(other)
    assert [name for name in STAGES[:4] if planned[name] != then[name]] == list(stale)


def test_without_a_folder_these_settings_are_in_no_key(folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    prompts = {"file": str(folder / "heldout.txt"), "heldout_file": None}
    plain = changed(settings_of(folder, sdxl_folder), images={"folder": None}, prompts=prompts)
    other = changed(plain, images={"max_aspect": 1.0, "weights": "score", "bucket_step_px": 64})
    assert all_keys(plain, tmp_path)["filter"] == all_keys(other, tmp_path)["filter"]


# ---- what is held out, how much it will be


def test_a_share_of_the_captions_is_held_out_unless_they_have_weights(folder: Path) -> None:
    none = changed(settings_of(folder), prompts={"heldout_file": None, "heldout_share": 0.001})
    with pytest.raises(ConfigError, match=r"held-out prompts[\s\S]*as their weights say"):
        parted(none, read_folder(none.images))
    scored = changed(none, images={"weights": "score"})
    train, heldout, notes = parted(scored, read_folder(scored.images))
    assert len(train) == 2
    assert [prompt.split for prompt in heldout] == ["heldout"]
    assert "1 captions are held out for the evaluation, and their 3 pictures" in notes[-1]
    with pytest.raises(ConfigError, match="no caption is held out"):
        parted(changed(scored, prompts={"heldout_share": 0.0}), read_folder(scored.images))
    limited = changed(scored, prompts={"limit": 1, "heldout_file": str(folder / "heldout.txt")})
    assert len(parted(limited, read_folder(limited.images))[0]) == 1


def test_plan_counts_own_pictures_and_what_is_drawn(folder: Path) -> None:
    given = amounts(settings_of(folder), acceptance=None)
    assert (given.groups, given.images, given.own, given.accepted, given.given) == (3, 9, 9, 9, True)
    scored = changed(settings_of(folder, weights="score"), filter={"target_samples": 4, "block_groups": 1})
    made = amounts(scored, acceptance=0.5)
    assert (made.groups, made.images, made.own, made.accepted, made.given) == (3, 12, 9, 4, False)
    fewer = amounts(changed(scored, filter={"target_samples": 3}), acceptance=0.5)
    assert (fewer.groups, fewer.own, fewer.accepted) == (2, 6, 3)
    assert amounts(changed(scored, generate={"max_images": 1}), acceptance=0.5).groups == 1


# ---- candidates


def import_all(run: Run, model: SdxlModel, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> None:
    settings = settings_of(folder, model.path)
    groups = own_groups(read_folder(settings.images))
    bring_in(run, model, folder, groups, own_sizes(settings), key=KEY, should_stop=should_stop)


def rows_of(run: Run) -> list[Candidate]:
    return run.manifest.candidates(KEY)


def test_pictures_become_candidates_of_their_bucket(folder: Path, sdxl: SdxlModel, tmp_path: Path) -> None:
    with open_run(tmp_path / "run", create=True) as run:
        import_all(run, sdxl, folder)
        rows = rows_of(run)
        assert len(rows) == NUMBER
        shapes = set()
        for row in rows:
            image = read_image(run.path(row.image.path))
            latents = load_safetensors(run.path(row.latents.path), expect_sha256=row.latents.sha256)[str(row.member)]
            assert latents.dtype == torch.float32
            assert tuple(latents.shape) == (4, *(side // sdxl.vae_scale_factor for side in image.shape[1:]))
            assert torch.equal(latents, encode_images(sdxl, image[None])[0])
            shapes.add(tuple(image.shape[1:]))
        assert shapes == {(64, 64), (48, 80), (80, 48)}
        # One that has its bucket's size is what it was, to the last bit.
        first = next(row for row in rows if row.base_prompt == "caption 0" and row.member == 1)
        assert torch.equal(read_image(run.path(first.image.path)), read_image(folder / "0.png"))


def test_an_interrupted_import_goes_on_to_the_same_candidates(
    folder: Path, sdxl: SdxlModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path / "whole", create=True) as run:
        import_all(run, sdxl, folder)
        whole = rows_of(run)
    with open_run(tmp_path / "cut", create=True) as run:
        # A kill between the files and their record.
        with monkeypatch.context() as killed:
            killed.setattr(run.manifest, "put_candidates", _no_disk)
            with pytest.raises(ResourceError):
                import_all(run, sdxl, folder)
        assert rows_of(run) == []
        asked = iter([False, True])
        import_all(run, sdxl, folder, lambda: next(asked))
        assert len(rows_of(run)) == 8
    with open_run(tmp_path / "cut") as run:
        import_all(run, sdxl, folder)
        assert sorted(rows_of(run), key=_place) == sorted(whole, key=_place)


def _no_disk(*_: Any) -> None:
    raise ResourceError("The disk is full")


def _place(row: Candidate) -> tuple[str, int]:
    return row.prompt_id, row.member


def test_a_picture_that_goes_or_changes_before_it_comes_in_stops_the_import(
    folder: Path, sdxl: SdxlModel, tmp_path: Path
) -> None:
    settings = settings_of(folder, sdxl.path)
    groups = own_groups(read_folder(settings.images))
    another_picture(folder)
    with open_run(tmp_path / "run", create=True) as run:
        with pytest.raises(IntegrityError, match=r"changed after it was listed[\s\S]*3\.png"):
            bring_in(run, sdxl, folder, groups, own_sizes(settings), key=KEY)
        assert rows_of(run) == []
        # What the run has already needs the folder no more.
        two = [replace(group, variants=group.variants[:1]) for group in groups[1:2]]
        bring_in(run, sdxl, folder, two, own_sizes(settings), key=KEY)
        shutil.rmtree(folder)
        bring_in(run, sdxl, folder, two, own_sizes(settings), key=KEY)
        assert len(rows_of(run)) == 1
