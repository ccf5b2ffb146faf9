"""Tokens of image-reward's prompts against the tokenizer that the package itself calls."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from transformers import BertTokenizer

from craft_fast.rewards import catalog
from craft_fast.rewards.texts import Texts
from tests.parity.small_sources import WORDS
from tests.unit.hostile_prompts import hostile_prompts

pytestmark = pytest.mark.parity
# As ImageReward/models/BLIP/blip.py and ImageReward.score have it.
SCRIPT = """
import json, sys
from pathlib import Path
from transformers import BertTokenizer
folder = Path(sys.argv[1])
tokenizer = BertTokenizer.from_pretrained(folder)
tokenizer.add_special_tokens({"bos_token": "[DEC]"})
tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
call = lambda text: tokenizer(text, padding="max_length", truncation=True, max_length=35)
asked = json.loads((folder / "asked").read_text())
found = [[call(text)[key] for key in ("input_ids", "attention_mask")] for text in asked]
(folder / "found").write_text(json.dumps(found))
"""


def test_every_hostile_prompt_has_the_same_tokens(image_reward_python: Path, tmp_path: Path) -> None:
    prompts = [*hostile_prompts(), "a [SEP] red [MASK] circle [unused0]", "ΟΔΟΣ İstanbul ﬁne"]
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (tmp_path / "asked").write_text(json.dumps(prompts), encoding="utf-8")
    subprocess.run([image_reward_python, "-I", "-c", SCRIPT, tmp_path], check=True, timeout=600)
    expected = json.loads((tmp_path / "found").read_text())
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})
    texts = Texts(tokenizer, catalog.get("image-reward").spec)
    found = [[part.tolist() for part in texts.tokens(prompt)] for prompt in prompts]
    wrong = [ascii(prompt) for prompt, mine, theirs in zip(prompts, found, expected, strict=True) if mine != theirs]
    assert wrong == []
    assert len({str(ids) for ids, _ in found}) > 700
