"""Pictures over HTTP: OpenAI's own client unchanged, jobs and tenants, clients that leave and servers that stop."""

import base64
import contextlib
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from http_asked import ACME, ACME_TWO, OTHER, QUICK, SLOW, bearer, error_of, events_of, pixels, submit, wait_for
from http_service import HANGS, PROMPT

from nodes.gateway import api

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
