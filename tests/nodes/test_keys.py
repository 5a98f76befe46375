"""Key files and the allow list, over real files."""

import logging
import os
import stat
import sys
import time

import pytest
import zmq

from nodes import cli, keys
from nodes.keys import AllowList, Credentials, KeyFileError, Peer, load_public, load_secret, write_keys
from relay.errors import BadRequest


@pytest.fixture
def folder(tmp_path):
    for name, role in (("edge-1", "edge"), ("phone", "device")):
        write_keys(name, role, tmp_path / "keys")
    return tmp_path / "keys"


def public(folder, name):
    return load_public(folder / f"{name}.pub")


def test_a_pair_is_written_once_the_secret_for_its_owner_only(tmp_path):
    secret, public_file = write_keys("edge-1", "edge", tmp_path, tenant="lab")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    mine, peer = load_secret(secret), load_public(public_file)
    assert (mine.name, mine.role, mine.public) == (peer.name, peer.role, peer.key) == ("edge-1", "edge", peer.key)
    assert peer.tenant == "lab"
    assert zmq.curve_public(mine.secret.encode()).decode() == peer.key
    assert mine.secret not in public_file.read_text()
    before = secret.read_bytes()
    with pytest.raises(BadRequest, match="not overwritten"):
        write_keys("edge-1", "edge", tmp_path)
    secret.unlink()
    with pytest.raises(BadRequest, match=r"edge-1\.pub exists"):
        write_keys("edge-1", "edge", tmp_path)
    assert before


def test_a_secret_is_in_no_repr(folder):
    mine = load_secret(folder / "edge-1.key")
    assert mine.secret not in f"{mine!r} {mine}"


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_secret_that_others_can_read_or_change_is_refused_with_the_way_out(folder, mode):
    path = folder / "edge-1.key"
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"chmod 600 {path}"):
        load_secret(path)


def test_what_is_no_key_file_is_refused_by_name(folder, tmp_path):
    with pytest.raises(KeyFileError, match=r"nobody\.key cannot be read"):
        load_secret(tmp_path / "nobody.key")
    with pytest.raises(KeyFileError, match="no secret key file"):
        load_secret_from(tmp_path, (folder / "edge-1.pub").read_text())
    other = load_secret(folder / "phone.key").secret
    with pytest.raises(KeyFileError, match="no pair"):
        load_secret_from(tmp_path, f"name: x\nrole: edge\npublic: '{public(folder, 'edge-1').key}'\nsecret: '{other}'")
    for text in (
        "name: x\nrole: king\nkey: ''",
        "name: ../x\nrole: edge\nkey: ''",
        "name: x\nrole: edge\nkey: short",
        "- 1",
    ):
        path = tmp_path / "broken.pub"
        path.write_text(text)
        with pytest.raises(KeyFileError, match=r"broken\.pub"):
            load_public(path)


def load_secret_from(folder, text):
    path = folder / "broken.key"
    path.write_text(text)
    path.chmod(0o600)
    return load_secret(path)


def test_a_name_is_no_path_and_a_role_is_one_of_four(tmp_path):
    for name in ("", "../x", "a/b", "x" * 64, "ä"):
        with pytest.raises(BadRequest, match="no name"):
            write_keys(name, "edge", tmp_path)
    with pytest.raises(BadRequest, match="gateway, edge, device, client"):
        Credentials.plain_text("x", "king")
    assert not list(tmp_path.iterdir())


def test_a_folder_and_a_yaml_list_let_in_the_same_keys(folder, tmp_path):
    one, other = public(folder, "edge-1"), public(folder, "phone")
    listed = tmp_path / "allowed.yaml"
    listed.write_text(
        f"- {{name: edge-1, role: edge, key: '{one.key}'}}\n- name: phone\n  role: device\n  key: '{other.key}'\n"
    )
    for allow in (AllowList(folder), AllowList(listed)):
        assert sorted(peer.name for peer in allow.peers()) == ["edge-1", "phone"]
        assert allow.find(one.key) == Peer(name="edge-1", role="edge", key=one.key)
        assert allow.find(zmq.curve_keypair()[0].decode()) is None


def test_a_removed_key_is_gone_and_a_new_one_is_in_after_the_next_look(folder, monkeypatch):
    allow = AllowList(folder)
    key = public(folder, "phone").key
    held = folder / "phone.pub"
    text = held.read_text()
    held.unlink()
    assert allow.find(key, now=True) is None  # a handshake looks at once
    held.write_text(text)
    assert allow.find(key) is None  # a message does not, for LOOK_EVERY_S
    monkeypatch.setattr(keys, "LOOK_EVERY_S", 0.0)
    assert allow.find(key) is not None


def test_a_key_changes_its_role_while_it_is_used(folder):
    allow = AllowList(folder)
    key = public(folder, "phone").key
    path = folder / "phone.pub"
    path.write_text(path.read_text().replace("role: device", "role: client"))
    assert allow.find(key, now=True).role == "client"


def test_a_list_that_is_being_written_stands_as_it_was_and_one_that_stays_broken_lets_nobody_in(
    folder, tmp_path, monkeypatch, caplog
):
    key = public(folder, "phone").key
    listed = tmp_path / "allowed.yaml"
    good = f"- {{name: phone, role: device, key: '{key}'}}\n"
    listed.write_text(good)
    allow = AllowList(listed)
    listed.write_text(good[:20])
    assert allow.find(key, now=True) is not None
    listed.write_text(good + "\n")
    assert allow.find(key, now=True) is not None
    monkeypatch.setattr(keys, "SETTLE_S", 0.05)
    listed.write_text(good[:20])
    assert allow.find(key, now=True) is not None
    time.sleep(0.06)
    with caplog.at_level(logging.ERROR):
        assert allow.find(key, now=True) is None
    assert "allowed.yaml" in caplog.text
    listed.unlink()
    time.sleep(0.06)
    assert allow.find(key, now=True) is None


def test_one_broken_file_of_a_folder_takes_only_its_own_key(folder, monkeypatch):
    allow = AllowList(folder)
    phone, edge = public(folder, "phone").key, public(folder, "edge-1").key
    monkeypatch.setattr(keys, "SETTLE_S", 0.0)
    (folder / "phone.pub").write_text("name: phone\n")
    assert allow.find(phone, now=True) is None
    assert allow.find(edge) is not None


def test_a_list_that_is_broken_from_the_start_or_says_two_things_of_one_key_is_refused(folder, tmp_path):
    with pytest.raises(KeyFileError, match="cannot be read"):
        AllowList(tmp_path / "nothing")
    twice = (folder / "edge-1.pub").read_text().replace("role: edge", "role: gateway")
    (folder / "edge-2.pub").write_text(twice)
    with pytest.raises(KeyFileError, match="also that of"):
        AllowList(folder)


def test_keygen_writes_both_files_and_says_where_each_goes(tmp_path, monkeypatch, capsys):
    def relay(*words):
        monkeypatch.setattr(sys, "argv", ["relay", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    code, out, _ = relay("keygen", "gw", "--role", "gateway", "--out", tmp_path)
    assert code == 0
    assert "secret" in out.splitlines()[0]
    assert load_secret(tmp_path / "gw.key").role == "gateway"
    code, _, err = relay("keygen", "gw", "--role", "gateway", "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = relay("keygen", "gw2", "--role", "king", "--out", tmp_path)
    assert code == 2
    assert "king" in err
