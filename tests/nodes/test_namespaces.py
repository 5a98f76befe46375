"""The two hosts that other tests stand on: they reach each other, at the rate they were given, and leave nothing behind."""

import signal
import subprocess
import sys
import time

import pytest
from namespaces import PREFIX, two_hosts, unavailable

SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
    with peer, peer.makefile("rwb") as stream:
        while line := stream.readline():
            stream.write(line if line.strip().isalpha() else bytes(int(line)))
            stream.flush()
"""
CLIENT = """
import socket, sys, time
address, port, local, size = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with socket.create_connection((address, port), timeout=10, source_address=(local, 0)) as peer, peer.makefile("rwb") as s:
    for _ in range(20):
        s.write(b"ping\\n"); s.flush()
        assert s.readline() == b"ping\\n"
    began = time.monotonic()
    s.write(b"%d\\n" % size); s.flush()
    assert len(s.read(size)) == size
    print(time.monotonic() - began)
"""


@pytest.fixture(params=["namespaces", "loopback"])
def hosts(request):
    if request.param == "namespaces" and unavailable():
        pytest.skip(unavailable())
    with two_hosts("40mbit", namespaces=request.param == "namespaces") as pair:
        yield pair


def test_two_processes_play_ping_pong_between_two_hosts(hosts):
    a, b = hosts
    server = subprocess.Popen(a.argv([sys.executable, "-c", SERVER, a.address]), stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        argv = b.argv([sys.executable, "-c", CLIENT, a.address, port, b.address, "1000000"])
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        if a.namespace:  # 8 Mbit less the burst at 40 Mbit/s
            assert 0.15 < float(done.stdout) < 1.0
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.communicate()


@pytest.mark.skipif(bool(unavailable()), reason=str(unavailable()))
def test_a_namespace_is_cut_off_from_the_machine_and_takes_its_processes_with_it():
    with two_hosts() as (a, b):
        reach = "import socket, sys; socket.create_connection((sys.argv[1], 9), timeout=0.5)"
        own = subprocess.run([sys.executable, "-c", reach, a.address], capture_output=True, text=True, check=False)
        assert "ConnectionRefusedError" not in own.stderr  # nothing of the machine's own reaches it
        crossed = subprocess.run(
            b.argv([sys.executable, "-c", reach, a.address]), capture_output=True, text=True, check=False
        )
        assert "ConnectionRefusedError" in crossed.stderr  # the other host does, and nobody listens
        left = subprocess.Popen(a.argv(["sleep", "600"]))
        time.sleep(0.1)
    assert left.wait(5) == -signal.SIGKILL
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert a.namespace not in listed
    assert b.namespace not in listed


@pytest.mark.skipif(bool(unavailable()), reason=str(unavailable()))
def test_what_a_killed_process_left_is_removed_by_the_next():
    dead = subprocess.Popen(["true"])
    dead.wait()
    subprocess.run(["ip", "netns", "add", f"{PREFIX}-{dead.pid}-a"], check=True)
    with two_hosts():
        pass
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"{PREFIX}-{dead.pid}-" not in listed
