"""Families from YAML or a folder: what they say is checked, what a role does not need is not loaded."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from tiny import PROMPT, SDXL_NOISE, transformer, unet, vae, write_family

from relay.errors import BadRequest, FamilyError, RelayError
from relay.family import Family, find_family, list_families
from relay.handoff import Handoff
from relay.pipeline import RelayPipeline
from relay.program import MATCHINGS

CALL = {"num_inference_steps": 3, "handoff": 1, "seed": 1}


def refused(path, match):
    with pytest.raises(FamilyError, match=match) as refusal:
        Family.load(path)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("name", list_families())
def test_the_families_that_stand_in_configs_can_be_read(name):
    spec = find_family(name)
    assert spec.name == name
    assert {"large", "small"} <= spec.members.keys()
    assert spec.matching in MATCHINGS


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(FamilyError, match="mini-sd3"):
        find_family("nobody")
    with pytest.raises(FamilyError, match=r"there\.yaml"):
        find_family("not/there.yaml")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"colour": "blue"}, "colour"),
        ({"vae": {"subfolde": "vae"}}, "subfolde"),
        ({"text": {"t5_token": 1}}, "t5_token"),
        ({"sizes": {"default": [32, 32], "multiple": 2}}, "multiple"),
        ({"large": {"guidence": 3}}, "guidence"),
    ],
)
def test_a_key_that_is_not_known_is_named_with_its_file(checkpoints, tmp_path, change, key):
    message = refused(write_family(tmp_path / "wrong.yaml", checkpoints["sd3"], "sd3", **change), key)
    assert "wrong.yaml" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "Upper Case"}, "name"),
        ({"sizes": {"default": [0, 32]}}, "sizes"),
        ({"sizes": {"default": 32}}, "sizes"),
        ({"dtype": "fp8"}, "dtype"),
        ({"offload": "disk"}, "offload"),
        ({"matching": "closest"}, "matching"),
        ({"codec": "zip"}, "codec"),
        ({"replace_scheduler": "heun"}, "replace_scheduler"),
        ({"large": {"guidance": -1}}, "guidance"),
        ({"large": {"steps": 0}}, "steps"),
        ({"text": {"t5_tokens": -1}}, "t5_tokens"),
        ({"members": {"large": {"repo": ".", "guidance": 1, "steps": 1}}}, "small"),
    ],
)
def test_a_value_that_is_not_possible_is_named_with_its_key(checkpoints, tmp_path, change, named):
    message = refused(write_family(tmp_path / "wrong.yaml", checkpoints["sd3"], "sd3", **change), named)
    assert "wrong.yaml" in message


def test_an_architecture_that_is_not_supported_is_refused(checkpoints, tmp_path):
    path = write_family(tmp_path / "wrong.yaml", checkpoints["sd3"], "sd3")
    path.write_text(path.read_text().replace("architecture: sd3", "architecture: dalle"))
    refused(path, "dalle.*architecture")


@pytest.mark.parametrize("text", ["", "- a\n- b", "name: [", "{}", "\x00", "name: x\nname: y"])
def test_a_file_that_is_no_family_is_refused(tmp_path, text):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    refused(path, "wrong.yaml")


def test_paths_in_a_yaml_are_relative_to_it(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "weights").symlink_to(checkpoints["sd3"])
    (tmp_path / "elsewhere").mkdir()
    path = write_family(tmp_path / "f.yaml", "./weights", "sd3")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Family.load(path).channels == 4
    assert Family.load("../f.yaml").channels == 4


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_diffusers_folder_with_a_small_member_beside_is_a_family(checkpoints, name):
    pipe = RelayPipeline.from_pretrained(checkpoints[name])
    assert pipe.family.spec.sizes.default == (32, 32)
    assert pipe(PROMPT, **CALL).images[0].size == (32, 32)


def test_a_folder_without_one_says_where_to_put_it(checkpoints, tmp_path):
    folder = tmp_path / "alone"
    shutil.copytree(checkpoints["sd3"], folder, ignore=shutil.ignore_patterns("*_small"))
    refused(folder, "transformer_small")
    refused(tmp_path, "model_index.json")


# --- members that do not belong together ---


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"in_channels": 8, "out_channels": 8}, "small has 8 latent channels, the VAE 4"),
        ({"joint_attention_dim": 48}, "joint_attention_dim 48"),
        ({"pooled_projection_dim": 48}, "pooled_projection_dim 48"),
    ],
)
def test_members_of_other_latents_or_conditioning_are_refused(checkpoints, tmp_path, config, named):
    transformer(5, **config).save_pretrained(tmp_path / "other" / "transformer")
    shutil.copytree(checkpoints["sd3"] / "scheduler", tmp_path / "other" / "scheduler")
    small = {"repo": "./other", "subfolder": "transformer"}
    refused(write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3", small=small), named)


def test_members_of_another_parameterisation_are_refused(checkpoints, tmp_path):
    unet(5).save_pretrained(tmp_path / "other" / "unet")
    shutil.copytree(checkpoints["sd3"] / "scheduler", tmp_path / "other" / "scheduler")
    small = {"repo": "./other", "subfolder": "unet"}
    refused(write_family(tmp_path / "f.yaml", checkpoints["sdxl"], "sdxl", small=small), "flow.*epsilon")


def test_a_scheduler_that_is_not_euler_is_refused_unless_the_yaml_replaces_it(checkpoints, tmp_path):
    folder = tmp_path / "dpm"
    shutil.copytree(checkpoints["sdxl"], folder)
    DPMSolverMultistepScheduler(**SDXL_NOISE, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    refused(write_family(tmp_path / "f.yaml", folder, "sdxl"), "DPMSolverMultistepScheduler.*replace_scheduler: euler")
    EulerDiscreteScheduler(**SDXL_NOISE, timestep_spacing="trailing").save_pretrained(folder / "scheduler_euler")
    replaced = write_family(tmp_path / "r.yaml", folder, "sdxl", replace_scheduler="euler")
    own = {"scheduler": "scheduler_euler"}
    euler = write_family(tmp_path / "e.yaml", folder, "sdxl", large=own, small=own)
    one, other = (
        RelayPipeline.from_pretrained(path)(PROMPT, output_type="latent", **CALL) for path in (replaced, euler)
    )
    assert one.images.equal(other.images)


# --- roles, sizes, sums ---


def test_each_role_loads_only_what_it_needs(checkpoints, tmp_path):
    """The edge's folder has no small weights, the device's no large ones: two hosts still make one picture."""
    (tmp_path / "whole").mkdir()
    whole = RelayPipeline.from_pretrained(write_family(tmp_path / "whole" / "one.yaml", checkpoints["sd3"], "sd3"))
    nodes = {}
    for role, without in (("edge", "transformer_small"), ("device", "transformer")):
        folder = tmp_path / role / "weights"
        shutil.copytree(checkpoints["sd3"], folder)
        next((folder / without).glob("*.safetensors")).unlink()
        nodes[role] = RelayPipeline.from_pretrained(
            write_family(tmp_path / role / "one.yaml", folder, "sd3"), role=role
        )
    message = nodes["edge"].start(PROMPT, **CALL).to_bytes()
    made = nodes["device"].finish(Handoff.from_bytes(message), output_type="pt").images
    assert made.equal(whole(PROMPT, output_type="pt", **CALL).images)
    for role, member in (("edge", "small"), ("device", "large")):
        with pytest.raises(FamilyError, match=f"role {role} .* does not hold member {member}"):
            nodes[role].family.denoiser(member)
    with pytest.raises(FamilyError, match="does not hold the VAE"):
        _ = nodes["edge"].family.vae
    with pytest.raises(BadRequest, match="all, edge, device"):
        Family.load(checkpoints["sd3"], role="cloud")


def test_what_a_role_needs_is_told_before_anything_loads(checkpoints, tmp_path):
    family = write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3", text={"omit": ["text_encoder_2"]})
    needs = {
        role: {need.name: need for need in Family.load(family, role).needs()} for role in ("all", "edge", "device")
    }
    assert set(needs["edge"]) == {"large", "text_encoder"}
    assert set(needs["device"]) == {"small", "text_encoder", "vae"}
    assert set(needs["all"]) == {"large", "small", "text_encoder", "vae"}
    for need in needs["all"].values():
        assert need.installed
        assert need.bytes == 0
    model = transformer(2)
    assert needs["all"]["large"].memory == 4 * sum(each.numel() for each in model.state_dict().values())
    assert Family.load(family).parameters("large") == sum(each.numel() for each in model.parameters())
    half = {need.name: need for need in Family.load(family, dtype="fp16").needs()}
    assert 2 * half["vae"].memory == needs["all"]["vae"].memory


def test_weights_that_are_missing_are_named_with_the_way_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = write_family(tmp_path / "f.yaml", "nobody/has-this", "sdxl")
    assert "hf download nobody/has-this" in refused(path, "nobody/has-this")


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((33, 32), "32x32"), ((35, 48), "36x48"), ((2, 32), "4x32"), ((1000, 98), "96x96")],
)
def test_a_size_that_is_not_possible_names_the_nearest_that_is(pipes, size, nearest):
    with pytest.raises(BadRequest, match=f"nearest is {nearest}"):
        pipes["sd3"].family.check_size(*size)
    pipes["sd3"].family.check_size(*map(int, nearest.split("x")))


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_smallest_and_odd_sizes_that_pass_can_be_drawn(pipes, name):
    family = pipes[name].family
    drawn = 0
    for side in range(1, 24):
        try:
            family.check_size(side, 32)
        except RelayError:
            continue
        assert pipes[name](PROMPT, width=side, height=32, **CALL).images[0].size == (side, 32)
        drawn += 1
    assert drawn


def test_a_size_grid_of_the_yaml_is_kept(checkpoints, tmp_path):
    sizes = {"default": [32, 32], "multiple_of": 16}
    family = Family.load(write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3", sizes=sizes))
    family.check_size(48, 96)
    with pytest.raises(BadRequest, match="multiples of 16"):
        family.check_size(40, 32)


def test_a_vae_of_its_own_is_the_familys(checkpoints, tmp_path):
    vae(7).save_pretrained(tmp_path / "better" / "decoder")
    own = write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3", vae={"repo": "./better", "subfolder": "decoder"})
    assert Family.load(own).fingerprint != Family.load(checkpoints["sd3"]).fingerprint


def test_importing_relay_and_reading_families_loads_no_torch():
    code = (
        "import sys, relay; from relay import Program, find_family, list_families;"
        "[find_family(name) for name in list_families()];"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=os.environ)


def test_yaml_that_we_write_is_what_the_library_reads(checkpoints, tmp_path):
    path = write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3", codec="int8", matching="nearest")
    spec, text = find_family(path), yaml.safe_load(path.read_text())
    assert (spec.codec, spec.matching, spec.members["small"].steps) == ("int8", "nearest", 4)
    assert spec.members["large"].repo == text["members"]["large"]["repo"]
