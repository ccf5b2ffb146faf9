"""A whole run of 100 samples, stage by stage: what was done in full is measured, the rest is told by its rate.

Filter, cache and report are left out: they run no network, and cached latents are those of the candidates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from craft_bench.baselines.reward_towers import FULL, TINY, RewardTowers
from craft_bench.measure import synchronize
from craft_bench.rows import Row
from craft_bench.sdxl.cases import GenerateCase, StepCase
from craft_bench.sdxl.generation import measure_images
from craft_bench.sdxl.ours import Ours
from craft_bench.sdxl.problem import SEED, clean, text_configs
from craft_bench.sdxl.stepping import Work, reason
from craft_fast.errors import Interrupted
from craft_fast.plan.amounts import ASSUMED_ACCEPTANCE
from craft_fast.qlora.adapt import repeatable_kernels
from craft_fast.rng import generator
from craft_fast.sdxl import published

MEASURED, EXTRAPOLATED = "measured", "extrapolated"
LATE = "left out by the deadline"
BATCH = 4
SCORED_AT_ONCE = 8
ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class Recipe:
    """What such a run does.

    Attributes:
        samples: accepted ones wanted.
        variants: of each prompt.
        accepted: assumed share of variants that pass the filter; it depends on prompts and model.
        eval_prompts: compared, with the base and with the tuned model.
    """

    samples: int = 100
    variants: int = 4
    accepted: float = ASSUMED_ACCEPTANCE
    eval_prompts: int = 16

    @property
    def groups(self) -> int:
        """Prompts that are drawn."""
        return math.ceil(self.samples / self.accepted / self.variants)

    @property
    def images(self) -> int:
        """Candidates, the member of each group that is made from the prompt itself included."""
        return self.groups * (self.variants + 1)

    @property
    def texts(self) -> int:
        """Texts that are encoded: of candidates and evaluation, and the empty one."""
        return self.images + self.eval_prompts + 1


class Headline:
    """Goes through the stages.

    Args:
        work: what to measure on.
        rows: of this run so far; an image's time is taken from there where it was measured.
        deadline: no stage is begun, and no training step done, after this moment of ``time.monotonic``.
        recipe: what the run does.
    """

    def __init__(
        self, work: Work, rows: Sequence[Row], *, deadline: float | None = None, recipe: Recipe | None = None
    ) -> None:
        self.work, self.rows, self.deadline, self.recipe = work, rows, deadline, recipe or Recipe()
        self._s_per_image: float | None = None
        self._s_per_score: float | None = None

    def stages(self) -> Iterator[Row]:
        """Fields of a row for each stage, in the order of the run, and their sum.

        Training comes first in time: a figure is asked of it.
        """
        found: dict[str, Row] = {}
        for name, stage in (("train", self._train), ("generate", self._generate), ("score", self._score),
                            ("encode", self._encode), ("evaluate", self._evaluate)):  # fmt: skip
            found[name] = {"case": name} | self._tried(stage)
            yield found[name]
        yield self._total(found)

    def _tried(self, stage: Callable[[], Row]) -> Row:
        self.work.check()
        if self._late():
            return {"failed": LATE}
        clean(self.work.device)
        try:
            return stage()
        except Interrupted:
            raise
        except Exception as error:  # whatever it is becomes the stage's row
            return {"failed": reason(error)}

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _train(self) -> Row:
        """As many sample passes as the time allows, of the engine as it is delivered."""
        passes = self.work.size.passes
        engine = Ours(StepCase("headline", BATCH), self.work.size, self.work.device, self.work.dtype)
        steps = -(-passes // BATCH)
        done, began = 0, time.perf_counter()
        first_s = 0.0
        with repeatable_kernels(self.work.device):
            while done < steps and not (done > self.work.effort.losses and self._late()):
                self.work.check()
                engine.step(done)
                done += 1
                first_s = time.perf_counter() - began if done == min(self.work.effort.losses, steps) else first_s
        spent = time.perf_counter() - began
        engine.close()
        rest = 0.0
        if done < steps:
            # Steps after the first ones, in which graphs were recorded, set the rate.
            rest = (steps - done) * (spent - first_s) / (done - self.work.effort.losses)
        how = MEASURED if done == steps else EXTRAPOLATED
        basis = f"{done} of {steps} steps of {BATCH} samples, preparation included"
        return {
            "seconds": engine.prepare_s + spent + rest, "how": how, "basis": basis, "batch": BATCH, "passes": passes,
            "measured_s": engine.prepare_s + spent, **engine.fields(),
        }  # fmt: skip

    def _generate(self) -> Row:
        images, each = self.recipe.images, self._image_s()
        assumed = f"{self.recipe.accepted:.0%} of {self.recipe.variants} variants accepted"
        return self._told(images, each, f"{images} images at {each:.4g} s, assuming {assumed}")

    def _score(self) -> Row:
        images = self.recipe.images
        towers, each = self._score_all(images)
        return {
            "seconds": each * images, "how": MEASURED, "measured_s": each * images,
            "basis": f"{images} images by {towers} image towers in random weights, pictures on the device",
        }  # fmt: skip

    def _encode(self) -> Row:
        first, second = published.random_text_encoders(
            device=self.work.device, dtype=self.work.dtype, seed=SEED, **text_configs(self.work.size)
        )
        texts, began = self.recipe.texts, time.perf_counter()
        with torch.inference_mode():
            for start in range(0, texts, ENCODED_AT_ONCE):
                self.work.check()
                shape = (min(ENCODED_AT_ONCE, texts - start), self.work.size.tokens)
                for encoder in (first, second):
                    top = int(encoder.config.vocab_size) - 1
                    ids = torch.randint(top, shape, generator=generator(SEED + start))
                    encoder(ids.to(self.work.device), output_hidden_states=True)
        synchronize(self.work.device)
        spent = time.perf_counter() - began
        return {"seconds": spent, "how": MEASURED, "measured_s": spent, "basis": f"{texts} texts by both encoders"}

    def _evaluate(self) -> Row:
        images = 2 * self.recipe.eval_prompts
        each = self._image_s() + (self._s_per_score or self._score_all(images)[1])
        return self._told(images, each, f"{images} images, made and scored at {each:.4g} s")

    def _told(self, count: int, each: float, basis: str) -> Row:
        return {"seconds": count * each, "how": EXTRAPOLATED, "measured_s": None, "basis": basis}

    def _image_s(self) -> float:
        if self._s_per_image is None:
            known = [
                row["s_per_image"] for row in self.rows
                if row["name"] == "generate" and row["batch"] == BATCH and row["graph"] and not row["failed"]
            ]  # fmt: skip
            self._s_per_image = float(
                known[0] if known else measure_images(GenerateCase(BATCH), self.work)["s_per_image"]
            )
            clean(self.work.device)
        return self._s_per_image

    def _score_all(self, images: int) -> tuple[int, float]:
        """How many towers there are, and seconds an image."""
        configs = FULL if self.work.size.name == "full" else TINY
        towers = RewardTowers(configs, device=self.work.device)
        side = self.work.size.side_px
        shape = (SCORED_AT_ONCE, 3, side, side)
        pictures = torch.randint(256, shape, generator=generator(SEED), dtype=torch.uint8).to(self.work.device)
        towers(pictures)
        synchronize(self.work.device)
        began, done = time.perf_counter(), 0
        while done < images:
            self.work.check()
            towers(pictures)
            done += SCORED_AT_ONCE
        synchronize(self.work.device)
        self._s_per_score = (time.perf_counter() - began) / done
        return len(configs), self._s_per_score

    def _total(self, found: dict[str, Row]) -> Row:
        lacking = [name for name, fields in found.items() if fields.get("failed")]
        if lacking:
            return {"case": "total", "failed": f"not known without {', '.join(lacking)}"}
        told = [name for name, fields in found.items() if fields["how"] == EXTRAPOLATED]
        total: Any = sum(fields["seconds"] for fields in found.values())
        basis = f"{', '.join(told)} extrapolated, the rest measured" if told else "all measured"
        return {"case": "total", "seconds": total, "how": EXTRAPOLATED if told else MEASURED, "basis": basis}
