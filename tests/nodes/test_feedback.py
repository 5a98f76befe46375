"""`POST /v1/jobs/{id}/feedback`: one rating a job, of whoever asked for it, handed to whoever learns."""

import asyncio

import httpx
import pytest
from http_service import Service

TOKENS = {"acme": "a" * 16, "other": "o" * 16}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A gateway without nodes, whose ledger holds a job of every kind."""
    root = tmp_path_factory.mktemp("feedback")
    running = Service(root / "store", compute=False)
    tokens = root / "tokens"
    tokens.write_text("".join(f"{token} {tenant}\n" for tenant, token in TOKENS.items()))
    tokens.chmod(0o600)
    running.url = running.listen(tokens=str(tokens))
    running.learned = []
    broken = [lambda job, scores: 1 / 0]  # a learner that fails spoils nothing
    running.dispatcher.verdicts.on_scores += [*broken, lambda job, scores: running.learned.append((job, dict(scores)))]

    async def fill():
        ledger = running.dispatcher.ledger
        for job in ("done", "again", "failed", "open"):
            await ledger.accept(f"req-{job}", "acme", None, {"prompt": "p"}, [(job, 1)])
        for job in ("done", "again"):
            await ledger.end(job, "done", report={"seed": 1, "degraded": False}, image=f"images/{job}.png")
        await ledger.end("failed", "failed", error="no node", report={"status": 504, "degraded": False})

    running.call(fill())
    yield running
    running.close()


@pytest.fixture
def http(service):
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {TOKENS['acme']}"}) as client:
        yield client


def test_a_rating_stands_in_the_report_and_is_learned_from(service, http):
    answer = http.post("/v1/jobs/done/feedback", json={"rating": 0.75, "comment": "the heart is blue"})
    assert answer.status_code == 200
    said = answer.json()
    assert (said["object"], said["job"], said["rating"]) == ("image.feedback", "done", 0.75)
    report = http.get("/v1/jobs/done").json()["report"]
    assert report["feedback"] == {"rating": 0.75, "comment": "the heart is blue", "at": said["at"]}
    assert report["seed"] == 1
    assert service.learned == [("done", {"user_rating": 0.75})]


def test_a_second_rating_replaces_the_first_and_the_same_again_changes_nothing(service, http):
    service.learned.clear()
    first = http.post("/v1/jobs/again/feedback", json={"rating": 1}).json()
    assert http.post("/v1/jobs/again/feedback", json={"rating": 1}).json() == first
    assert http.post("/v1/jobs/again/feedback", json={"rating": 0.25}).json()["rating"] == 0.25
    assert http.post("/v1/jobs/again/feedback", json={"rating": 0.25, "comment": "hm"}).status_code == 200
    assert http.get("/v1/jobs/again").json()["report"]["feedback"]["comment"] == "hm"
    assert service.learned == [("again", {"user_rating": 1.0}), ("again", {"user_rating": 0.25})]


def test_many_at_once_leave_one_and_teach_once(service, http):
    service.learned.clear()

    async def burst():
        async with httpx.AsyncClient(base_url=service.url, headers=http.headers) as client:
            asked = [client.post("/v1/jobs/done/feedback", json={"rating": 0.5}) for _ in range(8)]
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert set(asyncio.run(burst())) == {200}
    assert service.learned == [("done", {"user_rating": 0.5})]


@pytest.mark.parametrize(
    ("job", "token", "status", "said"),
    [
        ("done", "other", 404, "there is no job done"),
        ("nothing", "acme", 404, "there is no job nothing"),
        ("open", "acme", 409, "no picture to rate: it is accepted"),
        ("failed", "acme", 409, "no picture to rate: it is failed"),
        ("done", None, 401, "token"),
    ],
)
def test_only_who_asked_rates_and_only_a_picture(service, job, token, status, said):
    service.learned.clear()
    headers = {"Authorization": f"Bearer {TOKENS[token]}"} if token else {}
    answer = httpx.post(f"{service.url}/v1/jobs/{job}/feedback", json={"rating": 0.1}, headers=headers)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert service.learned == []


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ('{"rating": 5}', "rating", "less than or equal to 1"),
        ('{"rating": -0.1}', "rating", "greater than or equal to 0"),
        ('{"rating": "good"}', "rating", "valid number"),
        ('{"rating": true}', "rating", "valid number"),
        ('{"rating": null}', "rating", "valid number"),
        ('{"rating": NaN}', None, "not JSON"),
        ('{"comment": "x"}', "rating", "required"),
        ('{"rating": 1, "stars": 5}', "stars", "not permitted"),
        ('{"rating": 1, "rating": 0}', None, "twice"),
        ('{"rating": 1, "comment": "' + "x" * 1001 + '"}', "comment", "at most 1000"),
        ("[]", None, "object"),
    ],
)
def test_what_is_no_rating_is_refused_with_its_reason(service, http, body, param, said):
    service.learned.clear()
    answer = http.post("/v1/jobs/done/feedback", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert service.learned == []


def test_openapi_says_what_a_rating_is(http):
    described = http.get("/openapi.json").json()["paths"]["/v1/jobs/{job}/feedback"]["post"]
    rating = described["requestBody"]["content"]["application/json"]["schema"]["properties"]["rating"]
    assert (rating["minimum"], rating["maximum"]) == (0, 1)
    assert "just right" in rating["description"]
