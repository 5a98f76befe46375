"""From a request's words to the programs that may serve it. The only place of the gateway that needs diffusers, for the
schedules; it loads configs, never weights, and runs in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nodes.deployment import Offer
from nodes.requests import MAX_STEPS, ImageRequest
from relay.errors import BadRequest
from relay.program import Program
from scheduler.message_sizes import IMAGE_BYTES_PER_PIXEL

if TYPE_CHECKING:
    from relay.family import Family


@dataclass(frozen=True)
class Planned:
    programs: tuple[Program, ...]  # one where the request fixes it, else what is on offer
    width: int
    height: int


class Planner:
    """`offer`: the programs among which a policy chooses where the request leaves the choice."""

    def __init__(self, offer: Sequence[Offer]):
        self.offer = list(offer)
        self._thread = ThreadPoolExecutor(1, "planner")
        self._families: dict[str, Family] = {}
        self._known: dict[Any, Program] = {}

    @property
    def families(self) -> list[str]:
        """Names of those on offer, in the config's order; known once `start` is done."""
        return list(dict.fromkeys(self._families[o.family].name for o in self.offer if o.family in self._families))

    async def start(self) -> list[Program]:
        """Load configs and plan everything on offer; BadRequest where the config offers what cannot be done."""
        return await self._run(self._offered, ImageRequest(prompt="-"))

    async def plan(self, request: ImageRequest) -> Planned:
        """BadRequest, with the field's reason, on whatever no program can do."""
        return await self._run(self._plan, request)

    def sizes(self, size: tuple[int, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of a latent at 16 bit and of a picture, of each family on offer, at that size (width, height)."""
        width, height = size
        families = [self._families[name] for name in self.families]
        latents = {f.name: 2 * f.channels * (width // f.factor) * (height // f.factor) for f in families}
        return latents, {f.name: round(IMAGE_BYTES_PER_PIXEL["png"] * width * height) for f in families}

    def default_sizes(self) -> tuple[dict[str, int], dict[str, int]]:
        """`sizes` of pictures as each family draws them where nothing is said."""
        from relay.request import image_size

        latents: dict[str, int] = {}
        images: dict[str, int] = {}
        for name in self.families:
            latent, image = self.sizes(image_size(self._family(name), None, None))
            latents[name], images[name] = latent[name], image[name]
        return latents, images

    async def read(self, request: ImageRequest, reads: Callable[[str], None]) -> None:
        """Let a policy read a prompt, in this thread, where there is something to choose."""
        if not request.pins:
            await self._run(reads, request.prompt)

    async def others(self, request: ImageRequest, program: Program, handoff: int | None) -> list[Program]:
        """What may finish in its place where the answer may be degraded: with `handoff` steps of the large member done,
        the small member goes on from there or the large one to its end; without, anything on offer and each alone."""
        return await self._run(self._others, request, program, handoff)

    async def _run(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _plan(self, request: ImageRequest) -> Planned:
        from relay.request import check_texts, image_size

        words = {k: v for k, v in request.words.items() if v is not None and k not in ("width", "height")}
        named = request.family or (Program.parse(request.program).family if request.program else None)
        families = [named] if named else self.families
        if named and named not in self.families:
            raise BadRequest(f"model {named!r} is not served here: choose {', '.join(self.families)}")
        family = self._family(families[0])
        check_texts(family, [request.prompt], [request.negative_prompt] if request.negative_prompt else [])
        size = image_size(family, request.width, request.height)
        sized = {"width": size[0], "height": size[1]}
        programs = (
            (self._program(families[0], words | sized),) if words else tuple(self._offered(request, named, sized))
        )
        for program in programs:
            if sum(leg.steps for leg in program.legs) > MAX_STEPS:
                raise BadRequest(f"{program} takes more than {MAX_STEPS} steps, the limit here")
            if request.negative_prompt is not None and not any(g > 1 for g in program.guidance):
                raise BadRequest("a negative prompt does nothing without guidance: ask for a guidance above 1")
        return Planned(programs, *size)

    def _offered(
        self, request: ImageRequest, family: str | None = None, sized: dict[str, int] | None = None
    ) -> list[Program]:
        found = []
        for offer in self.offer:
            name = self._family(offer.family).name
            if family in (None, name):
                words = {
                    "mode": offer.mode, "num_inference_steps": offer.steps, "handoff": offer.handoff,
                    "small_steps": offer.small_steps, "codec": offer.codec, "matching": offer.matching,
                    "conditioning": offer.conditioning, "program": offer.program,
                }  # fmt: skip
                said = {k: v for k, v in words.items() if v is not None}
                found.append(self._program(name, said | (sized or {})))
        return found

    def _others(self, request: ImageRequest, program: Program, handoff: int | None) -> list[Program]:
        sized = {"width": request.width, "height": request.height}
        tries: list[dict[str, Any]] = []
        if handoff:
            total = program.legs[0].steps_total
            tries = [
                {"num_inference_steps": total, "handoff": handoff},
                {"num_inference_steps": total, "mode": "full-cloud"},
            ]
        else:
            tries = [{"mode": "edge-only"}, {"mode": "full-cloud"}]
        found = []
        for words in tries:
            try:
                found.append(self._program(program.family, words | {k: v for k, v in sized.items() if v}))
            except BadRequest:
                continue
        if not handoff:
            found += self._offered(request, program.family, {k: v for k, v in sized.items() if v})
        return [each for each in dict.fromkeys(found) if each != program]

    def _program(self, family: str, words: dict[str, Any]) -> Program:
        from relay.request import plan_program

        key = (family, tuple(sorted(words.items())))
        if key not in self._known:
            if len(self._known) > 4096:
                self._known.clear()
            self._known[key] = plan_program(self._family(family), None, None, **words)
        return self._known[key]

    def _family(self, name: str) -> Family:
        if name not in self._families:
            from nodes.session import quiet_libraries
            from relay.family import Family

            quiet_libraries()
            loaded = Family.load(name)
            self._families[name] = self._families[loaded.name] = loaded  # offered by path, asked for by name
        return self._families[name]
