"""Whatever comes over HTTP: an answer in OpenAI's shape, never a 500, and the server answers the next one."""

import contextlib
import json
import logging
import socket

import httpx
import pytest
from http_service import PROMPT, Service
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nodes.gateway.http_models import FIELDS, PREFERENCES

FINE = (200, 202, 400, 404, 409, 413, 415, 429, 504)
PROGRAM = "mini-sd3/large:4:0-2/small:4:2-4/match=direct/codec=fp16/guidance=3,3/conditioning=encode"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
small = st.integers(-2, 300)
likely = {
    "model": st.sampled_from(["mini-sd3", "mini-sdxl", "auto", "gpt-image-1"]),
    "n": st.integers(0, 20), "seed": st.integers(-1, 2**64),
    "size": st.sampled_from(["auto", "64x64", "96x32", "0x64", "99999x1", "64X64"]) | st.text(max_size=8),
    "steps": small, "handoff": small, "small_steps": small, "partial_images": st.integers(-1, 4),
    "quality": st.sampled_from([*PREFERENCES, "best"]), "mode": st.sampled_from(["full-cloud", "relay", "edge-only", "cloud"]),
    "program": st.sampled_from([PROGRAM, PROGRAM.replace("4:2-4", "9:2-4"), "/", "mini-sd3/" + "/" * 900]),
    "guidance": st.floats() | st.integers(-1, 101), "preference": st.floats(0, 1), "deadline_ms": st.integers(-1, 60),
    "stream": st.booleans(), "response_format": st.sampled_from(["url", "b64_json"]), "negative_prompt": st.text(max_size=10),
    "allow_degraded": st.booleans(), "device": st.text(max_size=5), "background": st.sampled_from(["opaque", "transparent"]),
}  # fmt: skip
fields = st.sampled_from(sorted({*FIELDS, "sampler"}))
junk = st.dictionaries(fields | st.text(max_size=10), anything, max_size=4)
prompts = st.sampled_from([PROMPT, PROMPT, "a green star and a blue circle", "a dog", " ", "x" * 2001]) | texts
plausible = st.lists(st.sampled_from(sorted(likely)), unique=True, max_size=4).flatmap(
    lambda names: st.fixed_dictionaries({"prompt": prompts, **{name: likely[name] for name in names}})
)
bodies = st.builds(lambda good, bad: {**good, **bad}, plausible, st.just({}) | junk) | junk


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    running = Service(tmp_path_factory.mktemp("fuzz"), compute=False)
    yield running
    assert running.dispatcher.counters["errors"] == 0
    running.close()


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=service.listen(), timeout=20) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_logged_as_an_error(caplog):
    yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def check(answer):
    assert answer.status_code in FINE, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        assert error["message"]
        assert len(error["message"]) < 3000


def encoded(body):
    """As a client that checks nothing would: NaN and half surrogates included."""
    return json.dumps(body).encode()


@settings(max_examples=150)
@given(body=bodies)
@example(body={"prompt": PROMPT, "n": 10**400})
@example(body={"prompt": "a red heart\x00"})
@example(body={"prompt": PROMPT, "program": PROGRAM.replace("4", "٤")})
@example(body={"prompt": PROMPT, "guidance": 1e308})
@example(body={"prompt": PROMPT, "n": 16, "seed": 2**63 - 1 - 16})
def test_any_body_of_a_job(http, body):
    answer = http.post("/v1/jobs", content=encoded(body), headers={"Content-Type": "application/json"})
    check(answer)
    if answer.status_code == 202:
        for job in answer.json()["jobs"]:
            assert http.delete(f"/v1/jobs/{job['id']}").json()["stage"] in ("cancelled", "failed")


@settings(max_examples=40)
@given(body=bodies, deadline=st.integers(1, 20))
def test_any_body_that_is_waited_for(http, body, deadline):
    body = {**body, "deadline_ms": deadline}
    check(http.post("/v1/images/generations", content=encoded(body), headers={"Content-Type": "application/json"}))


@settings(max_examples=40)
@given(content=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", "application/json;x"]))
def test_any_bytes(http, content, kind):
    check(http.post("/v1/jobs", content=content, headers={"Content-Type": kind}))


@settings(max_examples=80)
@given(
    method=st.sampled_from(["GET", "DELETE", "POST", "PUT", "HEAD", "OPTIONS"]),
    base=st.sampled_from(["/v1/jobs/", "/v1/models/", "/v1/", "/", "/v1/jobs/x/"]),
    rest=texts, query=st.dictionaries(st.sampled_from(["limit", "after", "format", "signature"]) | texts, texts, max_size=2),
)  # fmt: skip
def test_any_path_and_query(http, method, base, rest, query):
    from urllib.parse import quote

    answer = http.request(method, base + quote(rest), params=query)
    assert answer.status_code < 500
    assert answer.status_code != 422
    if answer.status_code >= 400 and method != "HEAD":
        assert answer.json()["error"]["message"]


STARTS = [b"GET /v1/jobs HTTP/1.1", b"POST /v1/jobs HTTP/1.1", b"GET /\xff HTTP/1.1", b"PRI * HTTP/2.0"]
HEADERS = [b"Host", b"Content-Length", b"Transfer-Encoding", b"Idempotency-Key", b"Authorization", b"Upgrade"]
header_bytes = st.binary(max_size=60)


@settings(max_examples=40)
@given(
    start=st.sampled_from(STARTS) | header_bytes, name=st.sampled_from(HEADERS), value=header_bytes, body=st.binary(max_size=50)
)  # fmt: skip
def test_any_bytes_on_the_socket(http, start, name, value, body):
    where = (http.base_url.host, http.base_url.port)
    with socket.create_connection(where, timeout=5) as raw, contextlib.suppress(ConnectionError):
        raw.sendall(start + b"\r\nHost: localhost\r\nConnection: close\r\n" + name + b": " + value + b"\r\n\r\n" + body)
        raw.shutdown(socket.SHUT_WR)
        assert not raw.recv(1000).startswith(b"HTTP/1.1 5")
    assert http.get("/healthz").status_code == 200
