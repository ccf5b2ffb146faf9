"""One picture grid of a LoRA at several strengths: same prompt and noise in a row, strength 0 is the base model.

The noise is that of the evaluation, so a prompt that a run was evaluated on gives the evaluated picture at strength 1.
Text comes first, then the UNet, then the VAE, each a phase of the device's memory; the model and the LoRA are loaded
once for all strengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from craft_fast.config import GenerateSettings, ModelSettings
from craft_fast.errors import CraftError, IntegrityError, Interrupted, UsageError
from craft_fast.lora.adapter import Adapter
from craft_fast.lora.applying import misfits
from craft_fast.lora.describing import read_lora, require_lora
from craft_fast.lora.layouts import adapted_shapes
from craft_fast.lora.reading import read_adapter
from craft_fast.progress import Progress, Silent, Task
from craft_fast.prompt_lines import clean_text, excerpt, prompt_id
from craft_fast.rng import derive_seed
from craft_fast.sdxl.drawing import encode_jobs
from craft_fast.sdxl.load import SdxlModel, open_source
from craft_fast.sdxl.sampling import Denoiser
from craft_fast.sdxl.text import PromptEmbeds
from craft_fast.sdxl.tuned_text import tuned_text
from craft_fast.sdxl.unet import ADAPTER_NAME, drawing_unet, tuned_unet
from craft_fast.sdxl.vae import Concessions, decode_latents, png_bytes
from craft_fast.store.digest import sha256_bytes

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
MOST_STRENGTH = 100.0
MAX_CHARS = 2000
_TINY = "package:craft_fast.tiny/assets/sdxl"
Texts = tuple[list[PromptEmbeds], PromptEmbeds]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a trial.

    Attributes:
        prompt: its text.
        seed: as given; the noise is a function of it and the prompt.
        strength: of the LoRA.
        image: uint8 [3, H, W].
        png: as a file.
        moved: mean absolute difference from strength 0, in levels of 255; None: strength 0 was not drawn.
    """

    prompt: str
    seed: int
    strength: float
    image: Tensor
    png: bytes
    moved: float | None

    @property
    def sha256(self) -> str:
        """Of ``png``."""
        return sha256_bytes(self.png)


@dataclass(frozen=True, slots=True)
class Trial:
    """All pictures, by prompt, then seed, then strength in the order given."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    strengths: Sequence[float]
    pictures: Sequence[Picture]
    truncated: Sequence[str]
    """Prompts whose end the text encoders do not see."""

    def moved(self, strength: float) -> float | None:
        """Mean of ``Picture.moved`` over all pictures of a strength."""
        found = [one.moved for one in self.pictures if one.strength == strength and one.moved is not None]
        return sum(found) / len(found) if found else None


# ---- what is asked


def clean_prompts(texts: Sequence[str]) -> list[str]:
    """Prompts as a prompt file's are cleaned, each once.

    Raises:
        UsageError: none, or one that no prompt file may hold.
    """
    found: dict[str, None] = {}
    for text in texts:
        cleaned, problem = clean_text(text, MAX_CHARS)
        if problem:
            raise UsageError("A prompt cannot be used", where=f"--prompt {excerpt(text)}", why=problem)
        found[cleaned] = None
    if not found:
        raise UsageError("There is nothing to draw", hint="--prompt 'a red circle'")
    return list(found)


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """Strengths, each once.

    Raises:
        UsageError: one that is no number, or beyond all measure.
    """
    for value in strengths:
        if not math.isfinite(value) or abs(value) > MOST_STRENGTH:
            raise UsageError(
                "This strength cannot be used",
                where=f"--strength {value}",
                why=f"a number from -{MOST_STRENGTH:g} to {MOST_STRENGTH:g} is wanted",
                hint="1 is the LoRA as trained, 0 the base model",
            )
    return list(dict.fromkeys(value + 0.0 for value in strengths))  # -0.0 is 0.0


def fitting_adapter(path: Path, model: ModelSettings) -> Adapter:
    """The LoRA's layers, which must be the model's; headers of the model alone are read.

    Raises:
        UsageError: the LoRA is for another model that is known here; names the option that gives it.
        EnvironmentProblem, IntegrityError: no such file or model, damaged, no LoRA, or one for no model known here.
    """
    require_lora(path)
    try:
        return _fits(path, model.path, model)
    except IntegrityError as error:
        hint = _another_model(path, model)
        if hint is None:
            raise
        raise UsageError(
            "This LoRA is for another model", where=str(path), why=f"{error.why}; model.path is {model.path}", hint=hint
        ) from error


def _fits(path: Path, model: str, settings: ModelSettings) -> Adapter:
    source = open_source(model, config=settings.config, offline=settings.offline)
    adapter = read_adapter(path, source.config("unet"))
    problems = misfits(adapter, adapted_shapes(source))
    if problems or not adapter.layers:
        raise IntegrityError(
            "The LoRA does not fit the model",
            where=str(path),
            why="; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
            or "it has no layers",
            hint=f"give the base model that it was trained on: craft-fast lora check {path}",
        )
    return adapter


def _another_model(path: Path, model: ModelSettings) -> str | None:
    """The option that gives the model which a LoRA does fit."""
    try:
        read_lora(path)
    except CraftError:
        pass
    else:
        return "it is of SDXL's size: --preset sdxl-8gb, or --set model.path=YOUR_SDXL"
    try:
        if model.path != _TINY:
            _fits(path, _TINY, model)
            return "it is of the tiny model's size: --preset tiny"
    except CraftError:
        pass
    return None


# ---- drawing


def draw_trial(
    model: SdxlModel,
    lora: Path,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    strengths: Sequence[float],
    settings: GenerateSettings,
    concessions: Concessions | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trial:
    """Draw every prompt with every seed at every strength.

    Args:
        model: the SDXL; as it was, afterwards.
        lora: the file, which fits the model.
        prompts: cleaned texts.
        seeds: each gives a prompt the noise that an evaluation of this seed gives it.
        strengths: 1 is as trained, 0 the base model without the file.
        settings: how to draw; ``batch_size`` pictures at a time, in the order of the rows.
        concessions: to memory and precision.
        progress: told of pictures.
        should_stop: asked before each batch.

    Raises:
        Interrupted: ``should_stop`` said so. IntegrityError: the file does not load. ResourceError: one picture does
            not fit. CraftError: NaN or infinity came out.
    """
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    work = _Drawing(model, lora, rows, settings, concessions or Concessions(), progress or Silent(), should_stop)
    with work.progress.task("draw", len(rows) * len(strengths), "images") as task:
        texts = work.encode(strengths)
        latents = work.denoise(strengths, texts, task)
        images = work.decode(latents)
    base = images.get(0.0)
    pictures = []
    for i, (prompt, seed) in enumerate(rows):
        for strength in strengths:
            image = images[strength][i]
            moved = None if base is None else float((image.int() - base[i].int()).abs().double().mean())
            pictures.append(Picture(prompt, seed, strength, image, png_bytes(image), moved))
    cut = dict.fromkeys(
        rows[i * settings.batch_size + j][0]
        for i, embeds in enumerate(texts[strengths[0]][0])
        for j, is_cut in enumerate(embeds.truncated)
        if is_cut
    )
    return Trial(list(prompts), list(seeds), list(strengths), pictures, list(cut))


class _Drawing:
    """One call of ``draw_trial``, phase by phase."""

    def __init__(
        self,
        model: SdxlModel,
        lora: Path,
        rows: Sequence[tuple[str, int]],
        settings: GenerateSettings,
        concessions: Concessions,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        self.model, self.lora, self.settings = model, lora, settings
        self.concessions, self.progress, self.should_stop = concessions, progress, should_stop
        size = settings.batch_size
        self.batches = [rows[start : start + size] for start in range(0, len(rows), size)]

    def encode(self, strengths: Sequence[float]) -> dict[float, Texts]:
        """Text by strength; that of the base model for all of them where the LoRA leaves the encoders alone."""
        base = self._encode()
        with tuned_text(self.model, self.lora) as set_strength:
            found = {}
            for strength in strengths:
                if set_strength is None or strength == 0:
                    found[strength] = base
                else:
                    self._stop_if_asked()
                    set_strength(strength)
                    found[strength] = self._encode()
        return found

    def _encode(self) -> Texts:
        texts = [[prompt for prompt, _ in batch] for batch in self.batches]
        return encode_jobs(self.model, texts, self.settings.negative_prompt, progress=self.progress)

    def denoise(self, strengths: Sequence[float], texts: Mapping[float, Texts], task: Task) -> dict[float, Tensor]:
        """Latents by strength; 0 is drawn before the LoRA is in the UNet, so it is the base model's to the bit."""
        latents: dict[float, Tensor] = {}
        self.model.rest()
        if 0.0 in strengths:
            latents[0.0] = self._denoise(drawing_unet(self.model), texts[0.0], task)
        tuned = [strength for strength in strengths if strength != 0]
        if not tuned:
            return latents
        if not any(name.startswith("unet.") for name in read_adapter(self.lora, self.model.unet_config).layers):
            return latents | {one: self._denoise(drawing_unet(self.model), texts[one], task) for one in tuned}
        with tuned_unet(self.model, self.lora, tuned[0]) as unet:
            for strength in tuned:
                unet.set_adapters([ADAPTER_NAME], [strength])
                latents[strength] = self._denoise(unet, texts[strength], task)
        return latents

    def _denoise(self, unet: object, texts: Texts, task: Task) -> Tensor:
        # Graphs hold a LoRA's strength as a constant, so each strength has its own.
        denoiser = Denoiser(self.model, self.settings, unet=unet, concessions=self.concessions, warn=self.progress.warn)
        embeds, negative = texts
        parts = []
        with denoiser:
            for batch, prompts in zip(self.batches, embeds, strict=True):
                self._stop_if_asked()
                noise_seeds = [derive_seed(seed, "evaluate", prompt_id(prompt)) for prompt, seed in batch]
                parts.append(denoiser.draw(prompts, negative, noise_seeds))
                task.advance(len(batch))
        return torch.cat(parts)

    def decode(self, latents: Mapping[float, Tensor]) -> dict[float, Tensor]:
        """uint8 [rows, 3, H, W] by strength."""
        self.model.rest()
        self.model.use("vae")
        images = {}
        try:
            for strength, part in latents.items():
                pieces = []
                for piece in torch.split(part, self.settings.batch_size):
                    self._stop_if_asked()
                    pieces.append(
                        decode_latents(self.model, piece, concessions=self.concessions, warn=self.progress.warn)
                    )
                images[strength] = torch.cat(pieces)
        finally:
            self.model.rest()
        return images

    def _stop_if_asked(self) -> None:
        if self.should_stop():
            raise Interrupted("Stopped; no grid was written", hint="the same command draws it")
