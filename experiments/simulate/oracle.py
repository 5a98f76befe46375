"""The oracle: the action of the best expected reward, for this request, in the present state.

It knows more than any policy: what every node really holds and how long its steps really take, the links as they are
now with what waits for them, and each program's mean reward for this very prompt over the stored seeds, which is the world
that pictures are drawn from. From that it works out when each action would end if nobody else came.

It does not know what comes: later requests, latents that are still being made elsewhere, a link's jitter and weather,
the seed that will be drawn (where the store holds one a prompt, that is known, luck and all). And it is greedy: it
counts this request's reward and not what its choice costs those that come later, so that under heavy load a policy that
leaves room can do better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.simulate.loop import Loop, Stretch, foresee
from experiments.simulate.scores import Cell
from experiments.simulate.world import Placed
from experiments.simulate.worth import known_of
from relay.program import check_choice
from scheduler.policy import Action, Context, Decision

if TYPE_CHECKING:
    from experiments.simulate.environment import Run


class Oracle:
    """Needs a simulation that it is attached to. `knows`: the mean scores of this "prompt", or only those of its "class"
    (complexity) over all stored prompts, which holds no single picture's luck."""

    name = "oracle"

    def __init__(self, knows: str = "prompt") -> None:
        check_choice("knowledge of the oracle", knows, ("prompt", "class"))
        self.knows = knows
        self._run: Run | None = None

    def attach(self, run: Run) -> None:
        """What it looks into from now on."""
        self._run = run

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        values = self.values(context, actions)
        best = max(range(len(actions)), key=values.__getitem__)
        notes = {"value": values[best]}
        return Decision(action=actions[best], probability=1.0, policy=self.name, actions=len(actions), notes=notes)

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It knows."""

    def values(self, context: Context, actions: Sequence[Action]) -> list[float]:
        """Expected reward of each action."""
        assert self._run is not None, "an oracle is attached to a simulation"
        run, reward, scores = self._run, self._run.simulation.reward, self._run.scores
        seconds = Foresight(run, context).seconds
        values = []
        for action in actions:
            placed = run.world.placed(action)
            takes = seconds(placed)
            if self.knows == "class":
                cells: Sequence[Cell] = [scores.of_class(placed.text_program, context.prompt)]
            else:
                cells = scores.of(placed.text_program, context.prompt)
            worth = [reward(known_of(context, placed, takes, cell)) or 0.0 for cell in cells]
            values.append(sum(worth) / len(worth))
        return values


class Foresight:
    """When actions would end that are taken now. What they share is worked out once."""

    def __init__(self, run: Run, context: Context):
        self.run, self.prompt = run, context.prompt
        self.job = run.jobs[context.job]
        self._outlooks: dict[str, tuple[float, Loop]] = {}
        self._ends: dict[Any, float] = {}

    def seconds(self, placed: Placed) -> float:
        """From its arrival to its picture."""
        run, latent, node = self.run, None, None
        end, last = run.clock.now, len(placed.stretches) - 1
        for i, (name, legs, _) in enumerate(placed.stretches):
            before, node = node, run.nodes[name]
            if before is not None:
                latent = run.transfer_end(run.lines(before, node), placed.latent_bytes, end)
            end = self._end(name, placed.family, legs, i == last, latent)
        assert node is not None
        home = run.lines_home(node, self.job.device)
        return run.transfer_end(home, placed.image_bytes, end) - self.job.request.arrival_s

    def _end(
        self, name: str, family: str, legs: tuple[tuple[str, int], ...], decodes: bool, latent: float | None
    ) -> float:
        key = name, family, legs, latent
        if key not in self._ends:
            run, node = self.run, self.run.nodes[name]
            if name not in self._outlooks:
                self._outlooks[name] = node.outlook()
            boundary, loop = self._outlooks[name]
            comes = run.clock.now + run.spec.overhead_s + (node.link.down.profile.delay_s if node.link else 0.0)
            stretch = Stretch(self.prompt, family, legs, decodes, latent is None, _nobody)
            stretch.urgency = (self.job.late, comes)
            self._ends[key] = foresee(loop.copy(), boundary, stretch, comes, latent)
        return self._ends[key]


def _nobody(time: float) -> None:
    """Is told."""
