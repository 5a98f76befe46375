"""Conditioning is what diffusers' pipelines feed, row by row."""

import copy

import pytest
import torch
from tiny import NEGATIVE, OTHER, PROMPT

from relay.conditioning import Conditioning, conditioning_fingerprint, prompt_digest
from relay.errors import BadRequest

SIZE = (48, 32)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_rows_do_not_depend_on_what_else_is_encoded(pipes, name):
    text = pipes[name].family.text
    together = text.encode([PROMPT, OTHER, PROMPT], [NEGATIVE, "grey", NEGATIVE], True, SIZE)
    assert len(together) == 3
    for i, (prompt, negative) in enumerate([(PROMPT, NEGATIVE), (OTHER, "grey"), (PROMPT, NEGATIVE)]):
        alone = text.encode([prompt], [negative], True, SIZE)
        for key, tensor in alone.tensors().items():
            assert torch.allclose(getattr(together, key)[i], tensor[0], atol=1e-6)


def test_sdxl_time_ids_are_height_then_width(pipes):
    cond = pipes["sdxl"].family.text.encode([PROMPT], None, False, SIZE)
    assert cond.time_ids.tolist() == [[32, 48, 0, 0, 32, 48]]
    assert cond.negative_embeds is None
    assert pipes["sd3"].family.text.encode([PROMPT], None, False, SIZE).time_ids is None


def test_no_negative_prompt_is_zeros_for_sdxl_and_the_empty_prompt_for_sd3(pipes):
    sdxl, sd3 = (pipes[name].family.text for name in ("sdxl", "sd3"))
    assert not sdxl.encode([PROMPT], None, True, SIZE).negative_embeds.any()
    assert sdxl.encode([PROMPT], [""], True, SIZE).negative_embeds.any()
    none, empty = sd3.encode([PROMPT], None, True, SIZE), sd3.encode([PROMPT], [""], True, SIZE)
    assert torch.equal(none.negative_embeds, empty.negative_embeds)


def test_without_a_t5_no_zero_tokens_are_appended(pipes):
    assert pipes["sd3"].family.text.encode([PROMPT], None, False, SIZE).prompt_embeds.shape == (1, 8, 32)


def test_the_digest_changes_with_every_value_dtype_and_shape(pipes):
    cond = pipes["sdxl"].family.text.encode([PROMPT], None, True, SIZE)
    digests = {cond.digest(), cond.to("cpu", torch.float16).digest(), cond.select([0, 0]).digest()}
    nudged = cond.pooled.clone()
    nudged[0, 0] += 1e-6
    digests.add(Conditioning(**cond.tensors() | {"pooled": nudged}).digest())
    assert len(digests) == 4
    assert cond.select([0]).digest() == cond.digest()


def test_time_ids_stay_float32(pipes):
    cond = pipes["sdxl"].family.text.encode([PROMPT], None, False, (1032, 1000)).to("cpu", torch.bfloat16)
    assert cond.prompt_embeds.dtype == torch.bfloat16
    assert cond.time_ids.tolist() == [[1000, 1032, 0, 0, 1000, 1032]]


def test_cat_joins_rows_and_refuses_guided_with_unguided(pipes):
    text = pipes["sd3"].family.text
    guided, plain = (text.encode([PROMPT], None, guidance, SIZE) for guidance in (True, False))
    assert len(Conditioning.cat([guided, guided])) == 2
    with pytest.raises(BadRequest, match="cannot share a batch"):
        Conditioning.cat([guided, plain])


def test_prompt_digests_tell_apart_what_could_be_confused():
    cases = [(["a", "b"], None), (["ab"], None), (["a"], ["b"]), (["a", "b"], ["", ""]), (["a", "b"], ["", "c"])]
    assert len({prompt_digest(*case) for case in cases}) == len(cases)


def test_a_fingerprint_is_stable_under_half_precision_and_tells_encoders_apart(pipes):
    from relay.conditioning import TextEncoder, compatible

    text = pipes["sdxl"].family.text
    ours = conditioning_fingerprint(text)
    assert (ours.tokens, ours.width, ours.pooled_width, len(ours.thumbnail)) == (8, 32, 16, 64)
    parts = {name: copy.deepcopy(part) for name, part in text.pipeline.components.items()}
    half = TextEncoder(type(text.pipeline)(**parts, add_watermarker=False).to(torch.bfloat16))
    assert compatible(ours, conditioning_fingerprint(half)) is None
    assert "other text encoders" in compatible(ours, type(ours)(8, 32, 16, tuple(reversed(ours.thumbnail))))
    assert "width" in compatible(ours, conditioning_fingerprint(pipes["sd3"].family.text))
