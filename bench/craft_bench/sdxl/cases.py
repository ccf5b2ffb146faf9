"""What is measured, in the order of its importance: a deadline cuts the end."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from craft_fast.errors import UsageError

OURS, REFERENCE = "ours", "reference"
Method = Literal["lora", "qlora", "full"]
Recompute = Literal["auto", "all", "none"]

# In the order in which they run: those of figures first.
GROUPS = {
    "steps": "batch 1 and 4 beside the reference loop, and the peaks asked for",
    "large": "batch 8",
    "generation": "images",
    "headline": "a whole run of 100 samples, by stage",
    "plan": "what plan says before, beside what is then measured",
    "variants": "more of full fine-tune, NF4 convolutions, parts switched off",
    "caps": "what is chosen under memory caps, and how fast it runs",
    "compile": "torch.compile of the transformer blocks",
}


@dataclass(frozen=True)
class StepCase:
    """One way to do a training step.

    Attributes:
        group: of ``GROUPS``.
        batch: samples of a step.
        method: what is trained; ``auto`` leaves it to the engine.
        nf4_convs: convolutions in NF4 too.
        recompute: which activations are computed again.
        graph: CUDA graph; compile: torch.compile of the transformer blocks.
        lora, optimizer: as in ``engine``.
        impl: ``ours`` or ``reference``.
        cap_gib: memory cap.
        probe: have plan's probe tell the time before, for some seconds.
        quick: part of ``--quick``.
    """

    group: str
    batch: int
    method: Method | Literal["auto"] = "lora"
    nf4_convs: bool = False
    recompute: Recompute = "auto"
    graph: bool = True
    compile: bool = False
    lora: Literal["auto", "fused", "peft"] = "auto"
    optimizer: Literal["auto", "flat", "bitsandbytes"] = "auto"
    impl: str = OURS
    cap_gib: float | None = None
    probe: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """``B=4 lora recompute=auto graph``; unique among the cases."""
        if self.impl == REFERENCE:
            return f"B={self.batch} lora recompute=all"
        words = [f"B={self.batch}", self.method + ("+convs" if self.nf4_convs else ""), f"recompute={self.recompute}"]
        words += ["graph"] if self.graph else ["eager"]
        words += ["compile"] if self.compile else []
        words += [f"lora={self.lora}"] if self.lora != "auto" else []
        words += [f"optimizer={self.optimizer}"] if self.optimizer != "auto" else []
        words += ["probed"] if self.probe else []
        words += [f"cap={self.cap_gib:g}GiB"] if self.cap_gib is not None else []
        return " ".join(words)

    @property
    def label(self) -> str:
        """``ours B=4 lora recompute=auto graph``."""
        return f"{self.impl} {self.name}"

    @property
    def isolated(self) -> bool:
        """Whether it gets a process of its own: a cap could spoil the next case, and a compiler can not be stopped."""
        return self.cap_gib is not None or self.compile


@dataclass(frozen=True)
class GenerateCase:
    """Images made together: denoising with guidance, and the VAE.

    Attributes:
        batch: images.
        graph: CUDA graph of the denoising step.
        vae_dtype: float32, as SDXL's own VAE needs, or float16, as the fp16-fix weights allow; on a CPU float32.
        group, probe, quick: as for steps.
    """

    batch: int
    graph: bool = True
    vae_dtype: str = "float32"
    group: str = "generation"
    probe: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """``B=4 euler graph vae=float32``."""
        return f"B={self.batch} euler {'graph' if self.graph else 'eager'} vae={self.vae_dtype}"

    @property
    def label(self) -> str:
        """``generate B=4 euler graph vae=float32``."""
        return f"generate {self.name}"


def choose_groups(names: Sequence[str]) -> list[str]:
    """The groups to run, in their order; no names are all of them.

    Raises:
        UsageError: there is no such group.
    """
    for name in names:
        if name not in GROUPS:
            close = difflib.get_close_matches(name, GROUPS, n=1, cutoff=0.5)
            raise UsageError(
                f"There is no group of cases named {name!r}",
                why=f"the groups are {', '.join(GROUPS)}",
                hint=f"craft-fast bench sdxl {close[0]}" if close else "leave the names out to run all of them",
            )
    return [name for name in GROUPS if name in names or not names]


def step_cases(
    groups: Sequence[str], *, batches: Sequence[int], caps_gib: Sequence[float], quick: bool = False
) -> list[StepCase]:
    """The training steps of some groups; the reference of a batch comes before ours of that batch.

    Args:
        groups: of ``GROUPS``.
        batches: three sizes, of which the first is 1.
        caps_gib: in the order in which they are tried.
        quick: few of them.
    """
    one, four, eight = batches
    found = [*_asked(one, four), *_large(eight), *_variants(one, four), *_caps(one, four, caps_gib)]
    found += [*_plan(one, four), *_compiled(one, four)]
    return [case for case in found if case.group in groups and (case.quick or not quick)]


def _asked(one: int, four: int) -> list[StepCase]:
    group = "steps"
    return [
        StepCase(group, one, impl=REFERENCE, quick=True),
        StepCase(group, one, quick=True),
        StepCase(group, one, "qlora", recompute="all", quick=True),
        StepCase(group, one, recompute="all"),
        StepCase(group, one, "full", recompute="all", quick=True),
        StepCase(group, four, impl=REFERENCE),
        StepCase(group, four),
        StepCase(group, one, "qlora"),
        StepCase(group, four, "qlora"),
        StepCase(group, four, recompute="all"),
        StepCase(group, four, "qlora", recompute="all"),
        StepCase(group, one, graph=False, quick=True),
        StepCase(group, four, graph=False),
        StepCase(group, one, recompute="none"),
        StepCase(group, one, "qlora", recompute="all", graph=False),
    ]


def _large(eight: int) -> list[StepCase]:
    group = "large"
    return [
        StepCase(group, eight, impl=REFERENCE),
        StepCase(group, eight),
        StepCase(group, eight, "qlora"),
        StepCase(group, eight, recompute="all"),
    ]


def _variants(one: int, four: int) -> list[StepCase]:
    group = "variants"
    return [
        StepCase(group, one, impl=REFERENCE),
        StepCase(group, one, "qlora", nf4_convs=True, recompute="all", quick=True),
        StepCase(group, one, "full"),
        StepCase(group, one, "qlora", nf4_convs=True),
        StepCase(group, one, lora="peft"),
        StepCase(group, one, graph=False, lora="peft", optimizer="bitsandbytes"),
        StepCase(group, four, "full", recompute="all"),
    ]


def _caps(one: int, four: int, caps_gib: Sequence[float]) -> list[StepCase]:
    group = "caps"
    found = [StepCase(group, one, "auto", cap_gib=cap, quick=cap == caps_gib[-1]) for cap in caps_gib]
    found += [StepCase(group, one, "qlora", nf4_convs=True, cap_gib=caps_gib[0])]
    found += [StepCase(group, one, "full", cap_gib=cap) for cap in caps_gib[-2:]]
    return found + [StepCase(group, four, "auto", cap_gib=cap) for cap in reversed(caps_gib)]


def _compiled(one: int, four: int) -> list[StepCase]:
    group = "compile"
    return [
        StepCase(group, one, compile=True),
        StepCase(group, four, compile=True),
        StepCase(group, four, graph=False, compile=True),
    ]


def _plan(one: int, four: int) -> list[StepCase]:
    group = "plan"
    return [
        StepCase(group, one, probe=True, quick=True),
        StepCase(group, one, "qlora", recompute="all", probe=True),
        StepCase(group, four, probe=True),
        StepCase(group, four, "qlora", recompute="all", probe=True),
        StepCase(group, one, "full", recompute="all", probe=True),
        StepCase(group, one, graph=False, probe=True),
    ]


def generate_cases(groups: Sequence[str], *, batches: Sequence[int], quick: bool = False) -> list[GenerateCase]:
    """Images: ``batches`` in their order, with a graph and without."""
    if "generation" not in groups:
        return []
    found = [GenerateCase(batch, probe=True, quick=batch == batches[0]) for batch in batches]
    found += [GenerateCase(batches[0], vae_dtype="float16")]
    found += [GenerateCase(batch, graph=False) for batch in batches]
    return [case for case in found if case.quick or not quick]
