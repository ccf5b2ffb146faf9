"""Docs that cannot go stale: references are what the code gives, links resolve, quoted messages are in the code."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from craft_cli import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [file for root in ("craft_fast", "cli", "kernels", "bench") for file in (ROOT / root).rglob("*.py")]


def test_the_references_are_what_the_code_gives() -> None:
    for name, page in reference.PAGES.items():
        found = (ROOT / "docs/reference" / name).read_text()
        assert found == page(), f"docs/reference/{name} is old: type make reference"


def test_the_reference_has_every_setting_and_every_command() -> None:
    from craft_fast.settings_io import field_docs

    pages = {name: page() for name, page in reference.PAGES.items()}
    for doc in field_docs():
        if doc.key == "rewards":
            continue  # a section of its own
        assert f"`{doc.key}`" in pages["settings.md"] or f"`{doc.key.partition('.')[2]}`" in pages["settings.md"]
    for command in ("run", "lora apply", "rewards score", "try", "compare", "dataset", "bench sdxl"):
        assert re.search(rf"^##+ `?craft-fast {command}`?$", pages["cli.md"], re.MULTILINE), command
    assert "--images" in pages["cli.md"]


def anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them: lower case, punctuation dropped, spaces to hyphens."""
    text = page.read_text()
    titles, ids = re.findall(r"^#+ (.+)$", text, re.MULTILINE), re.findall(r'<a id="([\w-]+)">', text)
    return {*ids} | {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, f"README.md does not name docs/{page.name}"


def test_quoted_messages_are_in_the_code() -> None:
    """As a whole in one literal; what stands in braces there, or is joined from several literals, cannot be quoted."""
    text = "\n".join(file.read_text() for file in SOURCES)
    items = re.findall(r"^- (\*\*.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [message for item in items for message in re.findall(r"\*\*(.+?)\*\*", item)]
    assert len(quoted) > 60
    assert [message for message in quoted if message not in text] == []


def test_named_functions_and_settings_exist() -> None:
    from craft_fast.settings_io import field_docs

    keys = {doc.key for doc in field_docs()}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)`", page.read_text()):
            if name.startswith(("craft_fast.", "craft_kernels.")) and page.name == "how-craft-works.md":
                module, _, attribute = name.rpartition(".")
                there = importlib.util.find_spec(name) if module == "craft_kernels" else None
                assert there or hasattr(importlib.import_module(module), attribute), f"{page.name}: {name}"
            elif name.partition(".")[0] in sections - {"rewards", "report"} and page.name not in (
                "lab-book.md",
                "design.md",
            ):
                assert name in keys or any(key.startswith(name) for key in keys), f"{page.name}: {name}"


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for target in re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", page.read_text(), re.MULTILINE):
            assert "".join(target) in targets, f"{page.name}: make {target}"


def test_programs_and_files_that_pages_start_exist() -> None:
    found = 0
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for file in re.findall(r"^(?:bash|(?:\S*/)?python3?) ([\w./-]+\.(?:sh|py))", block, re.MULTILINE):
                assert (ROOT / file).is_file(), f"{page.name}: {file}"
            for file in re.findall(r"^\S*python3? -m pytest ([\w./-]+)", block, re.MULTILINE):
                found += 1
                assert (ROOT / file).exists(), f"{page.name}: {file}"
        for file in re.findall(r"`((?:bench|tests|craft_fast|cli|kernels)/[\w./-]+\.\w+)`", page.read_text()):
            found += 1
            assert (ROOT / file).exists(), f"{page.name}: {file}"
    assert found > 5


def test_every_variable_that_the_code_reads_is_named() -> None:
    """Ours, CRAFT_*; an option's own stands with the option."""
    text = "\n".join(file.read_text() for file in SOURCES)
    read = set(re.findall(r'"(CRAFT_[A-Z_]+)"', text))
    page = reference.cli_reference()
    assert {"CRAFT_DEBUG", "CRAFT_RUNS"} < read
    assert [name for name in sorted(read) if f"`{name}`" not in page] == []
    assert all(name in text for names in reference.VARIABLES for name in names.split(", "))
