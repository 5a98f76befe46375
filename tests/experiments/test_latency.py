"""The real sizes: their parameter counts, and the code that measures them in its tiny form on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from experiments import latency
from experiments.cli import app
from experiments.random_family import RandomFamily, parameters
from experiments.real_sizes import SIZES, tiny
from relay.errors import BadRequest
from relay.family_spec import ARCHITECTURES, find_family
from scheduler.message_sizes import real_sizes

FAMILIES = ("sdxl-vega", "sd35")
SECTIONS = (
    "Members", "Text encoders", "End to end, measured", "End to end at every handoff step", "Transfer", "Throughput",
    "Peak memory",
)  # fmt: skip


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("member", ["large", "small"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_size_configs_have_the_published_number_of_parameters(family, member):
    sizes = SIZES[family]
    model = getattr(diffusers, ARCHITECTURES[find_family(family).architecture].model)
    trained, stored = parameters(model, sizes.denoisers[member])
    assert trained == pytest.approx(sizes.published[member].parameters, rel=0.01)
    if family == "sd35":  # what Stability AI announced counts the table of positions too
        assert stored == pytest.approx({"large": 8.1e9, "small": 2.5e9}[member], rel=0.015)


def test_the_vaes_and_text_encoders_have_the_published_number_of_parameters():
    import transformers

    for family, count in {"sdxl-vega": 83_653_863, "sd35": 83_819_683}.items():
        assert parameters(diffusers.AutoencoderKL, SIZES[family].vae)[0] == count
    known = {"CLIP-L": 123.06e6, "CLIP-bigG": 694.66e6, "T5-XXL": 4.762e9}
    for name, (cls, config) in SIZES["sd35"].text.items():
        assert parameters(getattr(transformers, cls), config)[0] == pytest.approx(known[name], rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_size_messages_are_those_that_links_are_charged(family):
    sizes, known = SIZES[family], real_sizes(family)
    cell = 2 ** (len(sizes.vae["block_out_channels"]) - 1)
    assert known.latent_shape == (sizes.vae["latent_channels"], *(side // cell for side in reversed(sizes.size)))
    config = sizes.denoisers["large"]
    width = config.get("joint_attention_dim") or config["cross_attention_dim"]
    pooled = config.get("pooled_projection_dim") or 2816 - 6 * 256
    tokens = 77 + 256 * (family == "sd35")
    assert known.embeddings == 2 * (tokens * width + pooled)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_run_writes_every_section(family, tmp_path, one_thread):
    out = tmp_path / "latency.md"
    words = ["latency", "--family", family, "--tiny", "--steps", "2", "--batches", "1,2", "--repeats", "1"]
    done = CliRunner().invoke(app, [*words, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    for section in SECTIONS:
        assert f"## {section}" in text
    assert "no quality can be read" in text
    assert "Tiny shapes" in text
    data = json.loads(out.with_suffix(".json").read_text())["families"][family]
    assert [row["handoff"] for row in data["relays"]] == [0, 1, 2]
    assert all(row["handoff"] + row["small_steps"] == 2 for row in data["relays"])
    theirs = [row for row in data["measured"] if row["method"] == "diffusers"]
    assert len(theirs) == 2
    # the same work was timed: in fp32 the pictures agree
    assert all(row["mean_difference"] < 1e-4 and row["ratio"] > 0 for row in theirs)
    assert [row["batch"] for row in data["members"]["large"]["curve"]] == [1, 2]
    full, edge = data["relays"][2], data["relays"][0]
    assert full["over"]["dsl"] - full["compute_s"] > edge["over"]["dsl"] - edge["compute_s"] == 0
    payloads = [row["payload"] for row in data["messages"]["latents"].values()]
    assert payloads == sorted(payloads, reverse=True)


def test_the_curve_ends_where_memory_does(monkeypatch, one_thread):
    family = RandomFamily("sd35", tiny(SIZES["sd35"]), "fp32", "cpu")
    walk = latency.walk_leg

    def full_at_four(denoiser, x, *args, **options):
        if len(x) >= 4:
            raise torch.OutOfMemoryError
        return walk(denoiser, x, *args, **options)

    monkeypatch.setattr(latency, "walk_leg", full_at_four)
    found = latency.step_curve(family, "small", 4, [1, 2, 4, 8], 1)
    assert [row["batch"] for row in found["curve"]] == [1, 2]
    assert found["full_at"] == 4


def test_without_a_gpu_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cli", "latency", "--family", "sdxl-vega"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs a CUDA device" in done.stderr
    assert "--tiny" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [({"name": "mini-sd3"}, "family"), ({"batches": "1,x"}, "--batches"), ({"steps": 1}, "at least 2"),
     ({"is_tiny": False, "device": "cpu"}, "needs a CUDA device"), ({"dtype": "int4"}, "dtype")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(words, said):
    asked = {"name": "sd35", "is_tiny": True, "device": None, "dtype": None, "steps": 4, "batches": "1", "repeats": 1}
    with pytest.raises(BadRequest, match=said):
        latency.latency(**asked | words)
