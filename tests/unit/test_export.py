"""Export: the file against diffusers' own loader, and the checks that stand before it counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from craft_fast import rng
from craft_fast.config import ExportSettings, ModelSettings, Settings, TrainSettings
from craft_fast.errors import IntegrityError
from craft_fast.export import adapter_of_state, check_fit, export_lora, stamp
from craft_fast.lora.adapter import Adapter
from craft_fast.lora.reading import read_adapter
from craft_fast.qlora.lora import add_lora, lora_state_dict
from craft_fast.sdxl.load import SdxlModel, load_sdxl
from craft_fast.sdxl.unet import is_pristine, pristine_unet, stored_shapes, tuned_unet
from craft_fast.store import atomic
from craft_fast.store.run import Run, open_run
from craft_fast.store.safe_load import load_safetensors

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with open_run(tmp_path / "run", create=True) as opened:
        yield opened


def make_settings(
    folder: Path, *, rank: int = 4, alpha: float = 4.0, dtype: str = "float32", method: str = "lora", **export: Any
) -> Settings:
    return Settings(
        model=ModelSettings(path=str(folder)),
        train=TrainSettings(rank=rank, lora_alpha=alpha, method=method),  # type: ignore[arg-type]
        export=ExportSettings(name="mine", dtype=dtype, **export),  # type: ignore[arg-type]
    )


def trained(model: SdxlModel, settings: Settings) -> tuple[dict[str, Tensor], Any]:
    """An adapter with both matrices away from zero, and the UNet that carries it."""
    unet = pristine_unet(model)
    add_lora(unet, rank=settings.train.rank, lora_alpha=settings.train.lora_alpha, target_modules=TARGETS, seed=0)
    with torch.no_grad():
        for i, (name, p) in enumerate(unet.named_parameters()):
            if ".lora_" in name:
                p.copy_(rng.normal(p.shape, i) * 0.3)
    return lora_state_dict(unet), unet


def unet_output(unet: Any, cross: int = 64) -> Tensor:
    with torch.no_grad():
        result: Tensor = unet(
            rng.normal((2, 4, 16, 16), 1),
            torch.tensor(500),
            encoder_hidden_states=rng.normal((2, 32, cross), 2),
            added_cond_kwargs={"text_embeds": rng.normal((2, 32), 3), "time_ids": torch.full((2, 6), 64.0)},
        ).sample
    return result


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (6, 2.5)])
def test_diffusers_loads_what_was_trained_in_both_formats(run: Run, sdxl_folder: Path, rank: int, alpha: float) -> None:
    settings = make_settings(sdxl_folder, rank=rank, alpha=alpha, format="both")
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    base = unet_output(model.unet)
    state, unet = trained(model, settings)
    expected = unet_output(unet)
    assert (expected - base).abs().max() > 1e-2
    written = export_lora(run, state, settings=settings, metadata={})
    assert written.path == "lora/mine.safetensors"
    assert [ref.path for ref in written.also] == ["lora/mine-diffusers.safetensors"]
    outputs = []
    for path in (run.path(written.path), run.path(written.also[0].path)):
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl_folder)
        pipe.load_lora_weights(path)
        outputs.append(unet_output(pipe.unet))
        assert (outputs[-1] - expected).abs().max() < 1e-5
        with tuned_unet(model, path) as tuned:
            assert torch.equal(unet_output(tuned), outputs[-1])
        with tuned_unet(model, path, strength=0.5) as half:
            assert not torch.equal(unet_output(half), outputs[-1])
        with tuned_unet(model, path, strength=0.0) as none:
            assert (unet_output(none) - base).abs().max() < 1e-6
    assert torch.equal(*outputs)
    assert is_pristine(model.unet)
    assert torch.equal(unet_output(model.unet), base)
    # What is in both files is what was trained, to the bit.
    for path in (run.path(written.path), run.path(written.also[0].path)):
        for name, layer in read_adapter(path, model.unet.config).layers.items():
            module = name.removeprefix("unet.")
            assert torch.equal(layer.down, state[f"{module}.lora_A.weight"])
            assert torch.equal(layer.up, state[f"{module}.lora_B.weight"])
            assert layer.alpha == alpha


def test_the_same_state_gives_the_same_bytes_and_a_header(run: Run, sdxl_folder: Path, sdxl: SdxlModel) -> None:
    settings = make_settings(sdxl_folder, alpha=8.0)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    first = export_lora(run, state, settings=settings, metadata={"seed": "3"})
    again = export_lora(run, dict(reversed(state.items())), settings=settings, metadata={"seed": "3"})
    assert first == again
    with safe_open(run.path(first.path), "pt") as file:
        header = file.metadata()
    assert header["craft.seed"] == "3"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "8.0")
    assert header["ss_output_name"] == "mine"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["ss_base_model_version"].startswith("sdxl_")


def test_scores_are_stamped_in_and_tensors_stay(run: Run, sdxl_folder: Path) -> None:
    settings = make_settings(sdxl_folder, format="both")
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    written = export_lora(run, state, settings=settings, metadata={"seed": 3})
    refs = [run.ref(run.path(written.path)), *written.also]
    before = [load_safetensors(run.path(ref.path)) for ref in refs]
    facts = {"scores": {"h": {"base_mean": 0.25, "tuned_mean": 0.5}}}
    stamped = stamp(run, refs, facts)
    for ref, tensors in zip(stamped, before, strict=True):
        assert ref == run.ref(run.path(ref.path))
        after = load_safetensors(run.path(ref.path), expect_sha256=ref.sha256)
        assert all(torch.equal(value, after[name]) for name, value in tensors.items())
        with safe_open(run.path(ref.path), "pt") as file:
            said = file.metadata()
        assert json.loads(said["craft.scores"]) == facts["scores"]
        assert said["craft.seed"] == "3"
    # A kill before the record: the file is the new one already, which was announced. What is exported anew is it too.
    told: list[Any] = []
    assert stamp(run, refs, facts, pending=stamped, announce=told.extend) == stamped == told
    again = export_lora(run, state, settings=settings, metadata={"seed": 3, **facts})
    assert [run.ref(run.path(again.path)), *again.also] == stamped
    path = run.path(written.path)
    flipped = {name: value + 1 for name, value in before[0].items()}
    with safe_open(path, "pt") as file:
        atomic.write_safetensors(path, flipped, file.metadata())
    with pytest.raises(IntegrityError, match="not what was written"):
        stamp(run, stamped[:1], facts)


def test_a_lower_rank_is_written_with_its_error(run: Run, sdxl_folder: Path) -> None:
    settings = make_settings(sdxl_folder, alpha=8.0)
    lower = settings.model_copy(update={"export": settings.export.model_copy(update={"rank": 2})})
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    written = export_lora(run, state, settings=lower, metadata={})
    assert written.notes is not None
    assert 0.05 < written.notes["resize_error"] < 1
    with safe_open(run.path(written.path), "pt") as file:
        assert file.metadata()["craft.rank_resize_error"] == str(written.notes["resize_error"])
        assert file.metadata()["ss_network_dim"] == "2"
        downs = [file.get_slice(name).get_shape() for name in file.keys() if "lora_down" in name]  # noqa: SIM118
    assert {shape[0] for shape in downs} == {2}


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_whole_model_with_the_lora_in_it(run: Run, sdxl_folder: Path, form: str) -> None:
    settings = make_settings(sdxl_folder, alpha=2.0, merged=form)
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    state, unet = trained(model, settings)
    expected = unet_output(unet)
    written = export_lora(run, state, settings=settings, metadata={})
    assert written.notes is not None
    path = run.path(written.notes["merged"])
    config = str(sdxl_folder)
    merged = load_sdxl(path, device="cpu", dtype="float32", config=config, prediction_type="epsilon")
    assert (unet_output(merged.unet) - expected).abs().max() < 1e-4
    assert [ref.path for ref in written.also] == ([written.notes["merged"]] if form == "file" else [])


def test_a_check_that_fails_leaves_no_file_and_names_the_key(
    run: Run, sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from craft_fast.lora import writing

    settings = make_settings(sdxl_folder)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    made = writing.kohya_tensors

    def misnamed(adapter: Adapter, config: Any = None) -> dict[str, Tensor]:
        tensors = made(adapter, config)
        key = next(iter(tensors))
        return {**{k: v for k, v in tensors.items() if k != key}, key.replace("input", "inptu"): tensors[key]}

    monkeypatch.setattr(writing, "kohya_tensors", misnamed)
    with pytest.raises(IntegrityError, match="lora_unet_inptu_blocks") as refused:
        export_lora(run, state, settings=settings, metadata={})
    assert refused.value.exit_code == 6
    assert not run.path("lora", "mine.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_smaller_dtypes(run: Run, sdxl_folder: Path, dtype: str) -> None:
    settings = make_settings(sdxl_folder, dtype=dtype)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    ref = export_lora(run, state, settings=settings, metadata={})
    tensors = load_safetensors(run.path(ref.path))
    assert {str(value.dtype) for value in tensors.values()} == {f"torch.{dtype}"}
    assert float(next(value for name, value in tensors.items() if name.endswith(".alpha"))) == 4.0


def test_a_whole_unet(run: Run, sdxl_folder: Path) -> None:
    settings = make_settings(sdxl_folder, method="full")
    model = load_sdxl(sdxl_folder, device="cpu", dtype="float32")
    base = unet_output(model.unet)
    state = {name: p + 0.01 * rng.normal(p.shape, 5) for name, p in model.unet.named_parameters()}
    ref = export_lora(run, state, settings=settings, metadata={})
    assert ref.path == "lora/mine-unet/diffusion_pytorch_model.safetensors"
    loaded = diffusers.UNet2DConditionModel.from_pretrained(run.path("lora", "mine-unet"))
    for result in (run.path(ref.path), run.path("lora", "mine-unet")):
        with tuned_unet(model, result) as tuned:
            assert torch.equal(unet_output(tuned), unet_output(loaded))
    assert not torch.equal(unet_output(loaded), base)
    assert torch.equal(unet_output(pristine_unet(model)), base)
    del state["conv_in.weight"]
    with pytest.raises(IntegrityError, match=r"conv_in\.weight"):
        export_lora(run, state, settings=settings, metadata={})


def no_such_layer(state: dict[str, Tensor]) -> None:
    state["nowhere.to_q.lora_A.weight"] = torch.zeros(4, 64)
    state["nowhere.to_q.lora_B.weight"] = torch.zeros(64, 4)


def half_a_pair(state: dict[str, Tensor]) -> None:
    del state[next(name for name in state if "lora_B" in name)]


def wrong_width(state: dict[str, Tensor]) -> None:
    name = next(name for name in state if "lora_A" in name)
    state[name] = torch.zeros(4, 7)


def another_rank(state: dict[str, Tensor]) -> None:
    name = next(name for name in state if "lora_A" in name)
    state[name] = state[name][:2]


def not_a_number(state: dict[str, Tensor]) -> None:
    state[next(iter(state))][0, 0] = float("nan")


def nothing(state: dict[str, Tensor]) -> None:
    state.clear()


@pytest.mark.parametrize("damage", [no_such_layer, half_a_pair, wrong_width, another_rank, not_a_number, nothing])
def test_what_does_not_fit_is_not_written(
    run: Run, sdxl_folder: Path, damage: Callable[[dict[str, Tensor]], None]
) -> None:
    settings = make_settings(sdxl_folder)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    damage(state)
    with pytest.raises(IntegrityError) as refused:
        export_lora(run, state, settings=settings, metadata={})
    assert refused.value.exit_code == 6
    assert not run.path("lora", "mine.safetensors").exists()


def test_a_value_too_large_for_the_dtype_is_refused(run: Run, sdxl_folder: Path) -> None:
    settings = make_settings(sdxl_folder, dtype="float16")
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    state[next(iter(state))][0, 0] = 1e6
    with pytest.raises(IntegrityError, match="float16") as refused:
        export_lora(run, state, settings=settings, metadata={})
    assert "float32" in refused.value.hint


def test_a_file_that_reads_back_differently_is_refused(
    run: Run, sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(sdxl_folder)
    state, _ = trained(load_sdxl(sdxl_folder, device="cpu", dtype="float32"), settings)
    write = atomic.write_safetensors

    def flip(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Any:
        damaged = {name: value.clone() for name, value in tensors.items()}
        next(iter(damaged.values()))[0, 0] += 1
        return write(path, damaged, metadata)

    monkeypatch.setattr(atomic, "write_safetensors", flip)
    with pytest.raises(IntegrityError, match="does not load as it should") as refused:
        export_lora(run, state, settings=settings, metadata={})
    assert "reads back differently" in refused.value.why
    assert not run.path("lora", "mine.safetensors").exists()


def test_a_lora_that_is_a_pickle_is_not_loaded(sdxl: SdxlModel, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    torch.save({"unet.a.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(IntegrityError, match="pickle"), tuned_unet(sdxl, path):
        pass
    assert is_pristine(sdxl.unet)


def test_a_lora_of_another_model_is_not_loaded(sdxl: SdxlModel, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    up, down = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight", torch.zeros(4, 99)
    atomic.write_safetensors(path, {up: torch.zeros(99, 4), up.replace("lora_B", "lora_A"): down})
    with pytest.raises(IntegrityError, match="does not load"), tuned_unet(sdxl, path):
        pass
    assert is_pristine(sdxl.unet)


def test_shapes_come_from_the_header(sdxl_folder: Path, sdxl: SdxlModel) -> None:
    expected = {name: tuple(value.shape) for name, value in sdxl.unet.state_dict().items()}
    assert stored_shapes(sdxl_folder / "unet") == expected
    with pytest.raises(IntegrityError, match="empty"):
        adapter_of_state({}, alpha=1.0, dtype=torch.float32)
    check_fit(Adapter({}), expected, where="here")


def test_the_config_travels_with_a_whole_unet(run: Run, sdxl_folder: Path, sdxl: SdxlModel) -> None:
    state = {name: p.detach() for name, p in sdxl.unet.named_parameters()}
    export_lora(run, state, settings=make_settings(sdxl_folder, method="full"), metadata={})
    written = json.loads(run.path("lora", "mine-unet", "config.json").read_text())
    assert written == json.loads((sdxl_folder / "unet" / "config.json").read_text())
