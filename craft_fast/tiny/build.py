"""Rebuild every asset of the small world from a seed: ``python -m craft_fast.tiny.build``.

Resumable: typed again after a kill, it goes on from its last checkpoint. On one data-centre GPU it takes some
minutes, on two CPU cores most of a day. The figures it prints are kept in ``assets/build.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from craft_fast.quiet import quiet_third_party

quiet_third_party()

from craft_fast.config import GenerateSettings  # noqa: E402 - third parties are silenced first
from craft_fast.progress import Progress  # noqa: E402
from craft_fast.rng import derive_seed  # noqa: E402
from craft_fast.sdxl.load import load_sdxl  # noqa: E402
from craft_fast.store.atomic import write_json, write_text  # noqa: E402
from craft_fast.tiny import oracle, pretrain  # noqa: E402
from craft_fast.tiny.architecture import build_scheduler  # noqa: E402
from craft_fast.tiny.judges import build_judges, generate  # noqa: E402
from craft_fast.tiny.pictures import WordTokens, rich_words  # noqa: E402
from craft_fast.tiny.render import encode_scene, render, to_uint8  # noqa: E402
from craft_fast.tiny.world import BACKGROUNDS, WORDS, caption, mistaken, prompt_sets, random_scene  # noqa: E402

TRAIN_PROMPTS, HELDOUT_PROMPTS = 400, 1000
ASSETS = Path(__file__).parent / "assets"
GUIDANCES = (1.0, 2.0, 3.0, 4.0)


def save_model(base: pretrain.Base, vae: Any, words: WordTokens, folder: Path) -> None:
    """Save an ordinary diffusers SDXL folder, weights in float16."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    pipeline = StableDiffusionXLPipeline(
        vae=vae.half().cpu(), unet=base.unet.half().cpu(), text_encoder=base.text_encoder.half().cpu(),
        text_encoder_2=base.text_encoder_2.half().cpu(), tokenizer=words.tokenizer,
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"), scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=False, add_watermarker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


def oracle_figures(seed: int, device: torch.device, count: int = 2000) -> dict[str, float]:
    """How often the oracle is right on clean renderings: passes the true caption, fails a mistaken one."""
    rng = random.Random(derive_seed(seed, "oracle"))
    generator = torch.Generator(device).manual_seed(derive_seed(seed, "oracle", "pictures"))
    scenes = [random_scene(rng, name_background=0.4) for _ in range(count)]
    pictures = to_uint8(render(torch.tensor([encode_scene(s) for s in scenes], device=device), generator)[0])
    true = float(oracle.passed(pictures, [caption(s) for s in scenes]).mean())
    wrong = float(oracle.passed(pictures, [caption(mistaken(s, rng)) for s in scenes]).mean())
    return {"passes_true": true, "passes_mistaken": wrong, "right": (true + 1 - wrong) / 2}


def base_figures(model: Any, seed: int, count: int = 512) -> dict[str, Any]:
    """The base model on plain and on rich prompts, by guidance: checks met, all met, cleanliness, passed."""
    rng = random.Random(derive_seed(seed, "figures"))
    scenes = [random_scene(rng, name_background=0.3) for _ in range(count)]
    named = [s if s.background else replace(s, background=rng.choice(list(BACKGROUNDS))) for s in scenes]
    plain = [caption(s) for s in scenes]
    rich = [caption(s, rich_words(rng)) for s in named]
    figures: dict[str, Any] = {}
    for guidance in GUIDANCES:
        for kind, prompts in (("plain", plain), ("rich", rich)):
            settings = GenerateSettings(guidance_scale=guidance)
            generator = torch.Generator(model.device).manual_seed(derive_seed(seed, "figures", kind))
            pictures = generate(model, prompts, settings, generator, 512 if model.device.type == "cuda" else 64).to(
                model.device
            )
            share = oracle.alignment(pictures, plain)
            clean = oracle.clean(pictures, plain)
            figures[f"{kind} guidance {guidance:g}"] = {
                "oracle_alignment": round(float(share.mean()), 4), "all_checks": round(float((share > 0.999).float().mean()), 4),
                "oracle_clean": round(float(clean.mean()), 4), "oracle": round(float(oracle.passed(pictures, plain).mean()), 4),
            }  # fmt: skip
    return figures


def _judge(
    assets: Path,
    work: Path,
    words: WordTokens,
    *,
    seed: int,
    device: torch.device,
    steps: dict[str, int],
    progress: Progress,
) -> dict[str, Any]:
    model = load_sdxl(assets / "sdxl", device=device, dtype=torch.float32)
    figures = base_figures(model, seed)
    for kind, row in figures.items():
        progress.info(f"{kind}: {row}")
    agreement = build_judges(
        assets,
        work,
        words,
        model,
        seed=seed,
        groups=steps["groups"],
        steps=steps["judges"],
        settings=GenerateSettings(),
        progress=progress,
    )
    return {"base": figures, "judges_agreement": agreement}


def build(
    assets: Path,
    work: Path,
    *,
    seed: int,
    device: torch.device,
    steps: dict[str, int],
    progress: Progress,
    judges_only: bool = False,
) -> dict[str, Any]:
    """Build all assets; returns and saves the log of figures."""
    started = time.monotonic()
    for folder in (assets, work):
        folder.mkdir(parents=True, exist_ok=True)
    if judges_only:
        log = (
            json.loads((assets / "build.json").read_text(encoding="utf-8")) if (assets / "build.json").exists() else {}
        )
        words = WordTokens(assets / "sdxl")
        log |= _judge(assets, work, words, seed=seed, device=device, steps=steps, progress=progress)
        write_json(assets / "build.json", log)
        return log
    log: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    train, heldout = prompt_sets(derive_seed(seed, "prompts"), TRAIN_PROMPTS, HELDOUT_PROMPTS)
    write_text(assets / "prompts" / "train.txt", "\n".join(train) + "\n")
    write_text(assets / "prompts" / "heldout.txt", "\n".join(heldout) + "\n")
    write_json(assets / "words.json", list(WORDS))
    words = WordTokens(assets / "sdxl")
    log["oracle"] = oracle_figures(seed, device)
    vae = pretrain.fit_vae(work, seed=seed, steps=steps["vae"], device=device, progress=progress)
    base = pretrain.fit_base(
        work, vae, words, seed=seed, steps=steps["base"], pictures=steps["pictures"], device=device, progress=progress
    )
    save_model(base, vae, words, assets / "sdxl")
    log |= _judge(assets, work, words, seed=seed, device=device, steps=steps, progress=progress)
    log["seconds"] = round(time.monotonic() - started)
    write_json(assets / "build.json", log)
    return log


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--base-steps", type=int, default=20000)
    parser.add_argument("--pictures", type=int, default=300_000)
    parser.add_argument("--groups", type=int, default=12_000)
    parser.add_argument("--judge-steps", type=int, default=6000)
    parser.add_argument("--judges-only", action="store_true", help="train the judges again, on the model that is there")
    options = parser.parse_args()
    steps = {
        "vae": options.vae_steps,
        "base": options.base_steps,
        "pictures": options.pictures,
        "groups": options.groups,
        "judges": options.judge_steps,
    }
    from craft_fast.tiny.console import Console

    log = build(
        options.assets,
        options.work,
        seed=options.seed,
        device=torch.device(options.device),
        steps=steps,
        progress=Console(),
        judges_only=options.judges_only,
    )
    print(json.dumps(log, indent=1))


if __name__ == "__main__":
    main()
