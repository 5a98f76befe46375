"""What the step engine is compared with draws the same pictures: diffusers' pipelines as prefix and suffix."""

import pytest
import torch

from experiments.diffusers_relay import DiffusersRelay, Wanted

PROMPTS = ("a red circle", "a blue square", "a green circle and a blue square")


@pytest.mark.parametrize("kind", ["sd3", "sdxl"])
def test_prefix_and_suffix_alone_and_in_a_batch_give_our_pictures(pipes, kind):
    pipe = pipes[kind]
    theirs = DiffusersRelay(pipe.family)
    programs = [str(pipe.plan(num_inference_steps=4, handoff=s, codec="fp32")) for s in (1, 3, 4)]
    programs.append(str(pipe.plan(num_inference_steps=4, mode="edge-only", codec="fp32")))
    wanted = [Wanted(PROMPTS[i % 3], i, program) for i, program in enumerate(programs)]
    alone = [theirs.draw([each])[0] for each in wanted]
    for each, image in zip(wanted, alone, strict=True):
        ours = pipe(each.prompt, program=each.program, seed=each.seed, output_type="pt").images[0]
        assert (ours - image).abs().max() < 1e-4
    for image, together in zip(alone, theirs.draw(wanted), strict=True):
        assert (image - together).abs().max() < 1e-4
    assert not torch.equal(alone[0], alone[1])
