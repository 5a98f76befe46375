"""The gateway over HTTP: OpenAI's own client unchanged, jobs and tenants, and what is refused."""

import base64
import contextlib
import io
import json
import logging
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from http_service import HANGS, PROMPT, Service, free_port
from PIL import Image

from nodes.deployment import GatewayConfig
from nodes.gateway import api
from nodes.gateway.http import make_app
from nodes.gateway.http_models import FIELDS
from nodes.gateway.tokens import check_address
from relay.errors import BadRequest

ACME, ACME_TWO, OTHER = "a" * 32, "b" * 32, "c" * 32
QUICK = {"model": "mini-sd3", "steps": 2, "handoff": 1}
SLOW = {"model": "mini-sd3", "mode": "full-cloud", "steps": 200}  # a second or more


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    running = Service(tmp_path_factory.mktemp("http"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def url(service):
    return service.listen()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.touch(mode=0o600)
    path.write_text(f"# who may ask\n{ACME} acme\n{ACME_TWO} acme\n\n{OTHER}   other\n")
    return path


@pytest.fixture(scope="module")
def guarded(service, tokens):
    return service.listen(tokens=str(tokens))


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=30) as made:
        yield made


@pytest.fixture(scope="module")
def secret(guarded):
    with httpx.Client(base_url=guarded, timeout=30) as made:
        yield made


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


# --- OpenAI's client ---


def test_openai_client_gets_pictures_that_can_be_made_again(service, client):
    answer = client.images.generate(
        prompt=PROMPT, n=2, size="64x64", quality="high", model="mini-sd3",
        extra_body={"seed": 7, "steps": 4, "handoff": 2, "guidance": 2.5},
    )  # fmt: skip
    assert (answer.size, answer.quality, answer.output_format) == ("64x64", "high", "png")
    first, second = answer.data
    assert [each.relay["seed"] for each in answer.data] == [7, 8]
    assert first.relay["steps"] == {"large": 2, "small": 2}
    assert first.relay["degraded"] is False
    assert first.relay["nodes"] == ["edge-1", "edge-1"]
    assert first.relay["timings"]["edge-1"]["denoising"] > 0
    again = client.images.generate(
        prompt=PROMPT, extra_body={"seed": second.relay["seed"], "program": second.relay["program"]}
    )
    made = pixels(base64.b64decode(second.b64_json))
    assert made.shape == (64, 64, 3)
    assert np.abs(pixels(base64.b64decode(again.data[0].b64_json)).astype(int) - made).max() <= 1  # its batch differed


def test_openai_client_streams_partial_images_and_the_picture(client):
    seen = list(client.images.generate(prompt=PROMPT, model="mini-sd3", stream=True, partial_images=2, n=2))
    partial = [each for each in seen if each.type == "image_generation.partial_image"]
    completed = [each for each in seen if each.type == "image_generation.completed"]
    assert sorted(each.relay["number"] for each in completed) == [0, 1]
    assert {(each.relay["number"], each.partial_image_index) for each in partial} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all(pixels(base64.b64decode(each.b64_json)).shape == (64, 64, 3) for each in seen)
    assert all(each.size == "64x64" for each in seen)


def test_openai_client_lists_models(client):
    assert [each.id for each in client.models.list()] == ["mini-sd3", "mini-sdxl", "auto"]
    one = client.models.retrieve("mini-sd3")
    assert one.relay["members"]["large"]["steps"] == 28
    assert one.relay["programs"][0].startswith("mini-sd3/large:4:0-2/small:4:2-4/")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"size": "64"}, "size"),
        ({"size": "9999x9999"}, "size"),
        ({"size": "63x64"}, None),
        ({"quality": "splendid"}, "quality"),
        ({"response_format": "jpeg"}, "response_format"),
        ({"partial_images": 2}, "partial_images"),
        ({"quality": "high", "preference": 1.0}, "preference"),
        ({"seed": -1}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"steps": 201}, "steps"),
        ({"steps": 10, "handoff": 11}, None),
        ({"mode": "cloud"}, "mode"),
        ({"mode": "edge-only", "handoff": 3}, None),
        ({"program": "mini-sd3/nonsense"}, None),
        ({"guidance": -1}, "guidance"),
        ({"guidance": 1.0, "negative_prompt": "a blue star"}, None),
        ({"allow_degraded": "yes"}, "allow_degraded"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"device": "tablet"}, "device"),
        ({"device": "edge-1"}, "device"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "webp"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"moderation": "low"}, "moderation"),
        ({"style": "vivid"}, "style"),
        ({"sampler": "ddim"}, "sampler"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, None),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"prompt": "a dog"}, None),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, body, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, extra_body=body)
    assert refused.value.param == param
    assert refused.value.body["message"]


def test_fields_of_openai_that_say_what_happens_anyway_are_taken(client):
    neutral = {
        "background": "opaque", "output_format": "png", "output_compression": 100, "moderation": "auto", "style": None,
        "user": "someone", "size": "auto", "quality": "auto", "response_format": "b64_json", "stream": False,
    }  # fmt: skip
    assert client.images.generate(prompt=PROMPT, model="auto", extra_body=neutral).data[0].b64_json


def test_openai_client_reads_errors(client, guarded, service):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt=PROMPT, model="gpt-image-1")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    stranger = openai.OpenAI(base_url=f"{guarded}/v1", api_key="d" * 32, max_retries=0)
    with pytest.raises(openai.AuthenticationError) as wrong:
        stranger.models.list()
    assert wrong.value.code == "invalid_api_key"
    mine = openai.OpenAI(base_url=f"{guarded}/v1", api_key=ACME, max_retries=0)
    assert mine.models.list().data
    with pytest.raises(openai.APIStatusError) as late:
        client.images.generate(prompt=PROMPT, extra_body={**HANGS, "deadline_ms": 100})
    assert (late.value.status_code, late.value.code) == (504, "deadline_passed")
    assert late.value.response.headers["x-should-retry"] == "false"
    assert late.value.response.headers["x-request-id"].startswith("http-")
    with pytest.raises(openai.APIError, match="deadline"):
        list(client.images.generate(prompt=PROMPT, stream=True, extra_body={**HANGS, "deadline_ms": 100}))


def test_full_queue_is_a_rate_limit_with_a_time(client, http, service):
    held = submit(http, **HANGS, n=16, steps=None, handoff=None)["jobs"]
    with pytest.raises(openai.RateLimitError) as full:
        client.images.generate(prompt=PROMPT, n=16)
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) >= 1
    assert [http.delete(f"/v1/jobs/{job['id']}").json()["stage"] for job in held] == ["cancelled"] * 16


# --- jobs ---


def test_job_from_acceptance_to_picture(http):
    said = submit(http, n=2, seed=5, partial_images=1)
    assert said["object"] == "image.request"
    first, second = (job["id"] for job in said["jobs"])
    with http.stream("GET", f"/v1/jobs/{second}/events") as stream:
        seen = list(events_of(stream.iter_lines()))
    assert seen[-1][0] == "end"
    assert {name for name, _ in seen} <= {"stage", "step", "preview", "end"}
    told = seen[-1][1]
    assert told == http.get(f"/v1/jobs/{second}").json()
    assert (told["stage"], told["seed"], told["number"], told["error"]) == ("done", 6, 1, None)
    assert told["report"]["steps"] == {"large": 1, "small": 1}
    assert list(events_of(http.get(f"/v1/jobs/{second}/events").text.splitlines())) == [("end", told)]
    image = http.get(told["image"])
    assert image.headers["content-type"] == "image/png"
    assert pixels(image.content).shape == (64, 64, 3)
    assert wait_for(lambda: http.get(f"/v1/jobs/{first}").json()["stage"] == "done")
    rows = http.get(f"/v1/jobs/{second}/trace").json()["data"]
    assert [row["what"] for row in rows if row["node"] == "gateway"] == ["accepted", "placed", "done"]
    assert {row["left"] for row in rows if row["node"] == "edge-1"} >= {"encoding", "denoising", "decoding"}
    drawn = http.get(f"/v1/jobs/{second}/trace", params={"format": "chrome"}).json()["traceEvents"]
    slices = [each for each in drawn if each["ph"] == "X"]
    assert {"denoising", "decoding"} <= {each["name"] for each in slices}
    assert all(each["ts"] >= 0 and each["dur"] >= 0 for each in slices)


def test_own_jobs_are_listed_newest_first_in_pages(http):
    ids = [job["id"] for _ in range(2) for job in submit(http, n=2)["jobs"]][::-1]
    page = http.get("/v1/jobs", params={"limit": 3}).json()
    assert [job["id"] for job in page["data"]] == ids[:3]
    assert page["has_more"] is True
    rest = http.get("/v1/jobs", params={"limit": 1, "after": ids[2]}).json()
    assert [job["id"] for job in rest["data"]] == ids[3:]


def test_job_is_cancelled(http, service):
    job = submit(http, **HANGS, steps=None, handoff=None)["jobs"][0]["id"]
    wait_for(lambda: http.get(f"/v1/jobs/{job}").json()["stage"] == "placed")
    assert error_of(http.get(f"/v1/jobs/{job}/image"), 409)["code"] == "not_done"
    assert http.delete(f"/v1/jobs/{job}").json()["stage"] == "cancelled"
    assert job in service.cancelled
    told = http.delete(f"/v1/jobs/{job}").json()
    assert (told["stage"], told["error"]["code"]) == ("cancelled", "cancelled")
    assert error_of(http.get(f"/v1/jobs/{job}/image"), 410)["code"] == "no_image"


def test_jobs_of_others_do_not_exist(secret):
    job = submit(secret, bearer(ACME))["jobs"][0]["id"]
    wait_for(lambda: secret.get(f"/v1/jobs/{job}", headers=bearer(ACME)).json()["stage"] == "done")
    for path in ("", "/image", "/events", "/trace"):
        theirs = secret.get(f"/v1/jobs/{job}{path}", headers=bearer(OTHER))
        nobodys = secret.get(f"/v1/jobs/job-none{path}", headers=bearer(OTHER))
        assert error_of(theirs, 404)["message"].replace(job, "job-none") == error_of(nobodys, 404)["message"]
        assert secret.get(f"/v1/jobs/{job}{path}", headers=bearer(ACME_TWO)).status_code == 200
    assert secret.delete(f"/v1/jobs/{job}", headers=bearer(OTHER)).status_code == 404
    assert secret.get("/v1/jobs", headers=bearer(OTHER)).json()["data"] == []
    assert secret.get("/v1/jobs", headers=bearer(OTHER), params={"after": job}).json()["data"] == []


def test_idempotency_key_does_a_request_once(http, client):
    key = {"Idempotency-Key": "order-1"}
    first, again = submit(http, key, seed=1), submit(http, key, seed=1)
    assert [job["id"] for job in first["jobs"]] == [job["id"] for job in again["jobs"]]
    assert error_of(http.post("/v1/jobs", json={"prompt": PROMPT, "seed": 2}, headers=key), 409)
    with pytest.raises(openai.ConflictError) as other:
        client.images.generate(prompt=PROMPT, extra_headers=key, extra_body={"seed": 3})
    assert other.value.code == "idempotency_conflict"
    picture = client.images.generate(prompt=PROMPT, extra_headers=key, extra_body={**QUICK, "seed": 1})
    assert picture.data[0].relay["job"] == first["jobs"][0]["id"]
    assert error_of(http.post("/v1/jobs", json={"prompt": PROMPT}, headers={"Idempotency-Key": "x" * 256}), 400)


# --- clients that go away, servers that stop ---


@pytest.mark.parametrize(("key", "stage"), [({}, "cancelled"), ({"Idempotency-Key": "later"}, "placed")])
@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_cancels_what_nobody_could_fetch(http, url, key, stage, stream):
    key = {name: f"{value}-{stream}" for name, value in key.items()}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{url}/v1/images/generations", json={"prompt": PROMPT, **HANGS, "stream": stream}, headers=key, timeout=0.4
        )
    job = http.get("/v1/jobs", params={"limit": 1}).json()["data"][0]
    assert wait_for(lambda: http.get(f"/v1/jobs/{job['id']}").json()["stage"] == stage)
    http.delete(f"/v1/jobs/{job['id']}")


def test_running_job_goes_on_when_its_watcher_leaves(http, url):
    job = submit(http, **SLOW, handoff=None)["jobs"][0]["id"]
    with httpx.stream("GET", f"{url}/v1/jobs/{job}/events") as stream:
        next(stream.iter_lines())
    assert http.get(f"/v1/jobs/{job}").json()["stage"] in ("placed", "denoising")
    assert http.delete(f"/v1/jobs/{job}").json()["stage"] == "cancelled"


def test_server_that_stops_ends_streams_with_a_word_and_keeps_the_jobs(service, http):
    address = service.listen()
    job = submit(http, **HANGS, steps=None, handoff=None)["jobs"][0]["id"]
    seen: list = []

    def look():
        with httpx.stream("GET", f"{address}/v1/jobs/{job}/events", timeout=20) as stream:
            seen.extend(events_of(stream.iter_lines()))

    def ask():
        seen.append(httpx.post(f"{address}/v1/images/generations", json={"prompt": PROMPT, **HANGS}, timeout=20))

    watching, asking = threading.Thread(target=look), threading.Thread(target=ask)
    watching.start(), asking.start()
    wait_for(lambda: len(service.dispatcher.jobs) == 2 and service.dispatcher.jobs[job].watchers)
    began = time.monotonic()
    service.hang_up(address)
    watching.join(5), asking.join(5)
    assert time.monotonic() - began < 3
    answer = next(each for each in seen if isinstance(each, httpx.Response))
    assert error_of(answer, 503)["code"] == "stopping"
    assert next(data for name, data in (each for each in seen if isinstance(each, tuple)) if name == "error")
    assert len(service.dispatcher.jobs) == 2
    for each in list(service.dispatcher.jobs):
        http.delete(f"/v1/jobs/{each}")


def test_streams_of_one_tenant_are_limited(http, url, monkeypatch):
    monkeypatch.setattr(api, "MAX_STREAMS", 2)
    job = submit(http, **HANGS, steps=None, handoff=None)["jobs"][0]["id"]
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(httpx.stream("GET", f"{url}/v1/jobs/{job}/events"))
        assert error_of(http.get(f"/v1/jobs/{job}/events"), 429)["code"] == "too_many_streams"
    http.delete(f"/v1/jobs/{job}")
    assert wait_for(lambda: http.get(f"/v1/jobs/{job}/events").status_code == 200)


# --- bodies ---


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'{"prompt": "a red heart", "guidance": NaN}', 400, "invalid_json"),
        (b'{"prompt": "a red heart", "seed": 1, "seed": 2}', 400, "invalid_json"),
        (b'{"prompt": "a \\ud800 heart"}', 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b" " * ((1 << 20) + 1), 413, "request_too_large"),
    ],
)
def test_bodies_that_are_no_request(http, content, status, code):
    headers = {"Content-Type": "application/json"}
    assert error_of(http.post("/v1/images/generations", content=content, headers=headers), status)["code"] == code


def test_long_body_is_refused_before_it_is_read(http, url):
    chunks = (b" " * 65536 for _ in range(1000))
    sent = http.post("/v1/jobs", content=chunks, headers={"Content-Type": "application/json"})
    assert error_of(sent, 413)
    assert sum(1 for _ in chunks) > 500  # most was never sent
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        head = f"POST /v1/jobs HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 9000000000\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 413")


def test_form_posts_and_unknown_queries_are_refused(http):
    assert error_of(http.post("/v1/jobs", data={"prompt": PROMPT}), 415)
    assert error_of(http.post("/v1/jobs", params={"seed": 1}, json={"prompt": PROMPT}), 400)["param"] == "seed"
    assert error_of(http.get("/v1/jobs", params={"limit": "many"}), 400)["param"] == "limit"
    assert error_of(http.get("/nowhere"), 404)
    assert error_of(http.put("/v1/jobs"), 405)


# --- who may ask ---


def test_without_tokens_http_is_for_this_machine_only(http, service):
    for host in ("evil.example", "evil.example:80", "192.0.2.1", ""):
        assert error_of(http.get("/v1/models", headers={"Host": host}), 403)["code"] == "foreign_host"
    for host in ("localhost:1", "127.0.0.1", "[::1]:8000"):
        assert http.get("/v1/models", headers={"Host": host}).status_code == 200
    with pytest.raises(BadRequest, match="needs tokens"):
        make_app(service.dispatcher, GatewayConfig(http="0.0.0.0:8000"), dict)
    check_address("0.0.0.0:8000", tokens=True)
    for address in ("8000", "localhost", "127.0.0.1:99999", ":80"):
        with pytest.raises(BadRequest, match="HOST:PORT"):
            check_address(address, tokens=True)


def test_token_opens_what_is_its_tenants(secret):
    assert error_of(secret.get("/v1/models"), 401)["code"] == "no_token"
    assert secret.get("/v1/models").headers["www-authenticate"] == "Bearer"
    for path in ("/v1/jobs", "/metrics", "/status"):
        assert error_of(secret.get(path, headers=bearer("nobody")), 401)
        assert secret.get(path, headers=bearer(ACME)).status_code == 200
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert secret.get(path).status_code == 200
    assert secret.get("/v1/models", headers={"Authorization": f"Basic {ACME}"}).status_code == 401


def test_picture_address_works_without_a_token_until_it_is_over(secret):
    body = {"prompt": PROMPT, **QUICK, "response_format": "url"}
    address = secret.post("/v1/images/generations", json=body, headers=bearer(ACME)).json()["data"][0]["url"]
    assert pixels(httpx.get(address).content).shape == (64, 64, 3)
    path, _, query = address.partition("?")
    expires = int(query.partition("&")[0].removeprefix("expires="))
    for wrong in (path, f"{path}?{query}0", address.replace(str(expires), str(expires + 1)), f"{path}?signature=é"):
        assert error_of(httpx.get(wrong), 401)
    assert error_of(httpx.get(address.replace("/image?", "/trace?")), 401)


def test_tokens_file_is_followed_and_revoking_counts_at_once(service, tmp_path):
    path = tmp_path / "tokens"
    path.touch(mode=0o600)
    path.write_text(f"{ACME} acme\n{OTHER} other\n")
    address = service.listen(tokens=str(path))
    ask = {
        token: (lambda t=token: httpx.get(f"{address}/v1/jobs", headers=bearer(t)).status_code)
        for token in (ACME, OTHER)
    }
    assert (ask[ACME](), ask[OTHER]()) == (200, 200)
    path.write_text(f"{OTHER} other\n")
    assert (ask[ACME](), ask[OTHER]()) == (401, 200)
    service.hang_up(address)


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("short acme\n", 0o600, "line 1"),
        (f"{ACME}\n", 0o600, "line 1"),
        (f"{ACME} acme\n{ACME} other\n", 0o600, "line 2.*twice"),
        (f"{ACME} acme\n", 0o644, "open to others"),
        ("# nobody\n", 0o600, "no token"),
        (f"{ACME} ../x\n", 0o600, "line 1"),
    ],
)
def test_tokens_file_must_be_one(service, tmp_path, text, mode, said):
    path = tmp_path / "tokens"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(BadRequest, match=said) as refused:
        make_app(service.dispatcher, GatewayConfig(tokens=str(path)), dict)
    assert ACME not in str(refused.value)


# --- operators ---


def test_operators_see_readiness_metrics_and_status(http, service):
    assert http.get("/healthz").json() == {"status": "ok"}
    ready = http.get("/readyz")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    client = http.post("/v1/images/generations", json={"prompt": PROMPT, **QUICK})
    assert client.status_code == 200
    text = http.get("/metrics").text
    for line in (
        'relay_jobs_ended_total{end="done"}', 'relay_stage_seconds_count{role="edge",stage="denoising"}',
        'relay_decisions_total{mode="relay",policy="least-finish-time"}', 'relay_nodes{role="device",state="ready"} 1.0',
        'relay_node_queued{node="edge-1"}', "relay_ledger_errors_total 0.0", "relay_answers_degraded_total",
        'relay_http_requests_total{method="POST",route="/v1/images/generations",status="200"}',
        'relay_job_seconds_bucket{end="done",le="300.0"}', 'relay_step_batch_bucket{le="1.0"}',
    ):  # fmt: skip
        assert line in text, line
    assert "relay_step_batch_count 0.0" not in text
    assert "acme" not in text
    assert {node["name"] for node in http.get("/status").json()["nodes"]} == {"edge-1", "phone"}
    service.registry.nodes["edge-1"].leaving = True
    service.registry.nodes["phone"].leaving = True
    unready = http.get("/readyz")
    assert (unready.status_code, unready.json()["ready"]) == (503, False)
    assert unready.json()["programs"][0]["missing"] == ["large", "small"]
    service.registry.nodes["edge-1"].leaving = service.registry.nodes["phone"].leaving = False


def test_every_field_is_described_and_nothing_answers_422(http):
    spec = http.get("/openapi.json").json()
    body = spec["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    assert set(body["schema"]["properties"]) == set(FIELDS)
    assert all(field.get("description") for field in body["schema"]["properties"].values())
    for example in body["examples"].values():
        taken = http.post("/v1/jobs", json={**example["value"], "stream": None})
        assert taken.status_code == 202, example
        for job in taken.json()["jobs"]:
            http.delete(f"/v1/jobs/{job['id']}")
    for path, methods in spec["paths"].items():
        for operation in methods.values():
            assert "422" not in operation["responses"], path
            assert operation["summary"], path
    page = http.get("/docs").text
    assert "Idempotency-Key" in page
    assert "://cdn" not in page


@pytest.mark.parametrize(("policy", "field"), [("on", "prompt"), ("hash", "prompt_sha256"), ("off", None)])
def test_log_has_one_line_a_request_and_prompts_only_as_told(service, caplog, policy, field):
    address = service.listen(prompts_in_logs=policy)
    body = {"prompt": "a green star", **QUICK}
    with caplog.at_level(logging.INFO, logger="relay.http"):
        answer = httpx.post(f"{address}/v1/images/generations", json=body, timeout=20)
        wait_for(lambda: any("generations" in record.message for record in caplog.records))
    (record,) = [each for each in caplog.records if "generations" in each.message]
    assert record.fields["status"] == 200
    assert record.fields["tenant"] == "local"
    assert record.fields["seconds"] > 0
    assert record.fields["job"] == answer.json()["data"][0]["relay"]["job"]
    assert [name for name in record.fields if name.startswith("prompt")] == ([field] if field else [])
    service.hang_up(address)


def test_port_that_is_taken_is_one_clear_line(service):
    from nodes.gateway.http import serve

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        with pytest.raises(BadRequest, match="cannot be served"):
            service.call(
                serve(make_app(service.dispatcher, service.config, dict), f"127.0.0.1:{taken.getsockname()[1]}")
            )
