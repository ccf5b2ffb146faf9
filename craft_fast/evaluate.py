"""Evaluate: held-out prompts, same noise, base against tuned, every reward; and sample pictures during training.

The tuned pictures come from the exported file, loaded the way a user loads it. Base pictures and scores do not
depend on the training, so runs of other settings in the same folder find them done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from craft_fast.config import EvaluateSettings, GenerateSettings, Settings
from craft_fast.errors import ConfigError, CraftError, Interrupted, ResourceError
from craft_fast.progress import Progress, Silent, Task
from craft_fast.records import EvalRow, FileRef, Prompt
from craft_fast.rng import derive_seed
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.sampling import draw
from craft_fast.sdxl.unet import pristine_unet, tuned_unet
from craft_fast.sdxl.vae import png_bytes
from craft_fast.store import atomic
from craft_fast.store.digest import digest_json
from craft_fast.store.run import Run
from craft_fast.store.safe_load import read_image

if TYPE_CHECKING:
    from craft_fast.rewards.base import Reward

Side = Literal["base", "tuned"]
_SCORE_BATCH = 64
_KEEP_BYTES = 512 * 1024**2
# What decides a picture, next to model, prompt and seed; budgets and the noise of groups do not.
_PICTURE_SETTINGS = {
    "scheduler", "num_inference_steps", "guidance_scale", "negative_prompt", "height_px", "width_px", "batch_size",
}  # fmt: skip


def evaluate(
    run: Run,
    model: SdxlModel,
    result: Path,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    *,
    settings: EvaluateSettings,
    generate_settings: GenerateSettings,
    seed: int,
    key: str,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    extra: Mapping[str, Any] | None = None,
) -> list[EvalRow]:
    """Draw, score and compare; what an interrupted call has done is not done again.

    Leaves in the manifest, under ``key``: pictures of kinds ``eval_base`` and ``eval_tuned`` by prompt_id, one score
    a side, prompt and reward, and the table.

    Args:
        run: the open run; gets PNGs under ``samples/eval/``.
        model: the SDXL; a UNet that training has changed is read from disk again.
        result: the exported LoRA or UNet.
        prompts: held-out prompts; the first ``settings.prompts`` are used.
        rewards: all judges, held-out ones among them.
        settings: how many prompts and bootstrap samples.
        generate_settings: sampler, steps, guidance and size of the pictures.
        seed: the run's seed.
        key: the evaluate stage's key.
        progress: told about pictures and scores.
        should_stop: asked between batches.
        extra: written with the means to the run's log, for whoever reads it.

    Returns:
        One row a reward, in the order of ``rewards``.

    Raises:
        ConfigError: no prompts. Interrupted: ``should_stop`` said so. CraftError: a score is not finite.
    """
    progress = progress or Silent()
    chosen = list(prompts[: settings.prompts])
    if not chosen:
        raise ConfigError("There are no held-out prompts to evaluate on", where="prompts.heldout_file")
    if len(chosen) < settings.prompts:
        progress.warn(f"Only {len(chosen)} held-out prompts; evaluate.prompts asks for {settings.prompts}")
    work = _Work(run, model, chosen, generate_settings, seed, key, progress, should_stop)
    with progress.task("draw pairs", 2 * len(chosen), "images") as task:
        # While training has left another UNet in the model, it is read again only if a base picture is missing.
        work.pictures("base", task, lambda: pristine_unet(model))
        work.tuned_pictures(result, task)
    scores = work.scores(rewards)
    held_out = {reward.name: reward.held_out for reward in rewards}
    rows = paired_rows(
        scores["base"], scores["tuned"], held_out, bootstrap_samples=settings.bootstrap_samples, seed=seed
    )
    run.manifest.put_eval(key, rows)
    summary = {row.metric: [row.base_mean, row.tuned_mean, row.win_rate] for row in rows}
    run.log("evaluate", key=key[:16], prompts=len(chosen), summary=summary, **({"extra": dict(extra)} if extra else {}))
    return rows


def paired_rows(
    base: Mapping[str, Sequence[float]],
    tuned: Mapping[str, Sequence[float]],
    held_out: Mapping[str, bool],
    *,
    bootstrap_samples: int,
    seed: int,
) -> list[EvalRow]:
    """Means, win rate (a tie counts one half) and the interval of the mean paired difference, tuned minus base.

    The interval is the percentile bootstrap's 95 %: prompts are drawn with replacement, the same draws for every
    reward, so rows can be compared.

    Args:
        base: scores by reward, in prompt order.
        tuned: likewise, of the same prompts.
        held_out: by reward; its order is the order of the rows.
        bootstrap_samples: draws.
        seed: of the draws.
    """
    rows: list[EvalRow] = []
    for name, is_held_out in held_out.items():
        before, after = np.asarray(base[name], dtype=np.float64), np.asarray(tuned[name], dtype=np.float64)
        if before.shape != after.shape or before.size == 0:
            raise ValueError(f"{name}: {before.size} base scores, {after.size} tuned scores; need equal numbers, not 0")
        difference = after - before
        win_rate = float(np.mean(difference > 0) + 0.5 * np.mean(difference == 0))
        low, high = bootstrap_interval(difference, samples=bootstrap_samples, seed=derive_seed(seed, "bootstrap"))
        means = float(before.mean()), float(after.mean())
        rows.append(EvalRow(name, is_held_out, *means, win_rate, low, high, int(before.size)))
    return rows


def bootstrap_interval(difference: np.ndarray, *, samples: int, seed: int) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the mean over ``samples`` draws of ``difference`` [n] with replacement."""
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    rows_at_once = max(1, 4_000_000 // difference.size)
    for start in range(0, samples, rows_at_once):
        stop = min(start + rows_at_once, samples)
        drawn = rng.integers(0, difference.size, size=(stop - start, difference.size))
        means[start:stop] = difference[drawn].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class _Work:
    """One evaluation's pictures and scores."""

    def __init__(
        self,
        run: Run,
        model: SdxlModel,
        prompts: Sequence[Prompt],
        settings: GenerateSettings,
        seed: int,
        key: str,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        self.run, self.model, self.prompts = run, model, prompts
        self.settings, self.seed, self.key = settings, seed, key
        self.progress, self.should_stop = progress, should_stop
        # Pictures read for one reward are there for the next, as far as memory is cheap.
        self.images: dict[str, torch.Tensor] = {}
        self.image_bytes = 0
        # Pieces of the batch are part of a picture's key: other neighbours in a batch change its last bits.
        ids = [prompt.prompt_id for prompt in prompts]
        pictures = [
            model.digest,
            model.prediction_type,
            str(model.dtype),
            settings.model_dump(include=_PICTURE_SETTINGS),
        ]
        self.picture_key: dict[Side, str] = {"base": digest_json([*pictures, seed, ids]), "tuned": key}

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise Interrupted("The evaluation was stopped; what is done is kept", hint="the same command continues")

    # ---- pictures

    def _files(self, side: Side) -> dict[str, FileRef]:
        """Pictures that are there, by prompt_id."""
        files = self.run.manifest.files(f"eval_{side}", self.picture_key[side])
        return {name: ref for name, ref in files.items() if _is_there(self.run.path(ref.path), ref)}

    def tuned_pictures(self, result: Path, task: Task) -> None:
        """Draw what is missing of the tuned side, the exported result loaded only if something is."""
        files = self._files("tuned")
        if all(prompt.prompt_id in files for prompt in self.prompts):
            task.advance(len(self.prompts))
            return
        with tuned_unet(self.model, result) as unet:
            self.pictures("tuned", task, lambda: unet)

    def pictures(self, side: Side, task: Task, unet: Callable[[], Any]) -> None:
        """Draw what is missing, in fixed batches; record a batch once its files are written."""
        files = self._files(side)
        size = self.settings.batch_size
        for start in range(0, len(self.prompts), size):
            batch = self.prompts[start : start + size]
            if any(prompt.prompt_id not in files for prompt in batch):
                self._stop_if_asked()
                self._draw(side, batch, unet())
            task.advance(len(batch))
        if side == "base":
            self.run.manifest.put_files("eval_base", self.key, self._files("base"))

    def _draw(self, side: Side, batch: Sequence[Prompt], unet: Any) -> None:
        seeds = [derive_seed(self.seed, "evaluate", prompt.prompt_id) for prompt in batch]
        drawn = draw(self.model, [prompt.text for prompt in batch], seeds, settings=self.settings, unet=unet)
        folder = f"samples/eval/{side}-{self.picture_key[side][:12]}"
        names = [prompt.prompt_id for prompt in batch]
        self.run.manifest.put_files(
            f"eval_{side}", self.picture_key[side], write_pictures(self.run, folder, names, drawn.images)
        )

    # ---- scores

    def scores(self, rewards: Sequence[Reward]) -> dict[Side, dict[str, list[float]]]:
        """Scores by side and reward, in prompt order; one reward at a time holds the accelerator."""
        result: dict[Side, dict[str, list[float]]] = {"base": {}, "tuned": {}}
        with self.progress.task("judge pairs", 2 * len(rewards) * len(self.prompts), "scores") as task:
            for reward in rewards:
                for side in result:
                    result[side][reward.name] = self._scored(side, reward, task)
                reward.rest()
        return result

    def _scored(self, side: Side, reward: Reward, task: Task) -> list[float]:
        # A score belongs to a picture and a reward's weights; under the evaluation's own key it is for the report.
        key = digest_json([self.picture_key[side], reward.key])
        known = {row[1]: row[3] for row in self.run.manifest.eval_scores(key)}
        files = self._files(side)
        for start in range(0, len(self.prompts), _SCORE_BATCH):
            batch = self.prompts[start : start + _SCORE_BATCH]
            if any(prompt.prompt_id not in known for prompt in batch):
                self._stop_if_asked()
                images = torch.stack([self._image(files[prompt.prompt_id]) for prompt in batch])
                values = _judge(reward, images, batch)
                self._put(key, side, reward.name, values)
                known |= values
            task.advance(len(batch))
        scores = {prompt.prompt_id: known[prompt.prompt_id] for prompt in self.prompts}
        self._put(self.key, side, reward.name, scores)
        return list(scores.values())

    def _image(self, ref: FileRef) -> torch.Tensor:
        if ref.path in self.images:
            return self.images[ref.path]
        image = read_image(self.run.path(ref.path))
        self.image_bytes += image.numel()
        if self.image_bytes <= _KEEP_BYTES:
            self.images[ref.path] = image
        return image

    def _put(self, key: str, side: Side, reward: str, scores: Mapping[str, float]) -> None:
        self.run.manifest.put_eval_scores(key, [(side, name, reward, value) for name, value in scores.items()])


def _judge(reward: Reward, images: torch.Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    values = [float(value) for value in reward.score(images, [prompt.text for prompt in prompts])]
    if not all(math.isfinite(value) for value in values):
        raise CraftError("A reward returned NaN or infinity", where=reward.name, hint="check its weights")
    return {prompt.prompt_id: value for prompt, value in zip(prompts, values, strict=True)}


def write_pictures(run: Run, folder: str, names: Sequence[str], images: torch.Tensor) -> dict[str, FileRef]:
    """Write uint8 [B, 3, H, W] as ``folder/<name>.png`` with one folder fsync.

    Returns:
        Name to record; to be put in the manifest after this.
    """
    with atomic.batch(run.path(folder)) as batch:
        return {
            name: FileRef(f"{folder}/{name}.png", *batch.write_bytes(f"{name}.png", png_bytes(image)))
            for name, image in zip(names, images, strict=True)
        }


def sample_drawer(
    run: Run, model: SdxlModel, prompts: Sequence[Prompt], settings: Settings
) -> Callable[[int, Any], None]:
    """A callback for training: ``draw(step, unet)`` puts pictures of ``prompts``, seeds fixed, into the run.

    They lie in ``samples/train/step-000100/``, and in the manifest as kind ``sample`` under key ``train``.
    """

    def draw_samples(step: int, unet: Any) -> None:
        if not prompts:
            return
        seeds = [derive_seed(settings.seed, "evaluate", prompt.prompt_id) for prompt in prompts]
        try:
            drawn = draw(model, [prompt.text for prompt in prompts], seeds, settings=settings.generate, unet=unet)
        except ResourceError as error:
            # Training goes on without pictures when they do not fit, and knows that by torch's own error.
            raise error.__cause__ or error from None
        folder = f"samples/train/step-{step:06d}"
        files = write_pictures(run, folder, [prompt.prompt_id for prompt in prompts], drawn.images)
        run.manifest.put_files("sample", "train", {f"{step:06d}/{name}": ref for name, ref in files.items()})

    return draw_samples


def _is_there(path: Path, ref: FileRef) -> bool:
    return path.is_file() and path.stat().st_size == ref.size
