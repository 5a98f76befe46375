"""Who may speak: CURVE key files, the list of keys that are let in, and what a key says of its holder.

    NAME.key   secret: name, role, public and secret key; mode 0600, never leaves its machine
    NAME.pub   public: name, role, key (and tenant); copied to whoever shall know it

Both are YAML. Keys are Z85 text of 40 characters, as ZeroMQ has them. The name and the role of a peer are what the *allow
list* says of its key; what a peer says of itself counts only in plain text, where nothing is proved.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from nodes.messages import ROLES
from relay.errors import BadRequest, RelayError

log = logging.getLogger("relay.keys")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
LOOK_EVERY_S = 0.5  # how long a revoked key may go on
SETTLE_S = 1.0  # how long a list that cannot be read may be one that is just being written


class KeyFileError(RelayError):
    """A key file that is not one, or is not kept as it must be; the message names it and the way out."""


class Peer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who is at the other end. `key`: what its connection proved, its public key; in plain text `role/name`, proved by
    nothing, or empty. `tenant`: whose jobs it sees; None: its own."""

    name: str
    role: str
    key: str = ""
    tenant: str | None = None


class Credentials(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who this process is. Without a secret it speaks plain text."""

    name: str
    role: str
    public: str = ""
    secret: str = ""

    def __repr__(self) -> str:  # a secret gets into no log
        return f"Credentials({self.name!r}, {self.role!r}, {self.public!r})"

    @staticmethod
    def plain_text(name: str, role: str) -> Credentials:
        """What a node of a deployment without keys says of itself."""
        check_name(name)
        check_role(role)
        return Credentials(name=name, role=role)


def check_name(name: str) -> None:
    """BadRequest unless it can be the name of a node and of a file."""
    if not NAME.fullmatch(name):
        raise BadRequest(f"{name!r} is no name: up to 63 letters, digits, dots, dashes and underscores")


def check_role(role: str) -> None:
    """BadRequest unless there is such a role."""
    if role not in ROLES:
        raise BadRequest(f"{role!r} is no role: {', '.join(ROLES)}")


def write_keys(name: str, role: str, folder: Path, tenant: str | None = None) -> tuple[Path, Path]:
    """A new pair in `folder`: the paths of the secret and of the public file. BadRequest where one exists."""
    check_name(name)
    check_role(role)
    secret_path, public_path = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (secret_path, public_path):
        if path.exists():
            raise BadRequest(f"{path} exists; a key is not overwritten: remove it, or choose another name or --out")
    folder.mkdir(parents=True, exist_ok=True)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    mine = Credentials(name=name, role=role, public=public, secret=secret)
    theirs = Peer(name=name, role=role, key=public, tenant=tenant)
    _write_new(secret_path, f"# Secret key of {name}: stays on its machine, readable by its owner only.\n", mine, 0o600)
    _write_new(public_path, f"# Public key of {name}: goes to whoever shall know it.\n", theirs, 0o644)
    return secret_path, public_path


def _write_new(path: Path, comment: str, content: msgspec.Struct, mode: int) -> None:
    fields = {k: v for k, v in msgspec.structs.asdict(content).items() if v is not None}
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(comment.encode() + msgspec.yaml.encode(fields))


def load_secret(path: Path) -> Credentials:
    """Who this process is. KeyFileError if others can read the file, or if it is none."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read()
    except OSError as error:
        raise KeyFileError(f"secret key {path} cannot be read: {error.strerror}") from None
    if os.name == "posix" and mode & 0o077:
        raise KeyFileError(f"secret key {path} is open to others (mode {mode:04o}): chmod 600 {path}")
    try:
        mine = msgspec.yaml.decode(data, type=Credentials)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} is no secret key file: {error}") from None
    _check(path, mine.name, mine.role, mine.public)
    try:
        fits = zmq.curve_public(mine.secret.encode()).decode() == mine.public
    except (zmq.ZMQError, ValueError):
        fits = False
    if not fits:
        raise KeyFileError(f"{path}: its secret and its public key are no pair")
    return mine


def load_public(path: Path) -> Peer:
    """Whom a .pub file names. KeyFileError if it is none."""
    try:
        peer = msgspec.yaml.decode(path.read_bytes(), type=Peer)
    except OSError as error:
        raise KeyFileError(f"public key {path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} is no public key file: {error}") from None
    _check(path, peer.name, peer.role, peer.key)
    return peer


def _check(path: Path, name: str, role: str, key: str) -> None:
    try:
        check_name(name)
        check_role(role)
    except BadRequest as error:
        raise KeyFileError(f"{path}: {error}") from None
    if not is_key(key):
        raise KeyFileError(f"{path}: {key!r} is no key of 40 characters in Z85")


def is_key(key: str) -> bool:
    """Whether it can be a CURVE key at all."""
    try:
        return len(key) == 40 and len(z85.decode(key.encode())) == 32
    except (ValueError, KeyError, UnicodeEncodeError):
        return False


class AllowList:
    """The keys that are let in: a folder of .pub files, or one YAML file, a list of what .pub files hold.

    It is looked at again when it is asked and the last look is `LOOK_EVERY_S` old, so that removing a key takes effect
    on connections that stand. A file that cannot be read lets nobody in by it, but only after `SETTLE_S`: until then it
    may be half written, and what was read before stands. Asking costs a dictionary look-up, a look some microseconds a
    file.
    """

    def __init__(self, path: Path):
        """KeyFileError if anything in it cannot be read now."""
        self.path = path
        self._stamp = _stamp(path)
        self._peers, problems = _read(path)
        if problems:
            raise KeyFileError(problems[0])
        self._looked = time.monotonic()
        self._doubted: float | None = None

    def find(self, key: str, now: bool = False) -> Peer | None:
        """Whose key it is, None if it is not on the list. `now`: look at the files first, however young the last look."""
        if now or time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._look()
        return self._peers.get(key)

    def peers(self) -> list[Peer]:
        return list(self._peers.values())

    def _look(self) -> None:
        self._looked = time.monotonic()
        stamp = _stamp(self.path)
        if stamp == self._stamp and self._doubted is None:
            return
        peers, problems = _read(self.path)
        if problems:
            self._doubted = self._doubted or self._looked
            if self._looked - self._doubted < SETTLE_S:
                return
            for problem in problems:
                log.error("%s: keys that cannot be read are not let in", problem)
        for gone in self._peers.keys() - peers.keys():
            log.warning("the key of %s %s is revoked", self._peers[gone].role, self._peers[gone].name)
        self._peers, self._stamp, self._doubted = peers, stamp, None


def _stamp(path: Path) -> object:
    """Equal as long as nothing has changed, as far as names, sizes and times of change can say."""
    try:
        if path.is_dir():
            return sorted((p.name, *_change(p)) for p in path.glob("*.pub"))
        return _change(path)
    except OSError as error:
        return error.errno


def _change(path: Path) -> tuple[int, ...]:
    now = path.stat()
    return now.st_mtime_ns, now.st_size, now.st_ino


def _read(path: Path) -> tuple[dict[str, Peer], list[str]]:
    """Key -> peer of what can be read, and what cannot. Two files for one key: neither is believed."""
    found: list[tuple[Path, Peer]] = []
    problems = []
    if path.is_dir():
        for file in sorted(path.glob("*.pub")):
            try:
                found.append((file, load_public(file)))
            except KeyFileError as error:
                problems.append(str(error))
    else:
        try:
            listed = msgspec.yaml.decode(path.read_bytes(), type=list[Peer])
            for peer in listed:
                _check(path, peer.name, peer.role, peer.key)
            found = [(path, peer) for peer in listed]
        except OSError as error:
            problems.append(f"allow list {path} cannot be read: {error.strerror}")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            problems.append(f"{path} is no allow list: {error}")
        except KeyFileError as error:
            problems.append(str(error))
    peers: dict[str, Peer] = {}
    doubled = set()
    for file, peer in found:
        if peers.setdefault(peer.key, peer) != peer:
            doubled.add(peer.key)
            problems.append(f"{file}: the key of {peer.name} is also that of {peers[peer.key].name}")
    return {key: peer for key, peer in peers.items() if key not in doubled}, problems
