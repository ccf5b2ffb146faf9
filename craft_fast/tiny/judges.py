"""Training of the small reward networks on preferences that the world can compute.

Each judge sees pairs of pictures of one prompt, or of one picture under two prompts, and learns which one the world
prefers (Bradley-Terry), from labels of which some are wrong. The judges weigh alignment and cleanliness differently,
as the published ones do; none of them is the oracle.

Shapes: G groups (a prompt and a mistaken version of it), V = 6 pictures a group, B pairs.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_fast.config import GenerateSettings
from craft_fast.progress import Progress
from craft_fast.rng import derive_seed
from craft_fast.sdxl.load import SdxlModel
from craft_fast.sdxl.sampling import sample_latents
from craft_fast.sdxl.text import encode_prompts
from craft_fast.sdxl.vae import decode_latents
from craft_fast.store.atomic import write_json
from craft_fast.tiny.architecture import build_aesthetic_reward, build_clip_reward, build_image_reward
from craft_fast.tiny.fitting import Batch, Fitter
from craft_fast.tiny.oracle import checks_met, look
from craft_fast.tiny.pictures import WordTokens, rich_words
from craft_fast.tiny.pretrain import draw_pictures
from craft_fast.tiny.render import encode_scene, to_uint8
from craft_fast.tiny.world import BACKGROUNDS, caption, mistaken, random_scene

WRONG_LABELS = 0.05
# Share of alignment in what each judge prefers; the rest is cleanliness.
ALIGNMENT_SHARE = {"h": 0.6, "p": 0.8, "a": 0.0, "image_reward": 0.7}
_MIN_GAP = 0.05


@dataclass
class Preferences:
    """Pictures uint8 [G, 6, 3, 64, 64], token ids [G, 2, T], alignment [G, 6, 2] and cleanliness [G, 6], 0 to 1."""

    pictures: Tensor
    ids: Tensor
    alignment: Tensor
    clean: Tensor

    def utility(self, alignment_share: float) -> Tensor:
        """What the world prefers, [G, 6, 2]."""
        return alignment_share * self.alignment + (1 - alignment_share) * self.clean[:, :, None]

    def part(self, start: int, stop: int | None) -> Preferences:
        """Groups ``start`` to ``stop``."""
        keep = slice(start, stop)
        return Preferences(self.pictures[keep], self.ids[keep], self.alignment[keep], self.clean[keep])


def generate(
    model: SdxlModel, prompts: list[str], settings: GenerateSettings, generator: torch.Generator, batch: int
) -> Tensor:
    """Pictures uint8 [N, 3, 64, 64] of N prompts."""
    negative = encode_prompts(model, [settings.negative_prompt])
    parts = []
    for start in range(0, len(prompts), batch):
        texts = prompts[start : start + batch]
        noise = torch.randn(len(texts), 4, 16, 16, generator=generator, device=generator.device)
        latents = sample_latents(model, encode_prompts(model, texts), negative, noise, settings=settings)
        parts.append(decode_latents(model, latents))
    return torch.cat(parts)


def collect(
    model: SdxlModel, words: WordTokens, *, groups: int, seed: int, settings: GenerateSettings, progress: Progress
) -> Preferences:
    """Make G groups: two pictures from the plain prompt, one from a rich one, three drawn by the world, some wrong."""
    rng = random.Random(derive_seed(seed, "judges"))
    device = model.device
    generator = torch.Generator(device).manual_seed(derive_seed(seed, "judges", "pictures"))
    scenes = [random_scene(rng, name_background=0.3) for _ in range(groups)]
    wrong = [mistaken(scene, rng) for scene in scenes]
    rich = [s if s.background else replace(s, background=rng.choice(list(BACKGROUNDS))) for s in scenes]
    sources = [[caption(s) for s in scenes]] * 2 + [[caption(s, rich_words(rng)) for s in rich]]
    batch = 512 if device.type == "cuda" else 64
    columns = []
    with progress.task("pictures for the judges", 6 * groups, "images") as task:
        for texts in sources:
            columns.append(generate(model, texts, settings, generator, batch).to(device))
            task.advance(groups)
        for drawn in (scenes, scenes, wrong):
            codes = torch.tensor([encode_scene(scene) for scene in drawn], device=device)
            flaws = torch.rand(groups, 3, generator=generator, device=device) < 0.25
            columns.append(to_uint8((draw_pictures(codes, flaws, generator) + 1) * 127.5))
            task.advance(groups)
    pictures = torch.stack([column.cpu() for column in columns], 1)
    codes = torch.tensor(
        [[encode_scene(s), encode_scene(w)] for s, w in zip(scenes, wrong, strict=True)], device=device
    )
    alignment, clean = [], []
    for start in range(0, groups, 256):
        part = pictures[start : start + 256].to(device)
        found = look(part.flatten(0, 1))
        for which in range(2):
            met, made = checks_met(found, codes[start : start + 256, which].repeat_interleave(6, 0))
            share = met / made
            alignment.append((0.5 * share + 0.5 * (share > 0.999)).reshape(-1, 6))
        clean.append(found.clean.reshape(-1, 6))
    both = torch.stack([torch.cat(alignment[0::2]), torch.cat(alignment[1::2])], 2)
    ids = torch.stack([words.encode([caption(s) for s in scenes]), words.encode([caption(w) for w in wrong])], 1)
    return Preferences(pictures.to(device), ids.to(device), both, torch.cat(clean))


def normalise(pictures: Tensor) -> Tensor:
    """uint8 pictures to the judges' pixel values, mean 0.5 and std 0.5."""
    return pictures.float() / 127.5 - 1


def _pairs(prefs: Preferences, utility: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Draw pairs (group, picture, text) x 2; three in four of two pictures, one of two texts; and the winner's sign."""
    groups = utility.shape[0]
    device = utility.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device)

    group, first, text = draw(groups), draw(6), draw(2)
    text = torch.where(draw(4) == 0, text, 0)
    second = (first + 1 + draw(5)) % 6
    by_text = draw(4) == 0
    second, text_2 = torch.where(by_text, first, second), torch.where(by_text, 1 - text, text)
    gap = utility[group, first, text] - utility[group, second, text_2]
    return group, first, text, second, text_2, gap


def fit_judge(
    name: str,
    network: nn.Module,
    score: Callable[[Tensor, Tensor], Tensor],
    prefs: Preferences,
    work: Path,
    *,
    seed: int,
    steps: int,
    progress: Progress,
    batch: int = 512,
) -> None:
    """Train one judge: -log sigmoid(sign * (score_1 - score_2)) on pairs with a clear winner."""
    utility = prefs.utility(ALIGNMENT_SHARE[name])

    def draw(step: int) -> Batch:
        generator = torch.Generator(utility.device).manual_seed(derive_seed(seed, "judge", name, step))
        group, first, text, second, text_2, gap = _pairs(prefs, utility, batch, generator)
        sign = torch.where(
            torch.rand(batch, generator=generator, device=gap.device) < WRONG_LABELS, -gap.sign(), gap.sign()
        )
        weight = (gap.abs() >= _MIN_GAP).float()
        pictures = torch.cat([prefs.pictures[group, first], prefs.pictures[group, second]])
        return pictures, torch.cat([prefs.ids[group, text], prefs.ids[group, text_2]]), sign, weight

    def loss(pictures: Tensor, ids: Tensor, sign: Tensor, weight: Tensor) -> Tensor:
        first, second = score(normalise(pictures), ids).float().chunk(2)
        return (F.softplus(-sign * (first - second)) * weight).sum() / weight.sum().clamp(min=1)

    network.train()
    Fitter(network, loss, draw, rate=1e-3).fit(steps, work / f"judge-{name}.safetensors", progress, f"judge {name}")
    network.eval().requires_grad_(False)


def agreement(
    name: str, score: Callable[[Tensor, Tensor], Tensor], prefs: Preferences, *, seed: int, pairs: int = 8192
) -> float:
    """Share of held-out pairs of pictures of one prompt on which a judge agrees with the world's ranking."""
    utility = prefs.utility(ALIGNMENT_SHARE[name])
    generator = torch.Generator(utility.device).manual_seed(derive_seed(seed, "agreement", name))
    group, first, _, second, _, _ = _pairs(prefs, utility, pairs, generator)
    gap = utility[group, first, 0] - utility[group, second, 0]
    keep = gap.abs() >= _MIN_GAP
    right = 0
    with torch.no_grad():
        for part in keep.nonzero().flatten().split(512):
            ids = prefs.ids[group[part], 0]
            one, two = (score(normalise(prefs.pictures[group[part], which[part]]), ids) for which in (first, second))
            right += int(((one - two).sign() == gap[part].sign()).sum())
    return right / int(keep.sum())


def build_judges(
    assets: Path,
    work: Path,
    words: WordTokens,
    model: SdxlModel,
    *,
    seed: int,
    groups: int,
    steps: int,
    settings: GenerateSettings,
    progress: Progress,
) -> dict[str, float]:
    """Train and save all four judges; returns each one's agreement with the world on held-out pairs."""
    held_out = max(64, groups // 10)
    prefs = collect(model, words, groups=groups + held_out, seed=seed, settings=settings, progress=progress)
    train, test = prefs.part(0, groups), prefs.part(groups, None)
    figures: dict[str, float] = {}
    for name in ALIGNMENT_SHARE:
        torch.manual_seed(derive_seed(seed, "judge", name))
        network: Any = {"a": build_aesthetic_reward}.get(
            name,
            lambda name=name: (build_image_reward if name == "image_reward" else build_clip_reward)(words.vocab_size),
        )()
        network.to(model.device)
        clip_scale: Tensor | None = network.clip.logit_scale if name in ("h", "p") else None

        def score(
            pixels: Tensor, ids: Tensor, network: Any = network, clip_scale: Tensor | None = clip_scale
        ) -> Tensor:
            # The end token pads too, so everything up to the first one is text.
            mask = (torch.cumsum(ids == words.vocab_size - 1, 1) <= 1).long()
            raw: Tensor = network(pixels, ids, mask)
            return raw if clip_scale is None else raw * clip_scale.exp()

        # Cleanliness needs no text and is learnt in a third of the steps.
        fit_judge(
            name, network, score, train, work, seed=seed, steps=steps // 3 if name == "a" else steps, progress=progress
        )
        figures[name] = agreement(name, score, test, seed=seed)
        progress.info(f"judge {name} agrees with the world on {100 * figures[name]:.1f} % of held-out pairs")
        _save(
            assets / "rewards" / name,
            name,
            network,
            score,
            test,
            words,
            float(clip_scale.exp()) if name == "p" and clip_scale is not None else 1.0,
        )
    return figures


def _save(
    folder: Path,
    name: str,
    network: Any,
    score: Callable[[Tensor, Tensor], Tensor],
    test: Preferences,
    words: WordTokens,
    scale: float,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {
        "family": {"a": "aesthetic", "image_reward": "image_reward"}.get(name, "clip"),
        "image_size": 64, "resize": "none", "mean": [0.5] * 3, "std": [0.5] * 3, "max_tokens": 32,
    }  # fmt: skip
    if info["family"] == "clip":
        info["score_scale"] = round(scale, 4)
    if name == "image_reward":
        with torch.no_grad():
            values = torch.cat([score(normalise(test.pictures[:, i]), test.ids[:, 0]) for i in range(6)])
        info |= {"score_mean": round(float(values.mean()), 5), "score_std": round(float(values.std()), 5)}
    network.half().save_folder(folder)
    network.float()
    if name != "a":
        words.tokenizer.save_pretrained(folder)
    write_json(folder / "reward.json", info)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {k: v for k, v in config.items() if k not in ("transformers_version", "dtype")})
    assert math.isfinite(scale)
