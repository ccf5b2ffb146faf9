"""Settings: one pydantic model per stage. One field text feeds ``--help``, the commented YAML and the docs.

Loading, presets, ``--set`` and rendering live in ``craft_fast.settings_io``; inside the library, stages get
plain section objects and never the whole tree.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Unit = Annotated[float, Field(ge=0.0, le=1.0)]

# Published reward models that are known by name (craft_fast.rewards.catalog), and the network families they are of.
OFFICIAL_REWARDS = (
    "hpsv2.1", "hpsv2.0", "pickscore", "aesthetic-v2", "image-reward", "mps", "clipscore-l14", "clipscore-b32",
)  # fmt: skip
REWARD_FAMILIES = ("clip", "aesthetic", "image_reward", "mps")


def _f(default: Any, text: str, *, unit: str = "", source: str = "", **bounds: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"unit": unit, "source": source}, **bounds)


class Section(BaseModel):
    """A section of the settings; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)


class ModelSettings(Section):
    path: str = _f(
        "package:craft_fast.tiny/assets/sdxl",
        "diffusers folder, one .safetensors file with the whole model, hub id, or package:NAME/FOLDER",
    )
    config: str = _f(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "one file: folder or hub id whose tokenizers and configurations go with it; no weights are read there",
    )
    vae: str | None = _f(
        None, "another VAE: folder, hub id or file, such as madebyollin/sdxl-vae-fp16-fix; null: the model's own"
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = _f(
        "auto", "what the UNet predicts; auto reads the scheduler's config, or a file's keys and metadata"
    )
    zero_terminal_snr: Literal["auto", "yes", "no"] = _f(
        "auto", "noise schedule that ends in pure noise; auto as for prediction_type", source="arXiv 2305.08891"
    )
    device: str = _f("auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _f(
        "auto", "auto: bfloat16 on a GPU that has it, else float32"
    )
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _f(
        "auto", "auto: float32 for the model's own VAE, model.dtype for the one in model.vae"
    )
    offline: bool = _f(False, "ask no network; hub ids must be in the local cache")


class PromptSettings(Section):
    file: str = _f("package:craft_fast.tiny/assets/prompts/train.txt", "training prompts: txt, csv, tsv or jsonl")
    heldout_file: str | None = _f(
        "package:craft_fast.tiny/assets/prompts/heldout.txt",
        "prompts for evaluation only; null holds out a share of the training prompts",
    )
    heldout_share: float = _f(0.2, "share of prompts held out when there is no held-out file", ge=0.0, lt=1.0)
    limit: int | None = _f(None, "use only the first N training prompts", ge=1)
    vocabulary: str | None = _f(
        None, "JSON list of the words the model knows; prompts with others are reported. null: no check"
    )
    max_chars: int = _f(2000, "longest prompt", unit="characters", ge=1)


class ImagesSettings(Section):
    folder: str | None = _f(
        None,
        "own pictures with captions, in place of the model's variants: folder, or what craft-fast dataset wrote; null: "
        "the model makes all candidates",
    )
    weights: Literal["auto", "score"] = _f(
        "auto",
        "auto: where the folder's metadata.jsonl gives weights, they and its selection are taken as they are; score: "
        "every picture is scored, filtered and weighted here",
    )
    bucket_step_px: int = _f(16, "sides of buckets are multiples of this; SDXL: 64", unit="px", ge=8)
    max_aspect: float = _f(2.0, "longest side over shortest of a bucket, at most", ge=1.0, le=4.0)
    max_enlargement: float = _f(
        1.5, "a picture that would have to be enlarged by more than this to fill its bucket is refused", ge=1.0
    )


class SlotSettings(Section):
    choices: list[str] = _f(..., "texts to choose from", min_length=1)
    unless: list[str] = _f([], "leave the slot empty when the prompt already holds one of these words")


class ExpandSettings(Section):
    kind: Literal["template", "file", "openai", "transformers"] = _f("template", "who writes the variants")
    variants: int = _f(3, "K, expansions per prompt; with K = 1 every advantage is +-1", ge=1, source="design.md 1")
    templates: list[str] = _f(
        ["{prompt}"], "template: texts with {prompt} and {slot}; each variant draws one without replacement"
    )
    slots: dict[str, SlotSettings] = _f({}, "template: what {slot} may become")
    file: str | None = _f(None, "file: JSONL of {prompt, variants} or CSV/TSV of prompt,variant")
    base_url: str = _f("http://localhost:8000/v1", "openai: server of the chat-completions kind")
    api_key_env: str = _f("OPENAI_API_KEY", "openai: environment variable that holds the key")
    model: str = _f("", "openai: model name; transformers: folder or hub id")
    instruction: str = _f(
        "Rewrite the image prompt below into {n} richer versions. Keep its subject, counts, colours and relations. "
        "Add concrete details of lighting, composition and style. One version a line, no numbering.\n\n{prompt}",
        "openai, transformers: what is asked; {prompt} and {n} are filled in",
    )
    timeout_s: float = _f(60.0, "openai: time for one answer", unit="s", gt=0)
    retries: int = _f(2, "openai: tries after the first", ge=0)
    max_new_tokens: int = _f(256, "openai, transformers: longest answer", unit="tokens", ge=1)
    temperature: float = _f(0.8, "openai, transformers: sampling temperature", ge=0)


class GenerateSettings(Section):
    noise: Literal["shared", "independent"] = _f(
        "shared", "one initial noise per group, or one per member", source="design.md 1"
    )
    scheduler: Literal["dpmpp_2m", "euler", "ddim"] = _f("dpmpp_2m", "sampler")
    num_inference_steps: int = _f(14, "denoising steps", ge=1)
    guidance_scale: float = _f(2.0, "classifier-free guidance; 1 turns it off", ge=1.0)
    negative_prompt: str = _f("", "what to steer away from")
    guidance_interval: list[float] = _f(
        [0.0, 1.0],
        "shares of the denoising between which guidance acts; outside, only the prompt's half is run",
        min_length=2,
        max_length=2,
        source="arXiv 2404.07724",
    )
    unet: Literal["auto", "dense", "nf4"] = _f(
        "dense",
        "UNet that draws candidates and evaluation; nf4: quantised, 1.33 GB of SDXL on the GPU instead of 5.14, but "
        "slower, and the pictures are not quite the model's own; auto: dense where the GPU has room for it, else nf4",
        source="arXiv 2305.14314",
    )
    height_px: int = _f(64, "image height", unit="px", ge=8)
    width_px: int = _f(64, "image width", unit="px", ge=8)
    batch_size: int = _f(32, "images denoised together", ge=1)
    max_images: int | None = _f(None, "budget: stop making candidates after this many images", ge=1)
    max_minutes: float | None = _f(None, "budget: stop making candidates after this time", unit="min", gt=0)


class RewardSettings(Section):
    kind: str = _f(
        ...,
        f"published model ({', '.join(OFFICIAL_REWARDS)}), a family ({', '.join(REWARD_FAMILIES)}) with a folder of "
        "its files, function, or a plug-in's name",
    )
    path: str = _f(
        "",
        "published model: folder of its files, empty: where craft-fast rewards fetch puts them; family: folder, hub id "
        "or package:NAME/FOLDER; function: module:callable",
    )
    backend: Literal["native", "package"] = _f(
        "native",
        "package: the authors' own package, in an environment of its own (craft-fast rewards install); it is there for "
        "hpsv2.1, hpsv2.0 and image-reward",
    )
    options: dict[str, str | int | float | bool] = _f({}, "plug-in: its keyword arguments")
    weight: float = _f(1.0, "weight w_m in r_total", source="design.md 1 item 3")
    held_out: bool = _f(False, "never filters or weights; only judges the result")


class ScoreSettings(Section):
    prompt: Literal["base", "expanded"] = _f("base", "which text the rewards see", source="design.md 1 item 1")
    batch_size: int = _f(64, "images scored together at most; fewer where memory is short", ge=1)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = _f(
        "auto", "precision of the reward networks; auto: float16 on a GPU, float32 on a CPU"
    )
    lazy: bool = _f(
        True,
        "ask rewards that nothing but the filter needs only about candidates that the others let through, the cheapest "
        "and most selective first; verdicts are the same",
    )


class FilterSettings(Section):
    rewards: list[str] = _f(
        ["h", "p", "a"],
        "the set S: a member must beat member 0 on every one; empty accepts all",
        source="design.md 1 item 2",
    )
    keep: Literal["each", "all"] = _f(
        "each", "each: a member passes by itself; all: only when every variant of its group passes"
    )
    select: Literal["first", "top"] = _f(
        "first", "first: stop at the first N accepted; top: spend the image budget, take the N of highest r_total"
    )
    target_samples: int = _f(100, "N, accepted samples wanted", ge=1, source="arXiv 2603.18991")
    block_groups: int = _f(16, "groups generated, scored and filtered at a time", ge=1)


def _from_bool(value: Any) -> Any:
    return {True: "all", False: "none"}[value] if isinstance(value, bool) else value


# true and false are what this setting used to be.
Recompute = Annotated[Literal["auto", "all", "none"], BeforeValidator(_from_bool)]


class TrainSettings(Section):
    method: Literal["auto", "lora", "qlora", "full"] = _f(
        "qlora",
        "qlora: NF4 base and LoRA; lora: unquantised base and LoRA; full: all UNet weights, updated in backward; "
        "auto: lora where the GPU has room for it, else qlora",
    )
    nf4_convs: bool = _f(False, "qlora: convolutions in NF4 too; 1.36 GB of SDXL instead of 1.86")
    weighting: Literal["positive", "signed", "uniform", "exponential", "clipped"] = _f(
        "positive", "phi(A), how the advantage becomes a weight", source="design.md 1 item 5"
    )
    weight_clip: float = _f(2.0, "clipped: |A| at most this; exponential: exponent at most this", gt=0)
    weight_temperature: float = _f(1.0, "exponential: exp(A / temperature)", gt=0)
    condition_on: Literal["base", "expanded", "both"] = _f(
        "base", "text the sample is trained with", source="design.md 1 item 6"
    )
    rank: int = _f(16, "LoRA rank", ge=1)
    lora_alpha: float = _f(16.0, "LoRA scale is lora_alpha / rank", gt=0)
    target_modules: list[str] = _f(
        ["to_q", "to_k", "to_v", "to_out.0"], "names of the linear layers that get an adapter", min_length=1
    )
    learning_rate: float = _f(1e-3, "AdamW8bit learning rate", gt=0)
    warmup_steps: int = _f(10, "linear warm-up", unit="steps", ge=0)
    steps: int = _f(150, "optimizer steps", ge=1)
    micro_batch_size: int = _f(32, "samples in one forward", ge=1)
    grad_accum_steps: int = _f(
        1, "micro-batches in one optimizer step; global batch = micro_batch_size * grad_accum_steps", ge=1
    )
    min_snr_gamma: float | None = _f(None, "min-SNR weight of timesteps; null: 1", source="arXiv 2303.09556", gt=0)
    prompt_dropout: Unit = _f(0.1, "share of samples trained with the empty prompt, for guidance")
    weight_decay: float = _f(0.01, "AdamW decoupled weight decay", ge=0)
    max_grad_norm: float = _f(1.0, "gradient clip", gt=0)
    gradient_checkpointing: Recompute = _f(
        "auto",
        "which activations are computed again in backward, for memory; all of them costs about 1.5x the time; "
        "auto: no more than the GPU's memory makes necessary",
    )
    checkpoint_every: int = _f(50, "steps between checkpoints", ge=1)
    keep_checkpoints: int = _f(2, "checkpoints kept", ge=1)
    sample_every: int = _f(100, "steps between sample images; 0: none", ge=0)
    sample_prompts: int = _f(8, "held-out prompts drawn at intervals, seeds fixed", ge=1)


class ExportSettings(Section):
    name: str = _f("craft", "file name of the LoRA, without extension", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")
    dtype: Literal["float32", "float16", "bfloat16"] = _f("float32", "dtype of the saved weights")
    format: Literal["kohya", "diffusers", "both"] = _f(
        "kohya",
        "kohya: one file that ComfyUI, A1111, Forge and diffusers load; diffusers: PEFT's names, which ComfyUI does "
        "not load; both: the second one beside it, as NAME-diffusers.safetensors",
    )
    rank: int | None = _f(
        None, "lower the rank to this by singular values; the error is reported. null: as trained", ge=1
    )
    merged: Literal["none", "folder", "file"] = _f(
        "none",
        "write the whole model with the LoRA in it besides: a folder in diffusers' layout, or one .safetensors file",
    )


class EvaluateSettings(Section):
    prompts: int = _f(64, "held-out prompts compared", ge=1)
    seed: int | None = _f(
        None, "seed of the pictures, so that runs of other seeds can be compared; null: the run's", ge=0, lt=2**31
    )
    bootstrap_samples: int = _f(2000, "paired bootstrap resamples", ge=100)
    min_win_rate: float | None = _f(
        None, "quality gate on every held-out reward's win rate; missing it is exit code 7", ge=0, le=1
    )


class ReportSettings(Section):
    title: str = _f("craft-fast run", "heading of the report")
    grid_prompts: int = _f(16, "prompts shown before and after", ge=1)


class EngineSettings(Section):
    vram_gib: float | None = _f(
        None, "hard cap on the GPU memory of this process; null: the whole card", unit="GiB", gt=0
    )
    resident: Literal["auto", "always", "never"] = _f(
        "auto", "keep models on the GPU between stages; auto: where all of them have room"
    )
    vae_tiling: Literal["auto", "always", "never"] = _f(
        "auto", "decode in strips of rows: same picture, a third of the memory; auto: where a whole image does not fit"
    )
    attention: Literal["auto", "sdpa", "xformers"] = _f("auto", "attention kernel; auto: PyTorch's own")
    lora: Literal["auto", "fused", "peft"] = _f("auto", "adapter layers: our op, or PEFT's modules; auto: fused")
    optimizer: Literal["auto", "flat", "bitsandbytes"] = _f(
        "auto", "8-bit AdamW: one launch for all, or one for each tensor; auto: flat on a GPU, bitsandbytes on a CPU"
    )
    autocast: bool = _f(False, "run the UNet in training under autocast, as other trainers do; false: in model.dtype")
    graph: bool = _f(True, "record training step and denoising step once and replay them (CUDA graphs); GPU only")
    compile: bool = _f(False, "torch.compile the transformer blocks; takes minutes at the start")


class Settings(Section):
    """Everything a run is told. Defaults are the ``tiny`` preset's where they are numbers."""

    seed: int = _f(0, "root of all randomness", ge=0, lt=2**31)
    model: ModelSettings = Field(default_factory=ModelSettings, description="the SDXL to align")
    prompts: PromptSettings = Field(default_factory=PromptSettings, description="what to draw")
    images: ImagesSettings = Field(default_factory=ImagesSettings, description="own pictures with captions, if any")
    expand: ExpandSettings = Field(default_factory=ExpandSettings, description="how prompts are enriched")
    generate: GenerateSettings = Field(default_factory=GenerateSettings, description="how candidates are made")
    rewards: dict[str, RewardSettings] = Field(default_factory=dict, description="the judges, by short name")
    score: ScoreSettings = Field(default_factory=ScoreSettings, description="how candidates are scored")
    filter: FilterSettings = Field(default_factory=FilterSettings, description="composite reward filtering")
    train: TrainSettings = Field(default_factory=TrainSettings, description="advantage-weighted training")
    export: ExportSettings = Field(default_factory=ExportSettings, description="the LoRA file")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="held-out comparison")
    engine: EngineSettings = Field(
        default_factory=EngineSettings, description="how the work is laid onto this machine; changes rounding only"
    )
    report: ReportSettings = Field(default_factory=ReportSettings, description="the page")
