"""Families: described in YAML, loaded from ordinary diffusers folders, refused in one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiny import PROMPT, SDXL_NOISE, build_sdxl, transformer, unet, vae, write_family

from relay.errors import BadRequest, FamilyError, NonFiniteLatent
from relay.family import Family, find_family, list_families
from relay.pipeline import RelayPipeline


@pytest.fixture
def sdxl(checkpoints, tmp_path):
    """A copy of the SDXL folder that a test may damage."""
    return Path(shutil.copytree(checkpoints["sdxl"], tmp_path / "copy"))


def family(path, folder, architecture="sdxl", role="all", **options):
    return Family.load(write_family(path / "f.yaml", folder, architecture, **options), role)


@pytest.mark.parametrize("name", list_families())
def test_every_family_in_configs_can_be_read(name):
    spec = find_family(name)
    assert spec.name == name
    assert {"large", "small"} <= spec.members.keys()


def test_the_packages_import_no_torch():
    code = "import relay, relay.program, relay.errors, relay.family_spec, sys; relay.list_families();"
    code += "[relay.find_family(n) for n in relay.list_families()]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_repo_may_be_relative_to_its_yaml_or_a_hub_id(checkpoints, tmp_path):
    (tmp_path / "models").symlink_to(checkpoints["sdxl"])
    spec = find_family(
        write_family(tmp_path / "f.yaml", "./models", "sdxl", vae={"repo": "someone/vae", "subfolder": ""})
    )
    assert spec.members["large"].repo == str((tmp_path / "models").resolve())
    assert (spec.vae.repo, spec.vae.subfolder, spec.vae.is_local) == ("someone/vae", "", False)
    assert spec.members["large"].is_local


def test_a_diffusers_folder_with_a_small_member_is_a_family(sdxl, checkpoints):
    spec = find_family(sdxl)
    assert (spec.name, spec.architecture, spec.sizes.default) == ("copy", "sdxl", (32, 32))
    assert spec.members["small"].scheduler == "scheduler_small"
    assert find_family(checkpoints["sd3"]).members["small"].subfolder == "transformer_small"
    shutil.rmtree(sdxl / "unet_small")
    with pytest.raises(FamilyError, match="unet_small"):
        find_family(sdxl)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"colour": "red"}, "colour"),
        ({"small": {"gidance": 3}}, "gidance"),
        ({"dtype": "fp8"}, "dtype"),
        ({"matching": "guess"}, "matching"),
        ({"architecture_": 1}, "architecture_"),
        ({"sizes": {"default": [0, 32]}}, "sizes"),
        ({"large": {"steps": 0}}, "steps"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_file_and_key(checkpoints, tmp_path, options, named):
    with pytest.raises(FamilyError, match=rf"f\.yaml.*{named}") as refusal:
        find_family(write_family(tmp_path / "f.yaml", checkpoints["sdxl"], "sdxl", **options))
    assert "\n" not in str(refusal.value)


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(FamilyError, match="sdxl-vega"):
        find_family("nonesuch")


def test_a_scheduler_that_is_not_euler_is_refused_until_the_yaml_replaces_it(sdxl, tmp_path):
    DDIMScheduler(**SDXL_NOISE, timestep_spacing="trailing").save_pretrained(sdxl / "scheduler")
    with pytest.raises(FamilyError, match=r"DDIMScheduler is not Euler.*replace_scheduler: euler"):
        family(tmp_path, sdxl)
    replaced = family(tmp_path, sdxl, replace_scheduler="euler")
    assert (
        replaced.schedule("large", 5).sigmas
        == family(tmp_path, sdxl, large={"scheduler": "scheduler_trailing"}, small={"scheduler": "scheduler_trailing"})
        .schedule("large", 5)
        .sigmas
    )


def test_members_that_do_not_share_latents_or_conditioning_are_refused(sdxl, checkpoints, tmp_path):
    unet(1, in_channels=8, out_channels=8).save_pretrained(sdxl / "unet_small")
    with pytest.raises(FamilyError, match="8 latent channels"):
        family(tmp_path, sdxl)
    wide = transformer(1, joint_attention_dim=64)
    sd3 = Path(shutil.copytree(checkpoints["sd3"], tmp_path / "sd3"))
    wide.save_pretrained(sd3 / "transformer_small")
    with pytest.raises(FamilyError, match="joint_attention_dim 64"):
        family(tmp_path, sd3, "sd3")


def test_a_small_member_with_another_vae_of_its_own_is_refused_before_it_is_used(checkpoints, tmp_path):
    foreign = build_sdxl(tmp_path / "foreign")
    small = {"repo": str(foreign), "subfolder": "unet_small"}
    family(tmp_path, checkpoints["sdxl"], small=small).members_share_latent_space()
    vae(seed=8).save_pretrained(foreign / "vae")
    pipe = RelayPipeline(family(tmp_path, checkpoints["sdxl"], small=small))
    with pytest.raises(FamilyError, match="another VAE"):
        pipe(PROMPT, num_inference_steps=4, handoff=2)
    pipe(PROMPT, num_inference_steps=2, mode="full-cloud", output_type="latent")


def test_missing_and_damaged_weights_are_one_line(sdxl, tmp_path):
    weights = sdxl / "unet_small" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    encoder = sdxl / "text_encoder" / "model.safetensors"
    encoder.write_bytes(encoder.read_bytes()[:1000])
    broken = family(tmp_path, sdxl)
    for load in (lambda: broken.denoiser("small"), lambda: broken.text):
        with pytest.raises(FamilyError, match=str(sdxl)) as refusal:
            load()
        assert "\n" not in str(refusal.value)
    weights.unlink()
    with pytest.raises(FamilyError, match="unet_small"):
        broken.denoiser("small")
    (sdxl / "vae" / "config.json").unlink()
    with pytest.raises(FamilyError, match=r"config\.json"):
        family(tmp_path, sdxl)


def test_pickled_weights_are_never_read(sdxl, tmp_path):
    torch.save(unet(3, width=4).state_dict(), sdxl / "unet_small" / "diffusion_pytorch_model.bin")
    (sdxl / "unet_small" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FamilyError):
        family(tmp_path, sdxl).denoiser("small")


def test_a_hub_id_that_is_not_here_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FamilyError, match="hf download nobody/nothing"):
        family(tmp_path, "nobody/nothing")


def test_a_role_loads_only_what_it_needs(checkpoints, tmp_path):
    edge, device = (family(tmp_path, checkpoints["sdxl"], role=role) for role in ("edge", "device"))
    with pytest.raises(FamilyError, match=r"role edge .* small"):
        edge.denoiser("small")
    with pytest.raises(FamilyError, match="decode on a device"):
        _ = edge.vae
    with pytest.raises(FamilyError, match=r"role device .* large"):
        device.denoiser("large")
    assert edge.fingerprint == device.fingerprint
    assert {need.name for need in edge.needs()} == {"large", "text_encoder", "text_encoder_2"}
    assert {need.name for need in device.needs()} == {"small", "text_encoder", "text_encoder_2", "vae"}


def test_two_roles_make_one_picture(checkpoints, tmp_path):
    path = write_family(tmp_path / "f.yaml", checkpoints["sdxl"], "sdxl", small={"scheduler": "scheduler_small"})
    call = {"num_inference_steps": 5, "handoff": 3, "seed": 2}
    both = RelayPipeline.from_pretrained(path)(PROMPT, output_type="pt", **call).images
    sent = RelayPipeline.from_pretrained(path, role="edge").start(PROMPT, **call)
    assert torch.equal(RelayPipeline.from_pretrained(path, role="device").finish(sent, output_type="pt").images, both)


@pytest.mark.parametrize("upcast", [True, False])
def test_force_upcast_is_honoured(sdxl, tmp_path, upcast):
    vae(force_upcast=upcast).save_pretrained(sdxl / "vae")
    half = family(tmp_path, sdxl, dtype="fp16")
    assert half.vae.dtype == (torch.float32 if upcast else torch.float16)
    assert half.decode(torch.randn(1, 4, 8, 8)).dtype == torch.float32
    assert family(tmp_path, sdxl, dtype="bf16").vae.dtype == torch.bfloat16


def test_pixels_that_are_not_finite_are_an_error_and_no_black_image(checkpoints, tmp_path):
    broken = family(tmp_path, checkpoints["sdxl"])
    with torch.no_grad():
        broken.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteLatent, match="use fp32"):
        broken.decode(torch.randn(1, 4, 8, 8))


def test_dtype_and_device_are_per_component_and_the_call_overrides_them(checkpoints, tmp_path):
    path = write_family(tmp_path / "f.yaml", checkpoints["sdxl"], "sdxl", dtype="bf16", vae={"dtype": "fp32"},
                        small={"dtype": "fp16"})  # fmt: skip
    mixed = Family.load(path)
    assert [mixed.denoiser(name).dtype for name in ("large", "small")] == [torch.bfloat16, torch.float16]
    assert mixed.vae.dtype == torch.float32
    assert Family.load(path, dtype=torch.float32).denoiser("small").dtype == torch.float32
    assert Family.load(path, dtype="fp32").denoiser("large").dtype == torch.float32
    with pytest.raises(BadRequest, match="fp8"):
        Family.load(path, dtype="fp8").denoiser("large")
    with pytest.raises(BadRequest, match="device"):
        Family.load(path, device="cuda:7").denoiser("large")


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("sdxl", (33, 32), "32x32"),
        ("sd3", (34, 31), "36x32|32x32"),
        ("sd3", (4000, 32), "96x32"),
        ("sd3", (1, 32), "4x32"),
    ],
)
def test_a_size_that_cannot_be_done_names_the_nearest(pipes, name, size, nearest):
    with pytest.raises(BadRequest, match=nearest):
        pipes[name].family.check_size(*size)


def test_parameters_are_counted_without_weights(sdxl, tmp_path):
    counted = family(tmp_path, sdxl)
    (sdxl / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert counted.parameters("large") == sum(p.numel() for p in unet(0).parameters())


def test_the_family_of_the_scheduler_config_is_diffusers_own(pipes):
    scheduler = EulerDiscreteScheduler.from_config(pipes["sdxl"].family.scheduler_config("small"))
    scheduler.set_timesteps(9)
    assert list(pipes["sdxl"].family.schedule("small", 9).sigmas) == scheduler.sigmas.tolist()
