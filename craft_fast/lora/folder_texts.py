"""What a model's folder holds beside its weights: configurations, tokenizers, noise schedule, licence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from craft_fast.lora.layouts import ADAPTED, WeightFile
from craft_fast.sdxl.identify import PARTS
from craft_fast.sdxl.prediction import Prediction, make_scheduler
from craft_fast.sdxl.source import FolderPart, Source

_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_TEXT_CLASSES = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
Text = tuple[Path, bytes]


def folder_texts(source: Source, files: Sequence[WeightFile], prediction: Callable[[], Prediction]) -> list[Text]:
    """Configurations, tokenizers and licence: path below the folder, and content."""
    if isinstance(source.main, FolderPart):
        return _folder_texts(source, {file.path.as_posix() for file in files})
    main = source.main
    scheduler = make_scheduler(source.scheduler_config(), prediction(), main.path)
    texts = [
        _json(Path("model_index.json"), _index(source, type(scheduler).__name__)),
        (Path("scheduler/scheduler_config.json"), scheduler.to_json_string().encode()),
    ]
    for part in (*ADAPTED, "vae"):
        config = source.of(part).config(part)
        about = (
            {"_class_name": _CLASSES[part]}
            if part in _CLASSES
            else {"architectures": [_TEXT_CLASSES[part]], "model_type": "clip_text_model"}
        )
        texts.append(_json(Path(part) / "config.json", {**about, **config}))
    for name in ("tokenizer", "tokenizer_2"):
        texts += [(Path(name) / file.name, file.read_bytes()) for file in _small_files(source.texts / name)]
    return texts


def _folder_texts(source: Source, weights: set[str]) -> list[Text]:
    root = source.path
    texts = [(Path(file.name), file.read_bytes()) for file in _small_files(root)]
    for part in PARTS:
        place = source.of(part) if part == "vae" else source.main
        folder = place.folder(part) if isinstance(place, FolderPart) else None
        if folder is None:
            texts.append(_json(Path("vae/config.json"), {"_class_name": _CLASSES["vae"], **place.config("vae")}))
            continue
        for file in _small_files(folder):
            if ".index." not in file.name or _is_of(file, part, weights):
                texts.append((Path(part) / file.name, file.read_bytes()))
    return texts


def _small_files(folder: Path) -> list[Path]:
    found = (file for file in folder.iterdir() if file.is_file())
    return sorted(file for file in found if file.suffix in (".json", ".txt", ".md") or file.name.startswith("LICENSE"))


def _is_of(index: Path, part: str, weights: set[str]) -> bool:
    """Whether a list of shards is that of the files that are written, not of a variant that is left out."""
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return False
    return {f"{part}/{name}" for name in named} <= weights


def _index(source: Source, scheduler: str) -> dict[str, Any]:
    """What ``StableDiffusionXLPipeline.from_pretrained`` reads first."""
    return {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": source.force_zeros(),
        "scheduler": ["diffusers", scheduler],
        **{part: ["transformers", name] for part, name in _TEXT_CLASSES.items()},
        **{name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")},
        **{part: ["diffusers", name] for part, name in _CLASSES.items()},
    }


def _json(path: Path, value: Mapping[str, Any]) -> Text:
    return path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
