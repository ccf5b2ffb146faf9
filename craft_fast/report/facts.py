"""What to do with the result, and what it takes to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from craft_fast.records import Provenance
from craft_fast.report.advice import Advice
from craft_fast.report.document import section
from craft_fast.report.inputs import ReportData
from craft_fast.report.text import esc


def next_section(data: ReportData, advice: Sequence[Advice]) -> str:
    """What to try next, then how to use what there is.

    Args:
        data: the gathered run.
        advice: see ``advise``.
    """
    lead = "From this run\u2019s figures by plain rules, the most important first."
    if not advice:
        lead = "Nothing in this run\u2019s figures asks for a change."
    items = "".join(_advice(item) for item in advice)
    body = f"<ol class=advice>{items}</ol>" if items else ""
    if any(item.commands for item in advice) and data.evaluation:
        name, kept = shlex.quote(data.name), shlex.quote(f"{data.name}-before")
        # Quoted whole: a name with a space needs it, and a plain one stays plain.
        copied = f"cp -r {shlex.quote(f'runs/{data.name}')} {shlex.quote(f'runs/{data.name}-before')}"
        body += (
            "<p class=note>Each command continues this run: what its change leaves valid is kept, and the new result "
            "takes this one\u2019s place. To hold both against one another, copy the folder first: "
            f"<code>{esc(copied)}</code>, and in the end <code>craft-fast compare {esc(kept)} {esc(name)}</code>.</p>"
        )
    return section("next", "What to try next", lead, body + _use(data))


def _advice(item: Advice) -> str:
    commands = "<span class=or>or</span>".join(f"<pre><code>{esc(line)}</code></pre>" for line in item.commands)
    return f"<li><h3>{esc(item.title)}</h3><p>{esc(item.why)}</p>{commands}</li>"


def _use(data: ReportData) -> str:
    """Where the LoRA goes, by program."""
    if not data.loras:
        return ""
    path, name = data.loras[0].path, shlex.quote(data.name)
    if data.settings["train"]["method"] == "full":
        folder = path.rpartition("/")[0]
        ways = [("diffusers", f'UNet2DConditionModel.from_pretrained("{folder}")', "a whole UNet, not a LoRA")]
    else:
        stem = path.rpartition("/")[2].removesuffix(".safetensors")
        ways = [("diffusers", f'pipe.load_lora_weights("{path}")', "")]
        if data.settings["export"]["format"] == "diffusers":
            ways.append(
                ("for ComfyUI", f"craft-fast lora convert {name}", "ComfyUI does not load diffusers\u2019 names")
            )
        else:
            ways += [
                ("ComfyUI", "models/loras/", "copy it there; node Load LoRA, strength 1"),
                ("A1111, Forge", "models/Lora/", f"copy it there; in the prompt <lora:{stem}:1>"),
            ]
        ways += [
            ("several strengths", f"craft-fast try {name} --prompt 'your prompt'", "one grid of pictures"),
            ("check the file", f"craft-fast lora check {name}", "by the rules of each program"),
        ]
    if data.selections:
        out = shlex.quote(f"{data.name}-accepted")
        ways.append(
            (
                "train elsewhere",
                f"craft-fast dataset {out} --name {name}",
                "the accepted pictures with captions and weights",
            )
        )
    rows = "".join(
        f"<dt>{esc(what)}</dt><dd>{esc(how)}{f' <span>{esc(note)}</span>' if note else ''}</dd>"
        for what, how, note in ways
    )
    return f"<h3>Use it: <code>{esc(path)}</code>, beside this page</h3><dl class=use>{rows}</dl>"


def facts_section(data: ReportData) -> str:
    """Versions, digests and settings, folded."""
    parts = [
        ("Rewards", _definitions(_ways(data))),
        ("Versions", _definitions(list(data.versions.items()))),
        ("Digests", _definitions(_digests(data))),
        ("Settings", f"<pre>{esc(data.settings_text)}</pre>"),
    ]
    body = "".join(f"<details><summary>{name}</summary>{content}</details>" for name, content in parts)
    lead = f"Seed {data.seed}. The same command with these settings, versions and device makes the same files."
    return section("repeat", "To repeat it", lead, body)


def _digests(data: ReportData) -> list[tuple[str, str]]:
    model = [("model", data.model_digest)] if data.model_digest else []
    loras = [(ref.path, ref.sha256) for ref in data.loras]
    rewards = [(f"reward {name}", key) for name, key in data.reward_keys.items()]
    return [*loras, *model, *rewards, *((f"stage {row.name}", row.key) for row in data.stages)]


def _ways(data: ReportData) -> list[tuple[str, str]]:
    """One line a reward: how its scores came about."""
    return [
        (name, "; also: ".join(map(_way, ways)) if ways else "no scores yet") for name, ways in data.provenances.items()
    ]


def _way(way: Provenance | None) -> str:
    if way is None:
        return "how its scores came about was not recorded"
    named = {
        "checkpoint": way.checkpoint[:12],
        "pictures": way.preprocessing,
        "text": way.tokenizer,
        "precision": way.precision,
    }
    parts = [way.backend, *(f"{name} {value}" for name, value in named.items() if value), way.note]
    return ", ".join(part for part in parts if part)


def _definitions(items: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in items) + "</dl>"
