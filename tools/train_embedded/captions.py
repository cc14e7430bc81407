"""What a scene of `world.py` is called in plain English: one caption per chunk.

A caption is a template filled with words that mean the scene's shape, colour and so on. Evaluation has phrasings of its own that
no training caption has: other templates, and other pairs of noun and verb (`_PHRASES` numbers the verbs, `_is_held_out` decides).
All of their words are in training captions, as a model trained from nothing cannot know a word that it never saw.
"""

import re

from .world import BACKGROUNDS, COLOURS, RESIZING, Draws, Scene

NOUNS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "star": ("star",),
}
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
COLOUR_WORDS = {name: (name,) for name in COLOURS} | {"purple": ("purple", "violet"), "cyan": ("cyan", "turquoise")}
BACKGROUND_WORDS = {name: (name,) for name in BACKGROUNDS} | {
    "grey": ("grey", "gray"),
    "dark blue": ("dark blue", "navy"),
}


def _directed(*ways: str) -> tuple[tuple[str, str], ...]:
    verbs = (
        ("moves", "moving"),
        ("goes", "going"),
        ("drifts", "drifting"),
        ("slides", "sliding"),
        ("travels", "travelling"),
    )
    return tuple((f"{verb} {way}", f"{gerund} {way}") for verb, gerund in verbs for way in ways)


# Of every motion, what the object does and what it is doing. Nothing that "turns" changes its direction: it rotates.
_PHRASES: dict[str, tuple[tuple[str, str], ...]] = {
    "left": _directed("left", "to the left"),
    "right": _directed("right", "to the right"),
    "up": (*_directed("up", "upwards"), ("rises", "rising")),
    "down": (*_directed("down", "downwards"), ("sinks", "sinking")),
    "still": (
        ("stands still", "standing still"),
        ("does not move", "not moving"),
        ("stays still", "staying still"),
        ("stays in its place", "staying in its place"),
        ("rests", "resting"),
    ),
    "grows": (
        ("grows", "growing"),
        ("gets larger", "getting larger"),
        ("gets bigger", "getting bigger"),
        ("becomes larger", "becoming larger"),
        ("becomes bigger", "becoming bigger"),
    ),
    "shrinks": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
        ("gets ever smaller", "getting ever smaller"),
    ),
    "turns": (
        ("turns", "turning"),
        ("spins", "spinning"),
        ("rotates", "rotating"),
        ("spins around", "spinning around"),
    ),
}

# {what} is "small red circle"; without its size where the size is not a word any more, as after growing. {Doing} begins a sentence.
TEMPLATES = (
    "A {what} {does} on a {background} background.",
    "On a {background} background, a {what} {does}.",
    "A {what} on a {background} background {does}.",
    "A {colour} {noun} {does}.",
    "There is a {what} {doing} on a {background} background.",
    "A video of a {what} {doing} on {background}.",
    "A {size} {noun} in {colour} {does} in front of a {background} background.",
    "The background is {background}. A {what} {does}.",
    "We see a {colour} {noun} that {does} on {background}.",
    "The {size} {noun} {does}. It is {colour} and the background is {background}.",
    "A {what} {doing}, {background} background",
    "Watch a {what} as it {does} over a {background} background.",
    "{Doing} on a {background} background: a {what}.",
    "Here is a {what} in front of {background}, and it {does}.",
    "The {what} is {doing} on a {background} background.",
)
HELD_OUT_TEMPLATES = (
    "In front of a {background} background there is a {what}, and it {does}.",
    "The {size} {noun} is {doing} over {background}. It is {colour}.",
    "Here a {what} {does} on a {background} background.",
    "It is a video of a {what} that {does} on {background}.",
    "The background is {background} and we see a {what} {doing}.",
)
MOTION_CHANGES = (
    "The {what} now {does} on a {background} background.",
    "Now the {colour} {noun} {does}.",
    "Then the {what} {does} on {background}.",
    "The {colour} {noun} on a {background} background changes and {does} now.",
    "The {what} is now {doing} on {background}.",
)
HELD_OUT_MOTION_CHANGES = (
    "On a {background} background, the {what} {does} now.",
    "Then we see the {colour} {noun} {doing}.",
)
COLOUR_CHANGES = (
    "The {noun} now becomes {colour} and {does} on a {background} background.",
    "Now the {size} {noun} is {colour} and {does}.",
    "Then the {noun} changes its colour to {colour} and {does} on {background}.",
    "The {noun} on a {background} background becomes {colour}, and it {does}.",
)
HELD_OUT_COLOUR_CHANGES = (
    "Then the {noun} becomes {colour} and {does} on {background}.",
    "Now the colour changes to {colour} and the {noun} {does}.",
)

_SAME = 0.8  # probability that a chunk without a change repeats the caption before it, word by word
_CHANGE = 0.5  # probability that a change is told as one, not as a scene of its own


def captions(scene: Scene, seed: int, *, held_out: bool = False) -> list[str]:
    """Returns one caption per chunk, each of which names shape, colour and motion; most name size and background, too.

    Args:
        scene: what they describe.
        seed: of the phrasing.
        held_out: phrase it as no training caption does.
    """
    random = Draws(seed, 2 + int(held_out))  # streams other than those of `draw`
    told: list[str] = []
    resized = False
    for chunk, (motion, colour) in enumerate(zip(scene.motions, scene.colours, strict=True)):
        moved = chunk > 0 and motion != scene.motions[chunk - 1]
        recoloured = chunk > 0 and colour != scene.colours[chunk - 1]
        if chunk and not moved and not recoloured and random.between(0, 1) < _SAME:
            told.append(told[-1])
        else:
            templates: tuple[str, ...] = HELD_OUT_TEMPLATES if held_out else TEMPLATES
            if recoloured and random.between(0, 1) < _CHANGE:
                templates = HELD_OUT_COLOUR_CHANGES if held_out else COLOUR_CHANGES
            elif moved and not recoloured and random.between(0, 1) < _CHANGE:
                templates = HELD_OUT_MOTION_CHANGES if held_out else MOTION_CHANGES
            size = "" if resized else random.choice(SIZES[scene.size])
            noun, (does, doing) = random.choice(phrases(scene.shape, motion, held_out))
            told.append(
                _fill(
                    random.choice(templates),
                    size=size,
                    colour=random.choice(COLOUR_WORDS[colour]),
                    noun=noun,
                    does=does,
                    doing=doing,
                    background=random.choice(BACKGROUND_WORDS[scene.background]),
                )
            )
        resized |= motion in RESIZING
    return told


def phrases(shape: str, motion: str, held_out: bool) -> list[tuple[str, tuple[str, str]]]:
    """Returns the pairs of noun and (verb, gerund) for a shape's motion in training captions, or those held out."""
    return [
        (noun, verb)
        for i, noun in enumerate(NOUNS[shape])
        for j, verb in enumerate(_PHRASES[motion])
        if ((i + j) % 4 == 3) == held_out
    ]


def words(text: str) -> list[str]:
    """Returns a caption as the model's tokenizer splits it: lower-case words and punctuation marks."""
    return re.findall(r"[a-z]+|[^\sa-z]", text.lower())


def vocabulary() -> list[str]:
    """Returns every word and punctuation mark of all captions, sorted: those of `words` for any caption."""
    templates = TEMPLATES + HELD_OUT_TEMPLATES + MOTION_CHANGES + HELD_OUT_MOTION_CHANGES
    texts = [re.sub(r"\{\w+\}", " ", template) for template in templates + COLOUR_CHANGES + HELD_OUT_COLOUR_CHANGES]
    for named in (NOUNS, SIZES, COLOUR_WORDS, BACKGROUND_WORDS):
        texts += [word for synonyms in named.values() for word in synonyms]
    texts += [form for motion in _PHRASES.values() for verb in motion for form in verb]
    return sorted({word for text in [*texts, "an"] for word in words(text)})


def _fill(template: str, *, size: str, colour: str, noun: str, does: str, doing: str, background: str) -> str:
    text = template.format(
        what=f"{size} {colour} {noun}",
        size=size,
        colour=colour,
        noun=noun,
        does=does,
        doing=doing,
        Doing=doing.capitalize(),
        background=background,
    )
    text = re.sub(r" +", " ", text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
