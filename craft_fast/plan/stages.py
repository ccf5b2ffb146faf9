"""Peak memory of every stage of a run, from its settings and the model's configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from craft_fast.budget import Machine, ModelShape, model_shape
from craft_fast.config import Settings
from craft_fast.plan.judges import Judge, at_once, judges, package_bytes, scoring_bytes
from craft_fast.sdxl import costs
from craft_fast.sdxl.costs import FRAGMENTATION, TrainingMemory
from craft_fast.sdxl.costs_parts import Cost, clip_text_cost, vae_cost

if TYPE_CHECKING:
    import torch

    from craft_fast.qlora.engine import Choices

GIB = 1024**3
# Of a process on a CPU with PyTorch, diffusers, transformers and bitsandbytes loaded: 0.5 GiB after the imports, 0.6 in
# a run (torch 2.13).
CPU_LIBRARIES_BYTES = int(0.6 * GIB)
# The VAE gets about a megapixel at a time, craft_fast.sdxl.vae.
_PIXELS_AT_ONCE = 1024 * 1024


@dataclass(frozen=True)
class Peak:
    """Most memory that a stage needs.

    Attributes:
        allocated: bytes handed out to tensors at once, as torch.cuda.max_memory_allocated says; on a CPU with what the
            libraries take.
        reserved: what the allocator takes from the GPU for that.
        what: what decides it.
    """

    allocated: int
    reserved: int
    what: str


@dataclass(frozen=True)
class Costs:
    """What the stages of a run need; see ``Costs.of``."""

    settings: Settings
    machine: Machine
    shape: ModelShape

    @classmethod
    def of(cls, settings: Settings, machine: Machine, shape: ModelShape | None = None) -> Costs:
        """For settings without ``train.method: auto``; elsewhere auto counts as ``always`` and as ``dense``."""
        return cls(settings, machine, shape or model_shape(settings))

    # ---- choices

    @property
    def gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.machine.gpu

    @property
    def device(self) -> torch.device:
        """Where it runs, or a device of its kind."""
        import torch

        return self.machine.device or torch.device("cuda" if self.gpu else "cpu")

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of UNet and text encoders."""
        import torch

        from craft_fast.sdxl.load import pick_dtype

        if self.settings.model.dtype == "auto":
            return torch.bfloat16 if self.gpu and self.machine.bfloat16 else torch.float32
        return pick_dtype(self.settings.model.dtype, self.device)

    @cached_property
    def vae_element(self) -> int:
        """Bytes of an element of the VAE."""
        from craft_fast.sdxl.load import pick_vae_dtype

        chosen = self.settings.model
        return pick_vae_dtype(chosen.vae_dtype, self.dtype, own=chosen.vae is None).itemsize

    @cached_property
    def choices(self) -> Choices:
        """How training is laid onto the machine."""
        from craft_fast.qlora.engine import decide

        engine, method = self.settings.engine, self.settings.train.method
        if self.gpu and engine.optimizer == "auto" and method != "full":
            # What auto comes to on a GPU, said here because this GPU need not be there to be asked.
            engine = engine.model_copy(update={"optimizer": "flat"})
        return decide(engine, method=method, device=self.device, dtype=self.dtype)

    @property
    def resident(self) -> bool:
        """Whether models stay on the device between phases."""
        return self.settings.engine.resident != "never"

    @cached_property
    def budget(self) -> int:
        """Bytes that may be handed out."""
        return self.machine.budget(self.settings.engine)

    @property
    def size(self) -> dict[str, Any]:
        """Height and width of the images."""
        return {"height_px": self.settings.generate.height_px, "width_px": self.settings.generate.width_px}

    @property
    def guided(self) -> bool:
        """Whether any denoising step is guided, so that twice the images go through the UNet."""
        low, high = self.settings.generate.guidance_interval
        return self.settings.generate.guidance_scale > 1.0 and high > low

    # ---- networks

    def text(self, prompts: int) -> tuple[Cost, Cost]:
        """Both text encoders."""
        element = self.dtype.itemsize
        return (
            clip_text_cost(self.shape.text_encoder, prompts=prompts, dtype_bytes=element),
            clip_text_cost(self.shape.text_encoder_2, prompts=prompts, dtype_bytes=element, projected=True),
        )

    def text_weights(self) -> int:
        """Weights of both text encoders."""
        return sum(one.weight_bytes for one in self.text(1))

    @property
    def draws_in_nf4(self) -> bool:
        """Whether the UNet that draws is quantised."""
        return self.settings.generate.unet == "nf4"

    def dense_unet_weights(self) -> int:
        """Of the UNet as it is on disk, in the model's dtype."""
        return costs.unet_weight_bytes(self.shape.unet, "lora", dtype_bytes=self.dtype.itemsize)

    def unet_weights(self) -> int:
        """Of the UNet as it draws."""
        if not self.draws_in_nf4:
            return self.dense_unet_weights()
        # Quantised on its way to the device: the dense one is never there.
        return costs.unet_weight_bytes(self.shape.unet, "qlora", nf4_convs=True, dtype_bytes=self.dtype.itemsize)

    def denoise_bytes(self, images: int) -> int:
        """Activations of one denoising step."""
        setup = costs.unet_setup(
            **self.size, batch=images * (2 if self.guided else 1), vae_scale_factor=self.shape.vae_scale_factor,
            tokens=self.shape.tokens, dtype_bytes=self.dtype.itemsize, workspaces=self.gpu,
        )  # fmt: skip
        # With NF4 a layer's dense weight is there while it is used.
        setup = replace(setup, nf4=self.draws_in_nf4, nf4_convs=self.draws_in_nf4)
        latents = images * setup.height * setup.width * int(self.shape.unet.get("in_channels", 4)) * 4
        # The sampler's own: latents, the last predictions, results of the step.
        return costs.unet_pass(self.shape.unet, setup).peak_bytes + 8 * latents

    def decode(self, *, tiled: bool) -> Cost:
        """One call of the VAE's decoder."""
        pixels = self.size["height_px"] * self.size["width_px"]
        images = min(self.settings.generate.batch_size, max(1, _PIXELS_AT_ONCE // pixels))
        return vae_cost(
            self.shape.vae, **self.size, images=images, dtype_bytes=self.vae_element, tiled=tiled, gpu=self.gpu
        )

    @property
    def score_element(self) -> int:
        """Bytes of a value in the reward networks: half precision on a GPU unless ``score.dtype`` says otherwise."""
        chosen = self.settings.score.dtype
        return 4 if chosen == "float32" or (chosen == "auto" and not self.gpu) else 2

    @cached_property
    def _all_judges(self) -> tuple[dict[str, Judge | None], list[str]]:
        return judges(self.settings.rewards, held_out=True, element=self.score_element)

    def judges(self, *, held_out: bool) -> dict[str, Judge | None]:
        """Reward networks by name; None where one's size is not known, functions and plug-ins left out."""
        found = self._all_judges[0]
        return {name: one for name, one in found.items() if held_out or not self.settings.rewards[name].held_out}

    @property
    def plugins(self) -> list[str]:
        """Rewards that are plug-ins, of which nothing is known before they run."""
        return self._all_judges[1]

    # ---- training

    def training_options(self) -> dict[str, Any]:
        """The arguments of ``costs.training_memory`` and ``costs.choose_kept``."""
        train, choices = self.settings.train, self.choices
        return {
            **self.size, "vae_scale_factor": self.shape.vae_scale_factor, "tokens": self.shape.tokens,
            "micro_batch": train.micro_batch_size, "method": choices.method, "nf4_convs": train.nf4_convs,
            "rank": train.rank, "target_modules": tuple(train.target_modules), "optimizer": choices.optimizer,
            "grad_accum_steps": train.grad_accum_steps, "dtype_bytes": self.dtype.itemsize, "lora": choices.lora,
            "autocast": choices.autocast, "lean": "torch" if choices.lean else "none", "gpu": self.gpu,
        }  # fmt: skip

    @cached_property
    def training_budget(self) -> int:
        """What training may use: the budget, less the models that stay beside it."""
        stays = self.text_weights() + self.decode(tiled=True).weight_bytes if self.resident else 0
        return self.budget - stays

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Units that keep their activations for backward."""
        names = costs.unit_names(self.shape.unet)
        choice = self.settings.train.gradient_checkpointing
        if choice == "all":
            return ()
        if choice == "none":
            return names
        return costs.choose_kept(self.shape.unet, budget_bytes=self.training_budget, **self.training_options())

    def training(self, *, least: bool = True) -> TrainingMemory:
        """Memory of a training step; ``least``: with as much recomputed as the settings allow."""
        kept = self.kept
        if least and self.settings.train.gradient_checkpointing != "none":
            kept = ()
        return costs.training_memory(self.shape.unet, kept=kept, **self.training_options())

    # ---- stages

    def peaks(self) -> dict[str, Peak | None]:
        """Every stage's peak; None where it is not known."""
        made: Mapping[str, Callable[[], Peak | None]] = {
            "expand": self._expand,
            "generate": self._generate,
            "score": lambda: self._score(held_out=False),
            "filter": self._nothing,
            "cache": self._cache,
            "train": self._train,
            "export": self._nothing,
            "evaluate": self._evaluate,
            "report": self._nothing,
        }
        return {name: make() for name, make in made.items()}

    def highest_peak(self) -> int:
        """The largest of them, as the allocator takes it."""
        return max(peak.reserved for peak in self.peaks().values() if peak is not None)

    def _peak(self, allocated: int, what: str) -> Peak:
        if not self.gpu:
            allocated += CPU_LIBRARIES_BYTES
            return Peak(allocated, allocated, what)
        return Peak(allocated, int(allocated * (1 + FRAGMENTATION)), what)

    def _nothing(self) -> Peak:
        # On a GPU, what stays there from the stages before is not counted anew.
        return self._peak(0, "")

    def _expand(self) -> Peak | None:
        if self.settings.expand.kind != "transformers":
            return self._peak(0, "")
        return None

    def _stays(self, *parts: int) -> int:
        """Weights on the device: all of them where models stay, else the largest alone."""
        return sum(parts) if self.resident else max(parts)

    def tiled(self) -> bool:
        """Whether the VAE works in strips."""
        choice = self.settings.engine.vae_tiling
        if choice != "auto" or not self.gpu:
            return choice == "always"
        whole = self.decode(tiled=False)
        beside = self.text_weights() + self.unet_weights() if self.resident else 0
        return (whole.peak_bytes + beside) * (1 + FRAGMENTATION) > self.budget

    def _drawing(self, adapter: int = 0) -> Peak:
        """Text encoders, UNet, VAE, one after the other."""
        batch = self.settings.generate.batch_size
        text, unet = self.text(min(64, batch)), self.unet_weights() + adapter
        tiled = self.tiled()
        decode = self.decode(tiled=tiled)
        runtime = costs.CUBLAS_BYTES if self.gpu else 0
        form, guided = "NF4 UNet" if self.draws_in_nf4 else "UNet", " guided" if self.guided else ""
        steps = {
            "text encoders": (self.text_weights(), max(one.activation_bytes for one in text)),
            f"{form}, {batch} images at once{guided}": (unet, self.denoise_bytes(batch)),
            f"VAE, {'in strips' if tiled else 'whole images'}": (decode.weight_bytes, decode.activation_bytes),
        }
        everything = sum(weights for weights, _ in steps.values())
        found = {
            name: (everything if self.resident else weights) + activations + runtime
            for name, (weights, activations) in steps.items()
        }
        largest = max(found, key=lambda name: found[name])
        return self._peak(found[largest], ("all models, " if self.resident else "") + largest)

    def _generate(self) -> Peak:
        return self._drawing()

    def _score(self, *, held_out: bool) -> Peak | None:
        found = self.judges(held_out=held_out)
        known = {name: judge for name, judge in found.items() if judge is not None}
        if len(known) < len(found):
            return None
        beside = 0
        if self.resident:
            beside = self.text_weights() + self.unet_weights() + self.decode(tiled=True).weight_bytes
        if not known:
            return self._peak(beside, "functions alone")
        stay, peaks = self._scoring(known, beside)
        largest = max(peaks, key=lambda name: peaks[name])
        what = f"reward {largest}" + (" by its package" if known[largest].package else "")
        return self._peak(beside + peaks[largest], what + (", all rewards stay" if stay and len(known) > 1 else ""))

    def _scoring(self, known: Mapping[str, Judge], beside: int) -> tuple[bool, dict[str, int]]:
        """Whether all reward networks stay, and the peak with each at work; ``workbench`` does by these rules."""
        images = self.settings.score.batch_size
        room, beside_drawing = self.budget - beside, 0
        if self.gpu:
            budget = int(self.budget / (1 + FRAGMENTATION))
            room, beside_drawing = budget - costs.CUBLAS_BYTES - beside, budget - self.drawing_peak().allocated
        native = {name: judge.need for name, judge in known.items() if not judge.package}
        weights = sum(need.weight_bytes for need in native.values())
        most = max((need.image_bytes for need in native.values()), default=0) * images
        # On a CPU they rest where they work; on a GPU all are there together where they have room, also while it draws.
        stay = self.resident and (not self.gpu or (weights + most <= room and weights <= beside_drawing))
        peaks = {}
        for name, judge in known.items():
            if judge.package:
                peaks[name] = package_bytes(judge)
                continue
            others = weights - judge.need.weight_bytes if stay else 0
            peaks[name] = others + scoring_bytes(
                judge.need, images=images, images_at_once=at_once(judge.need, images, max(0, room - others)),
                **self.size, side_px=judge.side_px, pads=judge.pads, gpu=self.gpu,
            )  # fmt: skip
        return stay, peaks

    def _cache(self) -> Peak:
        text = self.text(1)
        beside = self.unet_weights() + self.decode(tiled=True).weight_bytes if self.resident else 0
        allocated = self.text_weights() + max(one.activation_bytes for one in text) + beside
        return self._peak(allocated, "text encoders")

    def _train(self) -> Peak:
        memory = self.training(least=False)
        beside = self.text_weights() + self.decode(tiled=True).weight_bytes if self.resident else 0
        units = costs.unit_names(self.shape.unet)
        redone = len(units) - len(self.kept)
        what = f"{memory.weights / GIB:.2f} GiB weights, {memory.activations / GIB:.2f} activations, "
        what += f"{redone} of {len(units)} blocks recomputed"
        allocated = memory.total + beside
        if self.resident and self.choices.method == "qlora":
            # Quantised where it is: the dense UNet was there before.
            allocated = max(allocated, self.dense_unet_weights() + memory.adapter + beside)
        return self._peak(allocated, what)

    def drawing_peak(self) -> Peak:
        """Of drawing with the trained adapter, which is the most that drawing needs."""
        adapter = 0
        if self.settings.train.method != "full":
            # In the model's dtype beside dense weights; beside NF4 PEFT leaves it in that of the file.
            element = 4 if self.draws_in_nf4 else self.dtype.itemsize
            adapter = element * costs.lora_parameters(
                self.shape.unet, rank=self.settings.train.rank, target_modules=self.settings.train.target_modules
            )
        return self._drawing(adapter)

    def _evaluate(self) -> Peak | None:
        drawing, scoring = self.drawing_peak(), self._score(held_out=True)
        if scoring is None:
            return None
        return max(drawing, scoring, key=lambda peak: peak.allocated)
