"""The store of statistics: whole or absent, bounded, keyed by content."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from edgeq.analyse.store import STALE_S, Store, key_of


def test_arrays_come_back_as_they_were(tmp_path):
    store, arrays = Store(tmp_path), {"a": np.arange(6).reshape(2, 3), "0.b": np.float32([1.5]), "c": np.array(7)}
    assert store.load("ab12") is None
    assert store.save("ab12", arrays)
    found = store.load("ab12")
    assert found is not None and found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    store.drop("ab12")
    store.drop("ab12")
    assert store.load("ab12") is None


@pytest.mark.parametrize("left", [0, 1, 100, 200])
def test_a_file_cut_off_anywhere_counts_as_absent(tmp_path, left):
    store = Store(tmp_path)
    store.save("ab12", {"a": np.arange(100)})
    store.path("ab12").write_bytes(store.path("ab12").read_bytes()[:left])
    assert store.load("ab12") is None


def test_a_changed_byte_counts_as_absent(tmp_path):
    store = Store(tmp_path)
    store.save("ab12", {"a": np.arange(100)})
    data = bytearray(store.path("ab12").read_bytes())
    data[400] ^= 1
    store.path("ab12").write_bytes(data)
    assert store.load("ab12") is None


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.save("ab12", {"a": np.arange(3)})

    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save("ab12", {"a": np.arange(4)})
    assert store.load("ab12")["a"].size == 3
    assert [path.name for path in tmp_path.rglob("*.*")] == ["ab12.npz"]


def test_the_least_recently_used_go_first(tmp_path):
    store = Store(tmp_path, cap_bytes=3 * 9000)
    for age, key in enumerate(("aa1", "bb2", "cc3", "dd4")):
        store.save(key, {"a": np.zeros(1000)})
        os.utime(store.path(key), (1000 + age, 1000 + age))
    assert store.load("aa1") is not None  # used now
    assert store.evict() == 1
    assert [store.load(key) is not None for key in ("aa1", "bb2", "cc3", "dd4")] == [True, False, True, True]
    assert store.evict() == 0


def test_abandoned_partial_files_go_and_fresh_ones_stay(tmp_path):
    store = Store(tmp_path)
    store.save("ab12", {"a": np.zeros(3)})
    old, fresh = store.path("ab12").with_suffix(".partial"), store.path("ab99").with_suffix(".partial")
    old.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * STALE_S,) * 2)
    assert store.evict() == 1
    assert not old.exists() and fresh.exists() and store.load("ab12") is not None


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    assert store.save("ab12", {"a": np.zeros(3)}) is False
    assert store.load("ab12") is None
    assert store.evict() == 0


def test_keys_tell_neighbouring_parts_apart():
    assert key_of(["ab", "c"]) != key_of(["a", "bc"])
    assert key_of(["a", 1]) == key_of(["a", "1"])
    assert len(key_of([])) == 64


def test_the_default_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    assert Store().folder == tmp_path / "stats"
    monkeypatch.delenv("EDGEQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Store().folder == tmp_path / "edgeq" / "stats"
