"""Recomputation in backward: the same bits, fewer bytes, and no trace of it where gradients are off."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_fast.errors import ConfigError
from craft_fast.qlora import recompute as module
from craft_fast.qlora.lean import lean_activations
from craft_fast.qlora.recompute import recompute, unit_names
from craft_fast.qlora.saved import REST, saved_bytes_by_unit, saved_tensors
from tests.unit.small_unets import forward, loss_and_gradients, prepared, shipped_unet, small_unet

FORMS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "peft": {"method": "lora"},
    "peft-nf4": {"method": "qlora", "nf4_convs": True},
    "fused": {"method": "lora", "fused_lora": True},
    "fused-nf4": {"method": "qlora", "fused_lora": True, "nf4_convs": True},
    "fused-lean": {"method": "lora", "fused_lora": True},
}


def built(form: str, make: Callable[[], Any] = small_unet, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    unet, parameters = prepared(make, dtype=dtype, **FORMS[form])
    if form.endswith("lean"):
        lean_activations(unet)
    return unet, parameters


def random_sets(names: list[str]) -> list[list[str]]:
    draw = random.Random(3)
    return [[], *([name for name in names if draw.random() < share] for share in (0.2, 0.5, 0.8)), names]


def saved(unet: Any) -> int:
    return sum(saved_bytes_by_unit(unet, lambda: forward(unet)).values())


def test_units_are_resnet_and_transformer_blocks() -> None:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    unet = small_unet()
    found = [unet.get_submodule(name) for name in unit_names(unet)]
    assert len(found) == len(set(found)) == 2 + 4 + 2 + 4  # resnets down, up and middle; attentions
    assert {type(unit) for unit in found} == {ResnetBlock2D, BasicTransformerBlock}
    kinds = (ResnetBlock2D, BasicTransformerBlock)
    assert sum(isinstance(m, kinds) for m in unet.modules()) == len(found)
    lean_activations(unet)
    assert [unet.get_submodule(name) for name in unit_names(unet)] == found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_the_same_bits(form: str, dtype: torch.dtype) -> None:
    unet, parameters = built(form, dtype=dtype)
    expected, theirs = loss_and_gradients(unet, parameters, dtype=dtype)
    for kept in random_sets(unit_names(unet)):
        recompute(unet, kept)
        found, ours = loss_and_gradients(unet, parameters, dtype=dtype)
        assert torch.equal(found, expected)
        assert all(torch.equal(gradient, theirs[name]) for name, gradient in ours.items())


def test_under_autocast_too() -> None:
    unet, parameters = built("peft")
    results = []
    for kept in (unit_names(unet), []):
        recompute(unet, kept)
        loss = None
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(unet).float().square().mean()
        loss.backward()  # as train does: outside
        results.append([loss.detach(), *(p.grad.clone() for p in parameters.values())])
        unet.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_the_fewer_are_kept_the_fewer_bytes(form: str) -> None:
    unet, _ = built(form, make=shipped_unet)
    names = unit_names(unet)
    sizes = []
    for kept in (names, names[::2], []):
        recompute(unet, kept)
        sizes.append(saved(unet))
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] < 0.5 * sizes[0]


def test_a_unit_that_recomputes_keeps_its_inputs_alone() -> None:
    unet, _ = built("fused")
    name = "mid_block.attentions.0.transformer_blocks.0"
    recompute(unet, [one for one in unit_names(unet) if one != name])
    found = [one.shape for one in saved_tensors(unet, lambda: forward(unet)) if one.unit == name]
    # Its hidden states; the prompt's embeddings were kept by an earlier block's adapter already.
    assert found == [(2, 64, 64)]
    recompute(unet, unit_names(unet))
    found = [one.shape for one in saved_tensors(unet, lambda: forward(unet)) if one.unit == name]
    assert len(found) > 10


def test_without_gradients_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = built("fused")
    with torch.no_grad():
        expected = forward(unet)
    recompute(unet, [])

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr(module, "checkpoint", never)
    with torch.no_grad():
        assert torch.equal(forward(unet), expected)
    with pytest.raises(AssertionError, match="checkpoint was called"):
        forward(unet)


def test_no_state_of_a_random_generator_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, parameters = built("fused")
    recompute(unet, [])
    monkeypatch.setattr(torch, "get_rng_state", lambda: 1 / 0)
    monkeypatch.setattr(torch, "set_rng_state", lambda _: 1 / 0)
    loss_and_gradients(unet, parameters)


def test_keeping_all_leaves_every_unit_as_it_was() -> None:
    unet, _ = built("peft")
    names = unit_names(unet)
    before = {name: dict(vars(unet.get_submodule(name))) for name in names}
    shadow = unet.get_submodule(names[0])
    mine = shadow.forward  # a unit that already carries a forward of its own gets that back
    shadow.forward = mine
    for kept in ([], names[:3], [], names):
        recompute(unet, kept)
    assert vars(shadow).pop("forward") is mine
    assert {name: dict(vars(unet.get_submodule(name))) for name in names} == before


def test_another_call_replaces_the_first() -> None:
    unet, parameters = built("fused")
    names = unit_names(unet)
    recompute(unet, [])
    recompute(unet, names[1:])
    changed = [name for name in names if "forward" in vars(unet.get_submodule(name))]
    assert changed == names[:1]
    once = saved(unet)
    recompute(unet, names[1:])
    assert saved(unet) == once
    loss_and_gradients(unet, parameters)


def test_an_unknown_name_is_refused_and_changes_nothing() -> None:
    unet = small_unet()
    with pytest.raises(ValueError, match=r"mid_block\.nowhere"):
        recompute(unet, ["mid_block.nowhere"])
    assert not any("forward" in vars(unet.get_submodule(name)) for name in unit_names(unet))


def test_dropout_is_refused() -> None:
    unet = small_unet()
    name = unit_names(unet)[2]
    next(m for m in unet.get_submodule(name).modules() if isinstance(m, nn.Dropout)).p = 0.1
    with pytest.raises(ConfigError) as caught:
        recompute(unet, [])
    assert name in caught.value.where
    recompute(unet, [name])


def test_what_is_saved_is_counted_by_unit() -> None:
    """Each storage once, with all its bytes; no weight; nothing where gradients are off."""
    unet, _ = built("fused")
    by_unit = saved_bytes_by_unit(unet, lambda: forward(unet))
    assert list(by_unit) == [*unit_names(unet), REST]
    listed = saved_tensors(unet, lambda: forward(unet))
    assert sum(by_unit.values()) == sum(one.nbytes for one in listed)
    block = "mid_block.attentions.0.transformer_blocks.0"
    # GEGLU's two halves are kept as views of one result, which is 8 times as wide as the block.
    assert [one.nbytes for one in listed if one.unit == block].count(4 * 2 * 64 * 8 * 64) == 1
    owned = {p.shape for p in unet.parameters()}
    assert not [one for one in listed if one.unit == block and torch.Size(one.shape) in owned and len(one.shape) == 2]
    with torch.no_grad():
        assert not sum(saved_bytes_by_unit(unet, lambda: forward(unet)).values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every input's .grad
@pytest.mark.parametrize(("form", "way"), [("peft", "module"), ("fused-nf4", "around"), ("fused-lean", "inside")])
def test_it_works_with_compiled_blocks(form: str, way: str) -> None:
    """Compiled by the module's own call, under a wrapper, and with the compiler looking into the wrapper."""
    torch._dynamo.reset()
    unet, parameters = built(form)
    expected, theirs = loss_and_gradients(unet, parameters)
    blocks = [name for name in unit_names(unet) if "transformer_blocks" in name][:2]

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="aot_eager")

    for name in blocks:
        unit = unet.get_submodule(name)
        if way == "inside":
            unit.forward = compiled(unit.forward)
        if way == "module":
            unit.compile(backend="aot_eager")
    recompute(unet, [])
    if way == "around":
        for name in blocks:
            unit = unet.get_submodule(name)
            unit.forward = compiled(unit.forward)
    found, ours = loss_and_gradients(unet, parameters)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-4, atol=1e-7), name
    with torch.no_grad():
        output: Tensor = forward(unet)
    assert output.isfinite().all()
