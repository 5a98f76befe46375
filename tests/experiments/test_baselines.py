"""Baselines: equal to full-cloud where they save nothing, gone after a run, and honest about where they do not apply."""

from types import SimpleNamespace

import pytest
import torch

from experiments.baselines import NAMES, load_baseline, table
from experiments.baselines.absent import FirstBlockCache, SeaCache, TextKVCache
from experiments.baselines.base import Result, Setting, as_result, call, full_cloud, generators
from experiments.baselines.cached import LargeLeg, large_module
from experiments.baselines.hooks import FasterCache, PyramidAttention
from experiments.baselines.img2img import noised, second_draw
from experiments.baselines.mag_cache import MagCache
from experiments.baselines.points import points, totals_of
from experiments.baselines.work import counting, large_steps
from relay.errors import BadRequest
from relay.family import Family
from relay.pipeline import RelayPipeline
from relay.program import Program

STEPS = 6
PROMPTS = ["a large red heart at the top left", "a small green square"]
SEEDS = [7, 8]
FAMILIES = ("mini-sd3", "mini-sdxl")
TAKEN = {
    "mini-sd3": {
        "fewer-steps",
        "small-first",
        "img2img",
        "pyramid-attention",
        "faster-cache",
        "taylorseer",
        "mag-cache",
    },
    "mini-sdxl": {"fewer-steps", "small-first", "img2img", "pyramid-attention", "taylorseer", "deepcache", "t-gate"},
}
PACKAGES = {"deepcache": "DeepCache", "t-gate": "tgate"}
CACHED = [(family, name) for family in FAMILIES for name in NAMES if name.rpartition("+")[2] in TAKEN[family]]
# cached alone, at an operating point that does cache within six steps, and not in the last alone
ACTIVE = {
    "pyramid-attention": {"every": 2, "below": 990},
    "faster-cache": {"every": 3, "below": 990},
    "taylorseer": {"every": 3, "order": 1},
    "mag-cache": {"threshold": 1.0, "skips": 3},
    "deepcache": {"every": 2, "branch": 0},
    "t-gate": {"gate_step": 2, "sp_interval": 5, "fi_interval": 1, "warm_up": 2},
}


@pytest.fixture(scope="module")
def families():
    return {name: Family.load(name) for name in FAMILIES}


@pytest.fixture(scope="module")
def references(families):
    return {name: run_full_cloud(family) for name, family in families.items()}


def run_full_cloud(family, steps=STEPS):
    return as_result(call(family, PROMPTS, SEEDS, full_cloud(family, steps))).images


def needs_package(name):
    if module := PACKAGES.get(name.rpartition("+")[2]):
        pytest.importorskip(module)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_baseline_applies_or_says_why_not(families, name):
    for each in NAMES:
        reason = load_baseline(each).applies(families[name])
        if each.rpartition("+")[2] in TAKEN[name] and each.rpartition("+")[2] not in PACKAGES:
            assert reason is None, each
        elif reason is not None:
            assert len(reason) > 20
            assert "\n" not in reason
    shown = table(families[name])
    assert all(f"| {each} |" in shown for each in NAMES)
    assert "| no: " in shown


@pytest.mark.parametrize(("family", "name"), CACHED)
def test_settings_are_a_handful_of_labelled_points_in_plain_scalars(families, family, name):
    settings = load_baseline(name).settings(families[family])
    assert 3 <= len(settings) <= (10 if name.startswith("relay+") else 6)  # of two kinds of handoffs
    assert len({s.label for s in settings}) == len(settings)
    assert all(isinstance(v, (str, int, float)) for s in settings for v in s.values.values())
    programs = [Program.parse(s.values["program"]) for s in settings]
    assert all(p.family == family for p in programs)
    assert load_baseline(name).settings(families[family], 50)[0] != settings[0]


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, n in CACHED if n in ACTIVE])
def test_caching_nothing_is_full_cloud_caching_something_is_not_and_nothing_stays_behind(
    families, references, family, name
):
    needs_package(name)
    baseline, family = load_baseline(name), families[family]
    expected = references[family.name]
    idle = baseline.idle(family, STEPS)
    made = baseline.run(family, PROMPTS, SEEDS, idle)
    assert made.images.shape == expected.shape
    assert made.denoising_s > 0
    assert made.steps == {"large": STEPS, "small": 0}
    torch.testing.assert_close(made.images, expected, atol=1e-4, rtol=0)

    cached = baseline.run(family, PROMPTS, SEEDS, Setting("active", dict(idle.values) | ACTIVE[name])).images
    assert (cached - expected).abs().max() > 1e-3

    assert not any({"forward", "_diffusers_hook", "cache"} & vars(m).keys() for m in large_module(family).modules())
    assert not large_module(family)._forward_pre_hooks
    assert torch.equal(run_full_cloud(family), expected)


@pytest.mark.parametrize(("family", "name"), [("mini-sd3", "taylorseer"), ("mini-sdxl", "deepcache")])
def test_a_batch_gives_each_image_what_it_would_get_alone(families, family, name):
    needs_package(name)
    baseline, family = load_baseline(name), families[family]
    setting = Setting("active", {"program": str(full_cloud(family, STEPS))} | ACTIVE[name])
    both = baseline.run(family, PROMPTS, SEEDS, setting).images
    alone = baseline.run(family, PROMPTS[1:], SEEDS[1:], setting).images
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mini-sd3", "mini-sdxl"])
def test_a_relay_with_a_cache_that_caches_nothing_is_that_relay(families, name):
    baseline, family = load_baseline("relay+taylorseer"), families[name]
    idle = baseline.idle(family, STEPS)
    expected = as_result(call(family, PROMPTS, SEEDS, idle.values["program"]))
    made = baseline.run(family, PROMPTS, SEEDS, idle)
    assert made.steps == expected.steps
    assert made.steps["small"] > 0
    torch.testing.assert_close(made.images, expected.images, atol=1e-4, rtol=0)


def test_a_relays_first_leg_really_caches(families):
    """The points of a first leg reach up to its timesteps: full-cloud's own would never fire there."""
    family = families["mini-sd3"]
    settings = {
        name: load_baseline(name).settings(family, 10)[-1]
        for name in ("relay+pyramid-attention", "relay+faster-cache", "relay+mag-cache", "relay+taylorseer")
    }
    (program,) = {setting.values["program"] for setting in settings.values()}
    with counting(family) as plain:
        call(family, PROMPTS[:1], SEEDS[:1], program)
    for name, setting in settings.items():
        baseline = load_baseline(name)
        baseline.prepare(family, setting)
        with counting(family) as cached:
            baseline.run(family, PROMPTS[:1], SEEDS[:1], setting)
        assert cached["flops"] < 0.99 * plain["flops"], name


def test_fewer_steps_is_our_own_call_with_those_steps(families):
    family = families["mini-sdxl"]
    setting = load_baseline("fewer-steps").settings(family, 6)[2]
    made = load_baseline("fewer-steps").run(family, PROMPTS, SEEDS, setting)
    steps = made.steps["large"]
    assert steps < 6
    pipe = RelayPipeline(family)
    expected = pipe(
        PROMPTS, num_inference_steps=steps, mode="full-cloud", generator=generators(SEEDS), output_type="pt"
    )
    assert torch.equal(made.images, expected.images)
    assert large_steps(load_baseline("fewer-steps"), family, setting, PROMPTS[0]) == pytest.approx(steps)


@pytest.mark.parametrize("name", FAMILIES)
def test_small_first_is_its_program(families, name):
    family = families[name]
    setting = load_baseline("small-first").settings(family, STEPS)[1]
    program = Program.parse(setting.values["program"])
    assert [leg.member for leg in program.legs] == ["small", "large"]
    made = load_baseline("small-first").run(family, PROMPTS, SEEDS, setting)
    assert torch.equal(made.images, as_result(call(family, PROMPTS, SEEDS, program)).images)
    assert made.steps == program.steps


@pytest.mark.parametrize("name", FAMILIES)
def test_img2img_counts_its_steps_and_its_noise_is_fresh(families, name):
    family = families[name]
    setting = load_baseline("img2img").settings(family, STEPS)[-1]
    made = load_baseline("img2img").run(family, PROMPTS, SEEDS, setting)
    assert isinstance(made, Result)
    assert made.steps == {"large": setting.values["kept"], "small": STEPS}
    assert 0 <= made.images.min() <= made.images.max() <= 1
    first = family.initial_noise(2, family.spec.sizes.default, generators(SEEDS))
    again = second_draw(family, SEEDS)
    assert (first * again).mean().abs() < 0.1
    sigma = family.schedule("large", STEPS).sigmas[1]
    kept = 1 - sigma if name == "mini-sd3" else 1
    torch.testing.assert_close(noised(family, first, again, sigma), kept * first + sigma * again)


def test_deepcache_in_our_loop_is_deepcache_in_diffusers_own(families):
    """What makes our loop a fair place for the package: its own way of use gives the same pictures."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper
    from experiments.bench import diffusers_pipeline

    family = families["mini-sdxl"]
    theirs = diffusers_pipeline(family)
    patched = helper(pipe=theirs)
    patched.set_params(cache_interval=2, cache_branch_id=0)
    patched.enable()
    guidance = family.spec.members["large"].guidance
    expected = theirs(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=guidance, generator=generators(SEEDS), output_type="pt"
    ).images
    setting = Setting("", {"program": str(full_cloud(family, STEPS))} | ACTIVE["deepcache"])
    made = load_baseline("deepcache").run(family, PROMPTS, SEEDS, setting)
    torch.testing.assert_close(made.images, expected, atol=1e-4, rtol=0)


def attempt(family, cache, options):
    """A run with a cache that is said not to apply."""
    program = full_cloud(family, STEPS)
    with cache.on(family, LargeLeg.of(family, program), options):
        return as_result(call(family, PROMPTS, SEEDS, program)).images


@pytest.mark.parametrize(
    ("name", "cache", "options", "error"),
    [
        ("mini-sd3", FirstBlockCache(), {}, "NoneType"),
        ("mini-sdxl", FirstBlockCache(), {}, "pop from empty list"),
        ("mini-sdxl", SeaCache(), {}, "no repeated transformer blocks"),
        ("mini-sdxl", FasterCache(), {"every": 2, "below": 1001}, "must match"),
    ],
)
def test_what_is_said_to_fail_fails(families, references, name, cache, options, error):
    assert cache.applies(families[name])
    with pytest.raises(Exception, match=error):
        attempt(families[name], cache, options)
    assert torch.equal(run_full_cloud(families[name]), references[name]), "a failed run leaves the model as it was"


@pytest.mark.parametrize(
    ("name", "cache", "options"),
    [
        ("mini-sd3", SeaCache(), {"threshold": 10.0}),
        ("mini-sd3", TextKVCache(), {}),
        ("mini-sdxl", TextKVCache(), {}),
        ("mini-sdxl", MagCache(), {"threshold": 1.0, "skips": 3}),
    ],
)
def test_what_is_said_to_cache_nothing_caches_nothing(families, references, monkeypatch, name, cache, options):
    assert cache.applies(families[name])
    monkeypatch.setattr(MagCache, "ratios", lambda *_: [1.0] * STEPS)
    assert torch.equal(attempt(families[name], cache, options), references[name])


def test_a_baseline_of_ones_own_and_bad_names(families):
    assert load_baseline(f"{__name__}:Own").applies(families["mini-sd3"]) == "a lesson"
    for name, said in {
        "deepcach": "known are fewer-steps",
        "relay+fewer-steps": "unknown baseline",
        "no.such:Thing": "no.such:Thing",
        f"{__name__}:Lacking": "lacks paper",
    }.items():
        with pytest.raises(BadRequest, match=said):
            load_baseline(name)


class Own:
    name, paper, note = "own", "none", ""

    def applies(self, family):
        return "a lesson"

    def settings(self, family, steps=None):
        return []

    def run(self, family, prompts, seeds, setting):
        raise NotImplementedError


class Lacking(SimpleNamespace):
    name = "lacking"


def test_a_missing_package_is_the_reason(families, monkeypatch):
    monkeypatch.setattr("experiments.baselines.packages.find_spec", lambda _: None)
    for name in PACKAGES:
        assert "pip install" in load_baseline(name).applies(families["mini-sdxl"])


def test_settings_are_told_apart_by_t_and_by_name(families):
    family = families["mini-sd3"]
    baselines = [load_baseline("fewer-steps"), load_baseline("taylorseer"), load_baseline("sada")]
    found = points(baselines, family, [10, 28])
    assert len({point.text for point in found}) == len(found) == 2 * (6 + 5)
    assert "fewer-steps[5 of 10 steps]" in {point.text for point in found}
    assert "taylorseer[every 3 steps, order 1, T = 28]" in {point.text for point in found}
    with pytest.raises(BadRequest, match="two settings"):
        points([load_baseline("fewer-steps")] * 2, family, [10])


def test_baselines_stand_beside_the_ts_of_the_config_that_full_cloud_has(families):
    pipe = RelayPipeline(families["mini-sd3"])
    full, relay = pipe.plan(num_inference_steps=10, handoff=10), pipe.plan(num_inference_steps=28, handoff=14)
    assert totals_of([full, relay], [28, 10]) == [10]
    assert totals_of([relay], [28, 10]) == [28]
    assert totals_of([full], [28]) == [10]
    assert totals_of([], [28]) == []


def test_caches_without_guidance(families):
    """One branch only: nothing in a cache counts on two."""
    family = families["mini-sd3"]
    program = RelayPipeline(family).plan(num_inference_steps=3, mode="full-cloud", guidance_scale=1.0)
    expected = as_result(call(family, PROMPTS, SEEDS, program)).images
    for cache in (PyramidAttention(), FasterCache()):
        with cache.on(family, LargeLeg.of(family, program), cache.idle):
            made = as_result(call(family, PROMPTS, SEEDS, program)).images
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=0)
