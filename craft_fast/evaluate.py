"""Evaluate: held-out prompts, same noise, base against tuned, every reward; and sample pictures during training.

The tuned pictures come from the exported file, loaded the way a user loads it. Base pictures do not depend on the
training, so runs of other settings in the same folder find them done; and a picture that a reward has judged before,
with the same text and in the same way, is not judged again. Text is encoded first, for both sides; then come the base
pictures, the tuned ones, and the rewards, each of them a phase of the device's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from craft_fast.asking import answers, cut_note
from craft_fast.config import EvaluateSettings, GenerateSettings, Settings
from craft_fast.errors import ConfigError, IntegrityError, Interrupted, ResourceError
from craft_fast.pairs import paired_rows
from craft_fast.progress import Progress, Silent, Task
from craft_fast.records import EvalRow, FileRef, Prompt
from craft_fast.rng import derive_seed
from craft_fast.sdxl.drawing import Drawn, Job, KeptLatents, UnetContext, draw_jobs, encode_jobs
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.text import PromptEmbeds
from craft_fast.sdxl.unet import drawing_unet, tuned_unet
from craft_fast.sdxl.vae import Concessions, png_bytes
from craft_fast.store import atomic
from craft_fast.store.digest import digest_json, sha256_file
from craft_fast.store.run import Run
from craft_fast.store.safe_load import read_image

if TYPE_CHECKING:
    from craft_fast.rewards.base import Reward

Side = Literal["base", "tuned"]
_SCORE_BATCH = 64
_KEEP_BYTES = 512 * 1024**2
# What decides a picture, next to model, its UNet's form, prompt and seed; budgets and the noise of groups do not.
_PICTURE_SETTINGS = {
    "scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "negative_prompt", "height_px",
    "width_px", "batch_size",
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
    concessions: Concessions | None = None,
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
        settings: how many prompts and bootstrap samples; ``seed`` of the pictures where it is not the run's.
        generate_settings: sampler, steps, guidance and size of the pictures.
        seed: the run's seed.
        key: the evaluate stage's key.
        progress: told about pictures and scores.
        should_stop: asked between batches.
        extra: written with the means to the run's log, for whoever reads it.
        concessions: to memory and precision, of the whole run.

    Returns:
        One row a reward, in the order of ``rewards``.

    Raises:
        ConfigError: no prompts. Interrupted: ``should_stop`` said so. CraftError: a reward failed, or gave a score
            that is not finite. IntegrityError: a picture is not what was drawn, or scores of both sides came about in
            different ways.
    """
    progress = progress or Silent()
    seed = seed if settings.seed is None else settings.seed
    chosen = list(prompts[: settings.prompts])
    if not chosen:
        raise ConfigError("There are no held-out prompts to evaluate on", where="prompts.heldout_file")
    if len(chosen) < settings.prompts:
        progress.warn(f"Only {len(chosen)} held-out prompts; evaluate.prompts asks for {settings.prompts}")
    work = _Work(run, model, chosen, generate_settings, seed, key, progress, should_stop, concessions or Concessions())
    with progress.task("draw pairs", 2 * len(chosen), "images") as task:
        work.encode()
        # While training has left another UNet in the model, it is read again only if a base picture is missing.
        work.pictures("base", task, lambda: nullcontext(drawing_unet(model)))
        work.pictures("tuned", task, lambda: tuned_unet(model, result))
    model.rest()  # the rewards' phase
    scores = work.scores(rewards)
    held_out = {reward.name: reward.held_out for reward in rewards}
    rows = paired_rows(
        scores["base"],
        scores["tuned"],
        held_out,
        bootstrap_samples=settings.bootstrap_samples,
        seed=seed,
        provenances=run.manifest.eval_provenances(key),
    )
    run.manifest.put_eval(key, rows)
    summary = {row.metric: [row.base_mean, row.tuned_mean, row.win_rate] for row in rows}
    run.log("evaluate", key=key[:16], prompts=len(chosen), summary=summary, **({"extra": dict(extra)} if extra else {}))
    return rows


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
        concessions: Concessions,
    ) -> None:
        self.run, self.model, self.prompts = run, model, prompts
        self.settings, self.seed, self.key = settings, seed, key
        self.progress, self.should_stop, self.concessions = progress, should_stop, concessions
        size = settings.batch_size
        self.batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        # By batch: its text, where something is to be drawn.
        self.texts: dict[int, PromptEmbeds] = {}
        self.negative: PromptEmbeds | None = None
        # Pictures read for one reward are there for the next, as far as memory is cheap.
        self.images: dict[str, torch.Tensor] = {}
        self.image_bytes = 0
        # Pieces of the batch are part of a picture's key: other neighbours in a batch change its last bits.
        ids = [prompt.prompt_id for prompt in prompts]
        pictures = [
            model.digest,
            model.prediction_type,
            [str(model.dtype), str(model.vae_dtype), model.unet_form],
            settings.model_dump(include=_PICTURE_SETTINGS),
        ]
        self.picture_key: dict[Side, str] = {"base": digest_json([*pictures, seed, ids]), "tuned": key}

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise _stopped()

    # ---- pictures

    def _files(self, side: Side) -> dict[str, FileRef]:
        """Pictures that are there, by prompt_id."""
        files = self.run.manifest.files(f"eval_{side}", self.picture_key[side])
        return {name: ref for name, ref in files.items() if _is_there(self.run.path(ref.path), ref)}

    def _missing(self, side: Side) -> list[int]:
        """Batches of which a picture is not there."""
        files = self._files(side)
        return [i for i, batch in enumerate(self.batches) if any(p.prompt_id not in files for p in batch)]

    def encode(self) -> None:
        """The text of every batch that lacks pictures, for both sides."""
        wanted = sorted({*self._missing("base"), *self._missing("tuned")})
        if wanted:
            texts = [[prompt.text for prompt in self.batches[i]] for i in wanted]
            embeds, self.negative = encode_jobs(
                self.model, texts, self.settings.negative_prompt, progress=self.progress
            )
            self.texts = dict(zip(wanted, embeds, strict=True))

    def pictures(self, side: Side, task: Task, unet: UnetContext) -> None:
        """Draw what is missing, in fixed batches; record a batch once its files are written."""
        missing = self._missing(side)
        if already := sum(len(batch) for i, batch in enumerate(self.batches) if i not in missing):
            task.advance(already)
        if missing:
            self._draw(side, missing, task, unet)
        if side == "base":
            self.run.manifest.put_files("eval_base", self.key, self._files("base"))

    def _draw(self, side: Side, missing: Sequence[int], task: Task, unet: UnetContext) -> None:
        key = self.picture_key[side]
        assert self.negative is not None
        jobs = []
        for i in missing:
            ids = [prompt.prompt_id for prompt in self.batches[i]]
            seeds = [derive_seed(self.seed, "evaluate", name) for name in ids]
            jobs.append(Job(digest_json([side, ids, seeds]), self.texts[i], seeds))
        left = set(missing)

        def write(number: int, drawn: Drawn) -> None:
            names = [prompt.prompt_id for prompt in self.batches[missing[number]]]
            files = write_pictures(self.run, f"samples/eval/{side}-{key[:12]}", names, drawn.images)
            self.run.manifest.put_files(f"eval_{side}", key, files)
            left.discard(missing[number])

        draw_jobs(
            self.model, jobs, self.negative, settings=self.settings, done=write, unet=unet,
            kept=KeptLatents(self.run, key), concessions=self.concessions, progress=self.progress, task=task,
            should_stop=self.should_stop,
        )  # fmt: skip
        if left:
            raise _stopped()

    # ---- scores

    def scores(self, rewards: Sequence[Reward]) -> dict[Side, dict[str, list[float]]]:
        """Scores by side and reward, in prompt order; one reward at a time holds the accelerator."""
        result: dict[Side, dict[str, list[float]]] = {"base": {}, "tuned": {}}
        files = {side: self._files(side) for side in result}
        with self.progress.task("judge pairs", 2 * len(rewards) * len(self.prompts), "scores") as task:
            for reward in rewards:
                again = 0
                for side, scores in result.items():
                    scores[reward.name], renewed = self._scored(side, files[side], reward, task)
                    again += renewed
                reward.rest()
                self._tell(reward, again)
        return result

    def _scored(self, side: Side, files: Mapping[str, FileRef], reward: Reward, task: Task) -> tuple[list[float], int]:
        """Scores of one side in prompt order, and how many had come about in another way before."""
        manifest, key, way = self.run.manifest, reward.key, reward.provenance
        judged = {prompt.prompt_id: (files[prompt.prompt_id].sha256, prompt.text) for prompt in self.prompts}
        known = manifest.judgements(key, way, judged.values())
        others = manifest.judgements(key, None, [item for item in judged.values() if item not in known])
        for start in range(0, len(self.prompts), _SCORE_BATCH):
            batch = self.prompts[start : start + _SCORE_BATCH]
            if any(judged[prompt.prompt_id] not in known for prompt in batch):
                self._stop_if_asked()
                images = torch.stack([self._image(files[prompt.prompt_id]) for prompt in batch])
                texts = [prompt.text for prompt in batch]
                values = answers(reward.name, partial(reward.score, images, texts), texts)
                new = {judged[prompt.prompt_id]: value for prompt, value in zip(batch, values, strict=True)}
                manifest.put_judgements(key, way, new)
                known |= new
            task.advance(len(batch))
        scores = {name: known[item] for name, item in judged.items()}
        # Under the evaluation's own key too, for the report.
        rows = [(side, name, reward.name, value) for name, value in scores.items()]
        manifest.put_eval_scores(self.key, rows, {reward.name: way})
        return list(scores.values()), len(others)

    def _tell(self, reward: Reward, again: int) -> None:
        if again:
            self.progress.warn(f"{again} scores of {reward.name} had come about in another way and were made again")
        if note := cut_note(reward.name, getattr(reward, "cut", ()), [prompt.text for prompt in self.prompts]):
            self.progress.warn(note)

    def _image(self, ref: FileRef) -> torch.Tensor:
        if ref.path in self.images:
            return self.images[ref.path]
        path = self.run.path(ref.path)
        image = read_image(path)
        if sha256_file(path) != ref.sha256:
            # A judgement of it would be kept under the digest of another picture.
            raise IntegrityError(
                "A picture of the evaluation is not what was drawn",
                where=str(path),
                why="its sha256 is not the recorded one",
                hint="remove the file; the same command draws it again",
            )
        if self.image_bytes + image.nbytes <= _KEEP_BYTES:
            self.images[ref.path] = image
            self.image_bytes += image.nbytes
        return image


def _stopped() -> Interrupted:
    return Interrupted("The evaluation was stopped; what is done is kept", hint="the same command continues")


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


class SampleDrawer:
    """A callback for training: ``draw(step, unet)`` puts pictures of fixed prompts and seeds into the run.

    They lie in ``samples/train/step-000100/``, and in the manifest as kind ``sample`` under key ``train``.

    Args:
        run: the open run.
        model: the SDXL. Its text encoders are used by ``prepare``, its VAE by each call; where parts do not stay
            on the device, each is freed after its use. The UNet is the caller's.
        prompts: what to draw; none draws nothing.
        settings: of the run.
        concessions: to memory and precision, of the run so far; not changed, as there is less room beside training
            than there is after it.
        progress: told of new ones.
    """

    def __init__(
        self,
        run: Run,
        model: SdxlModel,
        prompts: Sequence[Prompt],
        settings: Settings,
        concessions: Concessions | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.run, self.model, self.prompts, self.settings = run, model, prompts, settings
        self.concessions, self.progress = replace(concessions or Concessions()), progress or Silent()
        self._text: tuple[list[PromptEmbeds], PromptEmbeds] | None = None

    def prepare(self) -> None:
        """Encode the prompts, while there is room for the text encoders: before the UNet is made ready to train."""
        if self._text is None and self.prompts:
            texts = [prompt.text for prompt in self.prompts]
            negative = self.settings.generate.negative_prompt
            self._text = encode_jobs(self.model, [texts], negative, progress=self.progress)
            self.model.rest()

    def __call__(self, step: int, unet: Any) -> None:
        """Draw with ``unet`` and record the pictures under ``step``."""
        self.prepare()
        if self._text is None:
            return
        [embeds], negative = self._text
        seeds = [derive_seed(self.settings.seed, "evaluate", prompt.prompt_id) for prompt in self.prompts]
        drawn: list[Drawn] = []
        try:
            # No graphs: one would hold memory beside training's for the sake of a few steps.
            draw_jobs(
                self.model, [Job("", embeds, seeds)], negative, settings=self.settings.generate,
                done=lambda _, found: drawn.append(found), unet=lambda: nullcontext(unet),
                concessions=self.concessions, progress=self.progress, record=False,
            )  # fmt: skip
        except ResourceError as error:
            # Training goes on without pictures when they do not fit, and knows that by torch's own error.
            raise error.__cause__ or error from None
        folder = f"samples/train/step-{step:06d}"
        files = write_pictures(self.run, folder, [prompt.prompt_id for prompt in self.prompts], drawn[0].images)
        self.run.manifest.put_files("sample", "train", {f"{step:06d}/{name}": ref for name, ref in files.items()})


def _is_there(path: Path, ref: FileRef) -> bool:
    return path.is_file() and path.stat().st_size == ref.size
