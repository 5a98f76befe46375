"""What HTTP refuses, who may ask, and what operators see."""

import logging
import socket

import httpx
import pytest
from http_asked import ACME, OTHER, QUICK, bearer, error_of, pixels, wait_for
from http_service import PROMPT, free_port

from nodes.deployment import GatewayConfig
from nodes.gateway.http import make_app
from nodes.gateway.http_models import FIELDS
from nodes.gateway.tokens import check_address
from relay.errors import BadRequest

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
