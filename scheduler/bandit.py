"""The bandit: a contextual bandit on Vowpal Wabbit that chooses among programs x nodes and learns from what came out.

    features of context and actions -> costs of all actions -> a distribution (SquareCB) -> one action, drawn
    reward, whenever it comes      -> cost -reward of that action at its logged probability

Costs are linear in context, action and their products (`-q CA`): without the products nothing that is learned of an action
would depend on the request. Actions may be others at every call (`--cb_explore_adf`).

Vowpal Wabbit takes what it is given: a nan becomes 0, a wrong probability 0, a `|` a new namespace. So it never sees text:
examples are made once and filled with checked numbers under hashed names, which is also what makes a decision fast.
Its predictions come back best first, not in the order of the actions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relay.errors import BadRequest
from relay.program import check_choice
from scheduler.bandit_file import BanditFile, read_bandit, write_bandit
from scheduler.drawing import draw, normalised
from scheduler.features import ACTION, CONTEXT, VERSION, Features, featurise
from scheduler.pending import Pending
from scheduler.policy import Action, Context, Decision
from scheduler.reward import reward_in

# How a distribution is made of the costs: Vowpal Wabbit's option, and settings where its own default would hardly learn.
EXPLORERS: dict[str, tuple[str | None, dict[str, float | str]]] = {
    # Foster and Rakhlin 2020. Its own 10 and 0.5 explore for too long where programs differ by hundredths of a reward, and a
    # greater factor gives up arms too early where they differ much. Chosen on stored outcomes: learned on 2,000 of train,
    # judged on validation, without queues.
    "squarecb": ("--squarecb", {"gamma_scale": 5, "gamma_exponent": 0.75}),
    "epsilon": (None, {}),
    "softmax": ("--softmax", {"lambda": 10}),  # costs are -1..1: with its own 1 no action ever leaves the others behind
    "bag": ("--bag", {}),  # bootstrap, as many policies as `policies`
    "cover": ("--cover", {}),  # Agarwal et al. 2014
    "rnd": ("--rnd", {}),
}
SHIPPED = Path(__file__).parent / "weights" / "bandit.model"  # `python -m experiments.simulate warm` makes it
REMEMBERED = 2000  # lessons, some 5 KB each with 64 actions
_NAME = re.compile(r"[A-Za-z0-9._=+-]{1,96}")


class Logged(NamedTuple):
    """A decision and its reward, as `warm_start` learns from them."""

    context: Context
    actions: Sequence[Action]
    chosen: int
    probability: float
    reward: float


class _Kept(NamedTuple):
    features: Features
    chosen: int
    probability: float


class _Lesson(NamedTuple):
    features: Features
    chosen: int
    probability: float
    reward: float


class Bandit:
    """`explore`: one of EXPLORERS; `epsilon`: share of decisions spread over all actions, so that none has probability 0.

    `replay`: how many of the last REMEMBERED lessons, drawn by chance, are gone over again with each new one: one online
    pass takes too little from some thousand rewards. They are remembered in this process only.
    `settings`: of Vowpal Wabbit, such as gamma_scale, learning_rate, power_t, cb_type. `time_scale_s`: seconds that count
    as one in features, best those of the reward. `path`: a file that `save` wrote; taken up where there is one.
    `seed`: of the draws, None draws anew in each process.
    """

    name = "bandit"

    def __init__(
        self,
        explore: str = "squarecb",
        epsilon: float = 0.02,
        policies: int = 5,
        replay: int = 5,
        settings: Mapping[str, float | str] | None = None,
        time_scale_s: float = 1.0,
        path: str | Path | None = None,
        seed: int | None = None,
        pending: int = 4096,
    ):
        check_choice("exploration of policy bandit", explore, tuple(EXPLORERS))
        if not (0 <= epsilon <= 1 and time_scale_s > 0 and policies >= 1 and replay >= 0):
            raise BadRequest(
                "policy bandit: epsilon is 0 to 1, time_scale_s above 0, policies at least 1, replay at least 0"
            )
        self.explore, self.time_scale_s = explore, float(time_scale_s)
        self.arguments = _arguments(explore, epsilon, policies, dict(settings or {}))
        self.learned, self.replay = 0, replay
        self._rng = np.random.default_rng(seed)
        self._lessons: list[_Lesson] = []  # a ring of REMEMBERED
        # apart from the draws of actions, which stay what they are however much is gone over again
        self._review_rng = np.random.default_rng(None if seed is None else [seed, 1])
        self._pending: Pending[_Kept] = Pending(pending)
        file = read_bandit(Path(path)) if path and Path(path).exists() else None
        if file is not None:
            self._check_fits(file, Path(str(path)))
            self.learned = file.learned
        self._learner = _Learner(self.arguments, file.model if file else None)

    @property
    def version(self) -> str:
        """For the log: how it explores, what it sees, how often it has learned."""
        return f"{self.explore}-f{VERSION}-{self.learned}"

    @property
    def waiting(self) -> int:
        """Decisions whose reward has not come."""
        return len(self._pending)

    def distribution(self, context: Context, actions: Sequence[Action]) -> np.ndarray:
        return self._learner.distribution(featurise(context, actions, self.time_scale_s))

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        features = featurise(context, actions, self.time_scale_s)
        p = self._learner.distribution(features)
        index, decision = draw(self.name, actions, p, self._rng, version=self.version)
        self._pending.put(decision.id, _Kept(features, index, decision.probability))
        return decision

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """A decision without a reward waits for it; one that is not waited for any more is passed over."""
        if (reward := reward_in(outcome)) is None or (kept := self._pending.take(decision.id)) is None:
            return
        self._take(_Lesson(*kept, reward))

    def warm_start(self, rows: Iterable[Logged]) -> int:
        """Learn from decisions that were logged, whoever made them; the number of them."""
        before = self.learned
        for row in rows:
            features = featurise(row.context, row.actions, self.time_scale_s)
            self._take(_Lesson(features, row.chosen, row.probability, row.reward))
        return self.learned - before

    def _take(self, lesson: _Lesson) -> None:
        """Learn a lesson, and go over some earlier ones."""
        self._learner.learn(*lesson)
        self.learned += 1
        if not self.replay:
            return
        if len(self._lessons) < REMEMBERED:
            self._lessons.append(lesson)
        else:
            self._lessons[self.learned % REMEMBERED] = lesson
        for number in self._review_rng.integers(len(self._lessons), size=self.replay):
            self._learner.learn(*self._lessons[number])

    def save(self, path: str | Path) -> None:
        """What was learned, into a file that `path=` takes up; it appears whole or not at all."""
        write_bandit(
            Path(path),
            BanditFile(
                features=VERSION, arguments=self.arguments, time_scale_s=self.time_scale_s, learned=self.learned,
                model=self._learner.model(),
            ),
        )  # fmt: skip

    def _check_fits(self, file: BanditFile, path: Path) -> None:
        if file.features != VERSION:
            raise BadRequest(f"{path} was learned on features {file.features}, these are {VERSION}: start without it")
        if file.arguments != self.arguments or file.time_scale_s != self.time_scale_s:
            was = f"{' '.join(file.arguments)}, time_scale_s {file.time_scale_s:g}"
            raise BadRequest(f"{path} was learned with other options ({was}): give the same, or start without it")


def _arguments(explore: str, epsilon: float, policies: int, settings: dict[str, float | str]) -> list[str]:
    """Vowpal Wabbit's command line; BadRequest on settings that are none of its words and numbers."""
    option, defaults = EXPLORERS[explore]
    arguments = ["--cb_explore_adf", "--epsilon", f"{epsilon:g}", "-q", "CA", "--quiet"]
    if option:
        arguments.append(option)
    if explore in ("bag", "cover", "rnd"):
        arguments.append(str(policies))
    for key, value in sorted((defaults | settings).items()):
        if not (_NAME.fullmatch(key) and _NAME.fullmatch(str(value))):
            raise BadRequest(f"policy bandit: setting {key!r}: {value!r} is no option of Vowpal Wabbit")
        arguments += [f"--{key}", str(value)]
    return arguments


class _Learner:
    """Vowpal Wabbit behind arrays. Its examples are made once and filled anew, the shared one and one an action."""

    def __init__(self, arguments: list[str], model: bytes | None):
        try:
            import vowpal_wabbit_next as vw
        except ImportError:
            raise BadRequest("policy bandit needs vowpal-wabbit-next: pip install 'relay-inference[gateway]'") from None
        self._label: Any = vw.CBLabel
        try:
            if model is None:
                self._vw: Any = vw.Workspace(arguments)
            else:
                self._vw = vw.Workspace(["--quiet"], model_data=model)  # the model brings its options along
        except (RuntimeError, vw.CLIError) as error:
            raise BadRequest(f"policy bandit: Vowpal Wabbit refuses its options or model: {error}") from None
        self._parser = vw.TextFormatParser(self._vw)
        self._shared: Any = self._parser.parse_line("shared |C x")
        self._examples: list[Any] = []
        self._rows: list[Any] = []  # of each example, where its features are
        self._context: Any = self._shared["C"]
        self._context_names = self._hashed("C", CONTEXT)
        self._action_names = self._hashed("A", ACTION)
        self._tables: dict[int, tuple[list[tuple[str, ...]], np.ndarray, np.ndarray]] = {}

    def distribution(self, features: Features) -> np.ndarray:
        """The probability of each action, (A,) float64."""
        predicted = self._vw.predict_one(self._fill(features))
        p = np.empty(len(predicted))
        for action, probability in predicted:
            p[action] = probability
        return normalised(p)

    def learn(self, features: Features, chosen: int, probability: float, reward: float) -> None:
        if not 0 < probability <= 1:
            raise BadRequest(
                f"a decision is learned from with its probability, above 0 and at most 1, not {probability}"
            )
        examples = self._fill(features)
        example = examples[1 + chosen]
        example.set_label(self._label(label=(chosen, -reward, probability)))
        try:
            self._vw.learn_one(examples)
        finally:
            example.set_label(self._label())

    def model(self) -> bytes:
        return self._vw.serialize()

    def _fill(self, features: Features) -> list[Any]:
        context, rows, labels = features
        if not (np.isfinite(context).all() and np.isfinite(rows).all()):
            raise BadRequest(f"features that are no finite numbers: {_not_finite(context, rows)}")
        while len(self._examples) < len(rows):
            self._examples.append(self._parser.parse_line("|A x"))
            self._rows.append(self._examples[-1]["A"])
        # Zeros stay out, as its own parser leaves them out: its normalised updates stall on a feature that is there and 0.
        there = np.flatnonzero(context)
        self._context.truncate_to(0)
        self._context.push_many_features(self._context_names[there], context[there])
        names, ones = self._names_of(labels)
        values = np.concatenate([rows, ones], axis=1)
        row, column = values.nonzero()
        names, values = names[row, column], values[row, column]
        ends = row.searchsorted(np.arange(1, len(rows) + 1)).tolist()
        start = 0
        for group, end in zip(self._rows, ends, strict=False):
            group.truncate_to(0)
            group.push_many_features(names[start:end], values[start:end])
            start = end
        return [self._shared, *self._examples[: len(rows)]]

    def _names_of(self, labels: list[tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray]:
        """Hashed names of all rows (A, F + most labels), and a 1 for each label that is there (A, most labels)."""
        known = self._tables.get(id(labels))
        if known is not None and known[0] is labels:
            return known[1], known[2]
        if len(self._tables) > 512:
            self._tables.clear()
        different = list(dict.fromkeys(label for own in labels for label in own))
        hashed = dict(zip(different, self._hashed("A", different), strict=True))
        most = max(map(len, labels))
        names = np.zeros((len(labels), len(ACTION) + most), np.uint64)
        names[:, : len(ACTION)] = self._action_names
        ones = np.zeros((len(labels), most), np.float32)
        for i, own in enumerate(labels):
            names[i, len(ACTION) : len(ACTION) + len(own)] = [hashed[label] for label in own]
            ones[i, : len(own)] = 1.0
        self._tables[id(labels)] = (labels, names, ones)  # the list is held, so that its id stays its own
        return names, ones

    def _hashed(self, namespace: str, names: Sequence[str]) -> np.ndarray:
        if bad := next((name for name in names if not _NAME.fullmatch(name)), None):
            raise BadRequest(f"a feature is named with letters, digits and . _ = + -, not {bad!r}")
        index = self._vw.get_index_for_scalar_feature
        return np.array([index(name, namespace_name=namespace) for name in names], np.uint64)


def _not_finite(context: np.ndarray, rows: np.ndarray) -> str:
    bad = [name for name, value in zip(CONTEXT, context, strict=True) if not np.isfinite(value)]
    bad += [name for name, column in zip(ACTION, rows.T, strict=True) if not np.isfinite(column).all()]
    return ", ".join(bad)
