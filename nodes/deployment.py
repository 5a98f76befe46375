"""A deployment as YAML: one gateway and its nodes; the same file starts all of them on one machine or one on each of two.

name: simulation
keys: keys                          # folder of CURVE keys; without it plain text, on loopback only
gateway:
  control: tcp://127.0.0.1:5600
  data: tcp://127.0.0.1:5601
  http: 127.0.0.1:8000
  store: runs/service
  policy: learned                   # the default: router and bandit, and a judge whose scores they learn from
  offer: [{family: mini-sd3, mode: full-cloud}, {family: mini-sd3, handoff: 10}, {family: mini-sd3, mode: edge-only}]
nodes:
  edge-1: {role: edge, data: tcp://127.0.0.1:5611, families: {mini-sd3: [large]}}
  phone: {role: device, families: {mini-sd3: [small]}, link: wifi, pace: 2}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from relay.errors import BadRequest
from relay.files import read_yaml
from scheduler.load.settings import LoadSettings

LEARNED = "learned"  # the default policy; see nodes.gateway.learning
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that nobody reads is a mistake."""


class Offer(_Strict, frozen=True, kw_only=True):
    """A program on offer where a request leaves the choice: the words of `relay generate`."""

    family: str
    mode: str | None = None
    steps: int | None = None
    handoff: int | None = None
    small_steps: int | None = None
    codec: str | None = None
    matching: str | None = None
    conditioning: str | None = None
    program: str | None = None


# One program of each mode, and a second relay: what is left to choose where a deployment says nothing.
OFFER = (
    Offer(family="mini-sd3", mode="full-cloud"),
    Offer(family="mini-sd3", handoff=10, small_steps=6, matching="exact"),
    Offer(family="mini-sd3", handoff=8, small_steps=6, matching="exact"),
    Offer(family="mini-sd3", mode="edge-only"),
)


class GatewayConfig(_Strict, frozen=True, kw_only=True):
    control: str = "tcp://127.0.0.1:5600"
    data: str = "tcp://127.0.0.1:5601"
    http: str | None = "127.0.0.1:8000"
    store: str = "runs/service"
    policy: str | dict[str, Any] = LEARNED
    offer: Annotated[list[Offer], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: list(OFFER))
    queue: Count = 1000  # jobs that may be open
    deadline_s: Positive = 300.0  # of a request that says none
    heartbeat_s: Positive = 0.5
    checkpoint_every: Annotated[int, msgspec.Meta(ge=0)] = 5  # steps; 0: never
    checkpoint_mb: Positive = 256.0
    checkpoints_to: str | None = (
        None  # the edge that keeps them; its own, and those it does not take, the gateway keeps
    )
    tries: Count = 6
    degrade_after_s: Positive = 2.0  # without a node that could go on
    keep_hours: Positive = 24.0
    keep_mb: Positive = 2048.0  # of pictures
    tokens: str | None = None  # a file of bearer tokens, `TOKEN TENANT` a line
    prompts_in_logs: Literal["on", "hash", "off"] = "hash"
    load: LoadSettings | None = None  # levels under pressure, and who is let in; see docs/load.md
    advertise_data: str | None = None  # the data address as nodes dial it, where `data` binds to a wildcard

    @property
    def learns(self) -> bool:
        """Whether its policy learns from what a judge says."""
        return (self.policy if isinstance(self.policy, str) else self.policy.get("name")) == LEARNED

    @property
    def data_address(self) -> str:
        """What nodes dial."""
        return self.advertise_data or self.data


class NodeConfig(_Strict, frozen=True, kw_only=True):
    role: Literal["edge", "device"]
    families: Annotated[dict[str, list[str]], msgspec.Meta(min_length=1)]
    data: str | None = None  # edges: where their data socket binds
    advertise: str | None = None  # as others dial it, where `data` binds to a wildcard
    local: str | None = None  # devices: loopback socket of their own user
    threads: Count = 1
    batch: Count = 8
    queue: Count = 64
    pace: Annotated[float, msgspec.Meta(ge=1)] = 1.0
    device: str | None = None
    dtype: str | None = None
    link: str | dict[str, Any] | None = None  # emulated, between this node and all others
    link_control: str | None = None  # where `relay link-set` reaches that link: HOST:PORT or a unix socket's path
    battery: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None  # in place of what psutil reads
    pad: dict[str, int] | None = None  # data messages padded to these sizes: latent, image, embeddings
    checkpoints: bool | None = None  # default: edges do, devices do not
    judge: Literal["off", "local", "share"] = "off"  # devices: scores their own pictures, or lets kept ones be judged
    drain_s: Positive = 30.0
    routes: dict[str, str] = {}  # address -> the one to dial instead (an emulated link)

    @property
    def data_address(self) -> str | None:
        """What others dial; None: it is dialled by nobody."""
        return self.advertise or self.data


class JudgeConfig(_Strict, frozen=True, kw_only=True):
    """The judge process; see docs/judging.md."""

    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25  # of the pictures that are judged, drawn by chance
    metrics: list[str | dict[str, Any]] = []  # of families that draw no scenes, as in an experiment's config
    threads: Count = 1
    nice: Annotated[int, msgspec.Meta(ge=0, le=19)] = 19
    queue: Count = 64  # pictures that wait for it; the oldest goes
    give_up_s: Positive = 120.0  # without an answer, a picture is not judged


class CacheConfig(_Strict, frozen=True, kw_only=True):
    """The latent cache of each edge; see docs/cache.md. `cache: off|tenant|shared` says the scope alone."""

    scope: Literal["off", "tenant", "shared"] = "tenant"
    mb: Positive = 256.0  # of latents, on each edge's disk
    eviction: Literal["lcbfu", "lru"] = "lcbfu"
    starts: Literal["asked", "open"] = "asked"  # open: every request that fixes nothing may start from it, too
    folder: str | None = None  # default: `cache/NODE` in the gateway's store


class Deployment(_Strict, frozen=True, kw_only=True):
    gateway: GatewayConfig = GatewayConfig()
    nodes: dict[Name, NodeConfig] = {}
    judge: JudgeConfig | bool | None = None  # by default one where the policy learns from scores; false: none
    cache: CacheConfig | bool | str = CacheConfig()
    name: str = "deployment"
    keys: str | None = None
    gateway_key: str | None = None  # the gateway's public key, where `keys` is not at hand
    allow_plain_text: bool = False

    @property
    def judging(self) -> JudgeConfig | None:
        """What judges the pictures; None: nobody does."""
        if isinstance(self.judge, JudgeConfig):
            return self.judge
        return JudgeConfig() if (self.gateway.learns if self.judge is None else self.judge) else None

    @property
    def caching(self) -> CacheConfig:
        """What `cache` says, whichever way it says it."""
        if isinstance(self.cache, CacheConfig):
            return self.cache
        scope = {False: "off", "off": "off", "tenant": "tenant", "shared": "shared"}.get(
            self.cache
        )  # off is a bool in YAML
        if scope is None:
            raise BadRequest(f"`$.cache` is off, tenant, shared, or more in keys of its own, not {self.cache!r}")
        return CacheConfig(scope=scope)  # type: ignore[arg-type]


def read_deployment(path: Path) -> Deployment:
    """BadRequest names file and key."""
    found = read_yaml(path, Deployment, strict=False)
    try:
        found.caching  # noqa: B018 - refused here
    except BadRequest as error:
        raise BadRequest(f"{path}: {error}") from None
    keeper = found.gateway.checkpoints_to
    if keeper is not None and (keeper not in found.nodes or found.nodes[keeper].role != "edge"):
        raise BadRequest(f"{path}: `$.gateway.checkpoints_to`: {keeper!r} is none of the edges under `nodes`")
    for name, node in found.nodes.items():
        if name == "gateway":
            raise BadRequest(f"{path}: `$.nodes.gateway`: the gateway is no node: choose another name")
        if name == "judge" and found.judging is not None:
            raise BadRequest(
                f"{path}: `$.nodes.judge`: so the judge process is called: choose another name, or `judge: false`"
            )
        if node.role == "edge" and node.judge != "off":
            raise BadRequest(f"{path}: `$.nodes.{name}.judge`: an edge keeps no pictures; this is a device's to say")
        if (node.role == "edge") != (node.data is not None):
            raise BadRequest(f"{path}: `$.nodes.{name}`: an edge needs a data address, and a device has none")
        if node.role == "device" and any("large" in members for members in node.families.values()):
            raise BadRequest(f"{path}: `$.nodes.{name}`: a device holds small members; an edge holds large ones")
    return found


def node_of(deployment: Deployment, name: str | None, role: str, path: Path) -> tuple[str, NodeConfig]:
    """The node that a process shall be: by name, or the only one of its role."""
    mine = {n: config for n, config in deployment.nodes.items() if config.role == role}
    if name is None and len(mine) == 1:
        name = next(iter(mine))
    if name is None or name not in mine:
        raise BadRequest(f"{path}: --name must be one of its {role} nodes: {', '.join(mine) or 'it has none'}")
    return name, mine[name]
