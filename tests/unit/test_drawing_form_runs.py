"""Whole runs drawn by the UNet in NF4: the same bits in every way of working, and keys of their own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from craft_fast.config import Settings
from craft_fast.errors import Interrupted
from craft_fast.pipeline import CONFIG_NAME, run_pipeline
from craft_fast.settings_io import load_settings
from craft_fast.store.digest import sha256_file
from craft_fast.store.run import open_run
from craft_fast.tiny.random_rewards import build_random_rewards
from craft_fast.workbench import Workbench


@pytest.fixture(scope="module")
def settings(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("form")
    build_random_rewards(folder / "rewards")
    (folder / "train.txt").write_text("red circle\nblue square\ngreen star\n")
    (folder / "heldout.txt").write_text("orange circle\npurple star\nred heart\n")
    rewards = {"h": {"kind": "clip", "path": str(folder / "rewards" / "h")}}
    return Settings.model_validate(
        {
            "model": {"path": str(sdxl_folder), "device": "cpu"},
            "prompts": {"file": str(folder / "train.txt"), "heldout_file": str(folder / "heldout.txt")},
            "expand": {"variants": 2, "templates": ["{prompt}, sharp", "{prompt}, vivid", "{prompt}, clean"]},
            "generate": {"num_inference_steps": 2, "batch_size": 3, "unet": "nf4"},
            "rewards": rewards,
            "filter": {"rewards": ["h"], "target_samples": 100, "block_groups": 2},
            "train": {"rank": 2, "steps": 2, "micro_batch_size": 2, "checkpoint_every": 2, "sample_every": 0}
            | {"weighting": "uniform", "warmup_steps": 1, "learning_rate": 0.05},
            "evaluate": {"prompts": 3, "bootstrap_samples": 100},
        }
    )


def changed(settings: Settings, **sections: dict[str, Any]) -> Settings:
    tree = settings.model_dump()
    for section, values in sections.items():
        tree[section] |= values
    return Settings.model_validate(tree)


def results(root: Path) -> dict[str, str]:
    """Digest of every picture, latents file and LoRA of a run."""
    kept = [path for path in root.rglob("*") if path.suffix in (".png", ".safetensors")]
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in kept if "checkpoints" not in path.parts}


def base_pictures(root: Path) -> dict[str, str]:
    with open_run(root, read_only=True) as run:
        row = run.manifest.stage("evaluate")
        assert row is not None
        return {name: ref.sha256 for name, ref in run.manifest.files("eval_base", row.key).items()}


@pytest.fixture(scope="module")
def finished(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "apart"
    run_pipeline(root, changed(settings, engine={"resident": "never"}))
    return root


def test_phases_and_resident_models_give_the_same_bits(settings: Settings, finished: Path, tmp_path: Path) -> None:
    run_pipeline(tmp_path / "together", changed(settings, engine={"resident": "always"}))
    assert results(tmp_path / "together") == results(finished)
    assert base_pictures(tmp_path / "together") == base_pictures(finished)
    assert "lora/craft.safetensors" in results(finished)
    assert load_settings(config=finished / CONFIG_NAME).generate.unet == "nf4"


class Stop:
    """Asks to stop at the nth time it is asked."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("resident", ["never", "always"])
def test_an_interrupted_run_ends_in_the_same_bits(
    resident: str, settings: Settings, finished: Path, tmp_path: Path
) -> None:
    chosen = changed(settings, engine={"resident": resident})
    stops = 0
    for polls in range(2, 40, 5):
        try:
            run_pipeline(tmp_path / "stopped", chosen, should_stop=Stop(polls))
        except Interrupted:
            stops += 1
        else:
            break
    assert stops >= 3
    run_pipeline(tmp_path / "stopped", chosen)
    assert results(tmp_path / "stopped") == results(finished)


def test_pictures_of_one_form_are_never_taken_for_the_others(
    settings: Settings, finished: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "both"))
    dense = changed(settings, generate={"unet": "dense"}, engine={"resident": "never"})
    run_pipeline(root, dense)
    run_pipeline(tmp_path / "dense", dense)
    assert base_pictures(root) == base_pictures(tmp_path / "dense")
    assert not set(base_pictures(root).values()) & set(base_pictures(finished).values())
    alone, both = results(tmp_path / "dense"), results(root)
    assert {name: both[name] for name in alone} == alone
    for folder in ("candidates/", "samples/"):
        assert not {name for name in alone if name.startswith(folder)} & set(results(finished))


def test_a_model_is_not_loaded_before_auto_is_decided(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"generate\.unet"):
        Workbench(changed(settings, generate={"unet": "auto"})).model()


def test_auto_is_saved_as_what_it_came_to(settings: Settings, tmp_path: Path) -> None:
    run_pipeline(tmp_path / "run", changed(settings, generate={"unet": "auto"}), until="expand")
    assert load_settings(config=tmp_path / "run" / CONFIG_NAME).generate.unet == "dense"


def test_the_packaged_model_draws_a_run_in_nf4(tmp_path: Path) -> None:
    tiny = load_settings(
        "tiny", None, ["model.device=cpu", "generate.unet=nf4", "generate.max_images=16", "generate.batch_size=8",
                       "generate.num_inference_steps=4", "filter.rewards=[a]", "filter.target_samples=4",
                       "train.steps=2", "train.micro_batch_size=2", "train.sample_every=1", "train.sample_prompts=1",
                       "evaluate.prompts=2", "evaluate.bootstrap_samples=100", "report.grid_prompts=1"],
    )  # fmt: skip
    done = {}
    for resident in ("never", "always"):
        root = tmp_path / resident
        summary = run_pipeline(root, changed(tiny, engine={"resident": resident}))
        assert {stage.state for stage in summary.stages} == {"done"}
        assert len(summary.evaluation) == 7
        done[resident] = results(root)
    assert done["never"] == done["always"]
    assert sum(name.startswith("samples/train/") for name in done["never"]) == 2
