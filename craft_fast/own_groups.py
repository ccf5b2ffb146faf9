"""Groups of own pictures, their verdicts and weights where they came with them, and what changed in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from craft_fast.own_folder import OwnFolder, OwnPicture
from craft_fast.prompt_lines import excerpt, prompt_id
from craft_fast.records import Candidate, Group, Prompt, Selection, Variant

_SHOWN = 3


def own_groups(folder: OwnFolder) -> list[Group]:
    """One group a caption; its picture files and weights are in the prompt's ``meta`` under ``own``, by member."""
    by_prompt: dict[str, list[OwnPicture]] = {}
    for picture in folder.pictures:
        by_prompt.setdefault(prompt_id(picture.prompt), []).append(picture)
    groups = []
    for line, (key, pictures) in enumerate(by_prompt.items(), 1):
        own = {
            str(p.member): {"file": p.name, "sha256": p.sha256, "weight": p.weight, "advantage": p.advantage}
            for p in pictures
        }
        prompt = Prompt(key, pictures[0].prompt, "train", line, {"own": own})
        drawn = () if folder.weighted else (Variant(key, 0, prompt.text),)
        members = sorted((Variant(key, p.member, p.variant) for p in pictures), key=lambda v: v.member)
        groups.append(Group(prompt, (*drawn, *members)))
    return groups


def own_members(group: Group) -> Mapping[str, Mapping[str, Any]]:
    """What is known of a group's own pictures, by member; empty where the model draws all of it."""
    found: Mapping[str, Mapping[str, Any]] = group.prompt.meta.get("own", {})
    return found


def drawn_part(group: Group) -> Group | None:
    """What the model draws of a group: member 0, or nothing where the folder's weights are taken."""
    own = own_members(group)
    drawn = tuple(variant for variant in group.variants if str(variant.member) not in own)
    return Group(group.prompt, drawn) if drawn else None


# ---- weights that the folder gives


def given_selections(groups: Sequence[Group], rows: Sequence[Candidate]) -> list[Selection]:
    """Verdicts of a folder whose weights are taken as they are: all accepted, advantages as given, in groups' order."""
    by_member = {(row.prompt_id, row.member): row for row in rows}
    selections = []
    for group in groups:
        for variant in group.variants:
            row = by_member.get((variant.prompt_id, variant.member))
            if row is not None:
                entry = own_members(group)[str(variant.member)]
                advantage = entry["weight"] if entry["advantage"] is None else entry["advantage"]
                selections.append(
                    Selection(row.candidate_id, row.prompt_id, row.member, True, {}, 0.0, float(advantage))
                )
    return selections


def given_weights(groups: Sequence[Group], rows: Sequence[Candidate]) -> dict[str, float]:
    """Weight of each candidate, as the folder's metadata gives it."""
    own = {(g.prompt.prompt_id, int(m)): entry for g in groups for m, entry in own_members(g).items()}
    return {row.candidate_id: float(own[row.prompt_id, row.member]["weight"]) for row in rows}


# ---- what changed


def listing(folder: OwnFolder) -> dict[str, list[Any]]:
    """What is remembered of a folder, by name: content, prompt, weight."""
    return {p.name: [p.sha256, p.prompt, p.weight] for p in folder.pictures}


def changes(before: Mapping[str, Sequence[Any]], after: Mapping[str, Sequence[Any]]) -> str:
    """One line that says how two listings differ; '' where they do not. What was renamed did not change."""
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    kept = {before[name][0] for name in gone} & {after[name][0] for name in new}
    gone = {name for name in gone if before[name][0] not in kept}
    new = {name for name in new if after[name][0] not in kept}
    both = before.keys() & after.keys()
    found = {
        "gone": gone,
        "new": new,
        "with other pixels": {name for name in both if before[name][0] != after[name][0]},
        "with another caption": {name for name in both if before[name][1] != after[name][1]},
        "with another weight": {name for name in both if before[name][2] != after[name][2]},
    }
    return "; ".join(f"{len(names)} {what} ({_named(names)})" for what, names in found.items() if names)


def _named(names: set[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(excerpt(name, 60) for name in sorted(names)[:_SHOWN]) + more
