"""Codecs decode within their stated bound, into memory of their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from relay.codecs import decode, encode, error_bound, payload_bytes
from relay.errors import BadRequest, HandoffRefused
from relay.program import CODECS

shapes = st.tuples(*[st.integers(1, 3)] * 2, st.integers(1, 5), st.integers(1, 5))
LARGEST = {"fp32": 2.0**127, "fp16": 2.0**15, "bf16": 2.0**127, "int8": 2.0**127}


@given(st.sampled_from(CODECS), st.data())
def test_decode_is_within_the_bound_of_what_was_encoded(name, data):
    values = st.floats(-LARGEST[name], LARGEST[name], width=32)
    x = torch.from_numpy(data.draw(hnp.arrays("float32", shapes, elements=values)).copy())
    payload = encode(x, name)
    assert len(payload) == payload_bytes(name, x.shape)
    error = (decode(payload, name, x.shape).double() - x.double()).abs()
    assert (error <= error_bound(name, x).double()).all()


@pytest.mark.parametrize("name", CODECS)
def test_a_latent_comes_back_within_the_bound_at_the_measured_size(name):
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    error = decode(encode(x, name), name, x.shape) - x
    assert (error.abs() <= error_bound(name, x)).all()
    assert error.norm() / x.norm() < {"fp32": 1e-12, "fp16": 4e-4, "bf16": 3e-3, "int8": 2e-2}[name]


@pytest.mark.parametrize("name", CODECS)
def test_the_decoded_latent_owns_its_memory(name):
    buffer = bytearray(encode(torch.ones(1, 2, 3, 3), name))
    x = decode(buffer, name, (1, 2, 3, 3))
    before = x.clone()
    buffer[:] = bytes(len(buffer))
    assert torch.equal(x, before)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_latents_are_refused(name, bad):
    with pytest.raises(BadRequest, match="non-finite"):
        encode(torch.full((1, 1, 2, 2), bad), name)


def test_a_value_out_of_range_names_the_way_out():
    with pytest.raises(BadRequest, match="use codec fp32"):
        encode(torch.full((1, 1, 2, 2), 7e4), "fp16")


@pytest.mark.parametrize("name", CODECS)
def test_a_payload_of_another_length_or_with_non_finite_values_is_refused(name):
    payload = encode(torch.ones(1, 2, 2, 2), name)
    with pytest.raises(HandoffRefused):
        decode(payload[:-1], name, (1, 2, 2, 2))
    with pytest.raises(HandoffRefused):
        decode(b"\xff" * len(payload), name, (1, 2, 2, 2))


def test_half_precision_latents_encode_like_their_float32_values():
    x = torch.randn(1, 4, 4, 4).half()
    assert torch.equal(decode(encode(x, "fp32"), "fp32", x.shape), x.float())


def test_int8_scales_each_channel_of_each_sample_on_its_own():
    x = torch.randn(3, 4, 8, 8) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1, 1)
    x[:, 1] *= 1e-2
    error = (decode(encode(x, "int8"), "int8", x.shape) - x).abs().amax((2, 3))
    assert (error <= x.abs().amax((2, 3)) / 250).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_int8_keeps_a_constant_channel(value):
    x = torch.full((1, 2, 4, 4), value)
    assert torch.equal(decode(encode(x, "int8"), "int8", x.shape), x)


@pytest.mark.parametrize("name", CODECS)
def test_the_memory_layout_of_a_latent_changes_no_byte(name):
    x = torch.randn(2, 3, 4, 6)
    assert encode(x.to(memory_format=torch.channels_last), name) == encode(x, name)
    assert encode(x.transpose(2, 3), name) == encode(x.transpose(2, 3).contiguous(), name)
