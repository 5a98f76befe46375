"""Programs and their one canonical text."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import BadRequest
from relay.program import CODECS, CONDITIONING_MODES, MATCHINGS, Leg, Program

TEXT = "mini-sd3/large:28:0-14/small:28:14-28/match=exact/codec=fp16/guidance=3,3/conditioning=encode"
names = st.from_regex(r"[a-z0-9._-]{1,12}", fullmatch=True)


@st.composite
def programs(draw):
    def leg(final):
        total = draw(st.integers(1 if final else 2, 1000))
        last = total if final else draw(st.integers(1, total - 1))
        return Leg(draw(names), total, draw(st.integers(0, last - 1)), last)

    count = draw(st.integers(1, 4))
    return Program(
        draw(names),
        tuple(leg(i == count - 1) for i in range(count)),
        draw(st.sampled_from(MATCHINGS)),
        tuple(draw(st.lists(st.floats(0, 1e30, allow_nan=False), min_size=count, max_size=count))),
        draw(st.sampled_from(CODECS)),
        draw(st.sampled_from(CONDITIONING_MODES)),
    )


@given(programs())
def test_parse_is_the_inverse_of_str_and_the_text_is_one_shell_word(program):
    assert Program.parse(str(program)) == program
    assert shlex.split(str(program)) == [str(program)]


@given(st.text(max_size=60) | st.lists(st.sampled_from([*TEXT, "/", ":", "=", "-"]), max_size=99).map("".join))
def test_any_other_text_is_a_bad_request(text):
    try:
        program = Program.parse(text)
    except BadRequest:
        return
    assert str(program) == text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("14/small", "28/small"),  # nothing left for the small one
        ("14-28", "14-27"),  # does not reach sigma 0
        ("14-28", "28-28"),
        ("0-14", "0-29"),
        ("=3,3", "=3"),
        ("=3,3", "=3,nan"),
        ("=3,3", "=3,-1"),
        ("=3,3", "=3,inf"),
        ("=3,3", "=3.0,3"),  # the same program, but not its canonical text
        ("exact", "guess"),
        ("fp16", "fp8"),
        ("encode", "guess"),
        ("mini-sd3", "Mini SD3"),
    ],
)
def test_inconsistent_programs_are_refused(old, new):
    with pytest.raises(BadRequest):
        Program.parse(TEXT.replace(old, new))


def test_a_program_knows_its_mode_and_steps():
    def program(*legs):
        return Program("f", legs, "exact", (1.0,) * len(legs))

    large, small = Leg("large", 8, 0, 8), Leg("small", 6, 0, 6)
    assert program(large).mode == "full-cloud"
    assert program(small).mode == "edge-only"
    relay = program(Leg("large", 8, 0, 3), Leg("small", 6, 2, 6))
    assert (relay.mode, relay.steps) == ("relay", {"large": 3, "small": 4})
    assert program(Leg("small", 6, 0, 2), Leg("large", 8, 3, 8)).mode == "other"


@given(st.data())
def test_one_changed_character_is_another_program_or_none(data):
    place = data.draw(st.integers(0, len(TEXT) - 1))
    letter = data.draw(st.characters(codec="latin-1").filter(lambda each: each != TEXT[place]))
    changed = TEXT[:place] + letter + TEXT[place + 1 :]
    try:
        program = Program.parse(changed)
    except BadRequest:
        return
    assert str(program) == changed
    assert program != Program.parse(TEXT)
