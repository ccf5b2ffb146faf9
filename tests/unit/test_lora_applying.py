"""LoRAs in a whole SDXL: the four ways from layout to layout, and nothing changed but what must."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from craft_fast import rng
from craft_fast.errors import ConfigError, IntegrityError, ResourceError, UsageError
from craft_fast.lora import applying
from craft_fast.lora.adapter import Adapter
from craft_fast.lora.applying import apply_adapters
from craft_fast.lora.layouts import adapted_shapes
from craft_fast.lora.original import piece_of
from craft_fast.sdxl import published
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.source import open_source
from craft_fast.sdxl.weights import expected_shapes
from tests.unit import original_layout as original
from tests.unit.small_adapters import everywhere, layer

SAID = {"modelspec.prediction_type": "epsilon", "modelspec.title": "mine", "modelspec.hash_sha256": "0xold"}
WHERE = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def file(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original.write(
        original.from_folder(sdxl_folder), tmp_path_factory.mktemp("file") / "model.safetensors", SAID
    )


@pytest.fixture(scope="module")
def adapter(sdxl_folder: Path) -> Adapter:
    """A LoRA of every layer of the UNet and of both text encoders."""
    return everywhere(adapted_shapes(open_source(sdxl_folder)))


@pytest.fixture(scope="module")
def merged(sdxl_folder: Path, adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "folder"
    done = apply_adapters(sdxl_folder, [(adapter, 0.7)], out)
    assert (done.form, done.changed, done.sha256) == ("folder", len(adapter.layers), None)
    return out


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata())


def weights(model: SdxlModel) -> dict[str, Tensor]:
    return {f"{part}.{name}": value for part in PARTS for name, value in getattr(model, part).state_dict().items()}


def output(unet: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = unet(
            rng.normal((2, 4, 16, 16), 1), torch.tensor(500), encoder_hidden_states=rng.normal((2, 32, 64), 2),
            added_cond_kwargs={"text_embeds": rng.normal((2, 32), 3), "time_ids": torch.full((2, 6), 64.0)},
        ).sample  # fmt: skip
    return result


def test_every_weight_has_its_delta_and_no_other_changes(merged: Path, sdxl: SdxlModel, adapter: Adapter) -> None:
    before, after = weights(sdxl), weights(load_sdxl(merged, device="cpu", dtype="float32"))
    deltas = {f"{name.replace('text_encoder.text_model.', 'text_encoder.')}.weight": one.delta() for name, one in
              adapter.layers.items()}  # fmt: skip
    assert len(deltas) > 100
    assert deltas.keys() <= before.keys() == after.keys()
    for name, value in before.items():
        want = value + 0.7 * deltas[name] if name in deltas else value
        assert torch.equal(after[name], want), name


def test_pictures_are_those_of_the_lora_loaded_at_that_strength(
    merged: Path, sdxl_folder: Path, adapter: Adapter
) -> None:
    unet = load_sdxl(sdxl_folder, device="cpu", dtype="float32").unet
    base = output(unet)
    state = {}
    for name, one in adapter.layers.items():
        if name.startswith("unet."):
            # PEFT's names; its scale is 1 where no alpha is told.
            state |= {f"{name}.lora_A.weight": one.down, f"{name}.lora_B.weight": one.up * one.scale}
    unet.load_lora_adapter(state, prefix="unet", adapter_name="a")
    unet.set_adapters("a", 0.7)
    loaded = output(unet)
    assert (loaded - base).abs().max() > 0.1
    whole = output(load_sdxl(merged, device="cpu", dtype="float32").unet)
    assert (whole - loaded).abs().max() < 5e-6  # 1.2e-6 of 1.3 was found


@pytest.mark.parametrize(("origin", "form"), [("file", "file"), ("file", "folder"), ("folder", "file")])
def test_all_ways_lead_to_the_same_weights(
    origin: str, form: str, merged: Path, sdxl_folder: Path, file: Path, adapter: Adapter, tmp_path: Path
) -> None:
    out = tmp_path / ("out.safetensors" if form == "file" else "out")
    model = file if origin == "file" else sdxl_folder
    done = apply_adapters(model, [(adapter, 0.7)], out, config=str(sdxl_folder), merged=[{"sha256": "12ab"}])
    assert (done.path, done.form, done.changed) == (out, form, len(adapter.layers))
    # Read by the tests' own names for the layout, not by ours.
    want = original.from_folder(merged)
    found = load_file(out) if form == "file" else original.from_folder(out)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    opened = load_sdxl(out, device="cpu", dtype="float32", config=str(sdxl_folder))
    mine, theirs = weights(opened), weights(load_sdxl(merged, device="cpu", dtype="float32"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert (opened.prediction_type, opened.zero_terminal_snr) == ("epsilon", False)
    said = metadata(out if form == "file" else out / "unet/diffusion_pytorch_model.safetensors")
    assert json.loads(said["craft.merged"]) == [{"sha256": "12ab", "strength": 0.7}]
    if form == "file":
        assert said["modelspec.title"] == ("mine" if origin == "file" else "out")
        assert "modelspec.hash_sha256" not in said
    else:
        import diffusers

        diffusers.StableDiffusionXLPipeline.from_pretrained(out)


def test_a_file_keeps_the_bytes_of_what_is_not_touched(file: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    besides = {"alphas_cumprod": torch.arange(9.0), "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6)}
    half = {name: value.half() for name, value in load_file(file).items()}
    save_file({**half, **besides, "model_ema.n": torch.tensor([7])}, tmp_path / "in.safetensors", SAID)
    shapes = adapted_shapes(open_source(sdxl_folder))
    one = layer(shapes["unet"][f"{WHERE.removeprefix('unet.')}.weight"], 4)
    fused = layer((32, 32), 4, 9)
    lora = Adapter({WHERE: one, "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj": fused})
    apply_adapters(tmp_path / "in.safetensors", [(lora, 1.0)], tmp_path / "out.safetensors", config=str(sdxl_folder))
    before, after = load_file(tmp_path / "in.safetensors"), load_file(tmp_path / "out.safetensors")
    config = open_source(sdxl_folder).config("unet")
    touched = piece_of("unet", f"{WHERE.removeprefix('unet.')}.weight", config).name
    rows = "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"
    assert list(before) == list(after)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {touched, rows}
    assert after[touched].dtype is torch.float16
    assert torch.equal(after[touched], (before[touched].float() + one.delta()).half())
    assert torch.equal(after[rows][32:64], (before[rows][32:64].float() + fused.delta()).half())
    assert torch.equal(after[rows][:32], before[rows][:32])
    assert torch.equal(after[rows][64:], before[rows][64:])


def test_a_folder_keeps_its_files(sdxl_folder: Path, tmp_path: Path) -> None:
    """Shards keep their names; a variant that is not read, and one whole file beside, are left out."""
    model = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    name = "diffusion_pytorch_model"
    state = load_file(model / "unet" / f"{name}.safetensors")
    (model / "unet" / f"{name}.safetensors").unlink()
    half = sorted(state)[: len(state) // 2]
    shards = {f"{name}-00001-of-00002.safetensors": {key: state[key] for key in half},
              f"{name}-00002-of-00002.safetensors": {key: state[key] for key in state if key not in half}}  # fmt: skip
    places = {key: shard for shard, tensors in shards.items() for key in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (model / "unet" / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    other = {**index, "weight_map": dict.fromkeys(state, "other.fp16.safetensors")}
    (model / "unet" / f"{name}.safetensors.index.fp16.json").write_text(json.dumps(other))
    for shard, tensors in shards.items():
        save_file(tensors, model / "unet" / shard, {"format": "pt"})
    (model / "LICENSE.md").write_text("as you like")
    shutil.copy(model / "vae" / f"{name}.safetensors", model / "vae" / f"{name}.fp16.safetensors")
    shutil.copy(model / "vae" / f"{name}.safetensors", model / "whole.safetensors")
    shape = state[f"{WHERE.removeprefix('unet.')}.weight"].shape
    apply_adapters(model, [(Adapter({WHERE: layer(tuple(shape), 4)}), 1.0)], tmp_path / "out")
    there = {path.relative_to(model) for path in model.rglob("*") if path.is_file()}
    here = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.as_posix() for path in there - here} == {
        "whole.safetensors", f"vae/{name}.fp16.safetensors", f"unet/{name}.safetensors.index.fp16.json",
    }  # fmt: skip
    assert here <= there
    touched = Path("unet") / places[f"{WHERE.removeprefix('unet.')}.weight"]
    assert {path for path in here if (model / path).read_bytes() != (tmp_path / "out" / path).read_bytes()} == {touched}
    load_sdxl(tmp_path / "out", device="cpu", dtype="float32")


def test_several_loras_and_a_second_time(sdxl_folder: Path, adapter: Adapter, tmp_path: Path) -> None:
    shapes = adapted_shapes(open_source(sdxl_folder))
    shape = shapes["unet"][f"{WHERE.removeprefix('unet.')}.weight"]
    more = Adapter({WHERE: layer(shape, 2, 77)})
    apply_adapters(sdxl_folder, [(adapter, 0.5), (more, -1.5), (more, 0.0)], tmp_path / "a", dtype=torch.bfloat16)
    path = "unet/diffusion_pytorch_model.safetensors"
    key = f"{WHERE.removeprefix('unet.')}.weight"
    base, found = load_file(sdxl_folder / path), load_file(tmp_path / "a" / path)
    want = base[key] + (0.5 * adapter.layers[WHERE].delta() + -1.5 * more.layers[WHERE].delta())
    assert torch.equal(found[key], want.bfloat16())
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    # What is in the weights already is not forgotten on the way into another layout.
    apply_adapters(tmp_path / "a", [(more, 2.0)], tmp_path / "b.safetensors")
    said = json.loads(metadata(tmp_path / "b.safetensors")["craft.merged"])
    assert [one["strength"] for one in said] == [0.5, -1.5, 0.0, 2.0]


def test_the_prediction_travels(tmp_path: Path, sdxl_folder: Path, file: Path) -> None:
    model = Path(shutil.copytree(sdxl_folder, tmp_path / "v"))
    schedule = model / "scheduler" / "scheduler_config.json"
    values = {**json.loads(schedule.read_text()), "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule.write_text(json.dumps(values))
    shape = adapted_shapes(open_source(sdxl_folder))["unet"][f"{WHERE.removeprefix('unet.')}.weight"]
    lora = [(Adapter({WHERE: layer(shape, 2)}), 1.0)]
    apply_adapters(model, lora, tmp_path / "v.safetensors")
    apply_adapters(tmp_path / "v.safetensors", lora, tmp_path / "v2", config=str(sdxl_folder))
    for out in ("v.safetensors", "v2"):
        prediction = open_source(tmp_path / out, config=str(sdxl_folder)).prediction("auto", "auto")
        assert (prediction.prediction_type, prediction.zero_terminal_snr) == ("v_prediction", True)
    silent = original.write(load_file(file), tmp_path / "silent.safetensors")
    with pytest.raises(ConfigError, match="--prediction epsilon"):
        apply_adapters(silent, lora, tmp_path / "no", config=str(sdxl_folder))
    assert not (tmp_path / "no").exists()
    # From file to file nobody needs to know, nor are tokenizers or a VAE wanted.
    bare = {name: value for name, value in load_file(file).items() if not name.startswith("first_stage")}
    original.write(bare, tmp_path / "bare.safetensors")
    apply_adapters(tmp_path / "bare.safetensors", lora, tmp_path / "yes.safetensors", config=str(sdxl_folder))


def test_another_vae_goes_in(sdxl_folder: Path, file: Path, tmp_path: Path) -> None:
    vae = Path(shutil.copytree(sdxl_folder / "vae", tmp_path / "vae"))
    weights_file = vae / "diffusion_pytorch_model.safetensors"
    state = {name: value + 1 for name, value in load_file(weights_file).items()}
    save_file(state, weights_file, {"format": "pt"})
    alone = original.write(original.vae_names(state, prefix=""), tmp_path / "vae.safetensors")
    want = original.vae_names(state)
    shape = adapted_shapes(open_source(sdxl_folder))["unet"][f"{WHERE.removeprefix('unet.')}.weight"]
    lora = [(Adapter({WHERE: layer(shape, 2)}), 1.0)]
    for n, (model, its, out) in enumerate(
        [(file, vae, "a.safetensors"), (file, alone, "b.safetensors"), (sdxl_folder, alone, "c"),
         (sdxl_folder, vae, "d"), (file, vae, "e"), (sdxl_folder, alone, "f.safetensors")]
    ):  # fmt: skip
        apply_adapters(model, lora, tmp_path / out, vae=str(its), config=str(sdxl_folder))
        found = load_file(tmp_path / out) if out.endswith("s") else original.from_folder(tmp_path / out)
        assert {name for name in found if name.startswith("first_stage")} == set(want), n
        assert all(torch.equal(found[name], value) for name, value in want.items()), n


def test_an_old_vae_goes_into_a_file(sdxl_folder: Path, lora: list[Any], tmp_path: Path) -> None:
    """Its attention layers have other names, and matrices are 1x1 convolutions."""
    model = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    path = model / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    old = {}
    for name, value in state.items():
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = value[:, :, None, None] if "attentions" in name and value.ndim == 2 else value
    assert old.keys() != state.keys()
    save_file(old, path, {"format": "pt"})
    apply_adapters(model, lora, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], value) for name, value in original.vae_names(state).items())


def test_what_cannot_be_joined_is_refused(sdxl_folder: Path, lora: list[Any], tmp_path: Path) -> None:
    model = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    path = model / "text_encoder_2/model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("layers.1.self_attn.k_proj.weight"))
    save_file({**state, name: state[name].half()}, path, {"format": "pt"})
    with pytest.raises(IntegrityError, match="different number formats"):
        apply_adapters(model, lora, tmp_path / "out.safetensors")
    apply_adapters(model, lora, tmp_path / "half.safetensors", dtype=torch.float16)
    assert {value.dtype for value in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


# ---- what is refused, and what a failure leaves


def test_a_lora_that_does_not_fit_names_layers_and_the_base(sdxl_folder: Path, tmp_path: Path) -> None:
    layers = {WHERE: layer((64, 768), 4)}
    layers |= {f"unet.down_blocks.9.attentions.{n}.proj_in": layer((64, 64), 4) for n in range(9)}
    with pytest.raises(IntegrityError) as refused:
        apply_adapters(sdxl_folder, [(Adapter(layers), 1.0)], tmp_path / "out")
    said = str(refused.value)
    assert WHERE in said
    assert "for a weight of [64, 768], the model's is [64, 64]" in said
    assert "down_blocks.9.attentions.0.proj_in: the model has no such layer" in said
    assert "and 5 more" in said
    assert "Stable Diffusion 1.5" in said
    assert not list(tmp_path.iterdir())
    with pytest.raises(IntegrityError, match="it has no layers"):
        apply_adapters(sdxl_folder, [(Adapter({}), 1.0)], tmp_path / "out")


@pytest.fixture
def lora(sdxl_folder: Path) -> list[tuple[Adapter, float]]:
    shape = adapted_shapes(open_source(sdxl_folder))["unet"][f"{WHERE.removeprefix('unet.')}.weight"]
    return [(Adapter({WHERE: layer(shape, 2)}), 1.0)]


def test_nothing_is_overwritten_unasked(sdxl_folder: Path, lora: list[Any], tmp_path: Path) -> None:
    apply_adapters(sdxl_folder, lora, tmp_path / "out")
    with pytest.raises(UsageError, match="--force"):
        apply_adapters(sdxl_folder, lora, tmp_path / "out")
    before = (tmp_path / "out/unet/diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "out/stale.txt").write_text("")
    apply_adapters(sdxl_folder, lora, tmp_path / "out", force=True)
    assert (tmp_path / "out/unet/diffusion_pytorch_model.safetensors").read_bytes() == before
    assert not (tmp_path / "out/stale.txt").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="something else than a model"):
        apply_adapters(sdxl_folder, lora, tmp_path / "home", force=True)
    assert (tmp_path / "home/letter.txt").exists()
    model = Path(shutil.copytree(sdxl_folder, tmp_path / "model"))
    for out in (model, model / "../model"):
        with pytest.raises(UsageError, match="over itself"):
            apply_adapters(model, lora, out, force=True)
    for out, form in (("out", "file"), ("out/model_index.json", "folder"), ("x.bin", "file")):
        with pytest.raises(UsageError):
            apply_adapters(sdxl_folder, lora, tmp_path / out, form=form, force=True)


def test_what_a_kill_left_is_removed(sdxl_folder: Path, lora: list[Any], tmp_path: Path) -> None:
    left, fresh = tmp_path / ".out.safetensors.77-0.craft-tmp", tmp_path / ".out.safetensors.78-0.craft-tmp"
    for path, age_s in ((left, 3600), (fresh, 0)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age_s,) * 2)
    (tmp_path / ".out.craft-tmp/unet").mkdir(parents=True)
    apply_adapters(sdxl_folder, lora, tmp_path / "out.safetensors")
    apply_adapters(sdxl_folder, lora, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.safetensors", fresh.name}


def test_a_full_disk_is_seen_before_anything_is_written(
    sdxl_folder: Path, lora: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applying.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match=r"needs 5,\d{3},\d{3} bytes, 1,000 are free"):
        apply_adapters(sdxl_folder, lora, tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_weight_that_leaves_its_dtypes_range_stops_it(
    out: str, sdxl_folder: Path, tmp_path: Path, lora: list[tuple[Adapter, float]]
) -> None:
    apply_adapters(sdxl_folder, lora, tmp_path / out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(IntegrityError, match=r"NaN or infinite(.|\n)*attn2\.to_k(.|\n)*float16"):
        apply_adapters(sdxl_folder, [(lora[0][0], 1e8)], tmp_path / out, dtype=torch.float16, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- names at full size


def test_every_weight_of_the_full_unet_has_its_original_name() -> None:
    shapes = expected_shapes("unet", published.UNET)
    want: dict[str, str] = original.unet_names({name: name for name in shapes}, published.UNET)  # type: ignore[dict-item,assignment]
    assert {piece_of("unet", name, published.UNET).name: name for name in shapes} == want
    first = {name: name for name in expected_shapes("text_encoder", published.TEXT_ENCODER)}
    want = original.clip_names(first)  # type: ignore[arg-type,assignment]
    assert {piece_of("text_encoder", name, {}).name: name for name in first} == want


def test_every_weight_of_the_full_second_text_encoder_has_its_place() -> None:
    shapes = expected_shapes("text_encoder_2", published.TEXT_ENCODER_2)
    marked = {name: torch.full(shape if len(shape) < 2 else (shape[0], 1), float(n)) for n, (name, shape) in
              enumerate(shapes.items())}  # fmt: skip
    whole = original.open_clip_names(marked)
    for name, value in marked.items():
        assert torch.equal(
            piece_of("text_encoder_2", name, {}).view(whole[piece_of("text_encoder_2", name, {}).name]), value
        )
