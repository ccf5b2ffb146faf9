"""Expanders: templates, files, a real HTTP server, and a real small language model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from craft_fast.config import ExpandSettings, SlotSettings
from craft_fast.errors import ConfigError, CraftError, EnvironmentProblem
from craft_fast.expanders import Expansion, build_groups, make_expander
from craft_fast.expanders.base import fill_instruction, parse_answer
from craft_fast.expanders.template import TemplateExpander
from craft_fast.progress import Silent
from craft_fast.prompt_lines import prompt_id
from craft_fast.records import Prompt
from craft_fast.settings_io import load_settings


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(prompt_id(text), text, "train", i + 1) for i, text in enumerate(texts)]


class Spoken(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


# ---- template


def tiny() -> TemplateExpander:
    expand = load_settings().expand
    return TemplateExpander(expand.templates, expand.slots)


def test_templates_give_k_different_texts_that_hold_the_prompt() -> None:
    base = prompts(*(f"a red circle number {i}" for i in range(50)))
    for found, prompt in zip(tiny().expand(base, 3, 0), base, strict=True):
        assert found.problem is None
        assert len({*found.variants, prompt.text}) == 4
        assert all(text.startswith(prompt.text) for text in found.variants)
        assert all(sum(word in text for word in ("sharp", "vivid", "clean")) >= 2 for text in found.variants)


def test_a_variant_is_a_function_of_seed_and_prompt_alone() -> None:
    base = prompts("a", "b", "c", "d")
    forward = {e.prompt_id: e.variants for e in tiny().expand(base, 3, 7)}
    backward = {e.prompt_id: e.variants for e in tiny().expand(base[::-1], 3, 7)}
    assert forward == backward
    assert forward != {e.prompt_id: e.variants for e in tiny().expand(base, 3, 8)}


def test_a_slot_stays_empty_when_the_prompt_holds_one_of_its_words() -> None:
    [named, other] = tiny().expand(prompts("a circle on a white background", "a circle in the backgrounds"), 3, 0)
    assert all(text.count("background") == 1 for text in named.variants)
    assert all(" background," in text for text in other.variants)


def test_what_an_empty_slot_leaves_is_tidied() -> None:
    slots = {"light": SlotSettings(choices=["soft light"], unless=["lit"])}
    expander = TemplateExpander(["{prompt}, {light}, {light}, sharp", "{light}, {prompt}"], slots)
    [found] = expander.expand(prompts("a lit, room"), 1, 0)
    assert found.variants[0] == "a lit, room, sharp"


def test_braces_in_a_prompt_stay_text() -> None:
    slots = {"light": SlotSettings(choices=["soft light"])}
    [found] = TemplateExpander(["{prompt} in {light}"], slots).expand(prompts("a {light} {prompt} {0}"), 1, 0)
    assert found.variants == ("a {light} {prompt} {0} in soft light",)


def test_all_texts_are_found_when_few_are_left() -> None:
    slots = {"n": SlotSettings(choices=[str(i) for i in range(40)])}
    [found] = TemplateExpander(["{prompt} {n}"], slots).expand(prompts("x"), 40, 3)
    assert set(found.variants) == {f"x {i}" for i in range(40)}


def test_too_few_templates_are_a_problem_not_a_repetition() -> None:
    [found] = TemplateExpander(["{prompt}", "{prompt} sharp"], {}).expand(prompts("x"), 2, 0)
    assert found.variants == ()
    assert "make 1 texts that differ, 2 wanted" in (found.problem or "")


def test_presets_expand_every_sort_of_prompt(tmp_path: Path) -> None:
    base = prompts("a cat", "a photo of a cat at night with lens flare", "happy style, background light, mood")
    for preset in ("tiny", "sdxl"):
        expand = load_settings(preset).expand
        for found in make_expander(expand, cache_dir=tmp_path).expand(base, expand.variants, 0):
            assert found.problem is None
            assert len(set(found.variants)) == expand.variants
            assert not any("{" in text or ", ," in text or "  " in text for text in found.variants)


# ---- groups


def test_groups_have_the_base_prompt_as_member_0_and_held_out_ones_stand_alone() -> None:
    base = [*prompts("a", "b"), Prompt(prompt_id("c"), "c", "heldout", 1)]
    found = build_groups(base, tiny(), 3, 0)
    assert [len(group.variants) for group in found.groups] == [4, 4, 1]
    for group in found.groups:
        assert group.variants[0].text == group.prompt.text
        assert [v.member for v in group.variants] == list(range(len(group.variants)))


class Half:
    key = "half"

    def expand(self, prompts: list[Prompt], k: int, seed: int) -> Iterator[Expansion]:
        for i, prompt in enumerate(prompts):
            yield Expansion(prompt.prompt_id, problem="no") if i % 2 else Expansion(prompt.prompt_id, ("x", "y"))


def test_prompts_whose_expansion_failed_are_dropped_and_said() -> None:
    spoken = Spoken()
    found = build_groups(prompts("a", "b", "c"), Half(), 2, 0, spoken)  # type: ignore[arg-type]
    assert [group.prompt.text for group in found.groups] == ["a", "c"]
    assert [e.problem for e in found.dropped] == ["no"]
    assert spoken.warnings == ["1 of 3 prompts dropped, they could not be expanded", "  line 2: no (b)"]


def test_when_none_is_expanded_it_is_an_error() -> None:
    with pytest.raises(CraftError, match="No prompt could be expanded") as caught:
        build_groups(prompts("x"), TemplateExpander(["{prompt}"], {}), 2, 0)
    assert "expand.kind=template" in caught.value.hint


# ---- file


def test_variants_come_from_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": "a  cat", "variants": ["a cat", "a fluffy cat", "a fluffy cat", "a black cat", "a white cat"]}]
    path = tmp_path / "v.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "a dog", "variants": ["a big dog"]}]))
    expander = make_expander(ExpandSettings(kind="file", file=str(path)), cache_dir=tmp_path)
    cat, dog, cow = expander.expand(prompts("a cat", "a dog", "a cow"), 2, 0)
    assert cat.variants == ("a fluffy cat", "a black cat")
    assert dog.problem == "1 variants in v.jsonl, 2 wanted"
    assert cow.problem == "0 variants in v.jsonl, 2 wanted"


def test_variants_come_from_a_table_and_the_key_follows_its_content(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    path.write_text("prompt,variant\na cat,a fluffy cat\na cat,a black cat\n")
    settings = ExpandSettings(kind="file", file=str(path))
    expander = make_expander(settings, cache_dir=tmp_path)
    [found] = expander.expand(prompts("a cat"), 2, 0)
    assert found.variants == ("a fluffy cat", "a black cat")
    path.write_text("prompt,variant\na cat,a red cat\n")
    assert make_expander(settings, cache_dir=tmp_path).key != expander.key


def test_a_file_without_variants_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text('{"prompt": "a cat"}\n')
    with pytest.raises(ConfigError, match="holds none") as caught:
        make_expander(ExpandSettings(kind="file", file=str(path)), cache_dir=tmp_path)
    assert "line 1" in caught.value.why


# ---- answers of language models


@pytest.mark.parametrize(
    "answer",
    [
        "a fluffy cat\na black cat",
        "1. a fluffy cat\n2) a black cat\n3. a third cat",
        'Here are two versions:\n\n- "a fluffy cat"\n* **a black cat**\n',
        '["a fluffy cat", "a black cat"]',
        '```json\n["a fluffy cat", "a black cat"]\n```',
        "<think>The user wants\ncats.</think>\na cat\na fluffy cat\nA FLUFFY cat\na black cat",
        "\u201ca fluffy cat\u201d\n\u201ca black cat\u201d",
    ],
)
def test_answers_of_many_forms_are_read(answer: str) -> None:
    assert parse_answer(answer, "a cat", 2) == (("a fluffy cat", "a black cat"), None)


@pytest.mark.parametrize(
    "answer", ["I'm sorry, but I can't do that.\nx\ny", "I\u2019m unable to help\nx\ny", "As an AI model, no\nx"]
)
def test_refusals_are_told_apart(answer: str) -> None:
    assert (parse_answer(answer, "a cat", 2)[1] or "").startswith("the model refused")


def test_too_few_versions_and_controls_are_a_problem() -> None:
    assert parse_answer("one cat\n\x1b[31mred cat\n...\n123", "a cat", 2)[1] == (
        "1 usable versions in the answer, 2 asked: one cat\\x0a\\x1b[31mred cat\\x0a...\\x0a123"
    )


def test_the_instruction_is_filled_in_one_pass() -> None:
    assert fill_instruction("{n} of {prompt}", "a {n} {prompt}", 3) == "3 of a {n} {prompt}"


# ---- a local model


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 without layers whose next token depends on the position alone: it writes words and line ends."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language-model")
    words = [f"word{i}" for i in range(30)]
    vocab = {token: i for i, token in enumerate(["<unk>", "<end>", "\n", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    places = 128
    config = GPT2Config(
        vocab_size=len(vocab), n_positions=places, n_embd=places, n_layer=0, n_head=1, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(places))
        model.lm_head.weight.zero_()
        for place in range(places):
            token = vocab["\n"] if place % 2 else vocab[words[(place // 2) % 30]]
            model.lm_head.weight[token, place] = 5.0
    model.save_pretrained(folder)
    return folder


def local(folder: Path, tmp_path: Path, **changes: Any) -> Any:
    settings = ExpandSettings(**{"kind": "transformers", "model": str(folder), "max_new_tokens": 20, **changes})
    return make_expander(settings, cache_dir=tmp_path, device="cpu")


def test_a_local_model_writes_variants(language_model: Path, tmp_path: Path) -> None:
    [found] = local(language_model, tmp_path, temperature=0.0).expand(prompts("a cat"), 3, 0)
    assert found.problem is None
    assert len(set(found.variants)) == 3
    assert all(text.startswith("word") for text in found.variants)


def test_sampling_is_a_function_of_seed_and_prompt_and_leaves_the_global_state(
    language_model: Path, tmp_path: Path
) -> None:
    import torch

    def run(seed: int) -> list[Expansion]:
        return list(local(language_model, tmp_path, temperature=30.0).expand(prompts("a cat", "a dog"), 1, seed))

    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert run(3) == run(3)
    assert run(3) != run(4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_prompt_too_long_for_the_model_is_a_problem(language_model: Path, tmp_path: Path) -> None:
    [found] = local(language_model, tmp_path).expand(prompts("long " * 150), 3, 0)
    assert "0 usable versions" in (found.problem or "")


def test_a_folder_with_pickled_weights_or_none_is_refused(language_model: Path, tmp_path: Path) -> None:
    import shutil

    import torch

    folder = tmp_path / "pickled"
    shutil.copytree(language_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(EnvironmentProblem) as caught:
        list(local(folder, tmp_path).expand(prompts("x"), 2, 0))
    assert caught.value.exit_code == 4
    with pytest.raises(EnvironmentProblem):
        local(tmp_path / "none", tmp_path)
