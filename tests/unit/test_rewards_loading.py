"""Keys and provenance of reward folders; broken and hostile ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from craft_fast.config import RewardSettings
from craft_fast.errors import ConfigError, EnvironmentProblem, IntegrityError
from craft_fast.rewards import loaders
from craft_fast.rewards.registry import load_reward, reward_key, reward_provenance
from craft_fast.store import digest
from craft_fast.store.digest import digest_json, sha256_file
from craft_fast.tiny.random_rewards import build_random_rewards
from tests.unit.random_judges import KINDS, spec

PROMPTS = ["a red circle", "a blue square above a star", ""]


# ---- keys and provenance


def test_keys_follow_files_preprocessing_and_dtype_and_nothing_else(own: Path) -> None:
    settings = spec(own, "h")
    key = reward_key("h", settings)
    assert key == load_reward("h", settings).key == reward_key("other", spec(own, "h", held_out=True, weight=2.0))
    others = {reward_key("h", settings, dtype=dtype) for dtype in ("float32", "float16", "bfloat16")}
    assert len(others | {key}) == 4
    assert load_reward("h", settings, dtype="float16").key in others
    moved = Path(shutil.copytree(own, own.parent / "moved"))
    (moved / "h" / "notes.txt").write_text("not read")
    assert reward_key("h", spec(moved, "h")) == key
    for file in ("reward.json", "config.json", "tokenizer.json", "model.safetensors"):
        changed = Path(shutil.copytree(own, own.parent / f"changed-{file}"))
        path = changed / "h" / file
        if file == "model.safetensors":
            save_file({name: value + 1e-3 for name, value in load_file(path).items()}, path)
        else:
            more = {"mean": [0.4, 0.5, 0.5]} if file == "reward.json" else {"unused_by_anything": 1}
            path.write_text(json.dumps(json.loads(path.read_text()) | more))
        others.add(reward_key("h", spec(changed, "h")))
    assert len(others | {key}) == 8


def test_a_key_reads_every_file_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(digest, "sha256_file", lambda path: (read.append(Path(path).name), sha256_file(path))[1])
    for _ in range(2):
        reward_key("a", spec(own, "a"))
        reward_provenance("a", spec(own, "a"), "cpu")
    assert sorted(read) == ["config.json", "head.safetensors", "model.safetensors"]


def test_provenance_says_how_scores_come_about_without_a_network(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {name: load_reward(name, spec(own, name)).provenance for name in KINDS}
    monkeypatch.setattr(loaders, "_network", lambda *given: pytest.fail("a network was read"))
    for name in KINDS:
        assert reward_provenance(name, spec(own, name), "cpu") == told[name]
    weights = own / "h" / "model.safetensors"
    assert told["h"].checkpoint == sha256_file(weights)
    files = [own / "a" / "model.safetensors", own / "a" / "head.safetensors"]
    assert told["a"].checkpoint == digest_json([[path.name, sha256_file(path)] for path in files])
    assert told["h"].preprocessing.startswith("none/64/")
    assert (told["h"].backend, told["h"].precision, told["a"].tokenizer) == ("native", "float32", "")
    assert told["h"].tokenizer == told["p"].tokenizer != ""
    assert "score_scale 100.0" in told["p"].note
    assert reward_provenance("h", spec(own, "h"), "cuda").precision == "float16"
    half = reward_provenance("h", spec(own, "h"), "cpu", dtype="bfloat16")
    assert told["h"].differences(half) == ["precision: float32, bfloat16"]
    path = own / "h" / "reward.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score_floor": 0.0, "note": "mine"}))
    assert reward_provenance("h", spec(own, "h"), "cpu").note == "mine; score_floor 0.0"


# ---- broken and hostile folders


@pytest.mark.parametrize("name", KINDS)
def test_equal_seeds_build_equal_bytes_and_the_key_follows_them(folders: Path, own: Path, name: str) -> None:
    again = build_random_rewards(own / "again")
    for path in (folders / name).iterdir():
        assert path.read_bytes() == (again / name / path.name).read_bytes(), path.name
    key = reward_key(name, spec(folders, name))
    assert key == load_reward(name, spec(folders, name)).key == reward_key(name, spec(again, name))
    other = build_random_rewards(own / "other", seed=1)
    assert reward_key(name, spec(other, name)) != key


def test_a_pickle_is_refused_with_the_command_that_converts_it(own: Path) -> None:
    for name, file in (("h", "pytorch_model.bin"), ("a", "weights.pth")):
        (own / name / "model.safetensors").unlink()
        torch.save({}, own / name / file)
        for load in (lambda n: load_reward(n, spec(own, n)), lambda n: reward_key(n, spec(own, n))):
            with pytest.raises(IntegrityError) as caught:
                load(name)
            assert caught.value.exit_code == 6
            assert file in caught.value.where
            assert "weights_only=True" in caught.value.hint


def test_a_pickle_renamed_to_safetensors_is_refused(own: Path) -> None:
    torch.save({}, own / "h" / "model.safetensors")
    with pytest.raises(IntegrityError) as caught:
        load_reward("h", spec(own, "h"))
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("name", KINDS)
def test_keys_must_fit_exactly(own: Path, name: str) -> None:
    path = own / name / "model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    save_file({("extra" if key == first else key): value for key, value in tensors.items()}, path)
    with pytest.raises(IntegrityError) as caught:
        load_reward(name, spec(own, name))
    assert "extra" in caught.value.why
    assert f"reward {name}" in caught.value.where


def test_shapes_must_fit(own: Path) -> None:
    path = own / "h" / "model.safetensors"
    tensors = load_file(path)
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"][:4].contiguous()
    save_file(tensors, path)
    with pytest.raises(IntegrityError):
        load_reward("h", spec(own, "h"))


def test_weights_must_be_finite(own: Path) -> None:
    path = own / "a" / "head.safetensors"
    tensors = load_file(path)
    tensors["layers.0.bias"][0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(IntegrityError):
        load_reward("a", spec(own, "a"))


def test_missing_parts_are_named(own: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem):
        load_reward("h", RewardSettings(kind="clip", path=str(tmp_path / "none")))
    (own / "h" / "model.safetensors").unlink()
    with pytest.raises(EnvironmentProblem, match="no weights"):
        load_reward("h", spec(own, "h"))
    (own / "a" / "reward.json").unlink()
    with pytest.raises(ConfigError, match="does not say"):
        load_reward("a", spec(own, "a"))
    for path in (own / "p").iterdir():
        if path.name.startswith("tokenizer"):
            path.unlink()
    with pytest.raises(EnvironmentProblem, match="no tokenizer"):
        load_reward("p", spec(own, "p"))


def test_a_reward_whose_files_were_mended_loads(own: Path) -> None:
    path = own / "h" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IntegrityError) as caught:
        load_reward("h", spec(own, "h"))
    assert "reward h" in caught.value.where
    path.write_bytes(whole)
    assert (
        load_reward("h", spec(own, "h"))
        .score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a star"])
        .isfinite()
        .all()
    )
