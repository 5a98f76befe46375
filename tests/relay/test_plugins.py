"""A class named in a config: made, or refused in one line that says what is wrong with it."""

from typing import Protocol

import pytest

from relay.errors import BadRequest
from relay.plugins import make


class Tool(Protocol):
    """Does something."""

    name: str

    @property
    def size(self) -> int: ...

    def use(self) -> None: ...


class Hammer:
    name, size = "hammer", 3

    def __init__(self, weight: float = 1.0):
        if weight < 0:
            raise ValueError("a hammer weighs something")
        self.weight = weight

    def use(self):
        pass


class Thought:
    name = "thought"


def test_a_class_is_made_with_its_options():
    assert make("tool", f"{__name__}:Hammer", Tool, {"weight": 2.0}).weight == 2.0
    assert make("tool", "hammer", Tool, {}, where=f"{__name__}:Hammer").name == "hammer"


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("nowhere.at_all:Hammer", {}, "tool nowhere.at_all:Hammer cannot be imported: No module named 'nowhere'"),
        (f"{__name__}:Saw", {}, "cannot be imported: module .* has no attribute 'Saw'"),
        (":Hammer", {}, "cannot be imported"),
        (f"{__name__}:Hammer", {"wieght": 2.0}, "unexpected keyword argument 'wieght'; its options: weight"),
        (f"{__name__}:Hammer", {"weight": -1}, "weighs something"),
        (f"{__name__}:Thought", {}, r"is not a tool: it lacks size, use \(see .*\.Tool\)"),
    ],
)
def test_what_is_wrong_with_one_is_one_line(name, options, said):
    with pytest.raises(BadRequest, match=said) as refused:
        make("tool", name, Tool, options)
    assert "\n" not in str(refused.value)
