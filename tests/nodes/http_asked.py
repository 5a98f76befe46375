"""What the tests of the gateway's HTTP ask, and how they read the answers."""

import io
import json
import time

import numpy as np
from http_service import PROMPT
from PIL import Image

ACME, ACME_TWO, OTHER = "a" * 32, "b" * 32, "c" * 32
QUICK = {"model": "mini-sd3", "steps": 2, "handoff": 1}
SLOW = {"model": "mini-sd3", "mode": "full-cloud", "steps": 200}  # a second or more


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def submit(http, headers=None, **body):
    answer = http.post("/v1/jobs", json={"prompt": PROMPT, **QUICK, **body}, headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def events_of(lines):
    """(event, data) of server-sent events."""
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def wait_for(condition, timeout_s=10.0):
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s")


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    said = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= said.keys()
    assert "Traceback" not in said["message"]
    return said
