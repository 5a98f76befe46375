"""Families from YAML or a folder: what they say is checked, what a role does not need is not loaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiny import DENOISER, PROMPT, SDXL_NOISE, build_sdxl, transformer, unet, vae, write_family

from relay.errors import BadRequest, FamilyError, NonFiniteLatent, RelayError
from relay.family import Family, find_family, list_families
from relay.handoff import Handoff
from relay.pipeline import RelayPipeline
from relay.program import MATCHINGS

CALL = {"num_inference_steps": 3, "handoff": 1, "seed": 1}
MODEL = {"sdxl": unet, "sd3": transformer}


@pytest.fixture
def sdxl(checkpoints, tmp_path):
    """A copy of the SDXL folder that a test may damage."""
    return Path(shutil.copytree(checkpoints["sdxl"], tmp_path / "copy"))


def described(path, folder, architecture="sdxl", **options):
    return Family.load(write_family(path / "f.yaml", folder, architecture, **options))


def refused(path, match):
    with pytest.raises(FamilyError, match=match) as refusal:
        Family.load(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", list_families())
def test_the_families_that_stand_in_configs_can_be_read(name):
    spec = find_family(name)
    assert spec.name == name
    assert {"large", "small"} <= spec.members.keys()
    assert spec.matching in MATCHINGS


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(FamilyError, match=".*".join(list_families())):
        find_family("nobody")
    with pytest.raises(FamilyError, match=r"there\.yaml"):
        find_family("not/there.yaml")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": "blue"}, "colour"),
        ({"vae": {"subfolde": "vae"}}, "subfolde"),
        ({"text": {"t5_token": 1}}, "t5_token"),
        ({"sizes": {"default": [32, 32], "multiple": 2}}, "multiple"),
        ({"large": {"guidence": 3}}, "guidence"),
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
def test_an_unknown_key_and_an_impossible_value_are_named_with_their_file(checkpoints, tmp_path, change, named):
    refused(write_family(tmp_path / "wrong.yaml", checkpoints["sd3"], "sd3", **change), rf"wrong\.yaml.*{named}")


def test_an_architecture_that_is_not_supported_is_refused(checkpoints, tmp_path):
    path = write_family(tmp_path / "wrong.yaml", checkpoints["sd3"], "sd3")
    path.write_text(path.read_text().replace("architecture: sd3", "architecture: dalle"))
    refused(path, "dalle.*architecture")


@pytest.mark.parametrize("text", ["", "- a\n- b", "name: [", "{}", "\x00", "name: x\nname: y"])
def test_a_file_that_is_no_family_is_refused(tmp_path, text):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    refused(path, "wrong.yaml")


def test_a_repo_is_a_path_relative_to_its_yaml_or_a_hub_id(checkpoints, tmp_path, monkeypatch):
    (tmp_path / "weights").symlink_to(checkpoints["sd3"])
    (tmp_path / "elsewhere").mkdir()
    path = write_family(tmp_path / "f.yaml", "./weights", "sd3")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Family.load(path).channels == 4
    assert Family.load("../f.yaml").channels == 4
    spec = find_family(write_family(path, "./weights", "sd3", vae={"repo": "someone/vae", "subfolder": ""}))
    assert spec.members["large"].repo == str(checkpoints["sd3"].resolve())
    assert spec.members["large"].is_local
    assert (spec.vae.repo, spec.vae.subfolder, spec.vae.is_local) == ("someone/vae", "", False)


@pytest.mark.parametrize(("name", "scheduler"), [("sdxl", "scheduler_small"), ("sd3", "scheduler")])
def test_a_diffusers_folder_with_a_small_member_beside_is_a_family(checkpoints, name, scheduler):
    pipe = RelayPipeline.from_pretrained(checkpoints[name])
    spec = pipe.family.spec
    assert (spec.name, spec.architecture, spec.sizes.default) == (name, name, (32, 32))
    assert (spec.members["small"].subfolder, spec.members["small"].scheduler) == (f"{DENOISER[name]}_small", scheduler)
    assert pipe(PROMPT, **CALL).images[0].size == (32, 32)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_folder_without_one_says_where_to_put_it(checkpoints, tmp_path, name):
    folder = tmp_path / "alone"
    shutil.copytree(checkpoints[name], folder, ignore=shutil.ignore_patterns("*_small"))
    refused(folder, f"{DENOISER[name]}_small")
    refused(tmp_path, "model_index.json")


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("sdxl", {"in_channels": 8, "out_channels": 8}, "small has 8 latent channels, the VAE 4"),
        ("sd3", {"in_channels": 8, "out_channels": 8}, "small has 8 latent channels, the VAE 4"),
        ("sd3", {"joint_attention_dim": 48}, "joint_attention_dim 48"),
        ("sd3", {"pooled_projection_dim": 48}, "pooled_projection_dim 48"),
    ],
)
def test_members_of_other_latents_or_conditioning_are_refused(checkpoints, tmp_path, name, config, named):
    MODEL[name](5, **config).save_pretrained(tmp_path / "other" / DENOISER[name])
    shutil.copytree(checkpoints[name] / "scheduler", tmp_path / "other" / "scheduler")
    small = {"repo": "./other", "subfolder": DENOISER[name]}
    refused(write_family(tmp_path / "f.yaml", checkpoints[name], name, small=small), named)


def test_members_of_another_parameterisation_are_refused(checkpoints, tmp_path):
    unet(5).save_pretrained(tmp_path / "other" / "unet")
    shutil.copytree(checkpoints["sd3"] / "scheduler", tmp_path / "other" / "scheduler")
    small = {"repo": "./other", "subfolder": "unet"}
    refused(write_family(tmp_path / "f.yaml", checkpoints["sdxl"], "sdxl", small=small), "flow.*epsilon")


def test_a_small_member_with_another_vae_of_its_own_is_refused_before_it_is_used(checkpoints, tmp_path):
    foreign = build_sdxl(tmp_path / "foreign")
    small = {"repo": str(foreign), "subfolder": "unet_small"}
    described(tmp_path, checkpoints["sdxl"], small=small).members_share_latent_space()
    vae(seed=8).save_pretrained(foreign / "vae")
    pipe = RelayPipeline(described(tmp_path, checkpoints["sdxl"], small=small))
    with pytest.raises(FamilyError, match="another VAE"):
        pipe(PROMPT, **CALL)
    pipe(PROMPT, num_inference_steps=2, mode="full-cloud", output_type="latent")


def test_a_scheduler_that_is_not_euler_is_refused_unless_the_yaml_replaces_it(sdxl, tmp_path):
    DDIMScheduler(**SDXL_NOISE, timestep_spacing="trailing").save_pretrained(sdxl / "scheduler")
    refused(write_family(tmp_path / "f.yaml", sdxl, "sdxl"), "DDIMScheduler is not Euler.*replace_scheduler: euler")
    own = {"scheduler": "scheduler_trailing"}
    one, other = (
        RelayPipeline(described(tmp_path, sdxl, **options))(PROMPT, output_type="latent", **CALL)
        for options in ({"replace_scheduler": "euler"}, {"large": own, "small": own})
    )
    assert torch.equal(one.images, other.images)


def test_a_member_walks_the_schedule_of_its_own_scheduler(checkpoints, pipes):
    for member, where in (("large", "scheduler"), ("small", "scheduler_small")):
        scheduler = EulerDiscreteScheduler.from_pretrained(checkpoints["sdxl"], subfolder=where)
        scheduler.set_timesteps(9)
        assert list(pipes["sdxl"].family.schedule(member, 9).sigmas) == scheduler.sigmas.tolist()


def test_missing_and_damaged_weights_are_one_line(sdxl, tmp_path):
    weights = sdxl / "unet_small" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    encoder = sdxl / "text_encoder" / "model.safetensors"
    encoder.write_bytes(encoder.read_bytes()[:1000])
    broken = described(tmp_path, sdxl)
    for load in (lambda: broken.denoiser("small"), lambda: broken.text):
        with pytest.raises(FamilyError, match=str(sdxl)) as refusal:
            load()
        assert "\n" not in str(refusal.value)
    weights.unlink()
    with pytest.raises(FamilyError, match="unet_small"):
        broken.denoiser("small")
    (sdxl / "vae" / "config.json").unlink()
    refused(tmp_path / "f.yaml", r"config\.json")


def test_pickled_weights_are_never_read(sdxl, tmp_path):
    torch.save(unet(3, width=4).state_dict(), sdxl / "unet_small" / "diffusion_pytorch_model.bin")
    (sdxl / "unet_small" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FamilyError):
        described(tmp_path, sdxl).denoiser("small")


def test_weights_that_are_not_here_are_named_with_the_way_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = write_family(tmp_path / "f.yaml", "nobody/has-this", "sdxl")
    refused(path, "nobody/has-this.*hf download nobody/has-this")


def test_a_vae_of_its_own_is_the_familys(checkpoints, tmp_path):
    vae(7).save_pretrained(tmp_path / "better" / "decoder")
    own = described(tmp_path, checkpoints["sd3"], "sd3", vae={"repo": "./better", "subfolder": "decoder"})
    assert own.fingerprint != Family.load(checkpoints["sd3"]).fingerprint


def test_dtype_is_per_component_and_the_call_overrides_it(checkpoints, tmp_path):
    dtypes = {"dtype": "bf16", "vae": {"dtype": "fp32"}, "small": {"dtype": "fp16"}}
    mixed = described(tmp_path, checkpoints["sdxl"], **dtypes)
    assert [mixed.denoiser(name).dtype for name in ("large", "small")] == [torch.bfloat16, torch.float16]
    assert mixed.vae.dtype == torch.float32
    assert Family.load(tmp_path / "f.yaml", dtype=torch.float32).denoiser("small").dtype == torch.float32
    assert Family.load(tmp_path / "f.yaml", dtype="fp32").denoiser("large").dtype == torch.float32


@pytest.mark.parametrize("upcast", [True, False])
def test_force_upcast_is_honoured(sdxl, tmp_path, upcast):
    vae(force_upcast=upcast).save_pretrained(sdxl / "vae")
    half = described(tmp_path, sdxl, dtype="fp16")
    assert half.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert half.decode(torch.randn(1, 4, 8, 8)).dtype == torch.float32
    assert described(tmp_path, sdxl, dtype="bf16").vae.dtype == torch.bfloat16


def test_pixels_that_are_not_finite_are_an_error_and_no_black_image(checkpoints, tmp_path):
    broken = described(tmp_path, checkpoints["sdxl"])
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteLatent, match="use fp32"):
        broken.decode(torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_each_role_loads_only_what_it_needs(checkpoints, tmp_path, name):
    """The edge's folder has no small weights, the device's no large ones: two hosts still make one picture."""
    small = {"scheduler": "scheduler_small"} if name == "sdxl" else {}
    whole = RelayPipeline.from_pretrained(write_family(tmp_path / "one.yaml", checkpoints[name], name, small=small))
    nodes = {}
    for role, without in (("edge", f"{DENOISER[name]}_small"), ("device", DENOISER[name])):
        folder = tmp_path / role / "weights"
        shutil.copytree(checkpoints[name], folder)
        next((folder / without).glob("*.safetensors")).unlink()
        description = write_family(tmp_path / role / "one.yaml", folder, name, small=small)
        nodes[role] = RelayPipeline.from_pretrained(description, role=role)
    message = nodes["edge"].start(PROMPT, **CALL).to_bytes()
    made = nodes["device"].finish(Handoff.from_bytes(message), output_type="pt").images
    assert torch.equal(made, whole(PROMPT, output_type="pt", **CALL).images)
    assert nodes["edge"].family.fingerprint == nodes["device"].family.fingerprint
    for role, member in (("edge", "small"), ("device", "large")):
        with pytest.raises(FamilyError, match=f"role {role} .* does not hold member {member}"):
            nodes[role].family.denoiser(member)
    with pytest.raises(FamilyError, match="does not hold the VAE: decode on a device"):
        _ = nodes["edge"].family.vae
    with pytest.raises(BadRequest, match="all, edge, device"):
        Family.load(checkpoints[name], role="cloud")


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
    assert needs["all"]["large"].memory == 4 * sum(each.numel() for each in transformer(2).state_dict().values())
    half = {need.name: need for need in Family.load(family, dtype="fp16").needs()}
    assert 2 * half["vae"].memory == needs["all"]["vae"].memory
    whole = Family.load(checkpoints["sdxl"], "edge").needs()
    assert {need.name for need in whole} == {"large", "text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_parameters_are_counted_without_weights(checkpoints, tmp_path, name):
    shutil.copytree(checkpoints[name], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    counted = Family.load(tmp_path / "bare").parameters("large")
    assert counted == sum(each.numel() for each in MODEL[name](2).parameters())


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("sdxl", (33, 32), "32x32"),
        ("sd3", (33, 32), "32x32"),
        ("sd3", (35, 48), "36x48"),
        ("sd3", (2, 32), "4x32"),
        ("sd3", (1000, 98), "96x96"),
    ],
)
def test_a_size_that_is_not_possible_names_the_nearest_that_is(pipes, name, size, nearest):
    with pytest.raises(BadRequest, match=f"nearest is {nearest}"):
        pipes[name].family.check_size(*size)
    pipes[name].family.check_size(*map(int, nearest.split("x")))


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
    family = described(tmp_path, checkpoints["sd3"], "sd3", sizes={"default": [32, 32], "multiple_of": 16})
    family.check_size(48, 96)
    with pytest.raises(BadRequest, match="multiples of 16"):
        family.check_size(40, 32)


def test_importing_relay_and_reading_families_loads_no_torch():
    code = (
        "import sys, relay.program, relay.errors, relay.family_spec;"
        "from relay import Program, find_family, list_families;"
        "[find_family(name) for name in list_families()];"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_yaml_that_we_write_is_what_the_library_reads(checkpoints, tmp_path):
    path = write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3", codec="int8", matching="nearest")
    spec, text = find_family(path), yaml.safe_load(path.read_text())
    assert (spec.codec, spec.matching, spec.members["small"].steps) == ("int8", "nearest", 4)
    assert spec.members["large"].repo == text["members"]["large"]["repo"]
