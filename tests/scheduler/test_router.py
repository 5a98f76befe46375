"""The token-level router: it learns a rule, names the tokens, keeps its weights safe, and speaks for several families."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from experiments.routing.data import EDGE, FULL, RELAY, RoutingData, Split
from experiments.training.router import Recipe, fit
from relay.errors import BadRequest, RelayError
from relay.family_spec import find_family
from relay.fingerprint import Fingerprint
from scheduler.router import store
from scheduler.router.budget import Budget
from scheduler.router.clip_text import ClipText
from scheduler.router.model import RouterNet, Shape
from scheduler.router.moe import DualGateMoE
from scheduler.router.router import Router
from scheduler.router.settings import MODES
from scheduler.router.tokens import TokenReader
from scheduler.router.trained import Trained

METRICS = ("q_definition", "q_color")
RECIPE = Recipe(
    shape=Shape(width=16, layers=1, heads=2, rank=4, hidden=16, top_k=3, dropout=0.0), gamma=2.0, epochs=24, rate=1e-2,
)  # fmt: skip
PROMPTS = [
    f"a {one} {shape} {rest}"
    for one in ("red", "blue", "green", "grey")
    for shape in ("circle", "square")
    for rest in ("", "on blue", "on green", "and a red square", "on red", "on grey", "and a grey square", "on a square")
]


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    return TokenReader.around(tiny.tokenizer(), tiny.text_encoder(CLIPTextModel), "0123456789abcdef")


def split(prompts, seed, better=1.0):
    """Circles need the large member, all else the small one draws a little better; colours are alike everywhere."""
    rng = np.random.default_rng(seed)
    circle = np.array(["circle" in prompt for prompt in prompts])
    quality = np.full((len(prompts), 3, 2), 0.7)
    quality[:, FULL, 0] = 0.8
    quality[:, RELAY, 0] = np.where(circle, 0.75, 0.8) * better
    quality[:, EDGE, 0] = np.where(circle, 0.4, 0.85) * better
    quality += rng.normal(0, 0.05, quality.shape)
    return Split(tuple(prompts), tuple(prompts), ("1",) * len(prompts), quality.clip(0, 1))


def routing_data(family="mini-sd3", better=1.0):
    rng = np.random.default_rng(7)
    train = [PROMPTS[i] for i in rng.integers(0, len(PROMPTS), 320)]
    programs = {mode: f"{family}/{mode}" for mode in MODES}
    held = (split(PROMPTS, 2, better), split(PROMPTS, 3, better))
    return RoutingData(family, "clip", METRICS, programs, split(train, 1, better), *held)


@pytest.fixture(scope="module")
def trained(reader):
    return fit(routing_data(), RECIPE, 0, reader).trained


def test_it_learns_the_rule(trained, reader):
    router = Router([trained], [reader])
    test = routing_data().test
    said = router.predict(test.prompts)
    circle = np.array(["circle" in prompt for prompt in test.prompts])
    assert ((said.prs[:, 0] < 0.5) == circle).mean() > 0.9
    # and how good each mode will be: off by less than half of what the mean over prompts is
    edge = np.where(circle, 0.4, 0.85)
    assert np.abs(said.quality[:, EDGE, 0] - edge).mean() < 0.5 * np.abs(edge.mean() - edge).mean()
    assert (
        said.quality[circle, FULL, 0].mean()
        > said.quality[circle, RELAY, 0].mean()
        > said.quality[circle, EDGE, 0].mean()
    )


@pytest.mark.parametrize("family", ["mini-sd3", "mini-sdxl"])
def test_its_own_clip_layers_are_transformers(family):
    """What the router reads is what the family's own encoder, loaded as diffusers loads it, says."""
    spec = find_family(family)
    reader = TokenReader.of(spec)
    folder = Path(spec.text.repo) / {"mini-sd3": "text_encoder", "mini-sdxl": "text_encoder_2"}[family]
    encoder = CLIPTextModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = ["a red heart at the top left and a blue circle, on a yellow background", "the letter A", ""]
    own = reader.read(prompts)
    theirs = TokenReader.around(reader.tokenizer, encoder, reader.digest).read(prompts)
    assert own.states.shape == (3, own.mask.shape[1], reader.width)
    assert torch.allclose(own.states, theirs.states, atol=1e-4)
    assert torch.equal(own.mask, theirs.mask)
    assert not own.mask[2].any()


def test_quick_gelu_too():
    encoder = tiny.text_encoder(CLIPTextModel)
    encoder.config.hidden_act = "quick_gelu"
    encoder = CLIPTextModel(encoder.config).eval()
    own = ClipText(encoder.config.to_dict(), encoder.state_dict())
    ids = torch.tensor([[2, 5, 7, 3]])
    with torch.inference_mode():
        theirs = encoder(ids, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(own(ids), theirs, atol=1e-5)


def test_selected_tokens_are_the_prompts_own(trained, reader):
    prompt = "a red circle on grey"
    said = Router([trained], [reader]).predict([prompt, "a square"])
    for i, text in enumerate((prompt, "a square")):
        for metric in METRICS:
            places = said.selected(i, metric)
            assert 1 <= len(places) <= RECIPE.shape.top_k
            assert len(set(places)) == len(places)
            assert all(said.tokens[i][at] in text.split() for at in places)
    assert [prompt[slice(*span)] for span in said.spans[0]] == prompt.split()


def test_a_batch_says_what_single_prompts_say(trained, reader):
    router = Router([trained], [reader])
    together = router.predict(["a red circle", "a blue square and a grey square on red"])
    alone = router.predict(["a red circle"])
    assert np.allclose(together.d[0], alone.d[0], atol=1e-5)
    assert np.allclose(together.quality[0], alone.quality[0], atol=1e-5)


def test_decisions_keep_the_budget_and_say_why(trained, reader):
    router = Router([trained], [reader])
    for budget in (Budget.two_way(0.25), Budget(full=0.2, relay=0.2)):
        modes = [router.decide(prompt, budget).mode for prompt in PROMPTS]
        assert modes.count("full-cloud") / len(modes) <= budget.full
        assert modes.count("relay") / len(modes) <= budget.relay
    two_way = router.decide("a red circle", Budget.two_way(1.0))
    assert two_way.mode == "full-cloud"
    assert two_way.probability == 1.0
    assert two_way.reason == f"PRS {two_way.prs:.3f} < alpha 0.500"
    assert router.decide("a red square", Budget.two_way(1.0)).mode == "edge-only"
    assert router.decide("a red circle", Budget(), allowed=["edge-only"]).mode == "edge-only"
    with pytest.raises(BadRequest, match="no mode is allowed"):
        router.decide("a red circle", allowed=[])


def test_exploration_is_logged_with_its_probability(trained, reader):
    router, rng = Router([trained], [reader]), np.random.default_rng(0)
    said = router.predict(["a red circle"])
    taken = [router.choose(said, Budget.two_way(1.0), explore=0.3, rng=rng) for _ in range(600)]
    assert {d.probability for d in taken if d.mode == "full-cloud"} == {0.7}
    assert {d.probability for d in taken if d.mode != "full-cloud"} == {0.15}
    share = np.mean([d.mode == "full-cloud" for d in taken])
    assert abs(share - 0.7) < 4 * (0.21 / 600) ** 0.5
    assert all(d.explored == (d.mode != "full-cloud") for d in taken)


def test_a_promise_decides_and_says_what_it_covers(trained, reader):
    router = Router([trained], [reader])
    promise = router.promise(0.15, 0.2)
    kept = router.decide("a red circle", Budget(), promise=promise)
    assert kept.promise == "mean loss to full-cloud <= 0.15 with probability 0.8"
    assert "not covered" in router.decide("a red circle", Budget(), promise=promise, explore=0.1).promise
    assert "not covered" in router.decide("a red circle", promise=promise, allowed=["relay"]).promise
    with pytest.raises(BadRequest, match="cannot both be met"):
        router.promise(0.06, 0.2, budget=Budget(full=0.0, relay=0.0))


def test_it_says_when_prompts_have_changed(trained, reader):
    router = Router([trained], [reader])
    assert not router.watch(PROMPTS).shifted
    said = router.watch([prompt for prompt in PROMPTS if "circle" in prompt] * 2)
    assert said.shifted
    assert said.prompts == 64


def test_two_ways_three_ablations_and_few_prompts(reader):
    data, change = routing_data(), {"ways": "two-way", "multi": False, "epochs": 4}
    shape = Shape(width=16, layers=1, heads=2, select=False, dual=False)
    fitted = fit(data, Recipe(shape=shape, rate=5e-3, **change), 0, reader)
    assert fitted.trained.card.metrics == ("prs",)
    said = Router([fitted.trained], [reader]).predict(data.test.prompts).prs[:, 0]
    circle = np.array(["circle" in prompt for prompt in data.test.prompts])
    assert said[circle].mean() < said[~circle].mean()
    assert fitted.trained.net.blocks[0].moe.low.shape[0] == 1
    with pytest.raises(BadRequest, match="too few"):
        fit(RoutingData("mini-sd3", "clip", METRICS, {}, *(data.test.take([0]),) * 3), RECIPE, 0, reader)


def test_weights_come_back_as_they_were(trained, reader, tmp_path):
    path = tmp_path / "clip.safetensors"
    store.save(trained, path)
    again = store.load(path, "mini-sd3")
    prompts = PROMPTS[:5]
    one, two = Router([trained], [reader]), Router([again], [reader])
    assert np.array_equal(one.predict(prompts).d, two.predict(prompts).d)
    assert again.card == trained.card
    assert two.prices(Budget(full=0.2)).full == pytest.approx(one.prices(Budget(full=0.2)).full, abs=1e-6)


def test_bad_weights_are_refused_in_one_line(trained, tmp_path):
    path = tmp_path / "clip.safetensors"
    store.save(trained, path)
    whole = path.read_bytes()

    def refused(data, error=RelayError, family=None):
        path.write_bytes(data)
        with pytest.raises(error) as caught:
            store.load(path, family)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "damaged" in refused(whole[: len(whole) // 2])
    assert "damaged" in refused(b"")
    assert "checksum" in refused(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    assert "checksum" in refused(whole.replace(b"q_definition", b"q_definitiom"))
    assert "not of sdxl" in refused(whole, family="sdxl")
    with pytest.raises(BadRequest, match="relay-train router"):
        store.load(tmp_path / "none.safetensors")
    with pytest.raises(RelayError, match="text encoder"):
        store.check_encoder(trained, "another")


def test_another_familys_pictures_are_refused(trained):
    mine = Fingerprint(4, 8, 0.5, 0.0, "flow", tuple(np.linspace(0, 1, 192).tolist()))
    card = trained.card.__class__(
        **{name: getattr(trained.card, name) for name in trained.card.__struct_fields__}
        | {"fingerprint": {name: getattr(mine, name) for name in mine.__struct_fields__}}
    )
    known = Trained(card, trained.net, trained.scales, trained.calibration)
    store.check_fingerprint(known, mine)
    with pytest.raises(RelayError, match="another family's"):
        store.check_fingerprint(known, Fingerprint(16, 8, 0.5, 0.0, "flow", mine.thumbnail))


def test_several_families_are_asked_together(trained, reader):
    worse = fit(routing_data("mini-sdxl", better=0.5), RECIPE, 0, reader).trained
    router = Router([worse, trained], [reader, reader])
    said = router.predict(["a red square", "a red circle"])
    assert said.families == ("mini-sdxl", "mini-sd3")
    assert said.family[:, EDGE].tolist() == [1, 1]  # the family whose small member is the better one
    alone = Router([trained], [reader]).predict(["a red square", "a red circle"])
    assert np.allclose(said.quality[:, EDGE], alone.quality[:, EDGE])
    assert said.prs[0, 0] > 0.5 > said.prs[1, 0]
    assert router.decide("a red square", Budget(full=0.5)).family["edge-only"] == "mini-sd3"
    assert len(router.calibration.outcome) == len(PROMPTS)
    other = Trained(
        fit(routing_data(), RECIPE, 0, reader).trained.card, trained.net, trained.scales, trained.calibration
    )
    changed = type(other.card)(
        **{n: getattr(other.card, n) for n in other.card.__struct_fields__} | {"calibration": "other"}
    )
    with pytest.raises(BadRequest, match="calibrated on other prompts"):
        Router([trained, Trained(changed, trained.net, trained.scales, trained.calibration)])


def test_the_dual_gate_is_the_papers():
    torch.manual_seed(0)
    moe = DualGateMoE(width=6, experts=2, top_k=2, rank=3, hidden=5)
    tokens, mask = torch.randn(1, 4, 6), torch.tensor([[True, True, True, False]])
    update, chosen = moe(tokens, mask)
    gate = (tokens[0] @ moe.experts.T).softmax(-1)  # A = softmax(T E^T)
    expected = torch.zeros(4, 6)
    for i in range(2):
        allowed = torch.where(mask[0], gate[:, i], torch.zeros(4))
        best = allowed.topk(2).indices
        assert chosen.index[0, i].tolist() == best.tolist()
        for t in best:
            plus, minus = (tokens[0, t] @ moe.low[o, i] @ moe.shared[i] for o in (0, 1))
            expected[t] += moe.back(gate[t, i] * (plus - minus).sigmoid())
    assert torch.allclose(update[0], expected, atol=1e-6)


def test_padding_and_special_tokens_change_nothing():
    torch.manual_seed(0)
    net = RouterNet(8, 2, Shape(width=8, layers=2, heads=2, top_k=3)).eval()
    states, mask = torch.randn(1, 5, 8), torch.tensor([[False, True, True, True, False]])
    padded = torch.cat([states, torch.randn(1, 3, 8)], 1)
    out = net(states, mask)
    wide = net(padded, torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], 1))
    assert torch.allclose(out.d, wide.d, atol=1e-5)
    assert set(out.selected[out.weights > 0].tolist()) <= {1, 2, 3}
    assert torch.isfinite(net(states, torch.zeros(1, 5, dtype=torch.bool)).d).all()  # a prompt of special tokens only
