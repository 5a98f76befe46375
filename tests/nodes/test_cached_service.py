"""One deployment with a latent cache: who may start from what, and what is told of it; an edge's side alone."""

import asyncio
import io
import json
import time

import httpx
import numpy as np
import pytest
from http_asked import ACME, OTHER
from PIL import Image
from tiny import PROMPT, build_sd3, write_family

from nodes.cache.keeper import Keeper, Kept, Look
from nodes.cli import main
from nodes.commands.service import free_port
from nodes.deployment import CacheConfig, read_deployment
from nodes.fleet import fleet
from nodes.images import KEY
from relay.errors import BadRequest
from relay.pipeline import RelayPipeline
from scheduler.load.similarity import Rule

STEPS, HANDOFF = 6, 4


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    return write_family(root / "tiny-sd3.yaml", build_sd3(root / "sd3"), "sd3")


@pytest.fixture(scope="module")
def running(tmp_path_factory, family):
    root = tmp_path_factory.mktemp("service")
    tokens = root / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"{ACME} acme\n{OTHER} other\n")
    nodes = {
        "edge": {"role": "edge", "families": {str(family): ["large"]}},
        "phone": {"role": "device", "families": {str(family): ["small"]}},
    }
    offer = [{"family": str(family), "steps": STEPS, "handoff": HANDOFF}]
    gateway = {"offer": offer, "http": f"127.0.0.1:{free_port()}", "tokens": str(tokens), "checkpoint_every": 2}
    with fleet(root / "up", nodes, gateway) as up:
        yield up


@pytest.fixture(scope="module")
def ask(running):
    """A picture for the tenant of a token: what is told of it, and its pixels and metadata."""

    def asked(token=ACME, n=1, **body):
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=f"http://{running.gateway.http}", headers=headers, timeout=60) as client:
            before = stored(running)
            made = client.post("/v1/images/generations", json={"prompt": PROMPT, "n": n} | body)
            assert made.status_code == 200, made.text
            told = []
            for each in made.json()["data"]:
                relay = each["relay"]
                job = client.get(f"/v1/jobs/{relay['job']}/image")
                told.append((relay, Image.open(io.BytesIO(job.content))))
        # latents are kept once the gateway says that their request is done
        expected = 0 if body.get("cache") is False else 3 * sum(relay["start"] is None for relay, _ in told)
        ends = time.monotonic() + 20
        while stored(running) < before + expected and time.monotonic() < ends:
            time.sleep(0.05)
        return told

    return asked


def cache_of(running):
    return next(node["cache"] for node in running.status()["nodes"] if node["name"] == "edge")


def stored(running):
    return cache_of(running).get("latents", 0)


def test_who_asks_for_it_starts_from_an_own_latent_of_a_like_prompt(running, ask, family):
    ((first, _),) = ask()
    assert first["start"] is None
    assert first["steps"] == {"large": HANDOFF, "small": STEPS - HANDOFF}
    ((fixed, _),) = ask(seed=99)
    assert fixed["start"] is None  # it fixes its seed and does not ask for the cache
    ((other, _),) = ask(OTHER, cache=True)
    assert other["start"] is None  # the latents are another tenant's
    ((made, image),) = ask(seed=5, cache=True)
    assert made["start"]["skipped"] == 3
    assert made["start"]["similarity"] == pytest.approx(1.0, abs=1e-5)
    assert made["start"]["source"] in (first["job"], fixed["job"])
    assert made["steps"] == {"large": HANDOFF - 3, "small": STEPS - HANDOFF}
    metadata = json.loads(image.text[KEY])
    assert metadata["start"] == made["start"]
    assert metadata["steps"] == made["steps"]
    # transport changes nothing: the same latent in one process gives the same picture
    seed = first["seed"] if made["start"]["source"] == first["job"] else 99
    pipe = RelayPipeline.from_pretrained(family)
    (state,) = pipe(PROMPT, program=made["program"], seed=seed, keep=[3]).kept[3]
    alone = pipe(PROMPT, program=made["program"], seed=5, cached=state).images[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(alone).astype(int)).max() <= 1


def test_pictures_of_one_request_do_not_all_become_one(ask):
    ask(n=2)
    told = ask(cache=True, n=3)
    sources = [relay["start"]["source"] for relay, _ in told if relay["start"]]
    assert len(sources) >= 2
    assert len(set(sources)) == len(sources)


def test_who_will_not_be_kept_is_not(running, ask):
    before = stored(running)
    ((made, _),) = ask(cache=False)
    time.sleep(0.5)
    assert made["start"] is None
    assert stored(running) == before


def test_it_is_told_by_status_and_metrics_and_show_says_what_cannot_be_made_again(
    running, ask, tmp_path, capsys, monkeypatch
):
    ask()
    ((_, image),) = ask(cache=True, seed=8)
    told = cache_of(running)
    assert told["scope"] == "tenant"
    assert told["hits"] > 0
    with httpx.Client(base_url=f"http://{running.gateway.http}", headers={"Authorization": f"Bearer {ACME}"}) as client:
        assert 'relay_cache_latents{node="edge"}' in client.get("/metrics").text
    from nodes.images import save_png

    save_png(image, tmp_path / "one.png", json.loads(image.text[KEY]))
    monkeypatch.setattr("sys.argv", ["relay", "show", str(tmp_path / "one.png")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "from a cached latent of job-" in capsys.readouterr().err


def test_no_prompt_lies_in_its_folder(running):
    folder = running.store / "cache" / "edge"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not any(PROMPT.encode() in path.read_bytes() for path in files)


# --- an edge's side, without a service ---


def kept(job="job", payload=b"x" * 100, owner="a"):
    return Kept(job, owner, "s", PROMPT, 1, np.array([1.0, 0.0], np.float32), 3, 6, payload)


LOOK = Look("a", "s", np.array([1.0, 0.1], np.float32), 6, 0, Rule())


def with_keeper(folder, work, **config):
    async def run():
        keeper = Keeper(folder, CacheConfig(**config))
        try:
            assert await asyncio.to_thread(keeper.opened.wait, 20)
            return await work(keeper)
        finally:
            await keeper.close()

    return asyncio.run(run())


def test_only_what_a_finished_job_left_is_found(tmp_path):
    async def work(keeper):
        keeper.note(kept("called off"))
        assert await keeper.find(LOOK) is None
        keeper.ended("called off", done=False)
        assert await keeper.find(LOOK) is None
        keeper.note(kept("done"))
        keeper.ended("done")
        hit = await keeper.find(LOOK)
        assert (hit.source, hit.skipped) == ("done", 3)
        assert keeper.status["latents"] == 1

    with_keeper(tmp_path / "c", work)


def test_what_was_kept_is_there_for_the_next_process(tmp_path):
    async def first(keeper):
        keeper.note(kept("done"))
        keeper.ended("done")

    async def second(keeper):
        assert (await keeper.find(LOOK)).source == "done"

    with_keeper(tmp_path / "c", first)
    with_keeper(tmp_path / "c", second)


def test_a_cache_that_cannot_be_opened_is_said_once_and_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")

    async def work(keeper):
        for _ in range(3):
            keeper.note(kept())
            keeper.ended("job")
            assert await keeper.find(LOOK) is None
        assert "broken" in keeper.status

    with_keeper(tmp_path / "file" / "cache", work)
    assert caplog.text.count("no latents are cached") == 1


def test_what_waits_for_its_jobs_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("nodes.cache.keeper.MOST_WAITING", 250)

    async def work(keeper):
        for i in range(5):
            keeper.note(kept(f"job-{i}"))
        for i in range(5):
            keeper.ended(f"job-{i}")
        assert (await keeper.find(LOOK)).source in ("job-3", "job-4")
        assert keeper.status["latents"] == 1  # one prompt and seed: the second is there already

    with_keeper(tmp_path / "c", work)


@pytest.mark.parametrize(
    ("said", "scope"),
    [("off", "off"), ("tenant", "tenant"), ("shared", "shared"), ("{scope: shared, mb: 5}", "shared")],
)
def test_a_deployment_says_its_scope_in_a_word_or_more(tmp_path, said, scope):
    path = tmp_path / "d.yaml"
    path.write_text(f"cache: {said}\n")
    assert read_deployment(path).caching.scope == scope


@pytest.mark.parametrize("said", ["on", "everyone", "{scope: everyone}", "{mb: 0}", "{colour: red}"])
def test_a_word_that_means_nothing_is_refused_with_its_file(tmp_path, said):
    path = tmp_path / "d.yaml"
    path.write_text(f"cache: {said}\n")
    with pytest.raises(BadRequest, match=r"d\.yaml"):
        read_deployment(path)


def test_cache_true_is_refused_where_there_is_none(tmp_path_factory):
    from http_service import Service

    service = Service(tmp_path_factory.mktemp("none"), compute=False)
    try:
        from nodes.requests import ImageRequest

        with pytest.raises(BadRequest, match="keeps no latents"):
            service.call(service.dispatcher.submit(ImageRequest(prompt="a red heart", cache=True), "local"))
    finally:
        service.close()
