"""What a program sends over a link: which data messages, and how many bytes each.

Kinds: `latent` (a handoff), `embeddings` (shipped conditioning), `image` (the result, back to the asker's device).
Headers, checksums and the prompt's text are left out: some hundred bytes beside 100 kB and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

from relay.checkpoints import Component, read_json, vae_factor
from relay.errors import BadRequest
from relay.family_spec import ARCHITECTURES, FamilySpec
from relay.program import CODECS, Program, check_choice

MessageKind = Literal["latent", "embeddings", "image"]
ImageFormat = Literal["png", "jpeg"]

# An assumption, not a measurement: half of the raw 3 bytes for PNG, a tenth for JPEG at quality 90.
IMAGE_BYTES_PER_PIXEL = {"png": 1.5, "jpeg": 0.3}
_WIDTH = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # bytes a value; `relay.codecs` has the same, and torch with it


class Message(NamedTuple):
    kind: MessageKind
    bytes: int


@dataclass(frozen=True)
class MessageSizes:
    """Bytes of one image's messages in one family."""

    family: str
    latent_shape: tuple[int, int, int]  # channels, height, width
    embeddings: int  # bytes per guidance branch: prompt embeddings and pooled ones
    image: int  # bytes of the result as it is sent
    source: str  # where the figures come from, for reports

    @property
    def latent(self) -> int:
        """Bytes at 16 bit."""
        return self.latent_bytes("fp16")

    def latent_bytes(self, codec: str) -> int:
        """Bytes under a codec; int8 carries a float32 scale and offset per channel beside its values."""
        check_choice("codec", codec, CODECS)
        tables = 8 * self.latent_shape[0] if codec == "int8" else 0
        return prod(self.latent_shape) * _WIDTH[codec] + tables


def _image_bytes(size: tuple[int, int], image_format: str) -> int:
    check_choice("image format", image_format, tuple(IMAGE_BYTES_PER_PIXEL))
    return round(prod(size) * IMAGE_BYTES_PER_PIXEL[image_format])


# Arithmetic over the published configs, 16 bit, 1024x1024: SDXL latent 131,072 B and 0.32 MB of embeddings per guidance branch
# (77 tokens x 2048 + pooled 1280); SD3.5 latent 524,288 B and 2.73 MB ((77 + 256 tokens) x 4096 + pooled 2048).
_REAL = {
    "sdxl": ((4, 128, 128), 2 * (77 * 2048 + 1280)),
    "sd35": ((16, 128, 128), 2 * (333 * 4096 + 2048)),
}
# Whose sizes a family is charged: an embedded one those of the family it stands for.
STANDS_FOR = {"sdxl": "sdxl", "sdxl-vega": "sdxl", "mini-sdxl": "sdxl", "sd35": "sd35", "mini-sd3": "sd35"}


def real_sizes(family: str, image_format: ImageFormat = "png") -> MessageSizes:
    """Sizes of the real family that `family` is or stands for, at 1024x1024 and 16 bit."""
    if family not in STANDS_FOR:
        raise BadRequest(f"no real message sizes for family {family!r}: there are some for {', '.join(STANDS_FOR)}")
    name = STANDS_FOR[family]
    shape, embeddings = _REAL[name]
    source = f"the published configs, 16 bit, 1024x1024; {image_format} at {IMAGE_BYTES_PER_PIXEL[image_format]} B/pixel assumed"
    return MessageSizes(name, shape, embeddings, _image_bytes((1024, 1024), image_format), source)


def computed_sizes(spec: FamilySpec, image_format: ImageFormat = "png") -> MessageSizes:
    """Sizes of a family at its own default size and dtype, from its configs alone. For a mini family: what really travels."""
    denoiser = read_json(spec.members["large"], "config.json")
    vae = read_json(spec.vae, "config.json")
    index = read_json(spec.text, "model_index.json")
    here = [
        name for name in ("tokenizer", "tokenizer_2") if (index.get(name) or [None])[0] and name not in spec.text.omit
    ]
    if not here:
        raise BadRequest(f"family {spec.name}: {spec.text} has no CLIP tokenizer to count tokens by")
    inside = "/".join(part for part in (spec.text.subfolder, here[0]) if part)
    tokenizer = Component(repo=spec.text.repo, subfolder=inside, revision=spec.text.revision)
    tokens = int(read_json(tokenizer, "tokenizer_config.json")["model_max_length"])
    width_key, *pooled_keys = ARCHITECTURES[spec.architecture].widths
    width = int(denoiser[width_key])
    if spec.architecture == "sd3":
        has_t5 = "text_encoder_3" not in spec.text.omit
        tokens += spec.text.t5_tokens if spec.text.t5_tokens is not None else 256 * has_t5
        pooled = int(denoiser[pooled_keys[0]])
    else:  # SDXL's added embedding is the pooled one beside six embedded time ids
        pooled = int(denoiser["projection_class_embeddings_input_dim"]) - 6 * int(denoiser["addition_time_embed_dim"])
    factor = vae_factor(vae)
    image_width, image_height = spec.sizes.default
    shape = (int(vae["latent_channels"]), image_height // factor, image_width // factor)
    value = _WIDTH[spec.text.dtype or spec.dtype]
    source = (
        f"computed from the configs of {spec.name}, {image_width}x{image_height}; image assumed as for real families"
    )
    return MessageSizes(
        spec.name,
        shape,
        value * (tokens * width + pooled),
        _image_bytes((image_width, image_height), image_format),
        source,
    )


def bytes_sent(program: Program, sizes: MessageSizes) -> list[Message]:
    """The data messages of one image, in the order they are sent: shipped conditioning, then what `sent_along` says.

    A receiver of shipped conditioning gets it once and ahead of its latent. Embeddings are one branch, two where some
    leg is guided (guidance above 1).
    """
    members = [leg.member for leg in program.legs]
    branches = 2 if any(value > 1 for value in program.guidance) else 1
    messages: list[Message] = []
    if program.conditioning == "ship":
        receivers = [member for member in dict.fromkeys(_hops(members)) if member != members[0]]  # the first encoded it
        messages += [Message("embeddings", branches * sizes.embeddings) for _ in receivers]
    return messages + sent_along(members, program.codec, sizes)


def sent_along(members: Sequence[str], codec: str, sizes: MessageSizes) -> list[Message]:
    """The messages of one image whose latent these members hold in turn, without conditioning.

    Members lie on nodes of their own, `small` on the asker's device. So each change of member sends the latent, and an
    image finished elsewhere is sent back: full-cloud pays for its image, a relay for its latent, edge-only for nothing.
    """
    messages = [Message("latent", sizes.latent_bytes(codec)) for _ in _hops(members)]
    if members[-1] != "small":
        messages.append(Message("image", sizes.image))
    return messages


def _hops(members: Sequence[str]) -> list[str]:
    """Who receives the latent at each change of member."""
    return [after for before, after in pairwise(members) if before != after]
