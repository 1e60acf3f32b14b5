"""Keys open what their scope says, for as long as they should, and are kept nowhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, update

from server_running import Running
from tunewright.errors import EndpointError
from tunewright.server import account_keys, keys, tables
from tunewright.server.keys import Keyring
from tunewright.server.state import Server


def test_a_key_is_kept_as_a_hash_alone(served: Running) -> None:
    with served.server.store.begin() as connection:
        kept = [dict(row) for row in connection.execute(select(tables.keys)).mappings()]
    assert kept
    assert all(served.key not in str(row) for row in kept)
    for path in Path(served.server.settings.data).rglob("*"):
        if path.is_file():
            assert served.key.encode() not in path.read_bytes()


def test_scopes(served: Running) -> None:
    assert served.client().files.list().data == []
    assert served.client(served.admin_key).files.list().data == []
    assert served.client(served.inference_key).models.list().data == []
    with pytest.raises(openai.PermissionDeniedError) as refused:
        served.client(served.inference_key).files.list()
    assert refused.value.code == "insufficient_permissions"


@pytest.mark.parametrize("key", ["tw-wrong", "x", "tw-" + "a" * 43])
def test_a_wrong_key_is_401_and_is_not_repeated_in_full(served: Running, key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as refused:
        served.client(key).files.list()
    assert refused.value.code == "invalid_api_key"
    assert key == "x" or key not in str(refused.value)


def test_azure_takes_its_header_and_says_its_code(served: Running) -> None:
    assert served.azure().files.list().data == []
    with pytest.raises(openai.AuthenticationError) as refused:
        served.azure("wrong").files.list()
    assert refused.value.code == "401"


def test_a_revoked_key_opens_nothing_within_seconds(open_server: Callable[[], Server]) -> None:
    server = open_server()
    at = [0.0]
    ring = Keyring(server.store, clock=lambda: at[0])
    key = keys.create(server.store, "one")
    assert ring.find(key) is not None
    keys.revoke(server.store, "one")
    at[0] = keys.FRESH_S
    assert ring.find(key) is None
    with pytest.raises(EndpointError, match="no key 'one'"):
        keys.revoke(server.store, "one")
    assert keys.create(server.store, "one") != key  # the name is free again


def test_an_expired_key_opens_nothing(open_server: Callable[[], Server]) -> None:
    server = open_server()
    key = keys.create(server.store, "one", expires_s=3600)
    ring = Keyring(server.store)
    assert ring.find(key) is not None
    with server.store.begin() as connection:
        connection.execute(update(tables.keys).values(expires_at=1))
    ring.forget()
    assert ring.find(key) is None


def test_a_name_is_taken_once(open_server: Callable[[], Server]) -> None:
    server = open_server()
    keys.create(server.store, "one")
    with pytest.raises(EndpointError, match="already"):
        keys.create(server.store, "one")
    with pytest.raises(EndpointError, match="no such scope"):
        keys.create(server.store, "two", scope="root")


def test_a_rotated_key_gives_way_to_another_of_the_same_kind(open_server: Callable[[], Server]) -> None:
    server = open_server()
    old = keys.create(server.store, "one", scope="inference", expires_s=86400)
    new = keys.rotate(server.store, "one", grace_s=3600)
    ring = Keyring(server.store)
    before, after = ring.find(old), ring.find(new)
    assert before is not None
    assert after is not None
    assert (after.name, after.scope) == ("one", "inference")
    assert before.expires_at is not None
    assert after.expires_at is not None
    assert 80000 < after.expires_at - before.expires_at < 86400
    last = keys.rotate(server.store, "one")
    ring.forget()
    assert [ring.find(key) is None for key in (old, new, last)] == [True, True, False]
    with pytest.raises(EndpointError, match="no key 'two'"):
        keys.rotate(server.store, "two")
    keys.revoke(server.store, "one")
    with pytest.raises(EndpointError, match="no key 'one'"):
        keys.rotate(server.store, "one")


def test_an_accounts_key_is_made_anew_by_its_account(served: Running) -> None:
    account_keys.both(served.server, "local")
    with pytest.raises(EndpointError, match="regenerateKey"):
        keys.rotate(served.server.store, "local/key1")


@given(st.text(max_size=12))
def test_durations(text: str) -> None:
    if re.fullmatch(r"[0-9]{1,6}[mhdw]", text) and int(text[:-1]):
        assert keys.duration(text) == int(text[:-1]) * keys.UNITS[text[-1]]
    else:
        with pytest.raises(EndpointError, match="30d"):
            keys.duration(text)


def test_durations_in_seconds() -> None:
    assert [keys.duration(text) for text in ("90m", "12h", "30d", "4w")] == [5400, 43200, 2592000, 2419200]
