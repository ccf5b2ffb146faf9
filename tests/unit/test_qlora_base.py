"""The NF4 base and the LoRA on it, on a small UNet of the real class."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from craft_fast.errors import ConfigError, IntegrityError
from craft_fast.qlora.adapt import prepare_unet
from craft_fast.qlora.lora import add_lora, load_lora_state_dict, lora_parameters, lora_state_dict
from craft_fast.qlora.nf4 import import_bitsandbytes, quantize_nf4

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def small_unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 32,
        cross_attention_dim=48,
        norm_num_groups=8,
    ).requires_grad_(False)


def forward(unet: Any, batch: int = 2) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    text = {"text_embeds": torch.randn(batch, 32, generator=draw), "time_ids": torch.zeros(batch, 6)}
    latents, prompt = torch.randn(batch, 4, 8, 8, generator=draw), torch.randn(batch, 5, 48, generator=draw)
    output: torch.Tensor = unet(latents, torch.tensor([5, 700]), prompt, added_cond_kwargs=text).sample
    return output


def test_every_linear_layer_is_replaced_and_frozen() -> None:
    bnb = import_bitsandbytes()
    unet = small_unet()
    linear = sum(type(layer) is torch.nn.Linear for layer in unet.modules())
    assert quantize_nf4(unet, compute_dtype=torch.float32) == linear > 20
    assert not any(type(layer) is torch.nn.Linear for layer in unet.modules())
    assert sum(isinstance(layer, bnb.nn.Linear4bit) for layer in unet.modules()) == linear
    assert not any(p.requires_grad for p in unet.parameters())
    assert unet.is_loaded_in_4bit


def test_weights_are_bitsandbytes_own_nf4() -> None:
    bnb = import_bitsandbytes()
    unet = small_unet()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = unet.get_submodule(name).weight.detach().clone()
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)
    quantize_nf4(unet, compute_dtype=torch.float32)
    layer = unet.get_submodule(name)
    assert torch.equal(layer.weight.data, packed)
    restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(restored, bnb.functional.dequantize_4bit(packed, state))
    assert layer.weight.quant_state.nested
    assert float((restored - weight).abs().mean() / weight.abs().mean()) < 0.12


@pytest.mark.parametrize("method", ["peft", "fused"])
def test_every_layer_computes_with_a_weight_near_the_dense_one(method: str) -> None:
    """Rows of 32 and 48 among them, to which bitsandbytes' CPU code gives the scales of others: 90 % noise.

    It takes rows of different size to see that, as a trained model has.
    """
    unet, plain = small_unet(), small_unet()
    for layer in [*unet.modules(), *plain.modules()]:
        if type(layer) is torch.nn.Linear:
            layer.weight.mul_(torch.linspace(0.1, 3.0, layer.out_features)[:, None])
    quantize_nf4(unet, compute_dtype=torch.float32, own_layers=method == "fused")
    widths = set()
    for name, layer in plain.named_modules():
        if type(layer) is torch.nn.Linear:
            with torch.no_grad():
                eye = torch.eye(layer.in_features)
                found, expected = (m(eye) - m(torch.zeros_like(eye)) for m in (unet.get_submodule(name), layer))
            assert float((found - expected).norm() / expected.norm()) < 0.12, name
            widths.add(layer.in_features % 64)
    assert widths >= {0, 32, 48}


@pytest.mark.parametrize("double_quant", [True, False])
def test_output_stays_near_the_base(double_quant: bool) -> None:
    unet = small_unet()
    with torch.no_grad():
        before = forward(unet)
        quantize_nf4(unet, compute_dtype=torch.float32, double_quant=double_quant)
        after = forward(unet)
    error = float((after - before).norm() / before.norm())
    assert 0 < error < 0.15


def test_inference_in_between_does_not_change_the_base() -> None:
    """bitsandbytes repacks weights in eval mode on some CPUs, after which there is no gradient."""
    unet = small_unet()
    quantize_nf4(unet, compute_dtype=torch.float32)
    add_lora(unet, rank=4, lora_alpha=4, target_modules=TARGETS, seed=0)
    unet.train()
    before = forward(unet).detach()
    unet.eval()
    with torch.no_grad():
        forward(unet)
    unet.train()
    after = forward(unet)
    assert torch.equal(before, after)
    after.square().mean().backward()
    gradients = [p.grad for name, p in lora_parameters(unet).items() if "lora_B" in name]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


@pytest.mark.parametrize("quantised", [True, False])
def test_a_new_adapter_changes_nothing(quantised: bool) -> None:
    unet = small_unet()
    if quantised:
        quantize_nf4(unet, compute_dtype=torch.float32)
    with torch.no_grad():
        before = forward(unet)
        layers = add_lora(unet, rank=4, lora_alpha=8, target_modules=TARGETS, seed=0)
        assert torch.equal(forward(unet), before)
    trained = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(layers) == len(lora_parameters(unet))
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


def test_the_scale_is_alpha_over_rank() -> None:
    """Against W + (alpha / rank) B A put into the plain layers."""
    unet, plain = small_unet(), small_unet()
    layers = add_lora(unet, rank=4, lora_alpha=6, target_modules=TARGETS, seed=0)
    draw = torch.Generator().manual_seed(2)
    state = {name: torch.randn(value.shape, generator=draw) * 0.1 for name, value in lora_state_dict(unet).items()}
    load_lora_state_dict(unet, state)
    with torch.no_grad():
        for layer in layers:
            delta = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"] * (6 / 4)
            plain.get_submodule(layer).weight += delta
        assert torch.allclose(forward(unet), forward(plain), atol=1e-5)


def test_initialisation_is_a_function_of_the_seed() -> None:
    def state(seed: int, noise: int) -> dict[str, torch.Tensor]:
        unet = small_unet()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        add_lora(unet, rank=4, lora_alpha=4, target_modules=TARGETS, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return lora_state_dict(unet)

    one, same, other = state(0, 1), state(0, 2), state(1, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if "lora_A" in name]
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    for name in drawn:
        bound = one[name].shape[1] ** -0.5
        assert 0.8 * bound < float(one[name].abs().max()) <= bound
        assert one[name].dtype == torch.float32
    assert not any(bool(one[name].any()) for name in one if "lora_B" in name)


def test_adapter_is_float32_on_a_bfloat16_base() -> None:
    unet = small_unet().to(torch.bfloat16)
    add_lora(unet, rank=4, lora_alpha=4, target_modules=TARGETS, seed=0)
    assert {p.dtype for p in lora_parameters(unet).values()} == {torch.float32}


def test_unknown_target_modules() -> None:
    with pytest.raises(ConfigError) as caught:
        add_lora(small_unet(), rank=4, lora_alpha=4, target_modules=["to_nothing"], seed=0)
    assert caught.value.where == "train.target_modules"


def test_state_that_does_not_fit_is_refused_whole() -> None:
    unet = small_unet()
    add_lora(unet, rank=4, lora_alpha=4, target_modules=TARGETS, seed=0)
    good = lora_state_dict(unet)
    name = next(iter(good))
    changed = {key: value + 1 for key, value in good.items()}
    for bad in (
        {key: value for key, value in changed.items() if key != name},
        {**changed, "extra.lora_A.weight": torch.zeros(1)},
        {**changed, name: torch.zeros(3, 3)},
        {**changed, name: changed[name].double()},
    ):
        with pytest.raises(IntegrityError):
            load_lora_state_dict(unet, bad)
    assert all(torch.equal(value, good[key]) for key, value in lora_state_dict(unet).items())


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_prepare_trains_what_the_method_says(method: Any) -> None:
    unet = small_unet()
    every = sorted(name for name, _ in unet.named_parameters())
    parameters = prepare_unet(
        unet, method=method, dtype=torch.float32, rank=2, lora_alpha=2, target_modules=TARGETS, seed=0
    )  # fmt: skip
    assert all(p.requires_grad for p in parameters.values())
    assert sum(p.requires_grad for p in unet.parameters()) == len(parameters)
    assert (list(parameters) == every) == (method == "full")
    assert unet.training
    assert not unet.is_gradient_checkpointing  # that is craft_fast.qlora.recompute's


def test_bitsandbytes_is_imported_without_its_hub_request() -> None:
    program = (
        "import sys, importlib.abc\n"
        "class Spy(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'kernels': print('asked for kernels')\n"
        "sys.meta_path.insert(0, Spy())\n"
        "from craft_fast.qlora.nf4 import import_bitsandbytes\n"
        "import_bitsandbytes()\n"
        "print('bitsandbytes' in sys.modules, 'kernels' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "True False"
    assert done.stderr == ""
