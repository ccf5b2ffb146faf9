"""Prompts to pictures in phases: text encoders, then UNet, then VAE, no two of them at a time where memory is short.

Where all parts stay on the device (``model.resident``) a job's pictures are finished one job after another. Where they
do not, the UNet denoises all jobs first and the VAE decodes after it is gone: its activations then have the room that
the UNet and its graphs had, and each part is loaded once. What is denoised is kept on disk until its pictures are, so
that a kill loses no more than the job it met.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from craft_fast.config import GenerateSettings
from craft_fast.errors import IntegrityError, ResourceError
from craft_fast.progress import Progress, Silent, Task
from craft_fast.records import FileRef
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.sampling import Denoiser
from craft_fast.sdxl.text import PromptEmbeds, encode_prompts
from craft_fast.sdxl.vae import Concessions, decode_latents
from craft_fast.store import atomic
from craft_fast.store.digest import digest_json
from craft_fast.store.run import Run
from craft_fast.store.safe_load import load_safetensors

FOLDER = "denoised"
UnetContext = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Drawn:
    """Finished pictures, on the CPU.

    Attributes:
        latents: float32 [B, 4, h, w], UNet space.
        images: uint8 [B, 3, H, W].
        truncated: per prompt, whether its end was cut off.
    """

    latents: torch.Tensor
    images: torch.Tensor
    truncated: list[bool]


@dataclass(frozen=True)
class Job:
    """Pictures that are denoised, decoded and written together.

    Attributes:
        name: of all that decides them, beside the key under which they are kept.
        embeds: of B prompts, on the CPU.
        noise_seeds: B seeds.
    """

    name: str
    embeds: PromptEmbeds
    noise_seeds: Sequence[int]


class KeptLatents:
    """Latents of jobs that are denoised and not decoded: files of the run, each on record once it is written.

    Args:
        run: the open run.
        key: of all that decides pictures beside the jobs' names.
    """

    kind = "denoised"

    def __init__(self, run: Run, key: str) -> None:
        self.run, self.key = run, key

    def take(self, name: str) -> torch.Tensor | None:
        """The latents of a job; None where there are none, or not those that were written."""
        ref = self.run.manifest.files(self.kind, self.key).get(name)
        if ref is None:
            return None
        try:
            return load_safetensors(self.run.path(ref.path), expect_sha256=ref.sha256)["latents"]
        except IntegrityError:
            self.forget([name])
            return None

    def put(self, name: str, latents: torch.Tensor) -> None:
        """Keep the latents of a job."""
        path = self.run.path(FOLDER, f"{digest_json([self.key, name])[:20]}.safetensors")
        written = atomic.write_safetensors(path, {"latents": latents})
        self.run.manifest.put_files(self.kind, self.key, {name: FileRef(f"{FOLDER}/{path.name}", *written)})

    def forget(self, names: Iterable[str]) -> None:
        """Drop the records of jobs, and then their files."""
        found = self.run.manifest.files(self.kind, self.key)
        gone = [name for name in names if name in found]
        if gone:
            self.run.manifest.drop_files(self.kind, self.key, gone)
        for name in gone:
            self.run.path(found[name].path).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove files that no record names: a process died between a record's end and its file's."""
        folder = self.run.path(FOLDER)
        if not folder.is_dir():
            return
        named = {self.run.path(ref.path) for kind, _, _, ref in self.run.manifest.all_files() if kind == self.kind}
        for path in folder.glob("*.safetensors"):
            if path not in named:
                path.unlink(missing_ok=True)


def encode_jobs(
    model: SdxlModel, texts: Sequence[Sequence[str]], negative_prompt: str, *, progress: Progress | None = None
) -> tuple[list[PromptEmbeds], PromptEmbeds]:
    """The text phase: the prompts of each job, and the negative one, on the CPU.

    A job's prompts are encoded by themselves, so that their last bits do not depend on which other jobs are left.

    Args:
        model: the SDXL.
        texts: the prompts of each job.
        negative_prompt: what to steer away from.
        progress: told of prompts, where the text encoders must be loaded for them.

    Raises:
        ResourceError: out of memory.
    """
    progress = Silent() if progress is None or model.resident else progress
    jobs: list[PromptEmbeds] = []
    try:
        with progress.task("encode prompts", sum(map(len, texts)), "prompts") as task:
            model.use("text_encoder", "text_encoder_2")
            for prompts in texts:
                jobs.append(encode_prompts(model, prompts).to("cpu"))
                task.advance(len(prompts))
            return jobs, encode_prompts(model, [negative_prompt]).to("cpu")
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "Not enough GPU memory to encode prompts",
            where=str(model.path),
            why=str(error).splitlines()[0],
            hint="--set engine.resident=never" if model.resident else "close other programs on this GPU",
        ) from error


def draw_jobs(
    model: SdxlModel,
    jobs: Sequence[Job],
    negative: PromptEmbeds,
    *,
    settings: GenerateSettings,
    done: Callable[[int, Drawn], None],
    unet: UnetContext | None = None,
    kept: KeptLatents | None = None,
    concessions: Concessions | None = None,
    progress: Progress | None = None,
    task: Task | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    record: bool = True,
) -> None:
    """The UNet's and the VAE's phases.

    Args:
        model: the SDXL.
        jobs: what to draw.
        negative: of one prompt to steer away from.
        settings: how to denoise.
        done: called with a job's number and its pictures, in order; writes them.
        unet: gives the UNet to denoise with, once its phase begins; the model's own otherwise.
        kept: latents that wait for the VAE; without, they wait in memory.
        concessions: of this run; changed when memory or precision runs out.
        progress: told of that, and of decoding where that is a phase of its own.
        task: advanced by images, with images_per_s.
        should_stop: asked before each job is denoised; what is denoised by then is finished.
        record: graphs as ``engine.graph`` says, or none.

    Raises:
        ResourceError: one image does not fit. CraftError: NaN or infinity came out.
    """
    if not jobs:
        return
    work = _Drawing(model, jobs, negative, settings, concessions or Concessions(), progress or Silent(), task, record)
    if model.resident:
        model.use("unet", "vae")
        work.one_by_one(unet or (lambda: nullcontext(model.unet)), done, should_stop)
        return
    model.rest()
    try:
        latents = work.denoise_all(unet or work.own_unet, kept, should_stop)
        # The UNet is gone before the VAE comes.
        model.rest()
        if latents:
            model.use("vae")
            work.decode_all(latents, done, kept)
    finally:
        model.rest()
    if kept is not None:
        kept.sweep()


class _Drawing:
    """One call of ``draw_jobs``."""

    def __init__(
        self,
        model: SdxlModel,
        jobs: Sequence[Job],
        negative: PromptEmbeds,
        settings: GenerateSettings,
        concessions: Concessions,
        progress: Progress,
        task: Task | None,
        record: bool,
    ) -> None:
        self.model, self.jobs, self.negative, self.settings = model, jobs, negative, settings
        self.concessions, self.progress, self.task, self.record = concessions, progress, task, record
        self.images, self.since = 0, time.perf_counter()

    def own_unet(self) -> AbstractContextManager[Any]:
        """The model's own UNet, loaded where it is not there."""
        self.model.use("unet")
        return nullcontext(self.model.unet)

    def one_by_one(
        self, unet: UnetContext, done: Callable[[int, Drawn], None], should_stop: Callable[[], bool]
    ) -> None:
        """Each job to its pictures before the next one."""
        with unet() as network, self._denoiser(network) as denoiser:
            for i, job in enumerate(self.jobs):
                if should_stop():
                    return
                latents = denoiser.draw(job.embeds, self.negative, job.noise_seeds)
                done(i, Drawn(latents, self._decode(latents), job.embeds.truncated))
                self._advance(job)

    def denoise_all(
        self, unet: UnetContext, kept: KeptLatents | None, should_stop: Callable[[], bool]
    ) -> dict[int, torch.Tensor]:
        """Latents by job, those that an earlier call has kept among them; not all jobs when asked to stop."""
        latents: dict[int, torch.Tensor] = {}
        for i, job in enumerate(self.jobs):
            found = kept.take(job.name) if kept is not None else None
            if found is not None:
                latents[i] = found
                self._advance(job, fresh=False)
        missing = [i for i in range(len(self.jobs)) if i not in latents]
        if not missing or should_stop():
            return latents
        self.since = time.perf_counter()
        with unet() as network, self._denoiser(network) as denoiser:
            for i in missing:
                if i != missing[0] and should_stop():
                    break
                job = self.jobs[i]
                latents[i] = denoiser.draw(job.embeds, self.negative, job.noise_seeds)
                if kept is not None:
                    kept.put(job.name, latents[i])
                self._advance(job)
        return dict(sorted(latents.items()))

    def decode_all(
        self, latents: dict[int, torch.Tensor], done: Callable[[int, Drawn], None], kept: KeptLatents | None
    ) -> None:
        """Latents to pictures."""
        with self.progress.task("decode", sum(map(len, latents.values())), "pictures") as task:
            for i, part in latents.items():
                done(i, Drawn(part, self._decode(part), self.jobs[i].embeds.truncated))
                if kept is not None:
                    kept.forget([self.jobs[i].name])
                task.advance(len(part))

    def _denoiser(self, unet: Any) -> Denoiser:
        return Denoiser(
            self.model, self.settings, unet=unet, concessions=self.concessions, warn=self.progress.warn,
            record=self.record,
        )  # fmt: skip

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        parts = [
            decode_latents(self.model, part, concessions=self.concessions, warn=self.progress.warn)
            for part in torch.split(latents, self.settings.batch_size)
        ]
        return torch.cat(parts)

    def _advance(self, job: Job, *, fresh: bool = True) -> None:
        if self.task is None:
            return
        if not fresh:
            self.task.advance(len(job.embeds))
            return
        self.images += len(job.embeds)
        seconds = time.perf_counter() - self.since
        self.task.advance(len(job.embeds), **({"images_per_s": self.images / seconds} if seconds > 0 else {}))


def draw(
    model: SdxlModel,
    prompts: Sequence[str],
    noise_seeds: Sequence[int],
    *,
    settings: GenerateSettings,
    unet: Any = None,
) -> Drawn:
    """Prompts to pictures in one call, at most ``settings.batch_size`` at a time.

    Args:
        model: the SDXL.
        prompts: B texts.
        noise_seeds: B seeds; the initial noise is a function of its seed.
        settings: how to denoise.
        unet: used instead of ``model.unet``.

    Raises:
        ResourceError: one image does not fit the device. CraftError: NaN or infinity came out.
    """
    [embeds], negative = encode_jobs(model, [prompts], settings.negative_prompt)
    drawn: list[Drawn] = []
    draw_jobs(
        model, [Job("", embeds, noise_seeds)], negative, settings=settings, done=lambda _, found: drawn.append(found),
        unet=None if unet is None else lambda: nullcontext(unet),
    )  # fmt: skip
    return drawn[0]
