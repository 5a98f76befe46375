"""The words of the scene language and nothing else: what can be said, drawn and judged.

Index order is part of the trained weights (judge heads, text-encoder targets): append, never reorder.
"""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
PLACES = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COUNTS = ("a", "two", "three", "four")
MAX_OBJECTS = 4
MAX_LETTERS = 3

PLURALS = {shape: ("crosses" if shape == "cross" else shape + "s") for shape in SHAPES}

# Other ways to say the same. The first of each tuple is the canonical word.
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
TEXTURE_WORDS = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "with stripes"),
    "dotted": ("dotted", "spotted", "with dots"),
    "checkered": ("checkered", "checked", "with checks"),
}
PLACE_WORDS = {
    "top left": ("top left", "upper left"),
    "top": ("top",),
    "top right": ("top right", "upper right"),
    "left": ("left",),
    "centre": ("centre", "center", "middle"),
    "right": ("right",),
    "bottom left": ("bottom left", "lower left"),
    "bottom": ("bottom",),
    "bottom right": ("bottom right", "lower right"),
}
# A relation places an object one cell away from the object named just before it.
RELATIONS = {"left of it": (-1, 0), "right of it": (1, 0), "above it": (0, -1), "below it": (0, 1)}


def neighbour(place: str, relation: str) -> str | None:
    """The cell one step from `place` in the direction of `relation`; None where the grid ends."""
    column, row = PLACES.index(place) % 3, PLACES.index(place) // 3
    dx, dy = RELATIONS[relation]
    column, row = column + dx, row + dy
    if 0 <= column < 3 and 0 <= row < 3:
        return PLACES[3 * row + column]
    return None
