"""Router weights on disk: one safetensors file with its card inside, checked before a number of it is used.

    scheduler/router/weights/FAMILY/METRICS.safetensors

Refused, each with one line that says why: a damaged or truncated file (checksum over every tensor and the card), another
format's, another family's, and one trained on another text encoder's tokens.
"""

from __future__ import annotations

from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from relay.errors import BadRequest, RelayError
from relay.files import write_atomically
from scheduler.router.trained import Calibration, Card, Scales, Trained

WEIGHTS = Path(__file__).parent / "weights"
FORMAT = "relay-router-1"


def shipped(family: str, metric_set: str) -> Path:
    """Where the weights of a family lie that come with the package."""
    return WEIGHTS / family / f"{metric_set}.safetensors"


def save(trained: Trained, path: Path) -> None:
    """Write it whole or not at all: the network in half precision, which is what it was calibrated in."""
    import torch
    from safetensors.torch import save as to_bytes

    tensors = {f"net.{name}": tensor.half().contiguous() for name, tensor in trained.net.state_dict().items()}
    for group, kind in (("scales", np.float64), ("calibration", np.float32)):
        held = getattr(trained, group)
        for field in fields(held):
            tensors[f"{group}.{field.name}"] = torch.from_numpy(np.ascontiguousarray(getattr(held, field.name), kind))
    card = msgspec.json.encode(trained.card, order="sorted").decode()
    metadata = {"format": FORMAT, "card": card, "checksum": _checksum(tensors, card)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_bytes(tensors, metadata))


def load(path: Path, family: str | None = None) -> Trained:
    """Read and check a file; `family`: whose it must be. BadRequest where there is none, RelayError where it is bad."""
    from scheduler.router.model import RouterNet

    tensors, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise RelayError(f"{path} holds no router weights of format {FORMAT}; train anew with `relay-train router`")
    card_text = metadata.get("card", "")
    if metadata.get("checksum") != _checksum(tensors, card_text):
        raise RelayError(f"{path} is damaged: its checksum differs; restore the file or train anew")
    try:
        card = msgspec.json.decode(card_text, type=Card)
        net = RouterNet(card.input_width, len(card.metrics), card.shape)
        net.load_state_dict({k.removeprefix("net."): v.float() for k, v in tensors.items() if k.startswith("net.")})
        scales, calibration = (
            cls(**{field.name: tensors[f"{group}.{field.name}"].double().numpy() for field in fields(cls)})
            for group, cls in (("scales", Scales), ("calibration", Calibration))
        )
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, RuntimeError) as error:
        raise RelayError(f"{path} is not a whole router: {str(error).splitlines()[0]}") from None
    if family is not None and card.family != family:
        raise RelayError(f"{path} is the router of family {card.family}, not of {family}")
    return Trained(card, net.eval(), scales, calibration)  # type: ignore[arg-type]


def check_encoder(trained: Trained, digest: str) -> None:
    """RelayError where the family reads its prompts with another text encoder than the router was trained on."""
    if trained.card.encoder != digest:
        raise RelayError(
            f"the router of {trained.card.family} was trained on text encoder {trained.card.encoder}, the family here"
            f" has {digest}: train it anew with `relay-train router`"
        )


def check_fingerprint(trained: Trained, fingerprint: Any) -> None:
    """RelayError where it was taught by pictures of another latent space (`Family.fingerprint` reads the VAE)."""
    from relay.fingerprint import Fingerprint, compatible

    reason = compatible(msgspec.convert(trained.card.fingerprint, Fingerprint), fingerprint)
    if reason is not None:
        raise RelayError(f"the router of {trained.card.family} was taught by another family's pictures: {reason}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise BadRequest(f"there are no router weights at {path}: train them with `relay-train router`")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise RelayError(f"{path} is damaged: {str(error).splitlines()[0]}; restore the file or train anew") from None


def _checksum(tensors: dict[str, Any], card: str) -> str:
    digest = blake2b(card.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
