"""Messages on the wire: what is encoded comes back, and whatever else comes is refused."""

import struct
import tracemalloc
import types
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes import messages
from nodes.messages import (
    MAJOR,
    MAX_FRAMES,
    MAX_HEADER,
    MAX_PAYLOAD,
    MESSAGES,
    MINOR,
    ROLES,
    Embeddings,
    Fetch,
    ForeignVersion,
    Heartbeat,
    Latent,
    Message,
    MessageRefused,
    Result,
    Told,
    decode,
    encode,
    name_of,
    seen_of,
)

HEAD = struct.pack("<5sHH", messages.MAGIC, MAJOR, MINOR)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
SCALARS = {
    str: st.text(max_size=12),
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    type(None): st.none(),
    typing.Any: PLAIN,
}


def values(kind):
    """Every value that a field of this type may have."""
    if kind in SCALARS:
        return SCALARS[kind]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return instances(kind)
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and inside[-1] is Ellipsis:
        return st.lists(values(inside[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, inside))
    if origin is dict:
        return st.dictionaries(values(inside[0]), values(inside[1]), max_size=2)
    assert origin in (typing.Union, types.UnionType), kind
    return st.one_of(*map(values, inside))


def instances(kind):
    hints = typing.get_type_hints(kind)
    fields = {field.name: values(hints[field.name]) for field in msgspec.structs.fields(kind)}
    return st.fixed_dictionaries(fields).map(lambda given: kind(**given))


@st.composite
def whole_messages(draw):
    kind = draw(st.sampled_from(MESSAGES))
    low, high = kind.payloads
    return draw(instances(kind)), draw(st.lists(st.binary(max_size=64), min_size=low, max_size=high))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_decode_is_the_inverse_of_encode(kind):
    low, high = kind.payloads

    @given(instances(kind), st.lists(st.binary(max_size=64), min_size=low, max_size=high))
    def inverse(message, payloads):
        frames = encode(message, payloads)
        assert decode(frames) == (message, payloads)
        assert decode([memoryview(frame) for frame in frames]) == (message, payloads)

    inverse()


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_says_who_may_send_it_and_what_it_is_for(kind):
    assert kind.senders
    assert set(kind.senders) <= set(ROLES)
    assert kind.__doc__


def refused_or_a_message(frames):
    try:
        message, payloads = decode(frames)
    except MessageRefused:
        return
    low, high = type(message).payloads
    assert isinstance(message, Message)
    assert low <= len(payloads) <= high


@given(st.lists(st.binary(max_size=80), max_size=8))
def test_arbitrary_frames_are_refused(frames):
    refused_or_a_message(frames)


@given(st.binary(max_size=200), st.lists(st.binary(max_size=8), max_size=2))
def test_an_arbitrary_header_is_refused(header, payloads):
    refused_or_a_message([HEAD, header, *payloads])


@given(PLAIN, st.lists(st.binary(max_size=8), max_size=2))
def test_a_header_of_another_shape_is_refused(value, payloads):
    refused_or_a_message([HEAD, msgspec.msgpack.encode(value), *payloads])


@given(whole_messages(), st.data())
def test_a_real_message_cut_short_or_with_flipped_bits_is_refused_or_another_message(whole, data):
    frames = [bytes(frame) for frame in encode(*whole)]
    at = data.draw(st.integers(0, len(frames) - 1))
    if not frames[at]:
        return
    place = data.draw(st.integers(0, len(frames[at]) - 1))
    cut = [*frames[:at], frames[at][:place], *frames[at + 1 :]]
    flipped = bytearray(frames[at])
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    refused_or_a_message(cut)
    refused_or_a_message([*frames[:at], bytes(flipped), *frames[at + 1 :]])
    refused_or_a_message(frames[:at])


@pytest.mark.parametrize(
    "tag", [b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"], ids=["list", "map", "text", "bytes", "ext"]
)
@pytest.mark.parametrize("field", ["value", "what", "unknown"])
def test_a_length_that_is_not_there_allocates_nothing(tag, field):
    claim = tag + struct.pack(">I", 2**32 - 1)
    header = b"\x82\xa4type\xa4told" + msgspec.msgpack.encode(field) + claim
    peak = peak_of([HEAD, header])
    assert peak < 100_000


def test_what_a_header_decodes_to_is_bounded_by_its_size():
    def header(count):  # an empty list a byte
        return b"\x83\xa4type\xa4told\xa4what\xa0\xa5value\xdd" + struct.pack(">I", count) + b"\x90" * count

    assert peak_of([HEAD, header(20_000)]) < 100 * 20_000
    assert peak_of([HEAD, header(MAX_HEADER)]) < 100_000  # too long: not even looked at


def peak_of(frames):
    tracemalloc.start()
    try:
        refused_or_a_message(frames)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_depth_is_refused():
    with pytest.raises(MessageRefused):
        decode([HEAD, b"\x82\xa4type\xa4told\xa5value" + b"\x91" * 500_000 + b"\xc0"])


def test_too_long_is_refused_by_both_sides():
    class Long(bytes):
        def __len__(self):
            return MAX_PAYLOAD + 1

    latent = Latent(job="j", attempt=0, leg=1)
    with pytest.raises(MessageRefused, match="payload"):
        encode(latent, [Long()])
    with pytest.raises(MessageRefused, match="payload"):
        decode([*encode(latent, [b""])[:2], Long()])
    with pytest.raises(MessageRefused, match="header"):
        encode(Told(what="x", value="y" * MAX_HEADER))
    doubles = memoryview(bytes(MAX_PAYLOAD + 8)).cast("d")  # its len is an eighth of its bytes
    with pytest.raises(MessageRefused, match="payload"):
        encode(latent, [doubles])
    with pytest.raises(MessageRefused, match="frames"):
        decode([HEAD] * (MAX_FRAMES + 1))


def test_another_major_is_refused_by_name_and_another_minor_is_understood():
    frames = encode(Fetch(job="j", attempt=1, leg=0))
    with pytest.raises(ForeignVersion, match=rf"version {MAJOR + 1}\.0.*{MAJOR}\.{MINOR}"):
        decode([struct.pack("<5sHH", messages.MAGIC, MAJOR + 1, 0), *frames[1:]])
    newer = struct.pack("<5sHH", messages.MAGIC, MAJOR, MINOR + 7)
    header = msgspec.msgpack.encode(
        {"type": "fetch", "job": "j", "attempt": 1, "leg": 0, "what_only_later_versions_know": [1]}
    )
    assert decode([newer, header])[0] == Fetch(job="j", attempt=1, leg=0)
    with pytest.raises(MessageRefused, match="from-the-future"):
        decode([newer, msgspec.msgpack.encode({"type": "from-the-future"})])


def test_a_missing_field_takes_its_default_and_one_without_is_refused_by_name():
    said = {"type": "heartbeat", "sequence": 1, "doing": "", "running": 0, "queued": 0, "steps_done": 0, "idle_s": 0.0}
    assert decode([HEAD, msgspec.msgpack.encode(said)])[0] == Heartbeat(
        sequence=1, doing="", running=0, queued=0, steps_done=0, idle_s=0.0
    )
    del said["doing"]
    with pytest.raises(MessageRefused, match="doing"):
        decode([HEAD, msgspec.msgpack.encode(said)])


def test_payloads_are_counted():
    with pytest.raises(MessageRefused, match="latent came with 0 payloads"):
        decode(encode(Latent(job="j", attempt=0, leg=1), [b"x"])[:2])
    with pytest.raises(MessageRefused, match="fetch came with 1"):
        decode([*encode(Fetch(job="j", attempt=1, leg=0)), b"x"])


def test_an_acknowledgement_names_what_it_acknowledges():
    result = Result(job="j", attempt=3, width=1, height=1, report={})
    assert (seen_of(result).what, seen_of(result).attempt) == (name_of(result), 3)
    assert seen_of(Latent(job="j", attempt=3, leg=1)) != seen_of(Latent(job="j", attempt=3, leg=2))
    assert seen_of(Embeddings(job="j", attempt=3)).what == "embeddings"
