"""How far a picture moves with the company it is drawn in: alone against sharing its batch, in fp32 and in bf16.

Eight requests of as many prompts and handoff steps walk the large member, once each alone and once all in one engine, so
that batches shrink as they leave; latents are compared where the leg ends, pictures after decoding. Alone a request
is bit for bit what the in-process run draws.
"""

from __future__ import annotations

from typing import Any

COUNT = 8


def measure_company(name: str, dtype: str, steps: int) -> dict[str, float]:
    """Worst difference over the requests: of the latent, as a share of its norm and as max |x|; of the picture, in 1/255."""
    import torch

    from experiments.workloads import load_workload
    from relay.engine import StepEngine, Walk
    from relay.pipeline import RelayPipeline
    from relay.sampling import walk_leg
    from relay.step_times import step_curve

    pipe = RelayPipeline.from_pretrained(name, torch_dtype=dtype)
    family, size = pipe.family, pipe.family.spec.sizes.default
    prompts = [each.text for each in load_workload("scenes").prompts("test", COUNT, 0)]
    guidance, denoiser = family.spec.members["large"].guidance, family.denoiser("large")
    with torch.inference_mode():
        sigmas = family.schedules(size)["large"](steps).sigmas
        cond = family.text.encode(prompts, None, True, size)
        noise = family.initial_noise(COUNT, size, torch.Generator().manual_seed(0)) * sigmas[0]
        engine = StepEngine(denoiser, "large", step_curve(family, "large", [1, COUNT]), COUNT, COUNT)
        alone = []
        for i in range(COUNT):
            walked = sigmas[: 1 + round((i + 1) * steps / COUNT)]
            own = cond.select([i])
            alone.append(walk_leg(denoiser, noise[i : i + 1], walked, own, guidance, member="large"))
            engine.submit(Walk(str(i), noise[i : i + 1], walked, own, guidance))
        shared: dict[str, Any] = {}
        while len(shared) < COUNT:
            for ended in engine.step():
                if ended.error is not None:
                    raise ended.error
                shared[ended.walk.id] = ended.latent
        off = {"latent_share": 0.0, "latent_max": 0.0, "pixel": 0.0}
        for i, one in enumerate(alone):
            other = shared[str(i)].float()
            difference = other - one.float()
            images = [family.decode(latent.float()) for latent in (one, other)]
            found = {
                "latent_share": float(difference.norm() / one.float().norm()), "latent_max": float(difference.abs().max()),
                "pixel": 255 * float((images[0] - images[1]).abs().max()),
            }  # fmt: skip
            off = {key: max(value, found[key]) for key, value in off.items()}
    return off


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """family -> dtype -> differences."""
    lines = [
        "## Company", "",
        f"{COUNT} requests, large member, each alone against all in one engine; the worst of them:", "",
        "| family | dtype | latent, share of its norm | latent, max | picture, of 255 |", "| --- " * 5 + "|",
    ]  # fmt: skip
    for name, dtypes in found.items():
        for dtype, off in dtypes.items():
            lines.append(
                f"| {name} | {dtype} | {off['latent_share']:.1e} | {off['latent_max']:.1e} | {off['pixel']:.2g} |"
            )
    return "\n".join(lines) + "\n"
