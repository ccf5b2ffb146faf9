"""Noise by counter, noised latents and target: the published generator, the distribution, equality to the bit."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from craft_kernels.noise_and_target import counter_noise, naive, noise_and_target

Where = tuple[torch.device, torch.dtype]
FORMS = ["torch", "triton"]
SHAPES = [(1, 1, 1, 1), (2, 1, 1, 63), (1, 7, 11, 1), (3, 1, 41, 3), (2, 5, 20, 20), (3, 4, 32, 32)]


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    from craft_kernels.noise_and_target import kernel

    ids, timesteps, table = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.ones(1000)
    step = torch.zeros((), dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        sdxl, odd = torch.zeros(2, 4, 128, 128, dtype=dtype), torch.zeros(2, 1, 3, 7, dtype=dtype)
        yield f"{dtype} sdxl", lambda x=sdxl: kernel.forward(x, ids, table, timesteps, 2**60, 7, None, False)
        yield f"{dtype} odd v", lambda x=odd: kernel.forward(x, ids, table, timesteps, 1, 1, step, True)


def arguments(
    shape: tuple[int, ...] = (3, 4, 5, 7), dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(sum(shape))
    batch = shape[0]
    return {
        "latents": torch.randn(shape, generator=draw, dtype=torch.float64).to(device, dtype),
        "sample_ids": torch.randint(-(2**62), 2**62, (batch,), generator=draw).to(device),
        "alphas_cumprod": torch.linspace(0.9991, 0.0, 1000).to(device),
        "timesteps": torch.tensor([0, 999, 500] * batch)[:batch].to(device),
        "seed": 2**61 + 12345,
        "step": 17,
    }


def test_philox_gives_the_published_answers() -> None:
    """The known answers of Random123's philox4x32-10: counter and key all zeros, all ones, digits of pi."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    cases = [
        ((0, 0, 0, 0), 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ((0xFFFFFFFF,) * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, 0x299F31D0A4093822, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, answer in cases:
        words = naive.philox(tuple(torch.tensor([c]) for c in counter), key)
        assert [int(word) for word in words] == answer


def test_normals_are_those_of_box_muller_in_float64() -> None:
    words = naive.philox(tuple(torch.arange(1 << 18) * scale for scale in (1, 0, 0, 0)), 1)
    found = naive._box_muller(words[0], words[1])
    radius = (-2 * (words[0].double() * 2.0**-32 + 2.0**-33).log()).sqrt()
    angle = words[1].double() * (2 * math.pi / 2**32)
    # Near radius 0 the uniform's own 24 bits show; elsewhere the fits do.
    allowed = torch.where(radius > 0.05, 2e-6, 5e-5)
    assert bool(((found[0] - radius * angle.cos()).abs() < allowed).all())
    assert bool(((found[1] - radius * angle.sin()).abs() < allowed).all())


def test_the_corners_of_the_generator_are_finite() -> None:
    corners = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 2**32 - 2**29, 2**32 - 1])
    first, second = (grid.flatten() for grid in torch.meshgrid(corners, corners, indexing="ij"))
    x, y = naive._box_muller(first, second)
    assert bool(x.isfinite().all())
    assert bool(y.isfinite().all())
    assert float(torch.cat([x, y]).abs().max()) == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)


def test_noise_is_standard_normal_and_independent() -> None:
    """Eight numbers at five standard errors each: one false alarm in 200,000, and the seed is fixed."""
    noise = counter_noise(torch.arange(16), (4, 128, 128), seed=3, step=5).double()
    n = noise.numel()
    flat = noise.flatten()
    assert abs(float(flat.mean())) < 5 / math.sqrt(n)
    assert abs(float(flat.var() - 1)) < 5 * math.sqrt(2 / n)
    assert abs(float((flat**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((flat**4).mean() - 3)) < 5 * math.sqrt(96 / n)
    # Kolmogorov and Smirnov: 2 exp(-2 n d^2) = 1e-6.
    steps = torch.arange(1, n + 1) / n
    distance = float((torch.special.ndtr(flat.sort().values) - steps).abs().max())
    assert distance < math.sqrt(math.log(2e6) / (2 * n))
    other = counter_noise(torch.arange(16), (4, 128, 128), seed=3, step=6).double().flatten()
    for a, b in ((flat[:-1], flat[1:]), (noise[:8].flatten(), noise[8:].flatten()), (flat, other)):
        assert abs(float((a * b).mean())) < 5 / math.sqrt(len(a))


def test_noise_is_a_function_of_seed_sample_and_step_alone() -> None:
    ids = torch.tensor([4, 2**40 + 4, 5])
    noise = counter_noise(ids, (4, 3, 5), seed=1, step=2)
    assert torch.equal(counter_noise(ids[1:2], (4, 3, 5), seed=1, step=2), noise[1:2])
    assert torch.equal(counter_noise(ids, (60,), seed=1, step=torch.tensor(2)).view_as(noise), noise)
    others = [counter_noise(ids, (4, 3, 5), seed=seed, step=step) for seed, step in ((2, 2), (2**32 + 1, 2), (1, 3))]
    together = torch.stack([noise, *others]).flatten(0, 1).flatten(1)
    assert len({tuple(row.tolist()) for row in together}) == 12


def test_by_hand() -> None:
    """With the noise subtracted, what is left is the formula."""
    given = arguments((2, 1, 1, 1), torch.float64)
    given |= {"alphas_cumprod": torch.tensor([0.64, 0.36]), "timesteps": torch.tensor([0, 1])}
    given["latents"] = torch.full((2, 1, 1, 1), 2.0, dtype=torch.float64)
    noise = counter_noise(given["sample_ids"], (1, 1, 1), seed=given["seed"], step=17).double()
    for form in FORMS:
        x_t, target = noise_and_target(**given, impl=form)
        n = noise.flatten().tolist()
        assert x_t.flatten().tolist() == pytest.approx([0.8 * 2 + 0.6 * n[0], 0.6 * 2 + 0.8 * n[1]])
        assert torch.equal(target, noise)
        _, v = noise_and_target(**given, prediction_type="v_prediction", impl=form)
        assert v.flatten().tolist() == pytest.approx([0.8 * n[0] - 0.6 * 2, 0.6 * n[1] - 0.8 * 2])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_agrees_with_diffusers(prediction_type: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    given = arguments((5, 4, 3, 7)) | {"alphas_cumprod": scheduler.alphas_cumprod}
    given["timesteps"] = t = torch.tensor([0, 1, 500, 998, 999])
    noise = counter_noise(given["sample_ids"], (4, 3, 7), seed=given["seed"], step=given["step"])
    x_t, target = noise_and_target(**given, prediction_type=prediction_type)
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(given["latents"], noise, t)
    assert torch.allclose(x_t, scheduler.add_noise(given["latents"], noise, t), atol=1e-6)
    assert torch.allclose(target, expected, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_the_naive_form_to_the_bit(where: Where, shape: tuple[int, ...], prediction_type: str) -> None:
    device, dtype = where
    given = arguments(shape, dtype, device)
    cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()}
    expected = noise_and_target(**cpu, prediction_type=prediction_type, impl="torch")
    step_on_device = torch.tensor(given["step"], device=device)
    for step in (given["step"], step_on_device):
        found = noise_and_target(**{**given, "step": step}, prediction_type=prediction_type, impl="triton")
        for value, truth in zip(found, expected, strict=True):
            assert value.dtype == dtype
            assert torch.equal(value.cpu(), truth)
    here = noise_and_target(**given, prediction_type=prediction_type, impl="torch")
    assert all(torch.equal(value.cpu(), truth) for value, truth in zip(here, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_in_float64(form: str, device: torch.device) -> None:
    given = arguments((2, 2, 3, 3), torch.float64, device)
    latents = given.pop("latents").requires_grad_()
    for prediction_type in ("epsilon", "v_prediction"):
        assert torch.autograd.gradcheck(
            lambda x, p=prediction_type: noise_and_target(x, **given, prediction_type=p, impl=form), (latents,)
        )


@pytest.mark.parametrize("form", FORMS)
def test_layouts_and_the_empty_batch(form: str, device: torch.device) -> None:
    given = arguments(device=device)
    expected = noise_and_target(**given, impl=form)
    wide = torch.zeros(3, 4, 5, 14, device=device)
    wide[..., ::2] = given["latents"]
    for other in (given["latents"].contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        found = noise_and_target(**{**given, "latents": other}, impl=form)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    empty = {**given, **{name: given[name][:0] for name in ("latents", "sample_ids", "timesteps")}}
    assert [tuple(value.shape) for value in noise_and_target(**empty, impl=form)] == [(0, 4, 5, 7)] * 2


def test_a_bad_sample_leaves_its_neighbours_alone(device: torch.device) -> None:
    given = arguments(device=device)
    clean, _ = noise_and_target(**given, impl="triton")
    latents, timesteps = given["latents"].clone(), given["timesteps"].clone()
    latents[1, 0, 0, 0] = float("nan")
    x_t, target = noise_and_target(**{**given, "latents": latents}, impl="triton")
    assert torch.equal(x_t[[0, 2]], clean[[0, 2]])
    assert int(x_t.isnan().sum()) == 1
    assert bool(target.isfinite().all())
    timesteps[1] = 1000
    x_t, _ = noise_and_target(**{**given, "timesteps": timesteps}, impl="triton")
    assert torch.equal(x_t[[0, 2]], clean[[0, 2]])
    assert bool(x_t[1].isnan().all())


def test_repeats_are_equal_to_the_bit(where: Where) -> None:
    given = arguments((3, 4, 33, 35), where[1], where[0])
    expected = noise_and_target(**given, impl="triton")
    for _ in range(100 if where[0].type == "cuda" else 3):
        again = noise_and_target(**given, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.slow
def test_the_compiled_form_draws_the_same_noise(device: torch.device) -> None:
    """A compiler took a product beyond 2^63 for one that cannot be: wrong noise for some samples of some sizes."""
    torch._dynamo.reset()
    ids = torch.tensor([0, 1, 0xEB97E454, 2**31, 2**32 - 1, -1, 2**62 + 12345, -(2**63)], device=device)
    latents = torch.zeros(8, 4, 16, 16, device=device)
    given = arguments((8, 1, 1, 1), device=device) | {"latents": latents, "sample_ids": ids}
    found, expected = (noise_and_target(**given, impl=form)[1] for form in ("compile", "torch"))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["triton", "compile", "auto"])
def test_torch_compile_sees_one_graph(form: str, device: torch.device) -> None:
    torch._dynamo.reset()
    given = arguments(device=device)
    latents = given.pop("latents")

    def step(x: Tensor) -> Tensor:
        x_t, target = noise_and_target(x * 2.0, **given, prediction_type="v_prediction", impl=form)
        return x_t + 3.0 * target

    found = torch.compile(step, fullgraph=True)(latents)
    # A compiler may fuse a product into a sum; the generator's integers leave no room for it.
    assert torch.allclose(found, step(latents), atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_the_registration_is_sound(grad: bool, device: torch.device) -> None:
    given = arguments((2, 3, 4, 5), device=device)
    tensors = [given[name] for name in ("latents", "sample_ids", "alphas_cumprod", "timesteps")]
    tensors[0].requires_grad_(grad)
    torch.library.opcheck(torch.ops.craft_kernels.noise_and_target.default, (*tensors, 5, 6, None, True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("12 GiB of float16: for a GPU")
    latents = torch.zeros(2, 4, 16384, 16640, dtype=torch.float16, device=device)  # 2.18e9 elements
    latents[1, 3, -1, -1] = 3.0
    given = arguments((2, 1, 1, 1), torch.float16, device) | {"latents": latents}
    given["timesteps"] = torch.tensor([0, 500], device=device)
    x_t, target = noise_and_target(**given, impl="triton")
    signal, sigma = naive.roots(given["alphas_cumprod"], given["timesteps"], torch.float32)
    noise = target[1, 3, -1, -1].float()
    expected = signal[1, 0, 0, 0] * 3.0 + sigma[1, 0, 0, 0] * noise
    assert float(x_t[1, 3, -1, -1]) == pytest.approx(float(expected), abs=4e-3)
    # The last four elements again, from the counter that belongs to them.
    last = latents[0].numel() // 4 - 1
    ids = given["sample_ids"][1:].cpu()
    counter = (torch.tensor([last]), torch.tensor([given["step"]]), ids & 0xFFFFFFFF, (ids >> 32) & 0xFFFFFFFF)
    words = naive.philox(counter, given["seed"])
    _, truth = naive._box_muller(words[2], words[3])
    assert torch.equal(target[1, 3, -1, -1].cpu().view(1), truth.half())


@pytest.mark.gpu
def test_a_cuda_graph_counts_its_own_steps(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("CUDA graphs are for a GPU")
    given = arguments((2, 4, 32, 32), torch.bfloat16, device)
    step = given["step"] = torch.tensor(0, device=device)
    noise_and_target(**given, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = noise_and_target(**given, impl="triton")
        step += 1
    step.zero_()
    for i in range(3):
        graph.replay()
        expected = noise_and_target(**{**given, "step": i}, impl="torch")
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_compiled_for_gpus_nothing_is_fused_and_accesses_are_wide(gpu_code: Any) -> None:
    rows = gpu_code(__file__)
    assert not [row for row in rows if row["spilled_bytes"] or row["fused"]]
    for row in rows:
        if "sdxl" in row["name"]:
            assert row["ops"]["LDG.E.128"] >= 1, row
            assert "STG.E.128" in row["ops"], row
            assert not {"STG.E", "STG.E.64", "STG.E.U16"} & set(row["ops"]), row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 4)}, r"latents .*\[B, C, H, W\], got float32 \(2, 4\)"),
        ({"sample_ids": torch.zeros(3)}, r"sample_ids must be int64 \[3\], got float32"),
        ({"alphas_cumprod": torch.zeros(2, 2)}, "alphas_cumprod"),
        ({"timesteps": torch.zeros(2, dtype=torch.int64)}, r"timesteps must be int64 \[3\]"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"step": 2**32}, r"step must be in \[0, 2\^32\), got 4294967296"),
        ({"step": torch.zeros(1, dtype=torch.int64)}, r"step must be int64 \[\], got int64 \(1,\)"),
        ({"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction, got 'sample'"),
        ({"timesteps": torch.zeros(3, dtype=torch.int64, device="meta")}, "timesteps must be on cpu like latents"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_and_target(**{**arguments(), **change})


def test_ops_import_torch_alone() -> None:
    program = (
        "import sys, torch; before = set(sys.modules);"
        "import craft_kernels.noise_and_target, craft_kernels.weighted_noise_loss;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - {'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['craft_kernels']"
