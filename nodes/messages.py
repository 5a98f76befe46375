"""Every message that travels between nodes: one data class each, and how all of them lie on the wire.

    frame 0   magic b"RELAY", u16 major, u16 minor   little-endian, 9 bytes
    frame 1   msgpack of one message, {"type": NAME, field: value, ...}
    frame 2.. payloads, raw bytes, as many as the message's docstring says (`payloads`); behind those of a data message
              one more may follow, of zeros, which brings it to a real family's size on a scaled link

Versions: nodes talk to each other if their major is the same. A minor adds fields with defaults and messages that an
older node may leave unanswered: unknown fields are ignored, missing ones take their default, an unknown type is refused
by name. Who sent a message is read from its connection's key; no field says it.

Control and data use separate sockets. On the control sockets (gateway ROUTER, node DEALER) travel small messages
without payload; on the data sockets (gateway and edge ROUTER, everyone else's DEALER) those that carry latents, images
or embeddings.

Knows no socket.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, ClassVar, Union, get_args

import msgspec

from relay.errors import RelayError

MAGIC, MAJOR, MINOR = b"RELAY", 1, 0
_HEAD = struct.Struct("<5sHH")
# Bytes of frame 1. Decoding takes up to 80 times as much memory (an empty list per byte), and the garbage collector's time.
MAX_HEADER = 1 << 18
MAX_PAYLOAD = 256 << 20  # bytes of one payload: a latent of 4096 x 4096 with its embeddings, and room
MAX_FRAMES = 2 + 4

ROLES = ("gateway", "edge", "device", "client", "judge")


class MessageRefused(RelayError):
    """Bytes that are no message of this version, or one that its sender may not send; the text says which."""


class ForeignVersion(MessageRefused):
    """A message of another major version."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """`senders`: the roles that may send it. `payloads`: how many frames follow the header, at least and at most."""

    senders: ClassVar[tuple[str, ...]] = ()
    payloads: ClassVar[tuple[int, int]] = (0, 0)


class Numbered(Message, frozen=True, kw_only=True):
    """A question of an asker's, or the answer to one, which repeats its number. 0: not numbered."""

    ref: int = 0


# --- who is there ---


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """A family on a node: its members, what proves the latent space, and each member's step-time curve."""

    family: str
    members: tuple[str, ...]
    decodes: bool
    fingerprint: dict[str, Any]
    curves: dict[str, dict[int, float]]  # member -> batch size -> seconds of one guided step, pace included
    encode_s: float = 0.0
    decode_s: float = 0.0


class Register(Message, frozen=True, kw_only=True, tag="register"):
    """Node -> gateway, first and after every cut: what it holds and where its data socket is (edges only)."""

    senders: ClassVar = ("edge", "device")
    name: str
    session: str  # new at every start of the process
    holdings: tuple[Holding, ...]
    batch: int
    queue: int
    data_address: str | None = None  # what others dial; None: it is dialled by nobody
    pace: float = 1.0
    version: str = ""
    startup_s: float = 0.0
    memory_bytes: int = 0
    running: tuple[tuple[str, int], ...] = ()  # (job, attempt) it still works on
    checkpoints: bool = True  # whether it may send them (a device only if its config asks)
    pad: dict[str, int] = {}  # what it brings data messages to: kind -> bytes, as links are charged
    judge: str = "off"  # off | local | share: what a device does about judging


class Registered(Message, frozen=True, kw_only=True, tag="registered"):
    """Gateway -> node: taken in. Jobs that it works on and that are not wanted any more are cancelled after this."""

    senders: ClassVar = ("gateway",)
    gateway: str
    session: str  # of the gateway; another one: it was restarted
    heartbeat_s: float


class PeerStats(msgspec.Struct, frozen=True, kw_only=True):
    """What real traffic to one peer took; None until something was measured."""

    round_trip_s: float | None = None
    bytes_per_s: float | None = None
    bytes_sent: int = 0
    bytes_received: int = 0


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """Node -> gateway, from a loop of its own: what the compute loop really does now."""

    senders: ClassVar = ("edge", "device")
    sequence: int
    doing: str
    running: int
    queued: int
    steps_done: int
    idle_s: float  # since the compute loop last did anything
    last_error: str | None = None
    battery: float | None = None  # 0..1, None without one
    memory_bytes: int = 0
    cpu_s: float = 0.0  # since its process started
    batch_bound: int = 0
    peers: dict[str, PeerStats] = {}
    cache: dict[str, Any] = {}  # of an edge: scope, latents, bytes, hits, misses, ...; `broken` where it has none


class HeartbeatSeen(Message, frozen=True, kw_only=True, tag="heartbeat-seen"):
    """Gateway -> node: gives the node its round trip, by its own clock."""

    senders: ClassVar = ("gateway",)
    sequence: int


class Leaving(Message, frozen=True, kw_only=True, tag="leaving"):
    """Node -> gateway: no new work, please; sent when it drains. `done`: nothing is left, it goes."""

    senders: ClassVar = ("edge", "device")
    reason: str
    done: bool = False


# --- work ---


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stretch's first latent comes from.

    noise     drawn from the seed
    fetch     asked for at the data socket `address` of the edge `node`, or of the gateway
    put       the node `node` with key `key` dials this edge and puts it there
    held      this very node has it
    """

    kind: str  # noise | fetch | put | held
    node: str = ""
    address: str = ""
    key: str = ""  # CURVE public key of `address`, empty in plain text
    checkpoint: bool = False  # not the handoff before the stretch, but the newest checkpoint of the job


class CacheUse(msgspec.Struct, frozen=True, kw_only=True):
    """What an assignment says of the edge's latent cache. The gateway decides whether and how far a request may start
    from it; which latent that is follows from what the edge has, by its family's rule.

    owner    whose latents it may start from, and whose its own become: a tenant, as a digest
    most     steps that it may skip; 0: it starts from noise
    nth      which picture of its request it is: each starts from another source
    keep     whether latents of its walk may be kept
    """

    owner: str
    most: int = 0
    nth: int = 0
    keep: bool = True


class Assign(Message, frozen=True, kw_only=True, tag="assign"):
    """Gateway -> node: walk the legs first..last of a program (and decode after the last leg).

    `attempt` counts placements of the job: an answer to an older one is stale. `put_to`: dial that edge and put the
    latent there, for a device, which nobody can dial.
    """

    senders: ClassVar = ("gateway",)
    job: str
    attempt: int
    program: str
    prompt: str
    negative: str | None
    seed: int
    width: int
    height: int
    first_leg: int
    last_leg: int
    source: Source
    put_to: Source | None = None
    next_key: str = ""  # whose connection may fetch the latent that this stretch ends with
    deadline_s: float | None = None  # left when this was sent
    checkpoint_every: int = 0  # steps; 0: never
    checkpoint_to: Source | None = None  # the edge that keeps them; None, or it does not take one: the gateway
    preview_every: int = 0
    degraded: bool = False  # another program finishes what the first one began: its latent may name that one
    cache: CacheUse | None = None  # of the edge that starts from noise; None: it is left alone
    keep_image: bool = False  # the asker sits on this node: the picture stays there, the report travels

    @property
    def key(self) -> tuple[str, int, int]:
        """Which stretch it is: a node may have two of one attempt, before and after another node's."""
        return self.job, self.attempt, self.first_leg

    @property
    def embeddings_come(self) -> bool:
        """Whether the conditioning is fetched where the first latent is: the node that had the leg before encoded it.
        A checkpoint comes without, and a device, which puts its latent, can be dialled by nobody."""
        ships = self.program.endswith("conditioning=ship")
        return ships and self.first_leg > 0 and self.source.kind == "fetch" and not self.source.checkpoint


class Taken(Message, frozen=True, kw_only=True, tag="taken"):
    """Node -> gateway: accepted into its queue."""

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int


class Busy(Message, frozen=True, kw_only=True, tag="busy"):
    """Node -> gateway: its queue is full."""

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int
    retry_after_s: float


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """Node -> gateway: a stage was entered, or `step` of `of` steps of leg `leg` are done; `kept`: the edge that keeps
    checkpoints has the one of that step.

    `spent_s`: seconds that the stage which has ended took, by the node's own clock.
    """

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int
    stage: str  # queued | encoding | waiting | denoising | kept | sending | ready | sent | decoding | done
    left: str = ""  # the stage that has ended
    leg: int = 0
    step: int = 0
    of: int = 0
    spent_s: float = 0.0
    batch: int = 0
    bytes: int = 0


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """Node -> gateway: it cannot go on. `kind`: refused (the request's fault), broken (the node's), or lost (a peer's)."""

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int
    kind: str
    reason: str


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Gateway -> node: stop working on it at the next step boundary. Handoffs that are kept stay until `Release`."""

    senders: ClassVar = ("gateway",)
    job: str
    attempt: int  # this one and every earlier one
    reason: str = ""


class Release(Message, frozen=True, kw_only=True, tag="release"):
    """Gateway -> node: the job has ended, kept handoffs may go."""

    senders: ClassVar = ("gateway",)
    job: str


class Allow(Message, frozen=True, kw_only=True, tag="allow"):
    """Gateway -> edge: the kept latent before leg `leg` may be fetched by the node with this key. `leg` -2: it may bring
    its checkpoints of the job, and fetch the newest."""

    senders: ClassVar = ("gateway",)
    job: str
    leg: int
    key: str


class Drain(Numbered, frozen=True, kw_only=True, tag="drain"):
    """Gateway or client -> node, client -> gateway: finish or hand on what runs within `limit_s`, then stop."""

    senders: ClassVar = ("gateway", "client")
    node: str
    limit_s: float


# --- bulk ---


class Fetch(Message, frozen=True, kw_only=True, tag="fetch"):
    """Whoever walks on -> whoever has the latent, data socket: answered with `Latent` as soon as it is there, or with
    `Embeddings`. `leg`: -1 for those, -2 for the job's checkpoint."""

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int
    leg: int


class Latent(Message, frozen=True, kw_only=True, tag="latent"):
    """The answer to `Fetch`, or a put. Payload: one handoff (relay.handoff, which proves itself)."""

    senders: ClassVar = ("edge", "device", "gateway")
    payloads: ClassVar = (1, 2)
    job: str
    attempt: int
    leg: int


class Embeddings(Message, frozen=True, kw_only=True, tag="embeddings"):
    """Edge -> the walker of a later leg, once and ahead of the latent: embeddings of a program that ships conditioning.
    Payload: as relay.handoff writes conditioning."""

    senders: ClassVar = ("edge",)
    payloads: ClassVar = (1, 2)
    job: str
    attempt: int


class Checkpoint(Message, frozen=True, kw_only=True, tag="checkpoint"):
    """Node -> gateway, or the edge that keeps them, data socket, at low priority. Payload: one handoff under way (latent,
    sigmas, index)."""

    senders: ClassVar = ("edge", "device")
    payloads: ClassVar = (1, 2)
    job: str
    attempt: int
    leg: int
    index: int


class Preview(Message, frozen=True, kw_only=True, tag="preview"):
    """Node -> gateway, data socket. Payload: a small PNG of what the latent shows."""

    senders: ClassVar = ("edge", "device")
    payloads: ClassVar = (1, 1)
    job: str
    attempt: int
    leg: int
    step: int


class Result(Message, frozen=True, kw_only=True, tag="result"):
    """Node -> gateway, data socket: the picture (payload: PNG; none with `keep_image`) and how it came about."""

    senders: ClassVar = ("edge", "device")
    payloads: ClassVar = (0, 2)
    job: str
    attempt: int
    width: int
    height: int
    report: dict[str, Any]


class Seen(Message, frozen=True, kw_only=True, tag="seen"):
    """The receiver of a `Latent`, `Embeddings`, a `Checkpoint` or a `Result` has it. Times across hosts come from these,
    by the sender's clock: send to seen, less the round trip, over the bytes is a throughput."""

    senders: ClassVar = ("edge", "device", "gateway")
    job: str
    attempt: int
    what: str
    leg: int = 0
    index: int = 0


class NotHere(Message, frozen=True, kw_only=True, tag="not-here"):
    """The answer to a `Fetch` or an embedding of a job that is not known here (any more)."""

    senders: ClassVar = ("edge", "gateway")
    job: str
    attempt: int
    leg: int


# --- judging ---


class JudgeHere(Message, frozen=True, kw_only=True, tag="judge-here"):
    """Judge -> gateway, data socket, every second and when it becomes free. `ask`: the number of this asking for a
    picture, 0 while it is busy; each number is answered once, with `ToJudge`."""

    senders: ClassVar = ("judge",)
    session: str  # new at every start of the process
    ask: int
    doing: str
    judged: int = 0
    columns: tuple[str, ...] = ()  # scores that it can give
    memory_bytes: int = 0
    last_error: str | None = None


class ToJudge(Message, frozen=True, kw_only=True, tag="to-judge"):
    """Gateway -> judge: a picture (payload: PNG), what it shall show and the program that drew it. Answered with `Scores`."""

    senders: ClassVar = ("gateway",)
    payloads: ClassVar = (1, 1)
    job: str
    prompt: str
    program: str


class JudgeThis(Message, frozen=True, kw_only=True, tag="judge-this"):
    """Gateway -> the device that finished a job: its scores, or its picture for judging, as the device's config allows.
    Answered with `Scores` or `KeptPicture`."""

    senders: ClassVar = ("gateway",)
    job: str


class KeptPicture(Message, frozen=True, kw_only=True, tag="kept-picture"):
    """Device -> gateway, data socket: a picture (payload: PNG) that it keeps and shares for judging."""

    senders: ClassVar = ("device",)
    payloads: ClassVar = (1, 2)
    job: str


class Scores(Message, frozen=True, kw_only=True, tag="scores"):
    """Whoever was asked to judge a job -> gateway. `missing`: metric -> why it gave none. `reason`: why there are none."""

    senders: ClassVar = ("judge", "device")
    job: str
    scores: dict[str, float] = {}
    missing: dict[str, str] = {}
    seconds: float = 0.0  # that scoring took
    reason: str = ""


# --- askers: `relay submit`, a device's own user ---


class Submit(Numbered, frozen=True, kw_only=True, tag="submit"):
    """Client or device -> gateway (client -> device for its own user): one request of `images` pictures."""

    senders: ClassVar = ("client", "device")
    request: dict[str, Any]  # nodes.requests.ImageRequest
    idempotency_key: str | None = None


class Accepted(Numbered, frozen=True, kw_only=True, tag="accepted"):
    """It is in the ledger: it will end in pictures or an error."""

    senders: ClassVar = ("gateway", "device")
    request: str
    jobs: tuple[str, ...]


class Refused(Numbered, frozen=True, kw_only=True, tag="refused"):
    """It is not done, and why. `status` is HTTP's; `retry_after_s` where trying again makes sense. `what`, `job`, `ref`:
    of the message that is refused, as far as they could be read."""

    senders: ClassVar = ("gateway", "edge", "device")
    reason: str
    status: int = 400
    retry_after_s: float | None = None
    what: str = ""  # its name on the wire
    job: str = ""


class Ask(Numbered, frozen=True, kw_only=True, tag="ask"):
    """Client or device -> gateway: something to read (`what`: job, image, status, trace, jobs), answered by `Told`."""

    senders: ClassVar = ("client", "device")
    what: str
    job: str = ""
    wait_s: float = 0.0  # for a job: answer when it ends or this is over


class CancelJob(Numbered, frozen=True, kw_only=True, tag="cancel-job"):
    """Asker -> gateway."""

    senders: ClassVar = ("client", "device")
    job: str


class Feedback(Numbered, frozen=True, kw_only=True, tag="feedback"):
    """Asker -> gateway: what it thinks of a job's picture, 0 (useless) to 1 (just right); answered by `Told`."""

    senders: ClassVar = ("client", "device")
    job: str
    rating: float
    comment: str | None = None


class Told(Numbered, frozen=True, kw_only=True, tag="told"):
    """The answer to `Ask`. Payload: the image where that was asked for."""

    senders: ClassVar = ("gateway", "device")
    payloads: ClassVar = (0, 1)
    what: str
    value: Any = None


class Probe(Message, frozen=True, kw_only=True, tag="probe"):
    """Anyone -> anyone, `relay doctor --peer`: comes back as `Probed` with as many payload bytes as it brought."""

    senders: ClassVar = ("client", "edge", "device", "gateway")
    payloads: ClassVar = (0, 1)
    sequence: int


class Probed(Message, frozen=True, kw_only=True, tag="probed"):
    """The answer to `Probe`."""

    senders: ClassVar = ("gateway", "edge", "device")
    payloads: ClassVar = (0, 1)
    sequence: int
    name: str
    version: str


Any_ = Union[  # noqa: UP007  # a tagged union for msgspec
    Register, Registered, Heartbeat, HeartbeatSeen, Leaving, Assign, Taken, Busy, Progress, Failed, Cancel, Release, Allow, Drain,
    Fetch, Latent, Embeddings, Checkpoint, Preview, Result, Seen, NotHere, JudgeHere, ToJudge, JudgeThis, KeptPicture, Scores,
    Submit, Accepted, Refused, Ask, CancelJob, Feedback, Told, Probe, Probed,
]  # fmt: skip
MESSAGES: tuple[type[Message], ...] = get_args(Any_)
_DECODER = msgspec.msgpack.Decoder(Any_)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message, payloads: Sequence[bytes | memoryview] = ()) -> list[bytes | memoryview]:
    """The frames of a message. Payloads are passed through, not copied. MessageRefused if `decode` would refuse its size."""
    low, high = type(message).payloads
    assert low <= len(payloads) <= high, f"{type(message).__name__} with {len(payloads)} payloads"
    header = _ENCODER.encode(message)
    _check_sizes(header, payloads)
    return [_HEAD.pack(MAGIC, MAJOR, MINOR), header, *payloads]


def decode(frames: Sequence[bytes | memoryview]) -> tuple[Message, list[bytes | memoryview]]:
    """The message and its payloads. MessageRefused says what is wrong; nothing is allocated for what is too long."""
    if not 2 <= len(frames) <= MAX_FRAMES:
        raise MessageRefused(f"a message has 2 to {MAX_FRAMES} frames, not {len(frames)}")
    head, header, *payloads = frames
    if len(head) != _HEAD.size or bytes(head[:5]) != MAGIC:
        raise MessageRefused("not a relay message")
    _, major, minor = _HEAD.unpack(head)
    if major != MAJOR:
        raise ForeignVersion(
            f"the peer speaks version {major}.{minor}, this node {MAJOR}.{MINOR}: upgrade the older one"
        )
    _check_sizes(header, payloads)
    try:
        message: Message = _DECODER.decode(header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MessageRefused(f"not a message of version {major}.{minor}: {error}") from None
    low, high = type(message).payloads
    if not low <= len(payloads) <= high:
        raise MessageRefused(f"{name_of(message)} came with {len(payloads)} payloads")
    return message, payloads


def _check_sizes(header: bytes | memoryview, payloads: Sequence[bytes | memoryview]) -> None:
    if len(header) > MAX_HEADER:
        raise MessageRefused(f"a header of {len(header)} bytes is over the limit of {MAX_HEADER}")
    for payload in payloads:
        if (size := size_of(payload)) > MAX_PAYLOAD:
            raise MessageRefused(f"a payload of {size} bytes is over the limit of {MAX_PAYLOAD}")


def size_of(frame: bytes | memoryview) -> int:
    """Bytes of a frame; `len` counts the elements of a memoryview, whatever their size."""
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def name_of(message: Message) -> str:
    """Its name on the wire."""
    return str(type(message).__struct_config__.tag)


def seen_of(message: Latent | Embeddings | Checkpoint | Result) -> Seen:
    """What acknowledges it."""
    leg, index = getattr(message, "leg", 0), getattr(message, "index", 0)
    return Seen(job=message.job, attempt=message.attempt, what=name_of(message), leg=leg, index=index)
