"""Links: time is what the figures say, a scaled link keeps the real ratio of transfer to step, and each mode pays its own."""

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import BadRequest, RelayError
from relay.family_spec import find_family
from relay.program import CODECS, Program
from scheduler.links import LINKS, LinkProfile, find_link, list_links
from scheduler.message_sizes import bytes_sent, computed_sizes, real_sizes

SECONDS = st.floats(1e-4, 1e2)
LINK = st.builds(
    LinkProfile,
    name=st.just("any"),
    bandwidth_bit_s=st.floats(1e3, 1e11),
    delay_s=st.floats(1e-5, 1.0),
    jitter_s=st.floats(0, 0.5),
)
RELAY = "mini-sd3/large:28:0-14/small:28:14-28/match=direct/codec={codec}/guidance={g}/conditioning={c}"


def program(codec="fp16", g="3,3", c="encode"):
    return Program.parse(RELAY.format(codec=codec, g=g, c=c))


def alone(member):
    return Program.parse(f"mini-sd3/{member}:28:0-28/match=direct/codec=fp16/guidance=3/conditioning=ship")


@given(LINK, SECONDS, SECONDS, st.integers(0, 10**8), st.integers(0, 99))
@settings(max_examples=20)
def test_scaled_transfer_over_mini_step_is_real_transfer_over_real_step(link, real_step, mini_step, size, seed):
    scaled = link.scaled(real_step, mini_step, "a test")
    assert scaled.transfer_time(size) / mini_step == pytest.approx(link.transfer_time(size) / real_step, rel=1e-9)
    drawn, wanted = (each.sample(size, np.random.default_rng(seed)) for each in (scaled, link))
    assert drawn / mini_step == pytest.approx(wanted / real_step, rel=1e-9)


@pytest.mark.parametrize("mini", ["mini-sd3", "mini-sdxl"])
def test_every_message_of_a_mini_family_weighs_like_the_real_ones_against_a_step(mini):
    real_step, mini_step = 0.31, 0.0125
    sizes = real_sizes(mini)
    scaled = LINKS["wifi"].scaled(real_step, mini_step, "a test")
    for message in bytes_sent(program(c="ship"), sizes) + bytes_sent(alone("large"), sizes):
        ratio = scaled.transfer_time(message.bytes) / mini_step
        assert ratio == pytest.approx(LINKS["wifi"].transfer_time(message.bytes) / real_step)


@pytest.mark.parametrize("name", ["wifi", "5g", "lte"])
def test_samples_have_the_stated_mean_and_jitter_and_are_never_early(name):
    link, rng = LINKS[name], np.random.default_rng(7)
    times = np.array([link.sample(131_072, rng) for _ in range(20_000)])
    assert times.mean() == pytest.approx(link.transfer_time(131_072), abs=4 * link.jitter_s / len(times) ** 0.5)
    assert times.std() == pytest.approx(link.jitter_s, rel=0.05)
    assert times.min() >= 8 * 131_072 / link.bandwidth_bit_s


def test_a_link_without_jitter_samples_its_mean():
    assert LINKS["loopback"].sample(524_288, np.random.default_rng(0)) == LINKS["loopback"].transfer_time(524_288)
    assert LINKS["loopback"].transfer_time(524_288) == pytest.approx(4e-4, rel=0.05)  # as measured, facts section 5


def test_profiles_are_listed_fastest_first():
    times = [LINKS[name].transfer_time(524_288) for name in list_links()]
    assert times == sorted(times)


def test_a_description_says_which_kind_of_link_it_is():
    assert LINKS["lte"].kind == "as given"
    assert LINKS["lte"].describe() == "lte: 12 Mbit/s, 35 ms one way, jitter 10 ms (as given)"
    scaled = LINKS["lte"].scaled(0.3, 0.012, "docs/latency.md on an H100")
    assert scaled.kind == "scaled"
    for part in ("300 Mbit/s", "1.4 ms one way", "lambda = 25", "300 ms / 12 ms", "docs/latency.md on an H100"):
        assert part in scaled.describe()
    with pytest.raises(BadRequest, match="scaled already"):
        scaled.scaled(0.3, 0.012, "again")


def test_links_are_read_from_yaml_and_mappings(tmp_path):
    path = tmp_path / "backhaul.yaml"
    path.write_text("like: lte\nbandwidth_bit_s: 40e6\nscaled: {real_step_s: 1.0, mini_step_s: 0.5, source: here}\n")
    link = find_link(path)
    assert (link.name, link.kind, link.bandwidth_bit_s, link.delay_s) == ("lte", "scaled", 80e6, 0.0175)
    path.write_text("bandwidth_bit_s: 1000000\n")
    assert find_link(str(path)) == LinkProfile(name="backhaul", bandwidth_bit_s=1e6)
    assert find_link({"like": "wifi", "name": "home"}) == find_link({"name": "home", **_figures("wifi")})
    assert find_link("wifi") is find_link(LINKS["wifi"]) is LINKS["wifi"]


def _figures(name):
    return {key: getattr(LINKS[name], key) for key in ("bandwidth_bit_s", "delay_s", "jitter_s")}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bandwidth: 5\n", "bandwidth"),
        ("like: wify\n", "wify"),
        ("delay_s: 0.1\n", "bandwidth_bit_s"),
        ("bandwidth_bit_s: 0\n", "bandwidth_bit_s"),
        ("like: lte\ndelay_s: -1\n", "delay_s"),
        ("bandwidth_bit_s: 1e6\njitter_s: 0.1\n", "jitter_s"),
        ("bandwidth_bit_s: fast\n", "bandwidth_bit_s"),
        ("bandwidth_bit_s: .nan\n", "bandwidth_bit_s"),
        ("like: lte\nscaled: {real_step_s: 1}\n", "mini_step_s"),
        ("like: lte\nscaled: {real_step_s: 0, mini_step_s: 1, source: x}\n", "real_step_s"),
        ("- 1\n", "array"),
        ("a: [\n", "line 2"),
    ],
)
def test_a_bad_link_is_refused_in_one_line_that_names_file_and_key(tmp_path, text, named):
    path = tmp_path / "link.yaml"
    path.write_text(text)
    with pytest.raises(BadRequest) as refusal:
        find_link(path)
    assert str(path) in str(refusal.value)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("unknown", ["wify", "no/such.yaml"])
def test_an_unknown_link_is_refused(unknown):
    with pytest.raises(BadRequest, match=unknown):
        find_link(unknown)


def test_scaling_by_nonsense_is_refused():
    for steps in ((0, 1), (1, -1), (float("nan"), 1), (1, float("inf"))):
        with pytest.raises(BadRequest, match="step_s"):
            LINKS["wifi"].scaled(*steps, "x")
    with pytest.raises(BadRequest, match="source"):
        LINKS["wifi"].scaled(1, 1, "")
    with pytest.raises(BadRequest, match="bytes"):
        LINKS["wifi"].transfer_time(-1)


# -- who pays for what ---------------------------------------------------------------------------------------------


def test_real_sizes_are_those_of_the_facts():
    sdxl, sd35 = real_sizes("mini-sdxl"), real_sizes("mini-sd3")
    assert (sdxl.family, sdxl.latent, round(sdxl.embeddings / 1e6, 2)) == ("sdxl", 131_072, 0.32)
    assert (sd35.family, sd35.latent, round(sd35.embeddings / 1e6, 2)) == ("sd35", 524_288, 2.73)
    assert real_sizes("sdxl", "jpeg").image < sdxl.image < 3 * 1024 * 1024
    with pytest.raises(BadRequest, match="flux"):
        real_sizes("flux")


def test_each_mode_pays_for_its_own():
    sizes = real_sizes("sd35")
    assert bytes_sent(alone("large"), sizes) == [("image", sizes.image)]
    assert bytes_sent(alone("small"), sizes) == []
    assert bytes_sent(program(), sizes) == [("latent", sizes.latent)]
    assert bytes_sent(program(c="ship"), sizes) == [("embeddings", 2 * sizes.embeddings), ("latent", sizes.latent)]
    assert bytes_sent(program(c="ship", g="1,1"), sizes)[0] == ("embeddings", sizes.embeddings)


def test_other_lists_of_legs_pay_by_the_same_rule():
    sizes = real_sizes("sdxl")
    kinds = lambda text: [m.kind for m in bytes_sent(Program.parse(text), sizes)]  # noqa: E731
    small_first = "f/small:28:0-7/large:28:7-28/match=exact/codec=fp16/guidance=2,2/conditioning=ship"
    assert kinds(small_first) == ["embeddings", "latent", "image"]
    tiers = "f/large:28:0-7/mid:28:7-14/small:28:14-28/match=exact/codec=fp16/guidance=2,2,2/conditioning=ship"
    assert kinds(tiers) == ["embeddings", "embeddings", "latent", "latent"]
    same = "f/large:28:0-7/large:28:7-28/match=exact/codec=fp16/guidance=2,2/conditioning=ship"
    assert kinds(same) == ["image"]


@pytest.mark.parametrize("codec", CODECS)
def test_a_latent_takes_the_bytes_that_its_codec_makes_of_it(codec):
    from relay.codecs import payload_bytes

    sizes = real_sizes("sd35")
    assert bytes_sent(program(codec), sizes)[0].bytes == payload_bytes(codec, (1, *sizes.latent_shape))


def test_a_family_that_is_not_on_disk_says_so(tmp_path):
    spec = find_family("mini-sd3")
    lost = msgspec.structs.replace(spec, vae=msgspec.structs.replace(spec.vae, repo=str(tmp_path)))
    with pytest.raises(RelayError, match="there is no config"):
        computed_sizes(lost)


@pytest.mark.parametrize("name", ["mini-sd3", "mini-sdxl"])
def test_computed_sizes_are_what_a_shipped_handoff_carries(name):
    from relay.family import Family

    sizes, family = computed_sizes(find_family(name)), Family.load(name)
    assert sizes.latent_shape == (8, 16, 16)
    conditioning = family.text.encode(["a red circle"], None, True, (64, 64))
    tensors = {key: value for key, value in conditioning.tensors().items() if key != "time_ids"}
    assert sum(value.nbytes for value in tensors.values()) == 2 * sizes.embeddings


def test_importing_links_brings_neither_torch_nor_a_socket_library():
    code = "import sys, scheduler.links, scheduler.message_sizes; print({'torch', 'zmq', 'diffusers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
