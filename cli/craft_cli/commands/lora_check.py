"""``craft-fast lora check``: what a LoRA file is, and which programs load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_cli import options as opt
from craft_cli.commands import lora_files as files
from craft_cli.ui.output import choose_mode, print_result
from craft_cli.ui.text import table
from craft_fast.errors import IntegrityError
from craft_fast.quiet import quiet_third_party

if TYPE_CHECKING:
    from craft_fast.lora.check import Finding
    from craft_fast.lora.describing import Facts

HELP = opt.help_text(
    "Say what a LoRA file is, and whether diffusers, ComfyUI, A1111 and Forge load it.",
    "By each program's rules for key names and headers; diffusers is asked itself. A file in diffusers' own names "
    "should load there alone, any other everywhere: exit code 6 where one that should load it does not.",
    examples=(
        "craft-fast lora check sea.safetensors",
        "craft-fast lora check sea --model models/sdxl --json",
    ),
)
_SHOWN = 200  # characters of a header's entry
_PROBLEMS = 2  # of one program


def check(
    file: files.File,
    model: files.Model = None,
    model_config: files.ModelConfig = None,
    offline: files.Offline = False,
    runs: opt.Runs = opt.DEFAULT_RUNS,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Look, say what was found; what should load and does not is an error after it."""
    mode = choose_mode(as_json=as_json, quiet=quiet)
    chosen = files.choose(file, runs)
    quiet_third_party()
    named = files.model_of(model, model_config, chosen)
    config = files.unet_config(named, offline=offline)
    from craft_fast.lora.check import check_file
    from craft_fast.lora.describing import describe, refused, written_as

    adapter, why_not = refused(chosen.path, config)
    findings = check_file(chosen.path, config)
    facts = describe(chosen.path, adapter)
    wrong = files.misfits(adapter, named, offline=offline) if adapter else []
    should = ("diffusers",) if written_as(chosen.path) == "diffusers" else tuple(one.program for one in findings)
    failed = [one for one in findings if one.program in should and not one.ok]
    ok = not (failed or wrong or why_not)
    lines = [*_facts_lines(chosen.path, facts), *table([(one.program, _verdict(one)) for one in findings])]
    if named.path is not None and adapter is not None:
        lines.append(f"{named.path}: " + (f"does not fit: {wrong[0]}" if wrong else "its layers are the model's"))
    data = {
        "ok": ok, "file": str(chosen.path), **_facts_data(facts), "model": named.path, "misfits": wrong,
        "programs": [_finding_data(one, one.program in should) for one in findings],
    }  # fmt: skip
    print_result(mode, lines, data, event="result")
    if not ok:
        raise _error(chosen.path, failed, wrong, why_not, facts.base)


def _verdict(found: Finding) -> str:
    """``loads``, ``loads partly``, ``loads wrongly``, ``hidden`` or ``does not load``, and why."""
    more = f"; and {len(found.problems) - _PROBLEMS} more" if len(found.problems) > _PROBLEMS else ""
    why = "; ".join(problem.removeprefix("hidden: ") for problem in found.problems[:_PROBLEMS]) + more
    return _word(found) + (f": {why}" if why else "")


def _word(found: Finding) -> str:
    if found.ok:
        return "loads"
    if found.loaded == 0:
        return "does not load"
    if found.loaded < found.total:
        return f"loads partly, {found.loaded} of {found.total} layers"
    if any(problem.startswith("hidden") for problem in found.problems):
        return "hidden"
    if all(problem.startswith("listed") for problem in found.problems):
        return "loads"
    return "loads wrongly"


def _error(path: Path, failed: list[Finding], wrong: list[str], why_not: str, base: str | None) -> IntegrityError:
    said = [why_not] if why_not else []
    said += [f"{one.program} {_word(one)}: {one.problems[0]}" for one in failed] if not why_not else []
    said += wrong[:3]
    if base not in (None, "SDXL"):
        hint = f"it seems to be for {base}: use it with that model"
    elif why_not:
        hint = "a LoRA of another base model fits that one alone; for one that is not of SDXL's size: --model PATH"
    else:
        hint = f"craft-fast lora convert {path} --to kohya writes one that all programs load"
    return IntegrityError(
        "A program that should load this LoRA does not", where=str(path), why="; ".join(said), hint=hint
    )


def _finding_data(found: Finding, should: bool) -> dict[str, Any]:
    return {
        "program": found.program, "ok": found.ok, "should_load": should, "verdict": _word(found),
        "loaded": found.loaded, "layers": found.total, "problems": list(found.problems),
    }  # fmt: skip


# ---- what it is


def _facts_lines(path: Path, facts: Facts) -> list[str]:
    ranks = f", {files.ranks_text(facts.ranks)}" if facts.ranks else ""
    lines = [f"{path}: a LoRA in {facts.naming}{ranks}, {', '.join(facts.dtypes)}, {files.size_text(facts.size)}"]
    rows = [("layers", ", ".join(f"{component} {n}" for component, n in facts.layers.items()))] if facts.layers else []
    if facts.alphas:
        stored = ", ".join("not stored" if alpha is None else f"{alpha:g}" for alpha in list(facts.alphas)[:4])
        rows.append(("alpha", stored + (", ..." if len(facts.alphas) > 4 else "")))
    rows.append(("base by shapes", facts.base or "not known"))
    rows += [(key, _short(value)) for key, value in (*facts.said.items(), *sorted(facts.craft.items()))]
    return [*lines, *("  " + line for line in table(rows))]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _facts_data(facts: Facts) -> dict[str, Any]:
    return {
        "naming": facts.naming, "size": facts.size, "dtypes": list(facts.dtypes), "base": facts.base,
        "ranks": {str(rank): n for rank, n in facts.ranks.items()},
        "alphas": {"none" if alpha is None else f"{alpha:g}": n for alpha, n in facts.alphas.items()},
        "layers": dict(facts.layers), "header": dict(facts.said), "craft": dict(facts.craft),
    }  # fmt: skip
