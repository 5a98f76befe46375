"""Who asks over HTTP: bearer tokens of a file, `TOKEN TENANT` a line; without a file everyone on this machine is one tenant.

    # tenant acme has two tokens, so that one can be replaced without a pause
    3f0a9c1e7d5b48f2a6c4e8d0b1f39a57  acme
    9b1c...                            acme

Changes count at once: the file is read again when it changes, and what is not in it any more is refused. Only hashes stay
in memory; a presented token is compared with all of them, so the time taken says nothing of how near it came.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import socket
import stat
import time
from pathlib import Path

from relay.errors import BadRequest

log = logging.getLogger("relay.http")

LOCAL = "local"  # the tenant of everyone where no tokens are set
TOKEN = re.compile(r"[\x21-\x7e]{16,200}")
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
LINK_S = 3600  # how long a picture's address works without a token
SETTLE_S = 1.0  # how long a file that cannot be read may be one that is just being written


class Tokens:
    """See the module. BadRequest where the file cannot be read, is open to others or has a line that is none."""

    def __init__(self, path: Path):
        self.path = path
        self._seen = self._state()
        self._entries, self._keys = _read(path)
        self._bad_since: float | None = None

    def tenant_of(self, presented: str) -> str | None:
        """Whose token this is."""
        self._look()
        digest, found = _digest(presented), None
        for known, tenant in self._entries:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def knows(self, tenant: str) -> bool:
        """Whether any token of this tenant is left."""
        self._look()
        return tenant in self._keys

    def sign(self, tenant: str, path: str) -> str:
        """The query that opens `path` as this tenant for `LINK_S`: a link works where no header can be set."""
        expires = int(time.time()) + LINK_S
        return f"expires={expires}&signature={self._signature(self._keys[tenant], path, expires)}"

    def tenant_of_link(self, path: str, expires: str, signature: str) -> str | None:
        """Whose link this is; None where it is nobody's or its time is over."""
        self._look()
        if not re.fullmatch(r"[0-9]{1,12}", expires) or int(expires) < time.time() or not signature.isascii():
            return None
        found = None
        for tenant, key in self._keys.items():
            if hmac.compare_digest(self._signature(key, path, int(expires)), signature):
                found = tenant
        return found

    def _signature(self, key: bytes, path: str, expires: int) -> str:
        return hmac.new(key, f"{path} {expires}".encode(), hashlib.sha256).hexdigest()

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _look(self) -> None:
        """Read the file again where it changed. One that stays unreadable lets nobody in."""
        if (state := self._state()) == self._seen and self._bad_since is None:
            return
        try:
            self._entries, self._keys = _read(self.path)
            self._seen, self._bad_since = state, None
            log.info("%d tokens were read from %s", len(self._entries), self.path)
        except BadRequest as error:
            now = time.monotonic()
            if self._bad_since is None:
                self._bad_since = now
                log.warning("%s", error)
            elif now - self._bad_since > SETTLE_S and self._entries:
                self._entries, self._keys = [], {}
                log.error("%s: nobody is let in until it can be read", error)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _read(path: Path) -> tuple[list[tuple[bytes, str]], dict[str, bytes]]:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read().decode("ascii")
    except OSError as error:
        raise BadRequest(f"tokens {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadRequest(f"tokens {path}: only ASCII can stand there") from None
    if os.name == "posix" and mode & 0o077:
        raise BadRequest(f"tokens {path} is open to others (mode {mode:04o}): chmod 600 {path}")
    entries: list[tuple[bytes, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        # the line is not quoted: it holds a secret
        if len(words) != 2 or not TOKEN.fullmatch(words[0]) or not TENANT.fullmatch(words[1]):
            raise BadRequest(f"tokens {path}, line {number}: TOKEN TENANT, the token of 16 to 200 characters")
        if any(known == _digest(words[0]) for known, _ in entries):
            raise BadRequest(f"tokens {path}, line {number}: this token stands there twice")
        entries.append((_digest(words[0]), words[1]))
    if not entries:
        raise BadRequest(f"tokens {path}: there is no token in it")
    keys = {
        tenant: hashlib.sha256(b"link" + b"".join(d for d, t in entries if t == tenant)).digest()
        for _, tenant in entries
    }
    return entries, keys


def parse_address(address: str) -> tuple[str, int]:
    """ "127.0.0.1:8000" or "[::1]:8000" to host and port. BadRequest on anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise BadRequest(f"HTTP address {address!r} is not HOST:PORT; say e.g. 127.0.0.1:8000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_address(address: str, tokens: bool) -> None:
    """Without tokens HTTP is for this machine only. BadRequest where the address is another's."""
    host, _ = parse_address(address)
    if not tokens and not is_loopback(host):
        raise BadRequest(f"HTTP on {address} needs tokens (`gateway.tokens`); without them it binds to 127.0.0.1 only")


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine and nothing else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        return all(ipaddress.ip_address(each[4][0]).is_loopback for each in socket.getaddrinfo(host, None))
    except (OSError, UnicodeError, ValueError):
        return False
