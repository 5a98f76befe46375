"""Metrics behind one interface: real models, tiny or embedded; what is missing is said in one line."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from experiments.training.clip import build_clip_tokenizer
from experiments.training.degrade import complete_all, spoil_scenes
from relay.errors import BadRequest, RelayError
from relay.metrics import BUILTIN, Metric, MissingModel, load_metric, score_all
from relay.metrics.clip_quality import PHRASES, QUALITIES
from relay.metrics.lpips import Lpips
from relay.metrics.ocr import agreement, quoted
from relay.scenes.sampling import caption, held_out

PROMPTS = ["a large red heart at the top left", "a small blue ring", 'the word "CAT" in red']
IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random CLIPModel of 32 pixels with the scene language's tokenizer, saved as any checkpoint is."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_clip_tokenizer()
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 3}
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", BUILTIN)
def test_every_builtin_is_a_metric_and_says_what_it_lacks(name):
    metric = load_metric(name)
    assert isinstance(metric, Metric)
    assert metric.name == name
    said = metric.missing()
    if said is None:
        return
    assert "\n" not in said
    with pytest.raises(RelayError, match=r"^[^\n]+$"):
        metric.score(IMAGES, PROMPTS, IMAGES)


def test_naming_a_metric_loads_no_model():
    code = "import sys, relay.metrics as m; m.load_metric('scene'); m.load_metric('clip_quality'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("beauty", {}, "clip_quality, clip_score"),
        ("no_such_module:Metric", {}, "cannot be imported"),
        ("relay.metrics:Nothing", {}, "cannot be imported"),
        ("pathlib:Path", {}, "is not a metric"),
        ("lpips", {"weights": "x"}, "trunk, net"),
        ("lpips", {"net": "resnet"}, "alex, vgg, squeeze"),
    ],
)
def test_a_bad_name_or_option_is_one_line(name, options, says):
    with pytest.raises(BadRequest, match=says) as caught:
        load_metric(name, **options)
    assert "\n" not in str(caught.value)


def test_a_metric_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "metrics_of_mine.py").write_text(
        "class Brightness:\n"
        "    name, columns, needs_reference = 'brightness', ('brightness',), False\n"
        "    def __init__(self, gain=1.0): self.gain = gain\n"
        "    def missing(self): return None\n"
        "    def score(self, images, prompts, references=None):\n"
        "        return {'brightness': (self.gain * images.mean((1, 2, 3))).tolist()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    metric = load_metric("metrics_of_mine:Brightness", gain=2.0)
    steps = []
    found = score_all([metric], IMAGES, PROMPTS, batch=2, progress=lambda done, total: steps.append((done, total)))
    assert found["brightness"] == pytest.approx((2 * IMAGES.mean((1, 2, 3))).tolist())
    assert steps == [(2, 3), (3, 3)]


def test_what_does_not_fit_together_is_refused(tiny_clip):
    clip = load_metric("clip_score", model=tiny_clip)
    with pytest.raises(BadRequest, match="3 images but 1 prompts"):
        score_all([clip], IMAGES, PROMPTS[:1])
    with pytest.raises(BadRequest, match="column clip_score"):
        score_all([clip, load_metric("clip_quality", model=tiny_clip)], IMAGES, PROMPTS)
    with pytest.raises(BadRequest, match="reference"):
        score_all([Lpips()], IMAGES, PROMPTS)
    with pytest.raises(MissingModel, match="trunk"):
        score_all([clip, Lpips()], IMAGES, PROMPTS, IMAGES)


def test_the_scene_judge_scores_what_is_asked():
    scenes = held_out(5, "test")
    drawn = complete_all(scenes, np.random.default_rng(0))
    images, _, _ = spoil_scenes(drawn, [{}] * 5, np.random.default_rng(1))
    found = load_metric("scene").score(images, [s.text() for s in scenes])
    assert found["attributes"] == [1.0] * 5
    assert math.isnan(found["letters"][0])
    assert found["letters"][4] == 1.0


def test_clip_quality_is_the_papers_formula(tiny_clip):
    """q against transformers' own logits: sigmoid(logit(m+) - logit(m-))."""
    images = IMAGES[:, :, :32, :32]
    metric = load_metric("clip_quality", model=tiny_clip)
    found = metric.score(images, PROMPTS)
    assert tuple(found) == metric.columns
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), build_clip_tokenizer()
    texts = tokenizer([t for q in QUALITIES for t in PHRASES[q]], padding=True, return_tensors="pt")
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[
        ..., None, None
    ]
    with torch.inference_mode():
        logits = model(pixel_values=(images - mean) / std, **texts).logits_per_image
    expected = (logits[:, 0::2] - logits[:, 1::2]).sigmoid()
    for i, quality in enumerate(QUALITIES):
        assert found[f"q_{quality}"] == pytest.approx(expected[:, i].tolist(), abs=1e-5)


def test_phrases_beside_the_weights_are_used(tiny_clip, tmp_path):
    for file in tiny_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pairs = {q: (f"low {q}", f"high {q}") for q in QUALITIES}
    (tmp_path / "phrases.json").write_text(json.dumps(pairs))
    found, turned = (load_metric("clip_quality", model=m).score(IMAGES, PROMPTS) for m in (tiny_clip, tmp_path))
    assert found["q_definition"] != turned["q_definition"]
    assert found["clip_score"] == turned["clip_score"]


def test_a_checkpoint_that_is_no_clip_model_is_one_line(tiny_clip, tmp_path):
    (tmp_path / "config.json").write_text((tiny_clip / "config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    metric = load_metric("clip_score", model=tmp_path)
    with pytest.raises(MissingModel, match="cannot be read as a transformers CLIPModel"):
        metric.score(IMAGES, PROMPTS)
    assert "no config.json" in load_metric("clip_score", model=tmp_path / "..").missing()
    assert "hf download no/such" in load_metric("pick_score", model="no/such").missing()


def test_pick_score_and_aesthetic_over_a_clip_by_path(tiny_clip, tmp_path):
    pick = load_metric("pick_score", model=str(tiny_clip)).score(IMAGES, PROMPTS)["pick_score"]
    assert all(math.isfinite(v) for v in pick)
    head = {"layers.0.weight": torch.randn(4, 8), "layers.0.bias": torch.zeros(4), "layers.2.weight": torch.randn(1, 4)}
    torch.save(head, tmp_path / "head.pth")
    found = load_metric("aesthetic", head=tmp_path / "head.pth", model=tiny_clip).score(IMAGES, PROMPTS)
    assert len(found["aesthetic"]) == 3
    torch.save({"weight": torch.randn(1, 768)}, tmp_path / "linear.pth")
    with pytest.raises(MissingModel, match="takes 768 numbers"):
        load_metric("aesthetic", head=tmp_path / "linear.pth", model=tiny_clip).score(IMAGES, PROMPTS)
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(MissingModel, match="cannot be read"):
        load_metric("aesthetic", head=tmp_path / "broken.pth", model=tiny_clip).score(IMAGES, PROMPTS)


def test_a_random_trunk_never_appears_under_the_name_lpips(tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    assert "not LPIPS" in Lpips().missing()
    torch.manual_seed(0)
    save_file(squeezenet1_1(weights=None).state_dict(), tmp_path / "trunk.safetensors")
    metric = Lpips(tmp_path / "trunk.safetensors", net="squeeze")
    assert metric.columns == ("lpips_unverified_trunk",)
    same = metric.score(IMAGES, PROMPTS, IMAGES)["lpips_unverified_trunk"]
    other = metric.score(IMAGES, PROMPTS, IMAGES.flip(0))["lpips_unverified_trunk"]
    assert same == pytest.approx([0.0] * 3, abs=1e-6)
    assert other[0] > 1e-4
    with pytest.raises(MissingModel, match="not torchvision's alex"):
        Lpips(tmp_path / "trunk.safetensors", net="alex").score(IMAGES, PROMPTS, IMAGES)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [('the word "CAT" in red', "CAT"), ("a sign that says 'i'm a truck'.", "i'm a truck"), ("the dog's bone, no text", ""),
     ("a mug “go” beside a sign 'stop'", "go stop"), ("cats' and dogs' toys", "")],
)  # fmt: skip
def test_the_text_that_a_prompt_quotes(prompt, wanted):
    assert quoted(prompt) == wanted


def test_ocr_agreement_is_one_less_the_edit_distance():
    assert agreement("CAT", "cat\n") == 1
    assert agreement("CAT", "CAR") == pytest.approx(2 / 3)
    assert agreement("CAT", "") == 0


@pytest.mark.parametrize("kind", QUALITIES)
def test_the_embedded_clip_sees_each_degradation_by_its_own_quality(kind):
    """Held-out scenes, clean against spoiled: the quality of that kind falls, and by more than any other does."""
    scenes = held_out(60, "test")
    drawn = complete_all(scenes, np.random.default_rng(3))
    clean, spoiled, _ = spoil_scenes(drawn, [{kind: 0.75}] * len(drawn), np.random.default_rng(4))
    metric = load_metric("clip_quality")
    before, after = (metric.score(images, [""] * len(images)) for images in (clean, spoiled))
    names = [name for name in metric.columns if name != "clip_score"]
    drops = {name: float(np.mean(before[name]) - np.mean(after[name])) for name in names}
    own = drops.pop(next(name for name in drops if name.endswith(kind)))
    assert own > 0.2
    assert own > 3 * max(map(abs, drops.values()))


def test_the_embedded_clip_prefers_a_scenes_own_caption():
    scenes = held_out(50, "test")
    rng = np.random.default_rng(3)
    captions = [caption(scene, rng) for scene in scenes]
    clean = spoil_scenes(complete_all(scenes, rng), [{}] * len(scenes), rng)[0]
    metric = load_metric("clip_score")
    own = np.array(metric.score(clean, captions)["clip_score"])
    other = np.array(metric.score(clean, captions[1:] + captions[:1])["clip_score"])
    assert (own > other).mean() > 0.95
