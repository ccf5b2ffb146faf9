"""Rebuild every asset of the small world from a seed: ``python -m craft_fast.tiny.build``.

Resumable: typed again after a kill, it goes on from its last checkpoint. On one data-centre GPU it takes some
minutes, on two CPU cores most of a day. The figures it prints are kept in ``assets/build.json``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
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
PARTS = ("model", "judges", "figures")
# What the shipped assets were made with.
STEPS = {"vae": 5000, "base": 15_000, "pictures": 300_000, "groups": 9000, "judges": 6000}
ASSETS = Path(__file__).parent / "assets"
Steps = Mapping[str, int]
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
            rates = {
                "oracle_alignment": share,
                "all_checks": (share > 0.999).float(),
                "oracle_clean": oracle.clean(pictures, plain),
                "oracle": oracle.passed(pictures, plain),
            }
            figures[f"{kind} guidance {guidance:g}"] = {name: round(float(v.mean()), 4) for name, v in rates.items()}
    return figures


def build_model(assets: Path, work: Path, *, seed: int, device: torch.device, steps: Steps, progress: Progress) -> None:
    """Write prompts, words, and the small SDXL."""
    train, heldout = prompt_sets(derive_seed(seed, "prompts"), TRAIN_PROMPTS, HELDOUT_PROMPTS)
    write_text(assets / "prompts" / "train.txt", "\n".join(train) + "\n")
    write_text(assets / "prompts" / "heldout.txt", "\n".join(heldout) + "\n")
    write_json(assets / "words.json", list(WORDS))
    words = WordTokens(assets / "sdxl")
    vae = pretrain.fit_vae(work, seed=seed, steps=steps["vae"], device=device, progress=progress)
    base = pretrain.fit_base(
        work, vae, words, seed=seed, steps=steps["base"], pictures=steps["pictures"], device=device, progress=progress
    )
    save_model(base, vae, words, assets / "sdxl")


def build(
    assets: Path,
    work: Path,
    *,
    seed: int,
    device: torch.device,
    steps: Steps,
    progress: Progress,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """Build the given parts; returns the log of figures, which is kept in ``assets/build.json``.

    Args:
        assets: where the assets go.
        work: where checkpoints of unfinished training lie.
        seed: of everything.
        device: where the networks are trained.
        steps: sizes of the work, keys as in ``STEPS``.
        progress: told what happens.
        parts: some of ``PARTS``; judges and figures need a model that is there.
    """
    for folder in (assets, work):
        folder.mkdir(parents=True, exist_ok=True)
    path = assets / "build.json"
    log: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    log |= {"seed": seed, "steps": dict(steps)}
    if "model" in parts:
        log["torch"] = torch.__version__
        log["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        build_model(assets, work, seed=seed, device=device, steps=steps, progress=progress)
    model = load_sdxl(assets / "sdxl", device=device, dtype=torch.float32)
    if "judges" in parts:
        # Judges of another model are none of this one's.
        judges = work / f"judges-{model.digest[:12]}"
        judges.mkdir(exist_ok=True)
        log["judges_agreement"] = build_judges(
            assets,
            judges,
            WordTokens(assets / "sdxl"),
            model,
            seed=seed,
            groups=steps["groups"],
            steps=steps["judges"],
            settings=GenerateSettings(),
            progress=progress,
        )
    if "figures" in parts:
        log["oracle"] = oracle_figures(seed, device)
        log["base"] = base_figures(model, seed)
        for kind, row in log["base"].items():
            progress.info(f"{kind}: {row}")
    write_json(path, log)
    return log


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the assets go")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="checkpoints of unfinished training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    for name, value in STEPS.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="steps, or how many")
    options = parser.parse_args()
    from craft_fast.tiny.console import Console

    log = build(
        options.assets,
        options.work,
        seed=options.seed,
        device=torch.device(options.device),
        steps={name: getattr(options, name) for name in STEPS},
        progress=Console(),
        parts=options.parts,
    )
    print(json.dumps(log, indent=1))


if __name__ == "__main__":
    main()
