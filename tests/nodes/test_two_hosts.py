"""docs/two-hosts.md as written: keys, two YAMLs, two commands, between two namespaces or else two loopback addresses."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from namespaces import two_hosts, unavailable
from PIL import Image

from nodes.images import read_parameters
from nodes.tether import tethered
from relay.pipeline import RelayPipeline

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "configs" / "deployments" / "two-hosts"
RELAY = [sys.executable, "-m", "nodes.cli"]
PROMPT = "a red heart at the top left"


def keygen(folder, name, role):
    subprocess.run(
        [*RELAY, "keygen", name, "--role", role, "--out", "keys"], cwd=folder, check=True, capture_output=True
    )


def run(host, folder, *words, timeout=120):
    return subprocess.run(
        host.argv([*RELAY, *words]), cwd=folder, capture_output=True, text=True, timeout=timeout, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def hosts():
    with two_hosts("20mbit", namespaces=unavailable() is None) as pair:
        yield pair


@pytest.fixture(scope="module")
def deployed(hosts, tmp_path_factory):
    """Both hosts' processes, and each host's folder."""
    server_host, device_host = hosts
    root = tmp_path_factory.mktemp("two-hosts")
    server, device = root / "server", root / "device"
    for folder, name in ((server, "server.yaml"), (device, "device.yaml")):
        folder.mkdir()
        text = (SHIPPED / name).read_text().replace("192.0.2.10", server_host.address)
        if not server_host.namespace:
            text = text.replace("0.0.0.0", server_host.address)
        (folder / name).write_text(text.replace("http: 127.0.0.1:8000", "http: null"))
    for name, role in (("gateway", "gateway"), ("edge", "edge"), ("client", "client"), ("judge", "judge")):
        keygen(server, name, role)
    keygen(device, "phone", "device")
    shutil.copy(device / "keys" / "phone.pub", server / "keys")
    shutil.copy(server / "keys" / "gateway.pub", device / "keys")
    commands = (
        (server_host, server, ["up", "server.yaml"]),
        (device_host, device, ["device", "--config", "device.yaml"]),
    )
    processes = [
        subprocess.Popen(
            tethered(host.argv([*RELAY, *words])), cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=(folder / "log.txt").open("w"), stderr=subprocess.STDOUT, process_group=0,
        )
        for host, folder, words in commands
    ]  # fmt: skip
    keys = ("--key", "keys/client.key", "--gateway-key", "keys/gateway.pub")
    where = ("--gateway", f"tcp://{server_host.address}:5600", *keys)
    ends, said = time.monotonic() + 150, ""
    while time.monotonic() < ends:
        done = run(server_host, server, "status", "--json", *where)
        said = done.stderr
        if done.returncode == 0 and {n["name"] for n in json.loads(done.stdout)["nodes"] if n["state"] == "ready"} == {
            "edge",
            "phone",
        }:
            break
        time.sleep(0.5)
    else:
        raise AssertionError(said + (server / "log.txt").read_text()[-3000:] + (device / "log.txt").read_text()[-3000:])
    yield server, device, where
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait(timeout=60)


@pytest.mark.parametrize("family", ["mini-sd3", "mini-sdxl"])
def test_both_embedded_families_cross_from_host_to_host(hosts, deployed, family):
    server, _, where = deployed
    done = run(
        hosts[0],
        server,
        "submit",
        PROMPT,
        "--family",
        family,
        "--mode",
        "relay",
        "--steps",
        "8",
        "--seed",
        "3",
        "--out",
        family,
        *where,
    )
    assert done.returncode == 0, done.stderr
    assert "on edge, phone" in done.stdout
    file = next((server / family).glob("*.png"))
    said = read_parameters(file)
    alone = RelayPipeline.from_pretrained(family)(PROMPT, program=said["program"], seed=3).images[0]
    assert (
        np.abs(np.asarray(alone).astype(int) - np.asarray(Image.open(io.BytesIO(file.read_bytes()))).astype(int)).max()
        <= 1
    )


def test_the_devices_own_user_asks_the_device_and_the_picture_stays_there(hosts, deployed):
    server, device, _ = deployed
    done = run(
        hosts[1],
        device,
        "submit",
        PROMPT,
        "--gateway",
        "tcp://127.0.0.1:5700",
        "--seed",
        "4",
        "--steps",
        "8",
        "--mode",
        "relay",
    )
    assert done.returncode == 0, done.stderr
    assert list((device / "out").glob("*.png"))
    assert not list((server / "store" / "images").glob("*-4.png"))


def test_doctor_reaches_the_gateway_from_the_device(hosts, deployed):
    _, device, _ = deployed
    done = run(
        hosts[1], device, "doctor", "--peer", f"tcp://{hosts[0].address}:5600", "--key", "keys/phone.key",
        "--peer-key", "keys/gateway.pub",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "round trip" in done.stdout
