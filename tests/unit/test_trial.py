"""A LoRA at several strengths: what is drawn, that text encoders take part, and the sheet."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from craft_fast import rng
from craft_fast.config import ModelSettings
from craft_fast.errors import EnvironmentProblem, IntegrityError, Interrupted, UsageError
from craft_fast.lora.adapter import Adapter, LoraLayer
from craft_fast.lora.writing import diffusers_tensors, kohya_tensors
from craft_fast.prompt_lines import prompt_id
from craft_fast.sdxl.drawing import draw
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.text import encode_prompts
from craft_fast.sdxl.tuned_text import tuned_text
from craft_fast.sdxl.unet import is_pristine
from craft_fast.store import atomic
from craft_fast.trial import Picture, Trial, check_strengths, clean_prompts, draw_trial, fitting_adapter
from craft_fast.trial.sheet import (
    check_target,
    draw_sheet,
    lay_out,
    shown_text,
    wrap,
    write_each,
    write_sheet,
)
from tests.unit.evaluations import GENERATE
from tests.unit.hostile_prompts import CHOSEN
from tests.unit.small_adapters import layer

PROMPTS = ["a red star", "two blue hearts"]
TEXT_LAYERS = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc1", "encoder.layers.1.self_attn.out_proj")


@pytest.fixture(scope="module")
def adapter(sdxl: SdxlModel) -> Adapter:
    """Layers of all three networks; those of the text encoders have three alphas, none of them the rank."""
    layers: dict[str, LoraLayer] = {}
    parts = {"text_encoder": sdxl.text_encoder, "text_encoder_2": sdxl.text_encoder_2, "unet": sdxl.unet}
    for part, network in parts.items():
        for name, module in network.named_modules():
            plain = name.removeprefix("text_model.")
            if part != "unet" and plain in TEXT_LAYERS:
                alpha = (2.0, 8.0, 1.0)[TEXT_LAYERS.index(plain)]
                layers[f"{part}.text_model.{plain}"] = layer(module.weight.shape, 4, len(layers), alpha=alpha)
            elif part == "unet" and name.endswith("attn2.to_k"):
                layers[f"unet.{name}"] = layer(module.weight.shape, 4, len(layers), alpha=40.0)
    assert len(layers) > 6
    return Adapter(layers)


@pytest.fixture(scope="module")
def files(adapter: Adapter, sdxl: SdxlModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    config: Any = dict(sdxl.unet_config)
    texts = {name: layer for name, layer in adapter.layers.items() if not name.startswith("unet.")}
    unet = {name: layer for name, layer in adapter.layers.items() if name.startswith("unet.")}
    still = {name: LoraLayer(one.down, torch.zeros_like(one.up), one.alpha) for name, one in unet.items()}
    contents = {"kohya": adapter, "diffusers": adapter, "texts": Adapter(texts), "still": Adapter(still)}
    for name, content in contents.items():
        # Not write_adapter, whose check knows SDXL's text encoders alone, not these small ones.
        tensors, header = (kohya_tensors(content, config), {}) if name != "diffusers" else diffusers_tensors(content)
        atomic.write_safetensors(folder / f"{name}.safetensors", tensors, header)
    return {name: folder / f"{name}.safetensors" for name in contents}


def trial(model: SdxlModel, lora: Path, *strengths: float, **changes: Any) -> Trial:
    options: dict[str, Any] = {"seeds": [0, 1], "settings": GENERATE, **changes}
    return draw_trial(model, lora, PROMPTS, strengths=strengths, **options)


def shas(found: Trial, strength: float) -> list[str]:
    return [one.sha256 for one in found.pictures if one.strength == strength]


# ---- text encoders


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_text_layers_are_added_with_their_own_scale(
    form: str, adapter: Adapter, files: dict[str, Path], sdxl: SdxlModel, sdxl_folder: Path
) -> None:
    before = encode_prompts(sdxl, PROMPTS)
    merged = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    for name, one in adapter.layers.items():
        part, _, module = name.partition(".")
        if part != "unet":
            network = getattr(merged, part)
            names = {found.removeprefix("text_model."): layer for found, layer in network.named_modules()}
            names[module.removeprefix("text_model.")].weight += 0.7 * one.delta()
    wanted = encode_prompts(merged, PROMPTS)
    with tuned_text(sdxl, files[form]) as set_strength:
        assert set_strength is not None
        set_strength(0.7)
        found = encode_prompts(sdxl, PROMPTS)
    for got, want, base in (
        (found.prompt_embeds, wanted.prompt_embeds, before.prompt_embeds),
        (found.pooled_prompt_embeds, wanted.pooled_prompt_embeds, before.pooled_prompt_embeds),
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert float((want - base).abs().max()) > 1e-2
    after = encode_prompts(sdxl, PROMPTS)
    assert torch.equal(after.prompt_embeds, before.prompt_embeds)


def test_a_lora_of_the_unet_leaves_the_encoders_alone(files: dict[str, Path], sdxl: SdxlModel) -> None:
    encoder = sdxl.text_encoder
    with tuned_text(sdxl, files["still"]) as set_strength:
        assert set_strength is None
    assert sdxl.text_encoder is encoder


# ---- pictures


def test_strengths_share_noise_and_nothing_else(files: dict[str, Path], sdxl: SdxlModel) -> None:
    found = trial(sdxl, files["kohya"], 0.0, 1.0, -1.0)
    seeds = [rng.derive_seed(seed, "evaluate", prompt_id(text)) for text in PROMPTS for seed in (0, 1)]
    base = draw(sdxl, [text for text in PROMPTS for _ in (0, 1)], seeds, settings=GENERATE)
    images = [one.image for one in found.pictures if one.strength == 0]
    assert torch.equal(torch.stack(images), base.images)
    assert len({one.sha256 for one in found.pictures}) == 12
    moved = [found.moved(strength) for strength in (0.0, 1.0, -1.0)]
    assert moved[0] == 0.0
    by_hand = [
        float((one.image.double() - two.image.double()).abs().mean())
        for one, two in zip(found.pictures[1::3], found.pictures[::3], strict=True)
    ]
    assert moved[1] == pytest.approx(sum(by_hand) / 4)
    assert moved[1] != moved[2]
    assert is_pristine(sdxl.unet)
    # Whatever the order, and in the other format.
    again = trial(sdxl, files["diffusers"], 1.0, 0.0)
    assert [shas(again, strength) for strength in (0.0, 1.0)] == [shas(found, strength) for strength in (0.0, 1.0)]
    assert trial(sdxl, files["kohya"], 1.0).moved(1.0) is None


def test_parts_that_do_not_stay_are_each_read_once(
    files: dict[str, Path], sdxl: SdxlModel, apart: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    together: list[tuple[str, ...]] = []
    load: Callable[..., Any] = apart.source.load

    def counted(part: str, *args: Any) -> Any:
        loaded.append(part)
        together.append((*apart.loaded, part))
        return load(part, *args)

    monkeypatch.setattr(type(apart.source), "load", lambda self, part, *args: counted(part, *args))
    found = trial(apart, files["kohya"], 0.0, 0.5, 1.0)
    assert loaded == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert together[2:] == [("unet",), ("vae",)]
    assert apart.loaded == ()
    monkeypatch.undo()
    assert shas(found, 1.0) == shas(trial(sdxl, files["kohya"], 1.0), 1.0)


def test_a_lora_of_the_text_encoders_alone_moves_pictures(files: dict[str, Path], sdxl: SdxlModel) -> None:
    moved = trial(sdxl, files["texts"], 0.0, 1.0).moved(1.0)
    assert moved is not None
    assert moved > 0


def test_a_lora_that_does_nothing_is_seen_in_the_number(files: dict[str, Path], sdxl: SdxlModel) -> None:
    assert trial(sdxl, files["still"], 0.0, 1.0).moved(1.0) == 0.0


def test_stopping_leaves_a_clean_model(files: dict[str, Path], sdxl: SdxlModel) -> None:
    asked: list[None] = []

    def stop() -> bool:
        asked.append(None)
        return len(asked) > 3  # in the tuned UNet's second batch

    with pytest.raises(Interrupted):
        trial(sdxl, files["still"], 0.0, 1.0, should_stop=stop, settings=GENERATE.model_copy(update={"batch_size": 2}))
    assert is_pristine(sdxl.unet)


# ---- what is asked


def test_prompts_are_cleaned_as_those_of_a_file() -> None:
    assert clean_prompts([" a  red\tstar ", "a red star", "b"]) == ["a red star", "b"]
    for bad in ("", " \n ", "a\x1b[31m", "a\udc80", "a \u202e b", "x" * 2001):
        with pytest.raises(UsageError):
            clean_prompts([bad])


def test_strengths_are_numbers() -> None:
    assert check_strengths([1.0, -0.0, 0.0, 1.0, -2.5]) == [1.0, 0.0, -2.5]
    for bad in (float("nan"), float("inf"), -float("inf"), 1e9):
        with pytest.raises(UsageError):
            check_strengths([bad])


def test_the_adapter_must_fit(files: dict[str, Path], sdxl_folder: Path, tmp_path: Path) -> None:
    model = ModelSettings(path=str(sdxl_folder))
    assert len(fitting_adapter(files["kohya"], model).layers) > 6
    with pytest.raises(EnvironmentProblem):
        fitting_adapter(tmp_path / "no.safetensors", model)
    (tmp_path / "bad.safetensors").write_bytes(b"\x80\x02pickle")
    with pytest.raises(IntegrityError):
        fitting_adapter(tmp_path / "bad.safetensors", model)


# ---- the sheet


def test_the_sheet_shows_every_picture_in_its_place(files: dict[str, Path], sdxl: SdxlModel, tmp_path: Path) -> None:
    found = trial(sdxl, files["kohya"], 0.0, 1.0)
    layout = lay_out(PROMPTS, [0, 1], [0.0, 1.0], height_px=64, width_px=64)
    path = tmp_path / "grid.png"
    write_sheet(found, layout, path, {"lora_sha256": "ab", "lora": '\u202e"<b>'})
    check_target(path)
    with Image.open(path) as sheet:
        said = {name.removeprefix("craft."): text for name, text in sheet.text.items()}  # type: ignore[attr-defined]
        pixels = torch.frombuffer(bytearray(sheet.convert("RGB").tobytes()), dtype=torch.uint8)
    assert [json.loads(said[name]) for name in ("prompts", "seeds", "strengths")] == [PROMPTS, [0, 1], [0.0, 1.0]]
    assert (json.loads(said["lora_sha256"]), json.loads(said["lora"])) == ("ab", '\u202e"<b>')
    canvas = pixels.view(layout.height, layout.width, 3)
    places = [_find(canvas, _enlarged(one.image, layout.scale)) for one in found.pictures]
    assert places == sorted(places)
    assert len({place[1] for place in places}) == 2
    assert len({place[0] for place in places}) == 4


def _enlarged(image: Tensor, scale: int) -> Tensor:
    return image.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0)


def _find(canvas: Tensor, tile: Tensor) -> tuple[int, int]:
    """Top and left of a tile that is on the canvas once."""
    height, width = tile.shape[:2]
    firsts = (canvas[: canvas.shape[0] - height + 1, : canvas.shape[1] - width + 1] == tile[0, 0]).all(-1).nonzero()
    [place] = [(int(y), int(x)) for y, x in firsts if torch.equal(canvas[y : y + height, x : x + width], tile)]
    return place


def test_labels_of_any_text_are_drawn_without_gaps_or_controls() -> None:
    for text in CHOSEN:
        shown = shown_text(text[:300], 14)
        assert all(char.isprintable() for char in shown)
        assert len(wrap(text, 400, 14)) <= 4
    assert shown_text("a b~Z", 14) == "a b~Z"
    assert shown_text("\u202e\x1b\U000f0000", 14) == "<U+202E><U+001B><U+F0000>"
    assert wrap("one two three", 10_000, 14) == ["one two three"]
    assert wrap("one two three", 60, 14)[0] == "one two"
    assert "".join(wrap("x" * 30, 100, 14)) == "x" * 30


def test_a_sheet_with_hostile_labels_is_drawn() -> None:
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    prompts = ["<b>\U0001f600 \u6f22\u5b57 \u05e9\u05dc\u05d5\u05dd e\u0301", "word " * 200]
    pictures = [Picture(prompt, 3, 1.0, image, b"", None) for prompt in prompts]
    layout = lay_out(prompts, [3], [1.0], height_px=64, width_px=64)
    sheet = draw_sheet(Trial(prompts, [3], [1.0], pictures, []), layout)
    assert sheet.size == (layout.width, layout.height)


def test_a_sheet_beyond_64_megapixels_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match="too large") as refused:
        lay_out(["a"] * 20, [0], [0.0, 0.5, 1.0, 1.5], height_px=1024, width_px=1024)
    assert "80 pictures of 1024 x 1024 px" in refused.value.why
    lay_out(["a"] * 10, [0], [0.0, 0.5, 1.0, 1.5], height_px=1024, width_px=1024)
    with pytest.raises(UsageError, match="too large"):
        lay_out(["a"] * 1_000_000, [0], [1.0], height_px=64, width_px=64)


def test_other_files_are_kept(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("craft-fast try")
    for name in ("photo.png", "text.png", "grid.jpg", "folder.png"):
        if name == "folder.png":
            (tmp_path / name).mkdir()
        with pytest.raises(UsageError):
            check_target(tmp_path / name)
    check_target(tmp_path / "new.png")


def test_single_pictures_have_names_of_their_own(files: dict[str, Path], sdxl: SdxlModel, tmp_path: Path) -> None:
    found = trial(sdxl, files["still"], 0.5, seeds=[4])
    names = write_each(found, tmp_path / "each")
    assert [name[:24] for name in names] == ["prompt1-seed4-strength0.", "prompt2-seed4-strength0."]
    for name, one in zip(names, found.pictures, strict=True):
        assert (tmp_path / "each" / name).read_bytes() == one.png
