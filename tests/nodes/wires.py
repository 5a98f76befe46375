"""Servers and clients over real sockets on loopback, with real keys, for the tests of the transport."""

import asyncio
import contextlib
import functools
import shutil

import zmq
import zmq.asyncio

from nodes.keys import AllowList, load_public, load_secret, write_keys
from nodes.messages import Heartbeat, Latent
from nodes.transport import CONTROL, Client, Server

ANY = "tcp://127.0.0.1:*"
LIMIT_S = 10.0  # nothing here takes long unless it hangs


def in_loop(test):
    """Run a coroutine test; what hangs fails."""

    @functools.wraps(test)
    def run(*given, **named):
        asyncio.run(asyncio.wait_for(test(*given, **named), 2 * LIMIT_S))

    return run


class Keys:
    """Keys in a folder, and those of them that are listed in another."""

    def __init__(self, folder):
        self.all, self.listed = folder / "all", folder / "listed"
        self.listed.mkdir()

    def make(self, name, role, listed=True):
        write_keys(name, role, self.all)
        if listed:
            self.list(name)
        return load_secret(self.all / f"{name}.key")

    def list(self, name):
        shutil.copy(self.all / f"{name}.pub", self.listed)

    def revoke(self, name):
        (self.listed / f"{name}.pub").unlink()

    def public(self, name):
        return load_public(self.all / f"{name}.pub")

    def server(self, lane=CONTROL, name="gw", role="gateway", address=ANY):
        if not (self.all / f"{name}.key").exists():
            self.make(name, role)
        return Server(address, lane, load_secret(self.all / f"{name}.key"), AllowList(self.listed))

    def client(self, server, name, role="edge", listed=True):
        path = self.all / f"{name}.key"
        me = load_secret(path) if path.exists() else self.make(name, role, listed)
        return Client(server.address, server.lane, me, self.public(server.me.name))


def beat(sequence=0):
    return Heartbeat(sequence=sequence, doing="idle", running=0, queued=0, steps_done=0, idle_s=0.0)


def latent(job="j", leg=1):
    return Latent(job=job, attempt=0, leg=leg)


async def answer(client, kind):
    message, _ = await client.receive(LIMIT_S)
    assert isinstance(message, kind), message
    return message


async def eventually(condition):
    while not condition():
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def raw_dealer(address, me=None, server=None, routing_id=None):
    """A peer that keeps to no rule of ours; with keys, or in plain text."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    if routing_id:
        socket.routing_id = routing_id
    if me is not None and me.secret:
        socket.curve_serverkey = server.public.encode()
        socket.curve_publickey, socket.curve_secretkey = me.public.encode(), me.secret.encode()
    else:
        socket.plain_username, socket.plain_password = f"{me.role}/{me.name}".encode(), b"none"
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


class While:
    """Receives from a client while its server is served, too."""

    def __init__(self, server, client):
        self.server, self.client = server, client

    async def receive(self, timeout_s):
        served = asyncio.create_task(self.server.receive())
        try:
            return await self.client.receive(timeout_s)
        finally:
            served.cancel()
