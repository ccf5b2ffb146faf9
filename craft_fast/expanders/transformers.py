"""Variants from a local instruct model through transformers; safetensors weights only, no remote code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from craft_fast.config import ExpandSettings
from craft_fast.errors import EnvironmentProblem
from craft_fast.expanders.base import Expansion, fill_instruction, parse_answer
from craft_fast.quiet import quiet_progress_bars, quiet_third_party
from craft_fast.records import Prompt
from craft_fast.rng import derive_seed
from craft_fast.store.digest import digest_folder, digest_json
from craft_fast.store.run import resolve_uri

_PATTERNS = ("*.json", "*.txt", "*.safetensors", "*.model", "*.jinja")


class TransformersExpander:
    """A causal language model, loaded at the first prompt.

    Args:
        settings: the expand section; ``model`` is a folder, package URI or hub id.
        device: auto, cpu, cuda or cuda:N.
        offline: a hub id must be in the hub's cache; no network is asked.

    Raises:
        EnvironmentProblem: there is no such folder.
    """

    def __init__(self, settings: ExpandSettings, device: str = "auto", *, offline: bool = False) -> None:
        self.settings = settings
        self.device = device
        self.offline = offline
        self.where = resolve_uri(settings.model)
        content = digest_folder(self.where) if isinstance(self.where, Path) else self.where
        self.key = digest_json(["transformers", content])

    def expand(self, prompts: Sequence[Prompt], k: int, seed: int) -> Iterator[Expansion]:
        """Yield the model's versions; sampling is a function of seed and prompt."""
        if not prompts:
            return
        tokenizer, model = self._load()
        for prompt in prompts:
            asked = fill_instruction(self.settings.instruction, prompt.text, k)
            answer = self._answer(tokenizer, model, asked, derive_seed(seed, "expand", prompt.prompt_id))
            variants, problem = parse_answer(answer, prompt.text, k)
            yield Expansion(prompt.prompt_id, variants, problem)

    def _load(self) -> tuple[Any, Any]:
        quiet_third_party()
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        quiet_progress_bars()
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        folder = local_folder(self.settings.model, offline=self.offline)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto" if wanted.startswith("cuda") else torch.float32,
            )
        except (OSError, ValueError, KeyError) as err:
            raise EnvironmentProblem(
                "The language model that writes variants cannot be loaded.",
                where=str(self.where),
                why=" ".join(str(err).split())[:300],
                hint="expand.model must be a folder of config.json, model.safetensors and a tokenizer, or a hub id",
            ) from None
        return tokenizer, model.to(wanted).eval()

    def _answer(self, tokenizer: Any, model: Any, text: str, seed: int) -> str:
        import torch

        if tokenizer.chat_template:
            asked = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(text, return_tensors="pt")
        room = getattr(model.config, "max_position_embeddings", 4096) - self.settings.max_new_tokens
        if inputs["input_ids"].shape[1] > room:
            return ""
        sampling: dict[str, Any] = {"do_sample": self.settings.temperature > 0}
        if sampling["do_sample"]:
            sampling["temperature"] = self.settings.temperature
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # generate() takes no generator of its own: seed the global one, and leave it as it was.
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed % 2**63)
            ids = model.generate(
                **{name: value.to(model.device) for name, value in inputs.items()},
                max_new_tokens=self.settings.max_new_tokens,
                pad_token_id=pad,
                **sampling,
            )
        answer: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer


def local_folder(where: str, *, offline: bool = False) -> Path:
    """The local folder of a language model: path, ``package:NAME/FOLDER``, or hub id, fetched where it is not here.

    Args:
        where: one of these.
        offline: a hub id must be in the hub's cache; no network is asked.

    Raises:
        EnvironmentProblem: it is not there.
    """
    from craft_fast.sdxl.hub import fetch

    found = resolve_uri(where)
    if isinstance(found, Path):
        return found
    return fetch(found, setting="expand.model", patterns=_PATTERNS, missing=_lacks, offline=offline)


def _lacks(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return f"{folder} lacks config.json"
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    missing = sorted(name for name in names if not (folder / name).is_file())
    return f"{folder} lacks {', '.join(missing)}" if missing else ""
