"""Shared by tests of several modules: keys for real sockets, and one gateway over HTTP for all that ask it."""

import pytest


@pytest.fixture
def keys(tmp_path, monkeypatch):
    from wires import Keys

    monkeypatch.setattr("nodes.keys.LOOK_EVERY_S", 0.05)
    return Keys(tmp_path)


@pytest.fixture(scope="session")
def service(tmp_path_factory):
    from http_service import Service

    running = Service(tmp_path_factory.mktemp("http"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def url(service):
    return service.listen()


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    from http_asked import ACME, ACME_TWO, OTHER

    path = tmp_path_factory.mktemp("tokens") / "tokens"
    path.touch(mode=0o600)
    path.write_text(f"# who may ask\n{ACME} acme\n{ACME_TWO} acme\n\n{OTHER}   other\n")
    return path


@pytest.fixture(scope="session")
def guarded(service, tokens):
    return service.listen(tokens=str(tokens))


@pytest.fixture(scope="session")
def client(url):
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="session")
def http(url):
    import httpx

    with httpx.Client(base_url=url, timeout=30) as made:
        yield made


@pytest.fixture(scope="session")
def secret(guarded):
    import httpx

    with httpx.Client(base_url=guarded, timeout=30) as made:
        yield made
