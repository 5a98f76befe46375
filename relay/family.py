"""Family: models that share one latent space, loaded from ordinary diffusers folders.

Components load on first use, and only those that the role needs:

    role     denoisers            text   VAE
    all      every member         yes    yes
    edge     all but `small`      yes    no (read once, for the fingerprint)
    device   `small`              yes    yes
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from relay.checkpoints import (
    DTYPES,
    Component,
    download_bytes,
    installed,
    load_model,
    load_tokenizer,
    place,
    read_json,
    vae_factor,
    weight_files,
)
from relay.errors import BadRequest, FamilyError, NonFiniteLatent
from relay.family_spec import ARCHITECTURES, ROLES, FamilySpec, Member, Role, find_family, list_families
from relay.program import check_choice
from relay.schedules import Schedule, make_schedule, parameterisation, replace_scheduler

if TYPE_CHECKING:
    import torch

    from relay.conditioning import ConditioningFingerprint, TextEncoder
    from relay.denoisers import Denoiser
    from relay.fingerprint import Fingerprint

__all__ = ["Family", "FamilySpec", "Need", "Role", "find_family", "installed", "list_families"]

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Need(NamedTuple):
    """What a role must hold of one component."""

    name: str
    where: str
    installed: bool
    bytes: int | None  # still to download; None where the hub cannot be asked
    memory: int | None  # of the weights once loaded; None where the config is not at hand


class Family:
    """The members of one latent space. `Family.load` reads configs only; weights follow on first use."""

    def __init__(self, spec: FamilySpec, role: Role = "all", dtype: Any = None, device: Any = None):
        check_choice("role", role, ROLES)
        self.spec, self.role = spec, role
        self.name = spec.name
        self.architecture = ARCHITECTURES[spec.architecture]
        self._dtype, self._device_override = dtype, device
        self._denoisers: dict[str, Denoiser] = {}
        self._hooks: list[Any] = []

    @classmethod
    def load(
        cls, name_or_spec: str | Path | FamilySpec, role: Role = "all", dtype: Any = None, device: Any = None
    ) -> Family:
        """A family by name, path or description, its configs checked. `dtype` and `device` override the YAML's."""
        spec = name_or_spec if isinstance(name_or_spec, FamilySpec) else find_family(name_or_spec)
        family = cls(spec, role, dtype, device)
        family._check_configs()
        for name, member in spec.members.items():
            if family._holds(name):
                family.dtype(member)
                family.device(member)
        return family

    # -- configs ------------------------------------------------------------------------------------------------

    def member(self, name: str) -> Member:
        if name not in self.spec.members:
            raise BadRequest(f"family {self.name} has no member {name!r}: it has {', '.join(self.spec.members)}")
        return self.spec.members[name]

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        return read_json(self.spec.vae, "config.json")

    def denoiser_config(self, member: str) -> dict[str, Any]:
        return read_json(self.member(member), "config.json")

    def scheduler_config(self, member: str) -> dict[str, Any]:
        source = self.member(member)
        where = Component(repo=source.repo, subfolder=source.scheduler, revision=source.revision)
        config = read_json(where, "scheduler_config.json")
        return replace_scheduler(config) if self.spec.replace_scheduler else config

    def schedule(self, member: str, steps: int, image_seq_len: int | None = None) -> Schedule:
        """The schedule of `steps` steps that `member` walks; `image_seq_len` where its shift depends on the size."""
        return self._schedule(member, steps, image_seq_len)

    @cache  # noqa: B019 - a family lives as long as its process
    def _schedule(self, member: str, steps: int, image_seq_len: int | None) -> Schedule:
        return make_schedule(self.scheduler_config(member), steps, image_seq_len)

    def schedules(self, size: tuple[int, int]) -> dict[str, Callable[[int], Schedule]]:
        """What `relay.matching` needs: for each member, steps -> schedule at `size` (width, height)."""

        def schedule_for(member: str) -> Callable[[int], Schedule]:
            cell = self.factor * self.denoiser_config(member).get("patch_size", 1)
            return partial(self.schedule, member, image_seq_len=(size[0] // cell) * (size[1] // cell))

        return {member: schedule_for(member) for member in self.spec.members}

    @property
    def channels(self) -> int:
        return self.vae_config["latent_channels"]

    @property
    def factor(self) -> int:
        return vae_factor(self.vae_config)

    @cached_property
    def parameterisation(self) -> str:
        return parameterisation(self.scheduler_config("large"))

    def check_size(self, width: int, height: int) -> None:
        """BadRequest on a size that the VAE or a denoiser cannot do, with the nearest that they can."""
        configs = [self.denoiser_config(member) for member in self.spec.members]
        cell = self.factor * max(config.get("patch_size", 1) for config in configs)
        multiple = self.spec.sizes.multiple_of or cell
        grids = [g * config["patch_size"] for config in configs if (g := config.get("pos_embed_max_size"))]
        most = min(grids, default=16384 // self.factor) * self.factor // multiple * multiple

        def nearest(pixels: int) -> int:
            return min(max(round(pixels / multiple), 1) * multiple, most)

        if (nearest(width), nearest(height)) != (width, height):
            raise BadRequest(
                f"size {width}x{height} is not possible with {self.name}: sides are multiples of {multiple} up to"
                f" {most}, the nearest is {nearest(width)}x{nearest(height)}"
            )

    def _check_configs(self) -> None:
        """Refuse members whose configs already say that they do not share latents and conditioning."""
        large = self.denoiser_config("large")
        for name in self.spec.members:
            config, kind = self.denoiser_config(name), parameterisation(self.scheduler_config(name))
            if config["in_channels"] != self.channels:
                raise FamilyError(
                    f"{self.name}: member {name} has {config['in_channels']} latent channels, the VAE {self.channels}"
                )
            if kind != self.parameterisation:
                raise FamilyError(f"{self.name}: {name} is {kind}, large is {self.parameterisation}: no shared latents")
            for key in self.architecture.widths:
                if config.get(key) != large.get(key):
                    raise FamilyError(f"{self.name}: {name} has {key} {config.get(key)}, large has {large.get(key)}")

    @cache  # noqa: B019 - a family lives as long as its process
    def members_share_latent_space(self) -> None:
        """FamilyError where a member that brings a VAE of its own was trained in another latent space."""
        from relay.fingerprint import compatible, fingerprint

        for name, source in self.spec.members.items():
            own = msgspec.structs.replace(self.spec.vae, repo=source.repo, revision=source.revision, subfolder="vae")
            if own.repo == self.spec.vae.repo or not installed(own):
                continue
            reason = compatible(self.fingerprint, fingerprint(self._load_vae(own, "fp32"), self.parameterisation))
            if reason is not None:
                raise FamilyError(f"{self.name}: {name} does not share the family's latent space: {reason}")

    # -- components ---------------------------------------------------------------------------------------------

    def denoiser(self, member: str) -> Denoiser:
        """The member's denoiser, loaded once. FamilyError where this role does not hold it."""
        if member not in self._denoisers:
            source = self.member(member)
            if not self._holds(member):
                raise FamilyError(f"role {self.role} of family {self.name} does not hold member {member}")
            import diffusers

            model = load_model(getattr(diffusers, self.architecture.model), source, self.dtype(source))
            self._denoisers[member] = self.wrap(member, model)
        return self._denoisers[member]

    def wrap(self, member: str, model: Any) -> Denoiser:
        """A diffusers model as the denoiser of `member`, placed where the member runs."""
        import torch

        source = self.member(member)
        device = self.device(source)
        if self.spec.architecture == "sdxl":
            from relay.denoisers.sdxl import SDXLDenoiser

            model = self._place(model.to(memory_format=torch.channels_last), source)
            return SDXLDenoiser.from_scheduler(model, self.scheduler_config(member), device=device)
        from relay.denoisers.sd3 import SD3Denoiser

        return SD3Denoiser(self._place(model, source), device=device)

    @cached_property
    def vae(self) -> Any:
        """The VAE. An fp16 one that says `force_upcast` overflows in fp16 and so is held in fp32."""
        if self.role == "edge":
            raise FamilyError(f"role edge of family {self.name} does not hold the VAE: decode on a device node")
        upcast = self.dtype(self.spec.vae) == "fp16" and self.vae_config.get("force_upcast", False)
        vae = self._load_vae(self.spec.vae, "fp32" if upcast else self.dtype(self.spec.vae))
        return self._place(vae, self.spec.vae)

    @cached_property
    def text(self) -> TextEncoder:
        """The text side: tokenizers and encoders, without those that the description omits."""
        import diffusers

        from relay.conditioning import TextEncoder

        source = self.spec.text
        index = read_json(source, "model_index.json")
        parts: dict[str, Any] = {"vae": None, "scheduler": None, self.architecture.denoiser: None}
        for name, entry in index.items():
            if name.startswith(("text_encoder", "tokenizer")):
                parts[name] = None if name in source.omit else self._load_text_part(name, *entry)
        if self.spec.architecture == "sdxl":
            parts["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
            parts["add_watermarker"] = False
        pipeline = getattr(diffusers, self.architecture.pipeline)(**parts)
        if self.spec.architecture == "sd3":
            # encode_prompt asks the transformer how wide its zero tokens shall be, and nothing else
            width = self.denoiser_config("large")["joint_attention_dim"]
            vars(pipeline)["transformer"] = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        return TextEncoder(pipeline, self.device(source), source.t5_tokens)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The family's fingerprint. Every role needs it, so the VAE is read for it alone, in fp32."""
        from relay.fingerprint import fingerprint

        return fingerprint(self._load_vae(self.spec.vae, "fp32"), self.parameterisation)

    @cached_property
    def conditioning_fingerprint(self) -> ConditioningFingerprint:
        from relay.conditioning import conditioning_fingerprint

        return conditioning_fingerprint(self.text)

    def initial_noise(
        self, count: int, size: tuple[int, int], generator: torch.Generator | Sequence[torch.Generator]
    ) -> torch.Tensor:
        """Unit noise (count, C, h, w) float32, drawn as diffusers does: one generator for all, or one per image."""
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        width, height = size
        shape = (count, self.channels, height // self.factor, width // self.factor)
        generators = generator if isinstance(generator, torch.Generator) else list(generator)
        device = generators.device if isinstance(generators, torch.Generator) else generators[0].device
        return randn_tensor(shape, generator=generators, device=device, dtype=torch.float32)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in 0..1 of denoised latents (B, C, h, w). NonFiniteLatent if the VAE fails."""
        import torch

        from relay.fingerprint import decoder_input

        with torch.inference_mode():
            vae, device = self.vae, self.device(self.spec.vae)
            inputs = decoder_input(vae.config, latents.to(device, torch.float32)).to(vae.dtype)
            images = vae.decode(inputs, return_dict=False)[0].float()
            if not torch.isfinite(images).all():
                raise NonFiniteLatent(f"the VAE of {self.name} decoded to non-finite pixels in {vae.dtype}: use fp32")
            return (images / 2 + 0.5).clamp(0, 1)

    def free(self) -> None:
        """Move what `offload: model` left on the accelerator back to the CPU."""
        for hook in self._hooks:
            hook.offload()

    # -- what it takes --------------------------------------------------------------------------------------------

    def parameters(self, member: str) -> int:
        """Parameters of a member's denoiser, counted from its config."""
        import diffusers
        from accelerate import init_empty_weights

        with init_empty_weights():
            model = getattr(diffusers, self.architecture.model).from_config(self.denoiser_config(member))
        return sum(parameter.numel() for parameter in model.parameters())

    def dtype(self, source: Component) -> str:
        """fp32, fp16 or bf16."""
        asked = self._dtype or source.dtype or self.spec.dtype
        name = {long: short for short, long in DTYPES.items()}.get(str(asked).removeprefix("torch."), str(asked))
        check_choice("dtype", name, tuple(DTYPES))
        return name

    def device(self, source: Component) -> torch.device:
        import torch

        asked = self._device_override or source.device or self.spec.device
        if asked == "auto":
            mps = torch.backends.mps.is_available()
            asked = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        try:
            device = torch.device(asked)
        except RuntimeError:
            raise BadRequest(f"there is no device {asked!r}: use auto, cpu, cuda, cuda:N or mps") from None
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise BadRequest(f"device {asked!r} is not available here ({reason}): use auto or cpu") from None
        return device

    def needs(self) -> list[Need]:
        """What this role must hold, with bytes to download and memory, before anything is loaded.

        Works without a single config at hand: what cannot be known then is None.
        """
        parts: list[tuple[str, Component]] = [
            (name, member) for name, member in self.spec.members.items() if self._holds(name)
        ]
        try:
            index = read_json(self.spec.text, "model_index.json")
        except FamilyError:
            index = {}
            parts.append(("text encoders", self.spec.text))
        for name in sorted(index):
            if name.startswith("text_encoder") and index[name][0] and name not in self.spec.text.omit:
                parts.append((name, msgspec.structs.replace(self.spec.text, subfolder=name)))
        if self.role != "edge":
            parts.append(("vae", self.spec.vae))
        return [self._need(name, part) for name, part in parts]

    def _need(self, name: str, part: Component) -> Need:
        files = weight_files(part)
        memory = None
        if files:
            memory = sum(_elements(file) for file in files) * _BYTES[self.dtype(part)]
        elif name in self.spec.members:
            with contextlib.suppress(FamilyError):
                memory = self.parameters(name) * _BYTES[self.dtype(part)]
        return Need(name, str(part), bool(files), download_bytes(part), memory)

    def _holds(self, member: str) -> bool:
        return self.role == "all" or (member == "small") == (self.role == "device")

    def _load_vae(self, source: Component, dtype: str) -> Any:
        import diffusers

        cls = getattr(diffusers, read_json(source, "config.json").get("_class_name", "AutoencoderKL"))
        return load_model(cls, source, dtype)

    def _load_text_part(self, name: str, library: str | None, cls: str | None) -> Any:
        """One tokenizer or text encoder as the checkpoint's index names it; None where the index has none."""
        import transformers

        if library is None or cls is None:
            return None
        source = msgspec.structs.replace(self.spec.text, subfolder=name)
        kind = getattr(transformers, cls)
        if name.startswith("tokenizer"):
            return load_tokenizer(kind, source)
        return self._place(load_model(kind, source, self.dtype(source)), source)

    def _place(self, model: Any, source: Component) -> Any:
        return place(model, self.device(source), source.offload or self.spec.offload, self._hooks)


def _elements(file: Path) -> int:
    """Numbers in a safetensors file, read from its header."""
    from math import prod

    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118 - not a dict
