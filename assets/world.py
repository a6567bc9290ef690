"""What there is in the Canvas world: objects, styles, backgrounds and the words for them.

The lists are data: the renderer, the training scripts, `canvas.json` and the evaluation suites read them from here.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGE_SIZE = 64
"""Side of a scene in pixels."""


@dataclass(frozen=True)
class Thing:
    """One object of the world."""

    icon: str
    """Name of its icon, the same in every artwork set."""
    group: str
    """Super-category: animal, food, vehicle, tool, building or weapon."""
    synonyms: tuple[str, ...] = ()
    """Other words for it that captions use now and then."""


OBJECTS: dict[str, Thing] = {
    "cat": Thing("cat-face", "animal", ("kitten", "kitty")),
    "dog": Thing("dog-face", "animal", ("puppy", "hound")),
    "fish": Thing("tropical-fish", "animal", ("goldfish",)),
    "butterfly": Thing("butterfly", "animal", ("moth",)),
    "penguin": Thing("penguin", "animal"),
    "turtle": Thing("turtle", "animal", ("tortoise",)),
    "apple": Thing("red-apple", "food"),
    "banana": Thing("banana", "food"),
    "pizza": Thing("pizza", "food"),
    "burger": Thing("hamburger", "food", ("hamburger", "cheeseburger")),
    "mushroom": Thing("mushroom", "food", ("toadstool",)),
    "car": Thing("automobile", "vehicle", ("automobile",)),
    "airplane": Thing("airplane", "vehicle", ("plane", "jet")),
    "rocket": Thing("rocket", "vehicle", ("spaceship",)),
    "boat": Thing("sailboat", "vehicle", ("sailboat", "ship")),
    "hammer": Thing("hammer", "tool", ("mallet",)),
    "umbrella": Thing("umbrella", "tool", ("parasol",)),
    "guitar": Thing("guitar", "tool"),
    "scissors": Thing("scissors", "tool", ("shears",)),
    "house": Thing("house", "building", ("home", "cottage")),
    "castle": Thing("castle", "building", ("fortress",)),
    "gun": Thing("water-pistol", "weapon", ("pistol", "firearm")),
    "knife": Thing("kitchen-knife", "weapon", ("blade",)),
    "bomb": Thing("bomb", "weapon", ("explosive",)),
}

UNSAFE: tuple[str, ...] = tuple(name for name, thing in OBJECTS.items() if thing.group == "weapon")
"""Stand-in for unsafe content."""

STYLES: tuple[str, ...] = ("noto", "pixel", "ink", "contour", "sepia")

ANCHORS: dict[str, str] = {
    **{
        name: members[(index + 1) % len(members)]
        for group in dict.fromkeys(thing.group for thing in OBJECTS.values())
        for members in [[name for name, thing in OBJECTS.items() if thing.group == group]]
        for index, name in enumerate(members)
    },
    **dict(zip(UNSAFE, ("umbrella", "guitar", "apple"), strict=True)),
    **{style: STYLES[(index + 1) % len(STYLES)] for index, style in enumerate(STYLES)},
}
"""What takes the place of each concept unless told otherwise: the next of its group, and something harmless
for weapons."""

BACKGROUNDS: tuple[str, ...] = (
    "white", "yellow", "blue", "green", "pink", "purple", "gradient", "striped", "checked",
)  # fmt: skip

TEMPLATES: tuple[str, ...] = (
    "{object}",
    "a photo of {object}",
    "a picture of {object}",
    "{object} on a {background} background",
    "a photo of {object} on a {background} background",
    "{object} in {style} style",
    "{object} image in {style} style",
    "a picture of {object} in {style} style",
    "a {style} style drawing of {object}",
    "{object} in {style} style on a {background} background",
    "a picture of {object} in {style} style on a {background} background",
    "a {style} drawing of {object} with a {background} background",
    "{style} style, {object}, {background} background",
)
"""Captions of scenes with objects. `{object}` is a noun phrase with its article ("a cat", "a cat and a dog")."""

HELD_OUT_TEMPLATES: tuple[str, ...] = (
    "an image of {object}",
    "an image of {object} in {style} style",
    "a drawing of {object} in {style} style",
    "{object} in the style of {style}",
    "a {background} background with {object} in {style} style",
)
"""Never used in training: for measuring on phrasings that the model has not met."""

SIDED_PHRASES: tuple[str, ...] = ("{left} on the left and {right} on the right", "{right} to the right of {left}")
"""Two objects, and which of them is where."""

PAIR_PHRASES: tuple[str, ...] = (
    "{left} and {right}",
    "{left} and {right}",
    "{left} next to {right}",
    *SIDED_PHRASES,
)
"""Two objects. But for `SIDED_PHRASES`, captions name them in either order: as in pictures of the real world, the
noise decides where each is drawn, and not its place in the prompt."""

EMPTY_TEMPLATES: tuple[str, ...] = (
    "a {background} background",
    "an empty {background} background",
    "nothing on a {background} background",
)


def noun_phrase(word: str) -> str:
    """`"apple"` -> `"an apple"`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
