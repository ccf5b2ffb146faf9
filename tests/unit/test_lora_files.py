"""LoRA files of other programs and of older runs; headers and alphas that somebody made up; what a header says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from craft_fast.errors import IntegrityError
from craft_fast.lora.adapter import Adapter
from craft_fast.lora.metadata import header
from craft_fast.lora.reading import read_adapter
from craft_fast.lora.writing import hashes, kohya_tensors, write_adapter
from craft_fast.store import atomic
from craft_fast.store.safe_load import load_safetensors
from tests.unit.small_adapters import layer

T = "transformer_blocks.0"
Q = f"down_blocks.1.attentions.0.{T}.attn1.to_q"
OUT = f"down_blocks.1.attentions.0.{T}.attn1.to_out.0"
SGM = f"input_blocks.4.1.{T}.attn1.to_q"
TE = "text_model.encoder.layers.3.self_attn.q_proj"
CONV = "down_blocks.0.resnets.0.conv1"
META = {"ss_base_model_version": "sdxl_base_v1-0"}


def pair(stem: str, down: str = ".lora_A.weight", up: str = ".lora_B.weight", size: int = 640) -> dict[str, Tensor]:
    return {stem + down: torch.full((2, size), 0.5), stem + up: torch.ones(size, 2)}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    atomic.write_safetensors(path, tensors, metadata or {})
    return path


KOHYA = (".lora_down.weight", ".lora_up.weight")
OLD = (".down.weight", ".up.weight")


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        (pair("lora_unet_" + SGM.replace(".", "_"), *KOHYA), f"unet.{Q}"),
        (pair("lora_unet_" + Q.replace(".", "_"), *KOHYA), f"unet.{Q}"),
        (pair("lycoris_" + Q.replace(".", "_"), *KOHYA), f"unet.{Q}"),
        (pair(f"diffusion_model.{SGM}"), f"unet.{Q}"),
        (pair(f"unet.{Q}"), f"unet.{Q}"),
        (pair(f"unet.{Q}.lora", *OLD), f"unet.{Q}"),
        (pair(f"base_model.model.{Q}"), f"unet.{Q}"),
        (pair(f"unet.{Q}", ".lora_A.default.weight", ".lora_B.default.weight"), f"unet.{Q}"),
        (pair(f"unet.{Q.replace('.to_q', '.processor.to_q_lora')}", *OLD), f"unet.{Q}"),
        (pair(f"{OUT.replace('.to_out.0', '.processor.to_out_lora')}", *OLD), f"unet.{OUT}"),
        (pair("lora_te_" + TE.replace(".", "_"), *KOHYA, 768), f"text_encoder.{TE}"),
        (pair("lora_te2_" + TE.replace(".", "_"), *KOHYA, 1280), f"text_encoder_2.{TE}"),
        (pair(f"text_encoder.{TE}", size=768), f"text_encoder.{TE}"),
        # transformers 5.6 took "text_model." off CLIPTextModel, and diffusers saves what it finds.
        (pair(f"text_encoder.{TE.removeprefix('text_model.')}", size=768), f"text_encoder.{TE}"),
        (pair(f"text_encoder.{TE}.lora_linear_layer", *OLD, 768), f"text_encoder.{TE}"),
        (pair(f"text_encoder.{TE.replace('q_proj', 'to_q_lora')}", *OLD, 768), f"text_encoder.{TE}"),
        (pair(f"text_encoders.clip_g.transformer.{TE}", size=1280), f"text_encoder_2.{TE}"),
    ],
)
def test_every_way_of_naming_a_layer_is_read(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    path = write(tmp_path / "a.safetensors", {key: value.bfloat16() for key, value in tensors.items()})
    (found,) = read_adapter(path).layers.items()
    assert found[0] == name
    assert (found[1].down.dtype, found[1].up.dtype, found[1].alpha) == (torch.bfloat16, torch.bfloat16, None)
    assert torch.equal(found[1].delta(), torch.ones(found[1].up.shape[0], found[1].down.shape[1]))


def test_what_older_runs_exported_is_read_and_can_be_written_anew(tmp_path: Path) -> None:
    """In 0.1.0 names were PEFT's, facts under ``craft_fast.``, and alpha / rank was inside lora_B."""
    meta = {"format": "pt", "craft_fast.rank": "2", "craft_fast.lora_alpha": "8.0", **META}
    path = write(tmp_path / "old.safetensors", pair(f"unet.{Q}"), meta)
    adapter = read_adapter(path)
    assert adapter.layers[f"unet.{Q}"].scale == 1.0
    write_adapter(tmp_path / "new.safetensors", adapter)
    again = read_adapter(tmp_path / "new.safetensors")
    assert torch.equal(again.layers[f"unet.{Q}"].delta(), adapter.layers[f"unet.{Q}"].delta())
    assert again.metadata["craft_fast.lora_alpha"] == "8.0"


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        ({"lora_alpha": 3}, 3.0),
        ({"lora_alpha": 3, "alpha_pattern": {Q: 5}}, 5.0),
        ({"lora_alpha": 3, "alpha_pattern": {f"^{Q}": 5}}, 5.0),
        ({"lora_alpha": 3, "alpha_pattern": {"to_q": 5, Q: 7}}, 5.0),
        ({"lora_alpha": 3, "alpha_pattern": {"o_q": 5, "^to_q": 5, "attn2.to_q": 5}}, 3.0),
        ({"lora_alpha": 3, "use_rslora": True}, 3 * 2**0.5),
        ({}, None),
    ],
)
def test_alphas_of_the_header_are_looked_up_as_peft_does(
    tmp_path: Path, config: dict[str, Any], alpha: float | None
) -> None:
    said = json.dumps({f"unet.{key}": value for key, value in config.items()})
    path = write(tmp_path / "a.safetensors", pair(f"unet.{Q}"), {"lora_adapter_metadata": said})
    assert read_adapter(path).layers[f"unet.{Q}"].alpha == alpha


def alphas(value: Tensor) -> dict[str, Tensor]:
    stem = "lora_unet_" + SGM.replace(".", "_")
    return {**pair(stem, *KOHYA), f"{stem}.alpha": value}


STEM = "lora_unet_" + SGM.replace(".", "_")


@pytest.mark.parametrize(
    ("tensors", "metadata", "word"),
    [
        (alphas(torch.ones(2)), {}, "alpha is no single finite number"),
        ({**pair(STEM, *KOHYA), **pair("lora_unet_" + Q.replace(".", "_"), *KOHYA)}, {}, "twice"),
        ({STEM + KOHYA[0]: torch.zeros(0, 640), STEM + KOHYA[1]: torch.zeros(640, 0)}, {}, "do not belong together"),
        ({STEM + KOHYA[0]: torch.zeros(2, 640), STEM + KOHYA[1]: torch.zeros(640, 2, 3, 3)}, {}, "do not belong"),
        ({STEM + KOHYA[0]: torch.zeros(640), STEM + KOHYA[1]: torch.zeros(640)}, {}, "do not belong together"),
        (
            pair(f"unet.{Q}"),
            {"lora_adapter_metadata": '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 2}}'},
            "no module's name",
        ),
        (pair(f"unet.{Q}"), {"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, "lora_alpha is nan"),
        (pair(f"unet.{Q}"), {"lora_adapter_metadata": "[" * 100_000}, "cannot be read"),
    ],
)
def test_what_somebody_made_up_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], word: str
) -> None:
    path = write(tmp_path / "a.safetensors", tensors, metadata)
    with pytest.raises(IntegrityError, match=word) as refused:
        read_adapter(path)
    assert refused.value.exit_code == 6


@pytest.mark.parametrize("said", ["{", "[]", '{"unet.x": 3}', f'{{"unet.{Q}": "nn"}}', f'{{"unet.{Q}": "int8"}}'])
def test_a_made_up_note_of_alphas_dtypes_does_nothing(tmp_path: Path, said: str) -> None:
    path = write(tmp_path / "a.safetensors", pair(f"unet.{Q}"), {"craft.alpha_dtypes": said})
    tensors = kohya_tensors(read_adapter(path))
    assert tensors[f"{STEM}.alpha"].dtype == torch.float32


def test_alphas_keep_dtypes_that_are_not_their_layers(tmp_path: Path) -> None:
    half = {name: value.half() for name, value in pair(STEM, *KOHYA).items()}
    for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16):
        first = {**half, f"{STEM}.alpha": torch.tensor(0.5, dtype=dtype)}
        read = read_adapter(write(tmp_path / "a.safetensors", first))
        write_adapter(tmp_path / "b.safetensors", read, format="diffusers", metadata=META)
        write_adapter(tmp_path / "c.safetensors", read_adapter(tmp_path / "b.safetensors"))
        again = load_safetensors(tmp_path / "c.safetensors")
        assert {name: (value.dtype, value.tolist()) for name, value in again.items()} == {
            name: (value.dtype, value.tolist()) for name, value in first.items()
        }


# ---- what a header says


def test_a_header_says_what_readers_look_for() -> None:
    adapter = Adapter({f"unet.{Q}": layer((640, 640), 8, alpha=4.0), f"unet.{OUT}": layer((640, 640), 8, alpha=4.0)})
    said = header(adapter, name="sea", model="base.safetensors", prediction_type="v_prediction", zero_terminal_snr=True)
    # Forge and A1111 list it under SDXL by either; kohya writes it for v-prediction models too.
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.prediction_type"] == "v"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_network_args"]) == ("8", "4.0", "{}")
    assert (said["ss_output_name"], said["ss_sd_model_name"]) == ("sea", "base.safetensors")
    assert {"modelspec.sai_model_spec", "modelspec.title", "modelspec.resolution"} <= said.keys()
    assert not {"modelspec.date", "ss_mixed_precision"} & said.keys()
    assert header(adapter, name="sea", prediction_type="epsilon")["modelspec.prediction_type"] == "epsilon"


def test_convolutions_are_told_apart_as_kohya_does() -> None:
    both = {f"unet.{Q}": layer((640, 640), 8, alpha=4.0), f"unet.{CONV}": layer((320, 320, 3, 3), 2, alpha=1.0)}
    said = header(Adapter(both), name="sea")
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("8", "4.0")
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1.0"}


def test_hashes_are_those_of_sd_scripts(tmp_path: Path) -> None:
    """library/train_util.py, precalculate_safetensors_hashes: of the bytes that safetensors' own writer makes."""
    adapter = Adapter({f"unet.{Q}": layer((640, 640), 400, alpha=400.0), f"unet.{OUT}": layer((640, 640), 3)})
    tensors = kohya_tensors(adapter)
    metadata = {"ss_output_name": "sea", "craft.scores": "{}", "title": "ü"}
    theirs = safetensors.torch.save(tensors, {"ss_output_name": "sea"})
    after = theirs[8 + int.from_bytes(theirs[:8], "little") :]
    assert hashes(tensors, metadata) == {
        "sshs_model_hash": hashlib.sha256(after).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(theirs[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": "0x" + hashlib.sha256(after).hexdigest(),
    }
    assert len(theirs) > 0x110000
    path = tmp_path / "a.safetensors"
    write_adapter(path, adapter, metadata={**META, **metadata})
    whole = path.read_bytes()
    assert whole[8 + int.from_bytes(whole[:8], "little") :] == after
