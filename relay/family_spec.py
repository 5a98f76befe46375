"""A family's description: which two checkpoints, where they lie, how they run. Reading one imports no torch.

In YAML (configs/families/*.yaml), unknown keys refused:

    name: sdxl-vega
    architecture: sdxl            # sdxl | sd3
    dtype: fp16                   # fp32 | fp16 | bf16; like revision, device and offload also per component
    device: auto                  # auto | cpu | cuda | cuda:1 | mps
    offload: none                 # none | model | sequential
    members:
      large: {repo: HUB/ID, guidance: 5.0, steps: 25}
      small: {repo: HUB/ID, subfolder: unet, scheduler: scheduler, guidance: 9.0, steps: 25}
    vae: {repo: HUB/ID, subfolder: vae}                 # default: the large member's
    text: {omit: [text_encoder_3], t5_tokens: 0}        # default: the large member's
    sizes: {default: [1024, 1024]}
    replace_scheduler: euler      # only for checkpoints whose scheduler is another one

A repo is a hub id, a local path (relative to the YAML), or `embedded:NAME` for a family that the package ships.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from relay.checkpoints import Component, Dtype, Offload, read_json, vae_factor
from relay.errors import FamilyError
from relay.program import Codec, Matching

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE.parent / "configs" / "families"
ROLES = ("all", "edge", "device")

Role = Literal["all", "edge", "device"]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Architecture(NamedTuple):
    denoiser: str  # diffusers' name of the component, and so of its default sub-folder
    model: str
    pipeline: str
    widths: tuple[str, ...]  # config keys that fix the text conditioning a denoiser reads


ARCHITECTURES = {
    "sd3": Architecture(
        "transformer",
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        ("joint_attention_dim", "pooled_projection_dim"),
    ),
    "sdxl": Architecture(
        "unet",
        "UNet2DConditionModel",
        "StableDiffusionXLPipeline",
        ("cross_attention_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
    ),
}


class Member(Component, frozen=True, forbid_unknown_fields=True, kw_only=True):
    scheduler: str = "scheduler"  # sub-folder
    guidance: Annotated[float, msgspec.Meta(ge=0)]
    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Text(Component, frozen=True, forbid_unknown_fields=True, kw_only=True):
    omit: tuple[str, ...] = ()
    t5_tokens: Annotated[int, msgspec.Meta(ge=0, le=512)] | None = None


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    default: tuple[Positive, Positive]  # width, height
    multiple_of: Positive | None = None


class FamilySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A family's YAML. `find_family` returns it with absolute local paths."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9._-]+$")]
    architecture: Literal["sdxl", "sd3"]
    members: dict[str, Member]
    sizes: Sizes
    vae: Component = Component()
    text: Text = Text()
    revision: str | None = None
    dtype: Dtype = "fp32"
    device: str = "auto"
    offload: Offload = "none"
    replace_scheduler: Literal["euler"] | None = None
    matching: Matching = "exact"
    codec: Codec = "fp16"
    scenes: bool = False  # prompts are in the scene language


def list_families() -> list[str]:
    """Names of the families that are described in configs/families."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_family(name: str | Path) -> FamilySpec:
    """The description of a family: by name, by the path of a YAML, or of a diffusers folder with a small member."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_spec(path.resolve())
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise FamilyError(f"unknown family {str(name)!r}: choose one of {', '.join(list_families())}, or give a path")
    return _read_spec(path)


def _read_spec(path: Path) -> FamilySpec:
    try:
        spec = msgspec.yaml.decode(path.read_bytes(), type=FamilySpec)
    except (msgspec.DecodeError, OSError, UnicodeDecodeError) as error:  # names the key
        raise FamilyError(f"{path}: {error}") from None
    if not {"large", "small"} <= spec.members.keys():
        raise FamilyError(f"{path}: members must hold `large` and `small`")

    def resolve(part: Any, subfolder: str, default: str) -> Any:
        values = {"repo": _resolve(part.repo, path.parent) or default}
        values["subfolder"] = subfolder if part.subfolder is None else part.subfolder  # "" is a repo's own root
        inherited = ("dtype", "device", "offload") + (("revision",) if values["repo"] == default else ())
        values |= {key: getattr(part, key) or getattr(spec, key) for key in inherited}
        return msgspec.structs.replace(part, **values)

    large = _resolve(spec.members["large"].repo, path.parent)
    if large is None:
        raise FamilyError(f"{path}: members.large needs a repo")
    denoiser = ARCHITECTURES[spec.architecture].denoiser
    return msgspec.structs.replace(
        spec,
        members={name: resolve(member, denoiser, large) for name, member in spec.members.items()},
        vae=resolve(spec.vae, "vae", large),
        text=resolve(spec.text, "", large),
    )


def _resolve(repo: str | None, base: Path) -> str | None:
    """A repo as written in a YAML in folder `base`: an absolute path where it is local, else the hub id it is."""
    if repo is None:
        return None
    if repo.startswith("embedded:"):
        return str(PACKAGE / "weights" / repo.removeprefix("embedded:"))
    path = base / Path(repo).expanduser()
    is_local = repo.startswith((".", "/", "~")) or path.exists()
    return str(path.resolve()) if is_local else repo


def _folder_spec(folder: Path) -> FamilySpec:
    """A diffusers folder whose small member lies beside the large one as `unet_small` or `transformer_small`."""
    large = Component(repo=str(folder))
    pipeline = read_json(large, "model_index.json").get("_class_name")
    name = next((name for name, each in ARCHITECTURES.items() if each.pipeline == pipeline), None)
    if name is None:
        raise FamilyError(f"{folder} holds a {pipeline}: supported are SD3 and SDXL pipelines")
    architecture = ARCHITECTURES[name]
    small = f"{architecture.denoiser}_small"
    if not (folder / small).is_dir():
        raise FamilyError(f"{folder} has no small member: put one into its sub-folder {small}, or write a YAML")
    scheduler = "scheduler_small" if (folder / "scheduler_small").is_dir() else "scheduler"
    vae = read_json(Component(repo=str(folder), subfolder="vae"), "config.json")
    sample = read_json(Component(repo=str(folder), subfolder=architecture.denoiser), "config.json")["sample_size"]
    side = sample * vae_factor(vae)
    shared: dict[str, Any] = {"repo": str(folder), "dtype": "fp32", "device": "auto", "offload": "none"}
    defaults: dict[str, Any] = shared | {"guidance": 5.0, "steps": 28}
    return FamilySpec(
        name=re.sub(r"[^a-z0-9._-]", "-", folder.name.lower()),
        architecture=name,  # type: ignore[arg-type]
        members={
            "large": Member(**defaults, subfolder=architecture.denoiser),
            "small": Member(**defaults, subfolder=small, scheduler=scheduler),
        },
        vae=Component(**shared, subfolder="vae"),
        text=Text(**shared, subfolder=""),
        sizes=Sizes(default=(side, side)),
    )
