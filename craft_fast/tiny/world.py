"""The words of the small world: scenes, their captions, and the way back from a caption to a scene.

A scene is one shape, two alike, or two with a relation, on one of four backgrounds. Plain captions leave much
unsaid; rich captions name the background and add the words of quality. In the world's training pictures, as on
the web, richer captions go with better pictures.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (50, 85, 225),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 190),
    "cyan": (60, 205, 215),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
    "navy": (20, 30, 90),
}
RELATIONS = ("left of", "right of", "above", "below")
QUALITY_WORDS = ("sharp", "vivid", "clean")
FLAW_WORDS = ("blurry", "noisy", "faded")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
WORDS = tuple(
    sorted(
        {"a", "two", "left", "right", "of", "above", "below", "on", "background", ","}
        | set(SHAPES)
        | set(PLURALS.values())
        | set(COLOURS)
        | set(BACKGROUNDS)
        | set(QUALITY_WORDS)
        | set(FLAW_WORDS)
    )
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape of one colour."""

    colour: str
    shape: str


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption asks for. ``relation`` is set for two different things; ``background`` may be left open."""

    things: tuple[Thing, ...]
    relation: str | None = None
    background: str | None = None


def caption(scene: Scene, words: tuple[str, ...] = ()) -> str:
    """The caption of a scene, with quality or flaw words at its end."""
    first = scene.things[0]
    if len(scene.things) == 1:
        text = f"a {first.colour} {first.shape}"
    elif scene.relation is None:
        text = f"two {first.colour} {PLURALS[first.shape]}"
    else:
        second = scene.things[1]
        text = f"a {first.colour} {first.shape} {scene.relation} a {second.colour} {second.shape}"
    if scene.background is not None:
        text += f" on a {scene.background} background"
    return ", ".join([text, *words])


_COLOUR = "|".join(COLOURS)
_SHAPE = "|".join(SHAPES)
_PLURAL = "|".join(PLURALS.values())
_SCENE = re.compile(
    rf"^(?:(?:a )?(?P<c1>{_COLOUR}) (?P<s1>{_SHAPE})"
    rf"(?: (?P<rel>{'|'.join(RELATIONS)}) (?:a )?(?P<c2>{_COLOUR}) (?P<s2>{_SHAPE}))?"
    rf"|two (?P<c3>{_COLOUR}) (?P<s3>{_PLURAL}))"
    rf"(?: on a (?P<bg>{'|'.join(BACKGROUNDS)}) background)?$"
)
_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}


def parse(text: str) -> Scene | None:
    """The scene a caption asks for, or None when it is not a caption of this world."""
    match = _SCENE.match(" ".join(text.lower().split(",")[0].split()))
    if match is None:
        return None
    part = match.groupdict()
    if part["c3"]:
        thing = Thing(part["c3"], _SINGULAR[part["s3"]])
        return Scene((thing, thing), None, part["bg"])
    first = Thing(part["c1"], part["s1"])
    if part["rel"] is None:
        return Scene((first,), None, part["bg"])
    return Scene((first, Thing(part["c2"], part["s2"])), part["rel"], part["bg"])


def random_scene(rng: random.Random, *, name_background: float) -> Scene:
    """A scene: 20 % single, 15 % two alike, 65 % a pair; the background is named with the given probability."""
    kind = rng.random()
    background = rng.choice(list(BACKGROUNDS)) if rng.random() < name_background else None
    first = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES))
    if kind < 0.20:
        return Scene((first,), None, background)
    if kind < 0.35:
        return Scene((first, first), None, background)
    second = first
    while second == first:
        second = Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES))
    return Scene((first, second), rng.choice(RELATIONS), background)


def mistaken(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one attribute wrong: what a careless caption says."""
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    kinds = (
        ["colour", "shape"] + (["relation"] if scene.relation else []) + (["background"] if scene.background else [])
    )
    kind = rng.choice(kinds)
    if kind == "relation":
        return replace(scene, relation=rng.choice([r for r in RELATIONS if r != scene.relation]))
    if kind == "background":
        return replace(scene, background=rng.choice([b for b in BACKGROUNDS if b != scene.background]))
    if kind == "colour":
        new = replace(thing, colour=rng.choice([c for c in COLOURS if c != thing.colour]))
    else:
        new = replace(thing, shape=rng.choice([s for s in SHAPES if s != thing.shape]))
    if scene.relation is None:
        return replace(scene, things=(new,) * len(scene.things))
    things = list(scene.things)
    things[index] = new
    if things[0] == things[1]:
        return mistaken(scene, rng)
    return replace(scene, things=(things[0], things[1]))


def prompt_sets(seed: int, train: int, heldout: int) -> tuple[list[str], list[str]]:
    """Distinct plain prompts for training and for evaluation, with none in common; 30 % name the background."""
    rng = random.Random(seed)
    texts: list[str] = []
    seen: set[str] = set()
    while len(texts) < train + heldout:
        text = caption(random_scene(rng, name_background=0.3))
        if text not in seen:
            seen.add(text)
            texts.append(text)
    return texts[heldout:], texts[:heldout]
