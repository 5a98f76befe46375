"""A handoff is trusted only when proved: every byte, every length, every contradiction."""

import struct
from dataclasses import replace
from hashlib import blake2b

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import NEGATIVE, OTHER, PROMPT, vae

from relay import codecs
from relay.conditioning import Conditioning, prompt_digest
from relay.errors import HandoffRefused
from relay.fingerprint import fingerprint
from relay.handoff import MAGIC, Handoff, accept
from relay.program import CODECS

FINGERPRINT = fingerprint(vae(), "epsilon")


def handoff(codec="fp16", ship=False, images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompts = [f"a red circle {i}" for i in range(images)]
    program = f"f/large:8:0-3/small:8:3-8/match=exact/codec={codec}/guidance=3,3/conditioning="
    cond = None
    if ship:
        embeds, pooled = torch.randn(images, 5, 6, generator=generator), torch.randn(images, 7, generator=generator)
        cond = Conditioning(embeds, pooled, embeds.bfloat16(), pooled.half(), torch.ones(images, 6))
    return Handoff(
        program=program + ("ship" if ship else "encode"),
        leg_index=1,
        latent=torch.randn(images, 4, 6, 8, generator=generator),
        sigmas_walked=[14.5, 9.0, 4.0, 1.5],
        index=3,
        fingerprint=FINGERPRINT,
        codec=codec,
        prompts=prompts,
        width=8 * FINGERPRINT.factor,
        height=6 * FINGERPRINT.factor,
        negative_prompts=["blurry"] * images,
        seeds=[seed, None][:images],
        conditioning=cond,
        conditioning_digest=cond.digest() if cond else prompt_digest(prompts, ["blurry"] * images),
        meta={"node": "edge-1"},
    )


@given(st.sampled_from(CODECS), st.booleans(), st.integers(1, 2), st.integers(0, 2**31))
def test_from_bytes_is_the_inverse_of_to_bytes_up_to_the_codec(codec, ship, images, seed):
    sent = handoff(codec, ship, images, seed)
    got = Handoff.from_bytes(sent.to_bytes())
    assert ((got.latent - sent.latent).abs() <= codecs.error_bound(codec, sent.latent)).all()
    assert (got.conditioning is None) == (sent.conditioning is None)
    for name, tensor in (sent.conditioning.tensors() if ship else {}).items():
        received = getattr(got.conditioning, name)
        assert torch.equal(received, tensor)
        assert received.dtype == tensor.dtype
    plain = {"latent": None, "conditioning": None}
    assert replace(got, **plain) == replace(sent, **plain)
    assert got.sigma == 1.5


@given(st.sampled_from([handoff(ship=ship).to_bytes() for ship in (False, True)]), st.data())
def test_any_flipped_byte_is_refused(message, data):
    damaged = bytearray(message)
    damaged[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(HandoffRefused):
        Handoff.from_bytes(damaged)


@given(st.sampled_from([handoff(ship=ship).to_bytes() for ship in (False, True)]), st.data())
def test_any_cut_and_any_addition_is_refused(message, data):
    with pytest.raises(HandoffRefused):
        Handoff.from_bytes(message[: data.draw(st.integers(0, len(message) - 1))])
    with pytest.raises(HandoffRefused):
        Handoff.from_bytes(message + data.draw(st.binary(min_size=1, max_size=64)))


@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    with pytest.raises(HandoffRefused):
        Handoff.from_bytes(noise)


def forged(**changes):
    """A whole message with a valid checksum whose header lies."""
    message = handoff(ship=changes.pop("ship", False)).to_bytes()
    start = 20
    (length,) = struct.unpack_from("<I", message, 16)
    header = msgspec.msgpack.decode(message[start : start + length])
    header = msgspec.msgpack.encode(header | changes)
    body = header + message[start + length : -32]
    body = struct.pack("<6sHQI", MAGIC, 1, start + len(body) + 32, len(header)) + body
    return body + blake2b(body, digest_size=32).digest()


def test_forging_without_a_change_is_accepted():
    Handoff.from_bytes(forged())


@pytest.mark.parametrize(
    "lie",
    [
        {"program": "nonsense"},
        {"program": handoff().program.replace("fp16", "fp32")},
        {"leg_index": 0},
        {"leg_index": 2},
        {"leg_index": -1},
        {"codec": "fp32"},
        {"codec": "pickle"},
        {"shape": [2, 4, 8, 6]},
        {"shape": [2, 3, 8, 8]},
        {"shape": [1, 4, 6, 8]},
        {"shape": [0, 4, 6, 8]},
        {"shape": [2, 4, 6, -8]},
        {"shape": [1 << 40, 4, 6, 8]},
        {"width": 640},
        {"sigmas_walked": [14.5, 9.0, 9.0, 1.5]},
        {"sigmas_walked": [14.5, 9.0, float("nan"), 1.5]},
        {"sigmas_walked": [float("inf"), 9.0, 4.0, 1.5]},
        {"sigmas_walked": [14.5, 9.0, 1.5], "index": 2},
        {"sigmas_walked": []},
        {"sigma": 2.0},
        {"index": 4},
        {"index": -1},
        {"prompts": ["a red circle 0"]},
        {"negative_prompts": []},
        {"seeds": [1, 2, 3]},
        {"prompts": ["another", "prompt"]},
        {"conditioning_digest": "0" * 32},
        {"conditioning": [{"name": "pooled", "dtype": "float32", "shape": [2, 7]}]},
        {"unknown": 1},
        {"width": "16"},
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_refused_in_one_line(lie):
    with pytest.raises(HandoffRefused) as refusal:
        Handoff.from_bytes(forged(**lie))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "frames",
    [
        [{"name": "prompt_embeds", "dtype": "float32", "shape": [2, 5, 6]}],
        [{"name": "latent", "dtype": "float32", "shape": [2, 5, 6]}],
        [{"name": "prompt_embeds", "dtype": "object", "shape": [2, 5, 6]}],
        [{"name": "prompt_embeds", "dtype": "float32", "shape": [2, 5, -6]}],
        [{"name": "prompt_embeds", "dtype": "float32", "shape": [2, 1 << 30, 1 << 30]}],
    ],
)
def test_a_lie_about_shipped_conditioning_is_refused(frames):
    with pytest.raises(HandoffRefused):
        Handoff.from_bytes(forged(ship=True, conditioning=frames))


def test_a_later_version_and_another_file_are_named():
    message = bytearray(handoff().to_bytes())
    message[6] = 9
    with pytest.raises(HandoffRefused, match="version 9"):
        Handoff.from_bytes(message)
    with pytest.raises(HandoffRefused, match="magic"):
        Handoff.from_bytes(b"\x89PNG\r\n" + bytes(message[6:]))


def test_non_finite_latents_are_refused():
    sent = handoff("fp32")
    message = sent.to_bytes()
    latent = codecs.encode(sent.latent, "fp32")
    body = message[:-32].replace(latent, b"\xff" * len(latent))
    with pytest.raises(HandoffRefused, match="non-finite"):
        Handoff.from_bytes(body + blake2b(body, digest_size=32).digest())


def test_a_foreign_fingerprint_family_or_conditioning_is_refused(pipes):
    pipe = pipes["sdxl"]
    call = {"num_inference_steps": 4, "handoff": 2, "seed": 0}
    sent = pipe.start(PROMPT, conditioning="ship", **call)
    assert accept(sent, pipe.family) == pipe.plan(handoff=2, num_inference_steps=4, conditioning="ship")
    change = msgspec.structs.replace
    for foreign in (
        replace(sent, fingerprint=fingerprint(vae(seed=9), "epsilon")),
        replace(sent, fingerprint=change(sent.fingerprint, parameterisation="flow")),
        replace(sent, fingerprint=change(sent.fingerprint, scaling=0.13)),
        replace(sent, program=sent.program.replace("sdxl", "sd3")),
        replace(sent, conditioning_fingerprint=None),
        replace(sent, conditioning_fingerprint=change(sent.conditioning_fingerprint, tokens=77)),
        replace(sent, conditioning_fingerprint=change(sent.conditioning_fingerprint, thumbnail=(1.0,) * 64)),
        replace(sent, conditioning_fingerprint=change(sent.conditioning_fingerprint, thumbnail=(float("nan"),) * 64)),
    ):
        with pytest.raises(HandoffRefused):
            pipe.finish(foreign)


def test_shipping_sends_the_embeddings_and_encoding_sends_the_texts(pipes):
    call = {"num_inference_steps": 4, "handoff": 2, "seed": 0, "negative_prompt": NEGATIVE}
    shipped = pipes["sd3"].start([PROMPT, OTHER], conditioning="ship", **call)
    encoded = pipes["sd3"].start([PROMPT, OTHER], conditioning="encode", **call)
    assert len(shipped.conditioning) == 2
    assert encoded.conditioning is None
    assert encoded.prompts == shipped.prompts == [PROMPT, OTHER]
    assert len(encoded.to_bytes()) < len(shipped.to_bytes())
