"""Each reward the way its authors' page shows it: what ``parity`` holds the native networks against.

One picture and one prompt at a time, through transformers' own CLIPModel, CLIPImageProcessorPil and CLIPTokenizer, or
the bare equation, in float32. Nothing here is shared with ``networks``, ``keys``, ``pixels`` and ``texts``, so that an
error there shows. hpsv2 and image-reward are held against their own packages instead.

Shapes: H, W picture, S the network's image side in pixels, P image tokens, T prompt tokens, D embedding.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from craft_fast.errors import ConfigError, IntegrityError
from craft_fast.quiet import quiet_progress_bars, quiet_third_party
from craft_fast.rewards.base import Preprocessing

if TYPE_CHECKING:
    from pathlib import Path

    from craft_fast.rewards.loaders import RewardSource


class Plain:
    """A reward as its page shows it; the text is taken as it comes, so prompts should be ordinary ones.

    Args:
        source: its files; ``config`` must be among them.
        device: to compute on.

    Raises:
        ConfigError: of this family there is no plain form.
        IntegrityError: the files lack tensors.
    """

    def __init__(self, source: RewardSource, device: torch.device) -> None:
        quiet_third_party()
        self.spec = source.spec
        self.device = device
        tensors = _tensors(source.files["weights"])
        config = _config(source)
        if self.spec.family == "mps":
            self.cross = _cross(tensors)
            tensors = {name.removeprefix("mps.model."): value for name, value in tensors.items()}
            tensors = {name.removeprefix("clip."): value for name, value in tensors.items()}
        elif self.spec.family == "aesthetic":
            head = _tensors(source.files["head"])
            self.head = [(head[f"layers.{i}.weight"], head[f"layers.{i}.bias"]) for i in (0, 2, 4, 6, 7)]
        elif self.spec.family != "clip":
            raise ConfigError(f"There is no plain form of the family {self.spec.family}.", where=source.origin)
        self.model = _model(self.spec, config, tensors, source).to(device)
        self.tokenizer = _tokenizer(source.tokenizer) if source.tokenizer is not None else None

    @torch.no_grad()
    def score(self, picture: Tensor, prompt: str) -> float:
        """Score of a picture uint8 [3, H, W] on the CPU and a prompt, in the published unit."""
        pixels = plain_pixels(picture, self.spec).to(self.device)
        if self.spec.family == "aesthetic":
            found = self._aesthetic(pixels)
        elif self.spec.family == "mps":
            found = self._mps(pixels, prompt)
        else:
            out = self.model(**self._tokens(self.spec.prefix + prompt), pixel_values=pixels)
            found = (out.image_embeds * out.text_embeds).sum()
        scale = self.spec.score_scale
        score = float(found) * (float(self.model.logit_scale.exp()) if scale == "logit_scale" else float(scale))
        if self.spec.score_floor is not None:
            score = max(score, self.spec.score_floor)
        return (score - self.spec.score_mean) / self.spec.score_std

    def _tokens(self, text: str) -> dict[str, Tensor]:
        assert self.tokenizer is not None
        length = self.spec.max_tokens
        found = self.tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {name: found[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def _aesthetic(self, pixels: Tensor) -> Tensor:
        """Five linear maps of the unit embedding, no activations (christophschuhmann/improved-aesthetic-predictor)."""
        state = F.normalize(self.model(pixel_values=pixels).image_embeds, dim=-1)
        for weight, bias in self.head:
            state = state @ weight.to(self.device).T + bias.to(self.device)
        return state.squeeze()

    def _mps(self, pixels: Tensor, prompt: str) -> Tensor:
        """Cosine of the text and of the picture's first token after it has looked at the words that matter."""
        clip = self.model
        text = clip.text_model(input_ids=self._tokens(prompt)["input_ids"])
        words = clip.text_projection(text.last_hidden_state)[0]
        wish = clip.text_model(input_ids=self._tokens(self.spec.condition)["input_ids"]).last_hidden_state
        likeness = (words @ clip.text_projection(wish)[0].T).max(dim=-1).values
        words = words[likeness / likeness.max() > self.spec.threshold]
        states = clip.visual_projection(clip.vision_model(pixel_values=pixels).last_hidden_state)[0]
        for layer in self.cross:
            states = _look_at_itself(_look_at_words(states, words, layer), layer)
        return F.cosine_similarity(states[0], clip.text_projection(text.pooler_output)[0], dim=0)


def plain_pixels(picture: Tensor, spec: Preprocessing) -> Tensor:
    """A picture uint8 [3, H, W] to pixels float32 [1, 3, S, S], normalised, through PIL or transformers' processor."""
    side = spec.image_size
    image = Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).numpy()))
    if spec.fit == "crop" and spec.crop_rounding == "floor" and spec.resize == "bicubic":
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        processor = CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=list(spec.mean),
            image_std=list(spec.std),
        )  # fmt: skip
        found: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return found
    width, height = image.size
    if spec.resize == "bicubic" and spec.fit == "crop":
        short = min(width, height)
        image = image.resize((int(side * width / short), int(side * height / short)), Image.Resampling.BICUBIC)
        left, top = (round((size - side) / 2.0) for size in image.size)
        image = image.crop((left, top, left + side, top + side))
    elif spec.resize == "bicubic" and spec.fit == "stretch":
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    if spec.resize == "bicubic" and spec.fit == "pad":
        pixels = _padded(pixels, side, spec.antialias)
    return (pixels - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)


def _padded(pixels: Tensor, side: int, antialias: bool) -> Tensor:
    height, width = pixels.shape[2:]
    scale = side / max(height, width)
    size = (round(height * scale), round(width * scale))
    if size != (height, width):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=antialias, align_corners=False)
    down, right = side - size[0], side - size[1]
    return F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))


def _look_at_words(states: Tensor, words: Tensor, layer: dict[str, Tensor]) -> Tensor:
    """Image tokens [P, D] attend to words [T, D]; a SwiGLU feed-forward beside it, both of the same normed states."""
    normed = _norm(states, layer, "0.fn.norm")
    key, value = (words @ layer["0.fn.to_kv.weight"].T).chunk(2, dim=-1)
    query = normed @ layer["0.fn.to_q.weight"].T
    seen = _attend(query, key, value) @ layer["0.fn.to_out.weight"].T
    return states + seen + _swiglu(normed @ layer["0.fn.ff.0.weight"].T) @ layer["0.fn.ff.2.weight"].T


def _look_at_itself(states: Tensor, layer: dict[str, Tensor]) -> Tensor:
    """Image tokens [P, D] attend to one another with rotary positions; keys and values are of one head."""
    out = layer["1.fn.attn_out.weight"]
    inner = layer["1.fn.ff_out.1.weight"].shape[1]
    made = _norm(states, layer, "1.fn.norm") @ layer["1.fn.fused_attn_ff_proj.weight"].T
    size = (made.shape[1] - out.shape[1] - 2 * inner) // 2
    query, key, value, wide = made.split([out.shape[1], size, size, 2 * inner], dim=-1)
    query = torch.cat([_turned(part) for part in query.split(size, dim=-1)], dim=-1)
    return states + _attend(query, _turned(key), value) @ out.T + _swiglu(wide) @ layer["1.fn.ff_out.1.weight"].T


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads one after another: [P, heads * d] over keys and values [T, d] that all heads share."""
    heads = query.split(key.shape[1], dim=-1)
    seen = [(head @ key.T / key.shape[1] ** 0.5).softmax(dim=-1) @ value for head in heads]
    return torch.cat(seen, dim=-1)


def _turned(rows: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): the pair (i, i + d/2) turns by position * 10000 ** (-2 i / d)."""
    half = rows.shape[1] // 2
    speed = 10000.0 ** (-torch.arange(half, device=rows.device) / half)
    turn = torch.polar(torch.ones(1, device=rows.device), torch.arange(len(rows), device=rows.device)[:, None] * speed)
    made = torch.complex(rows[:, :half], rows[:, half:]) * turn
    return torch.cat([made.real, made.imag], dim=-1)


def _swiglu(wide: Tensor) -> Tensor:
    value, gate = wide.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * value


def _norm(states: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(states, states.shape[-1:], layer[f"{name}.weight"], layer.get(f"{name}.bias"))


def _cross(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The layers between text and picture, by the names of RE-N-Y/mpsv1; ours, of a saved folder, are put back."""
    back = (
        ("cross.", "mps.cross_model."), (".attend.ff_in", ".0.fn.ff.0"), (".attend.ff_out", ".0.fn.ff.2"),
        (".attend.", ".0.fn."), (".block.fused", ".1.fn.fused_attn_ff_proj"), (".block.ff_out", ".1.fn.ff_out.1"),
        (".block.", ".1.fn."),
    )  # fmt: skip
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("cross."):
            for ours, theirs in back:
                name = name.replace(ours, theirs)
        if name.startswith("mps.cross_model.layers."):
            number, _, rest = name.removeprefix("mps.cross_model.layers.").partition(".")
            layers.setdefault(int(number), {})[rest] = value
    return [layers[number] for number in sorted(layers)]


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from craft_fast.store.safe_load import load_safetensors

        found = load_safetensors(path)
    else:
        from craft_fast.store.official import read_official

        found = read_official(path)
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def _config(source: RewardSource) -> dict[str, Any]:
    if "config" not in source.files:
        from craft_fast.rewards import published

        # The one official file without its config.json is MPS's.
        return dict(published.MPS) if source.spec.family == "mps" else dict(published.CLIP_VIT_L)
    found: dict[str, Any] = json.loads(source.files["config"].read_text(encoding="utf-8"))
    return found


def _model(spec: Preprocessing, config: dict[str, Any], tensors: dict[str, Tensor], source: RewardSource) -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    quiet_progress_bars()
    with torch.device("meta"):
        if spec.family == "aesthetic":
            sizes = config.get("vision_config", config)
            width = config["projection_dim"] if "vision_config" in config else sizes["projection_dim"]
            model: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**sizes, "projection_dim": width}))
        else:
            model = CLIPModel(CLIPConfig(**config.get("clip", config)))
    wanted = model.state_dict().keys()
    missing = sorted(wanted - tensors.keys())
    if missing:
        raise IntegrityError("A reward's weights lack tensors.", where=source.origin, why=f"such as {missing[:5]}")
    model.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:  # position ids, which no file holds
                module.register_buffer(name, torch.arange(buffer.shape[-1])[None], persistent=False)
    return model.eval().requires_grad_(False)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, CLIPTokenizer

    whole = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    kind = AutoTokenizer if whole else CLIPTokenizer
    tokenizer = kind.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
