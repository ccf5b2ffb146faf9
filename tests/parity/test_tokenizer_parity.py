"""Tokens and cleaned text against open_clip's tokenizer and hpsv2's own copy of it, with the true vocabulary."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from craft_fast.rewards.base import Preprocessing
from craft_fast.rewards.texts import Texts, clean
from tests.unit.hostile_prompts import hostile_prompts

pytestmark = pytest.mark.parity
PACKAGES = ("open_clip", "hpsv2/src/open_clip")
# Loads the two modules by their files: the packages' own imports are slow and want tkinter.
SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
asked, answer = json.loads(Path(sys.argv[1]).read_text()), {}
for name in asked["packages"]:
    top, *rest = name.split("/")
    where = importlib.util.find_spec(top).submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("tok_" + top, Path(where, *rest, "tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = module.SimpleTokenizer()
    answer[name] = {
        "clean": [module.whitespace_clean(module.basic_clean(text)) for text in asked["prompts"]],
        "tokens": [module.tokenize([text])[0].tolist() for text in asked["prompts"]],
        "lengths": [len(tokenizer.encode(text)) + 2 for text in asked["prompts"]],
    }
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    answer["vocab"], answer["merges"] = tokenizer.encoder, merges
Path(sys.argv[2]).write_text(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def answer(hpsv2_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokens")
    asked, found = folder / "asked.json", folder / "found.json"
    asked.write_text(json.dumps({"packages": PACKAGES, "prompts": hostile_prompts()}))
    subprocess.run([hpsv2_python, "-c", SCRIPT, asked, found], check=True, timeout=600)
    answered: dict[str, Any] = json.loads(found.read_text())
    return answered


@pytest.fixture(scope="module")
def tokenizer(answer: dict[str, Any]) -> Any:
    """transformers' tokenizer of the same vocabulary, under the names that its files give the two special tokens."""
    from transformers import CLIPTokenizer

    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {names.get(token, token): index for token, index in answer["vocab"].items()}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in answer["merges"]])


@pytest.mark.parametrize("package", PACKAGES)
def test_every_prompt_is_cleaned_alike(answer: dict[str, Any], package: str) -> None:
    found = [clean(prompt) for prompt in hostile_prompts()]
    assert [pair for pair in zip(found, answer[package]["clean"], strict=True) if pair[0] != pair[1]] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_prompt_has_the_same_tokens(answer: dict[str, Any], tokenizer: Any, package: str) -> None:
    prompts = hostile_prompts()
    texts = Texts(tokenizer, Preprocessing(family="clip"), pad_token_id=0)
    tokens = [texts.tokens(prompt)[0].tolist() for prompt in prompts]
    pairs = zip(prompts, tokens, answer[package]["tokens"], strict=True)
    assert [prompt for prompt, mine, theirs in pairs if mine != theirs] == []
    lengths = answer[package]["lengths"]
    assert texts.cut == {prompt: n - 77 for prompt, n in zip(prompts, lengths, strict=True) if n > 77}
