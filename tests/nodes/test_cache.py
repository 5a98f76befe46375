"""The latent cache: what is near is found, what is not the asker's or not whole never is."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nodes.cache.store import LatentCache
from relay.errors import BadRequest
from scheduler.load.similarity import Rule

RULE = Rule(((0.95, 0.5), (0.8, 0.2)))


def at(degrees):
    """A prompt's embedding; the cosine of two is that of the angle between them."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), 0.0, 0.0], np.float32)


@pytest.fixture
def cache(tmp_path):
    with_room = LatentCache(tmp_path / "cache", 10_000, rule=RULE)
    yield with_room
    with_room.close()


def fill(cache, degrees, skipped, payload=b"x" * 1000, tenant="a", space="s", prompt=None):
    source = f"job at {degrees}"
    return cache.store(space, tenant, prompt or source, 7, source, at(degrees), skipped, 20, payload)


def test_the_nearest_prompt_gives_as_many_steps_as_its_similarity_allows(cache):
    assert fill(cache, 0, 10, b"half")
    assert fill(cache, 0, 4, b"fifth")
    assert fill(cache, 90, 10, b"else")
    near = cache.find("s", "a", at(5))
    assert (near.payload, near.skipped, near.total, near.source) == (b"half", 10, 20, "job at 0")
    assert near.similarity == pytest.approx(np.cos(np.radians(5)), abs=1e-5)
    assert cache.find("s", "a", at(30)).payload == b"fifth"  # cos 30 is 0.87: a fifth, not a half
    assert cache.find("s", "a", at(45)) is None
    assert (cache.hits, cache.misses) == (2, 1)


def test_a_leg_keeps_a_step_to_walk(cache):
    fill(cache, 0, 10, b"half")
    fill(cache, 0, 4, b"fifth")
    assert cache.find("s", "a", at(0), below=10).payload == b"fifth"
    assert cache.find("s", "a", at(0), below=4) is None
    assert cache.find("s", "a", at(30), rule=Rule(((0.8, 0.5),))).payload == b"half"


def test_pictures_of_one_request_start_from_one_source_each(cache):
    for degrees in (0, 1, 2):
        fill(cache, degrees, 10)
        fill(cache, degrees, 4)
    assert [cache.find("s", "a", at(0), nth=n).source for n in range(3)] == ["job at 0", "job at 1", "job at 2"]
    assert cache.find("s", "a", at(0), nth=3) is None


def test_no_prompt_is_written(cache):
    fill(cache, 0, 10, prompt="a secret wish")
    cache.close()
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert len(files) > 1
    assert not any(b"secret wish" in path.read_bytes() for path in files)


def test_nothing_crosses_spaces_or_tenants(cache):
    fill(cache, 0, 10)
    assert cache.find("other", "a", at(0)) is None
    assert cache.find("s", "b", at(0)) is None


def test_shared_is_found_by_all_and_off_by_nobody(tmp_path):
    shared = LatentCache(tmp_path / "shared", 10_000, "shared", rule=RULE)
    fill(shared, 0, 10)
    assert shared.find("s", "b", at(0)).skipped == 10
    off = LatentCache(tmp_path / "off", 10_000, "off")
    assert not fill(off, 0, 10)
    assert off.find("s", "a", at(0)) is None


def test_what_was_shared_is_forgotten_by_a_cache_of_tenants(tmp_path):
    shared = LatentCache(tmp_path / "c", 10_000, "shared", rule=RULE)
    fill(shared, 0, 10)
    shared.close()
    own = LatentCache(tmp_path / "c", 10_000, "tenant", rule=RULE)
    assert len(own) == 0
    assert own.find("s", "", at(0)) is None
    assert not list((tmp_path / "c" / "latents").glob("*/*"))


def test_bytes_are_bounded_and_lcbfu_drops_what_spared_least(tmp_path):
    cache = LatentCache(tmp_path / "c", 3000, eviction="lcbfu", rule=RULE)
    fill(cache, 0, 10)
    fill(cache, 90, 4)
    fill(cache, 180, 4)
    for _ in range(3):
        assert cache.find("s", "a", at(180)).skipped == 4  # used more often, it is worth more than 10 steps unused
    fill(cache, 270, 10)
    assert cache.bytes == 3000
    assert cache.find("s", "a", at(90)) is None
    fill(cache, 45, 10)
    assert cache.find("s", "a", at(0)) is None  # the longer unused of two that spare alike
    assert cache.find("s", "a", at(180)).skipped == 4
    assert (len(cache), cache.evicted) == (3, 2)


def test_lru_drops_the_longest_unused(tmp_path):
    cache = LatentCache(tmp_path / "c", 2000, eviction="lru", rule=RULE)
    fill(cache, 0, 10)
    fill(cache, 90, 4)
    cache.find("s", "a", at(0))
    fill(cache, 180, 4)
    assert cache.find("s", "a", at(90)) is None
    assert cache.find("s", "a", at(0)) is not None


def test_a_latent_larger_than_the_cache_or_known_is_not_kept(cache):
    assert not fill(cache, 0, 10, b"x" * 10_001)
    assert fill(cache, 0, 10)
    assert not fill(cache, 0, 10)
    assert len(cache) == 1


@pytest.mark.parametrize("damage", ["gone", "short", "altered", "empty"])
def test_a_damaged_latent_is_never_served_and_the_next_best_is(tmp_path, damage):
    cache = LatentCache(tmp_path / "c", 10_000, rule=RULE)
    fill(cache, 0, 10, b"half" * 100)
    (path,) = (tmp_path / "c" / "latents").glob("*/*")
    fill(cache, 1, 4, b"fifth")
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"short": data[:-1], "altered": data[:-1] + b"?", "empty": b""}[damage])
    assert cache.find("s", "a", at(0)).payload == b"fifth"
    assert cache.damaged == 1
    assert len(cache) == 1


def test_it_is_there_after_a_kill(tmp_path):
    """The process is killed between two stores; what it had stored is found, and nothing else lies about."""
    script = (
        "import sys, os, signal\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_cache import LatentCache, RULE, fill\n"
        "cache = LatentCache(Path(sys.argv[1]), 10_000, rule=RULE)\n"
        "fill(cache, 0, 10, b'kept')\n"
        "(Path(sys.argv[1]) / 'latents' / 'ab').mkdir(); (Path(sys.argv[1]) / 'latents' / 'ab' / 'stray').write_bytes(b'x')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "c")], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    cache = LatentCache(tmp_path / "c", 10_000, rule=RULE)
    assert cache.find("s", "a", at(0)).payload == b"kept"
    assert [path.name == "stray" for path in (tmp_path / "c" / "latents").glob("*/*")] == [False]


@pytest.mark.parametrize("damage", ["version", "truncated", "foreign"])
def test_a_damaged_or_foreign_database_is_set_aside(tmp_path, damage, caplog):
    import sqlite3

    folder = tmp_path / "c"
    cache = LatentCache(folder, 10_000, rule=RULE)
    fill(cache, 0, 10)
    cache.close()
    path = folder / "cache.db"
    if damage == "version":
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
    else:
        path.write_bytes(path.read_bytes()[:5000] if damage == "truncated" else b"not a database at all" * 100)
    again = LatentCache(folder, 10_000, rule=RULE)
    assert len(again) == 0
    assert fill(again, 0, 10)
    assert len(list(tmp_path.glob("c.aside-*"))) == 1
    assert "set aside" in caplog.text


# --- an index on disk ---


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder whose cache of three latents was closed, its index kept; and how to open it."""
    monkeypatch.setattr("nodes.cache.snapshot.LEAST", 1)
    folder = tmp_path / "kept"

    def opened(of=folder):
        return LatentCache(of, 10_000, rule=RULE)

    cache = opened()
    for degrees in (0, 40, 80):
        fill(cache, degrees, 10)
    cache.close()
    assert len(list((folder / "index").iterdir())) == 1
    return folder, opened


def killed(folder, tmp_path):
    """What a process that is killed now leaves behind."""
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "killed"))


def test_an_index_is_read_and_not_built_where_nothing_changed(kept):
    _, opened = kept
    cache = opened()
    assert cache._changed == set()  # no row had to enter
    assert [cache.find("s", "a", at(degrees)).source for degrees in (1, 41, 81)] == [
        "job at 0",
        "job at 40",
        "job at 80",
    ]


def test_after_a_kill_what_came_since_is_in_the_index_and_what_went_is_not(kept, tmp_path):
    folder, opened = kept
    cache = opened()
    fill(cache, 120, 10)
    fill(cache, 160, 10)
    cache._forget(1)
    again = opened(killed(folder, tmp_path))
    assert len(again) == 4
    assert again.find("s", "a", at(0)) is None
    assert [again.find("s", "a", at(d)).source for d in (40, 120, 160)] == ["job at 40", "job at 120", "job at 160"]
    assert len(again._indexes["s", "a"]) == 4


def test_a_number_that_is_given_again_makes_no_latent_anothers(kept, tmp_path):
    folder, opened = kept
    cache = opened()
    cache._forget(3)  # the last one: its number goes to the next
    fill(cache, 170, 10)
    assert cache.find("s", "a", at(170)).source == "job at 170"
    again = opened(killed(folder, tmp_path))
    assert again.find("s", "a", at(80)) is None
    hit = again.find("s", "a", at(170))
    assert (hit.source, hit.similarity) == ("job at 170", pytest.approx(1.0))


@pytest.mark.parametrize("damage", ["truncated", "altered", "gone"])
def test_a_damaged_index_is_built_anew_with_one_line(kept, damage, caplog):
    folder, opened = kept
    (path,) = (folder / "index").iterdir()
    if damage == "gone":
        path.unlink()
    else:
        data, half = path.read_bytes(), path.stat().st_size // 2
        path.write_bytes(data[:half] + (b"" if damage == "truncated" else bytes([data[half] ^ 1]) + data[half + 1 :]))
    cache = opened()
    assert cache.find("s", "a", at(41)).source == "job at 40"
    assert caplog.text.count("it is built anew") == 1
    cache.close()
    assert opened()._changed == set()


def test_how_near_it_is_is_not_rounded(cache):
    """The index holds 8 bits; thresholds are of the vectors themselves."""
    fill(cache, 0, 10)
    for degrees in (18.0, 18.3):  # the cosines are 0.9511 and 0.9494, the rule's threshold lies between
        hit = cache.find("s", "a", at(degrees))
        assert (hit is not None) == (degrees == 18.0)
        if hit:
            assert hit.similarity == pytest.approx(np.cos(np.radians(degrees)), abs=1e-6)


def test_other_words_are_refused_in_one_line(tmp_path):
    with pytest.raises(BadRequest, match="off"):
        LatentCache(tmp_path / "c", 0)
    with pytest.raises(BadRequest, match="eviction"):
        LatentCache(tmp_path / "c", 1, eviction="oldest")
    cache = LatentCache(tmp_path / "c", 100)
    with pytest.raises(BadRequest, match="not zero"):
        cache.store("s", "a", "p", 0, "job", np.zeros(4), 1, 2, b"x")
