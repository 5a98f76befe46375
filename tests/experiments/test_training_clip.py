"""What the embedded CLIP learns from: degradations that show, swaps that change the meaning, a tokenizer that knows both."""

import numpy as np
import pytest
import torch

from experiments.metric_matrix import measure, table
from experiments.training.clip import PHRASES, ClipTask, build_clip, build_clip_tokenizer, said_labels, swapped
from experiments.training.degrade import KINDS, complete_all, layers, spoil_scenes
from experiments.training.judge import labels
from experiments.training.tokenizer import build_tokenizer
from relay.scenes.language import parse
from relay.scenes.render import render
from relay.scenes.sampling import held_out

SCENES = complete_all(held_out(10, "validation"), np.random.default_rng(0))


def test_layers_put_together_are_the_rendered_scene():
    clean, spoiled, done = spoil_scenes(SCENES, [{}] * 10, np.random.default_rng(1))
    assert torch.equal(clean, spoiled)
    assert done.sum() == 0
    # The jitter of the objects is drawn in another order, so the pictures agree up to a pixel at the edges.
    rendered = render(SCENES, np.random.default_rng(1)) / 2 + 0.5
    assert (clean - rendered).abs().mean() < 0.03
    assert [len(found) for found in layers(SCENES, np.random.default_rng(1))] == [
        len(s.word or s.groups) for s in SCENES
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_degradation_shows_and_grows(kind):
    change = []
    for severity in (0.25, 1.0):
        clean, spoiled, done = spoil_scenes(SCENES, [{kind: severity}] * 10, np.random.default_rng(2))
        assert (spoiled.min() >= 0, spoiled.max() <= 1) == (True, True)
        assert (done > 0).sum(0)[KINDS.index(kind)] >= 8
        assert (done > 0).sum() == (done > 0).sum(0)[KINDS.index(kind)]
        change.append((spoiled - clean).abs().mean())
    assert change[1] > change[0]


def test_the_tokenizer_knows_the_phrases_and_keeps_the_families_ids():
    tokenizer, families = build_clip_tokenizer(), build_tokenizer()
    caption = "a large red striped heart at the top left"
    assert tokenizer(caption).input_ids == families(caption).input_ids
    for pair in PHRASES.values():
        for text in pair:
            ids = tokenizer(text).input_ids
            assert len(ids) == 4  # start, high or low, the quality, end
            assert tokenizer.unk_token_id not in ids


def test_the_model_is_small():
    count = sum(p.numel() for p in build_clip(len(build_clip_tokenizer())).parameters())
    assert 2 * count < 2.5e6


def test_a_hard_negative_says_something_else():
    rng = np.random.default_rng(3)
    for scene in held_out(50, "validation"):
        other = swapped(scene, rng)
        assert set(other.groups) != set(scene.groups) or other.word != scene.word
        assert other.background == scene.background


def test_what_a_caption_leaves_open_is_not_asked_of_it():
    scene = parse("a red heart at the top left and a ring")
    drawn = complete_all([scene], np.random.default_rng(4))
    said = said_labels(labels(drawn), [scene])
    assert said["shape"][0, 0] == 4
    assert said["texture"][0, 0] == -100
    assert said["background"][0] == -100
    assert (said["present"][0, 1:] == -100).all()


def test_a_step_of_training_has_gradients_everywhere_and_is_a_function_of_its_number(tmp_path):
    task = ClipTask(tmp_path, 0, quick=True)
    task.batch_size = 9
    loss, _ = task.loss(3, torch.device("cpu"))
    again, _ = task.loss(3, torch.device("cpu"))
    assert loss.item() == pytest.approx(again.item())
    loss.backward()
    still = [n for n, p in task.modules["clip"].named_parameters() if p.grad is None and "vision_model.post" not in n]
    assert still == []


def test_the_table_says_where_a_metric_does_not_separate():
    def score(images):
        q = torch.full((len(images), len(KINDS)), 0.9)
        q[:, 0] = images.mean((1, 2, 3))
        return q

    found = measure(score, SCENES[:5], (1.0,))
    text = table(found, 5, None)
    assert found["drops"]["clarity"]["detail"] == 0
    assert "do not separate 3x: definition" in text
