"""Messages over ZeroMQ: a `Server` is bound and has many peers, a `Client` dials one; both in asyncio.

    lanes.py          control and data: what travels where, bounds, and what ZeroMQ's defaults get wrong
    authenticator.py  lets keys in, and writes into each frame whose it is
    server.py         ROUTER: every message comes with the peer that its connection's key proves
    client.py         DEALER: one connection that is kept up, and says how it stands
    diagnosis.py      why a connection does not come about
    meter.py          round trip and throughput from real traffic, and the time-outs that follow
    complaints.py     refusals, counted and logged without flooding the log

Knows the messages and their senders' roles; what they mean is none of its business, but for `Probe`, which it answers.
"""

from nodes.transport.client import CONNECTED, CONNECTING, REFUSED, UNREACHABLE, Client, State
from nodes.transport.lanes import CONTROL, DATA, Lane, PeerGone, PeerSlow, SendFailed, sent
from nodes.transport.meter import Meter
from nodes.transport.server import Received, Server

__all__ = [
    "CONNECTED",
    "CONNECTING",
    "CONTROL",
    "DATA",
    "REFUSED",
    "UNREACHABLE",
    "Client",
    "Lane",
    "Meter",
    "PeerGone",
    "PeerSlow",
    "Received",
    "SendFailed",
    "Server",
    "State",
    "sent",
]
