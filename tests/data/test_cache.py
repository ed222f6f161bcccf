"""The store: what is put comes back, whoever puts it and whatever befalls its files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpletuner.data.cache import CacheStore, CorruptEntry, cache_key

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def entry(number: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), number, dtype=torch.bfloat16), "b": torch.arange(number + 1)}


def key(number: int) -> str:
    return cache_key("test", "f", "t", str(number).encode())


def fill(root: Path, numbers: range) -> CacheStore:
    store = CacheStore(root)
    store.put({key(number): entry(number) for number in numbers})
    return store


def damage(shard: Path, *, keep_mtime: bool = False) -> None:
    """Flip the last byte, which belongs to the last of the tensors."""
    stat = shard.stat()
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    if keep_mtime:
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_returns(tmp_path: Path, dtype: torch.dtype) -> None:
    items = {
        f"{number:064}": {"x": torch.arange(number).to(dtype), "y": torch.ones(number, 0, 2, dtype=torch.uint8)}
        for number in range(5)
    }
    CacheStore(tmp_path).put(items)
    for name, got in zip(items, CacheStore(tmp_path).get(list(items)), strict=True):
        assert same(got, items[name]) and got["x"].dtype is dtype


def test_missing_and_rows_of_one_tensor(tmp_path: Path) -> None:
    store = fill(tmp_path, range(3))
    assert store.missing([key(n) for n in (5, 1, 4, 5)]) == [key(5), key(4)]
    batch = torch.randn(2, 3, 4)
    store.put({key(4): {"x": batch[0]}, key(5): {"x": batch[1].T}, key(6): {"x": batch[0]}})
    assert torch.equal(store.get([key(5)])[0]["x"], batch[1].T)
    with pytest.raises(KeyError):
        store.get([key(99)])


def test_what_a_reader_writes_stays_with_it(tmp_path: Path) -> None:
    store = fill(tmp_path, range(1))
    store.get([key(0)])[0]["a"].fill_(7)
    assert same(CacheStore(tmp_path).get([key(0)])[0], entry(0))


def test_stores_see_each_other(tmp_path: Path) -> None:
    first, second = CacheStore(tmp_path), CacheStore(tmp_path)
    first.put({key(1): entry(1)})
    assert second.missing([key(1), key(2)]) == [key(2)]
    first.put({key(2): entry(2)})
    assert same(second.get([key(2)])[0], entry(2))


def test_torn_files_are_ignored(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    (torn,) = tmp_path.glob("*.safetensors")
    fill(tmp_path, range(2, 4))
    with torn.open("r+b") as file:
        file.truncate(torn.stat().st_size - 8)
    (tmp_path / "shard-x.index").write_text("12 34 abc\n[[")
    (tmp_path / "shard-y.index").write_bytes(b"\xff\xfe")
    (tmp_path / ".shard-z.safetensors.00.tmp").write_bytes(b"half")
    (tmp_path / "shard-w.safetensors").write_bytes(b"not committed")
    store = CacheStore(tmp_path)
    assert store.missing([key(n) for n in range(4)]) == [key(0), key(1)]
    assert same(store.get([key(3)])[0], entry(3))


def test_a_touched_shard_is_checked_before_it_is_used(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    (shard,) = tmp_path.glob("*.safetensors")
    damage(shard)
    store = CacheStore(tmp_path)
    (missing,) = store.missing([key(n) for n in range(4)])
    assert store.corrupt == {missing}
    store.put({missing: entry([key(n) for n in range(4)].index(missing))})
    again = CacheStore(tmp_path)
    assert again.missing([key(n) for n in range(4)]) == [] and not again.corrupt
    assert all(same(got, entry(n)) for n, got in enumerate(again.get([key(n) for n in range(4)])))


def test_rot_is_found_at_the_first_read(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    (shard,) = tmp_path.glob("*.safetensors")
    damage(shard, keep_mtime=True)
    store = CacheStore(tmp_path)
    keys = [key(n) for n in range(4)]
    assert store.missing(keys) == []
    with pytest.raises(CorruptEntry) as caught:
        store.get(keys)
    assert store.missing(keys) == [caught.value.key] == CacheStore(tmp_path).missing(keys)


def test_a_copied_cache_is_checked_once(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    (shard,) = tmp_path.glob("*.safetensors")
    os.utime(shard)
    index = shard.with_suffix(".index")
    assert CacheStore(tmp_path).missing([key(0), key(1)]) == []
    stamped = index.read_bytes()
    CacheStore(tmp_path)
    assert index.read_bytes() == stamped and str(shard.stat().st_mtime_ns).encode() in stamped


def test_large_puts_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.data.cache._SHARD_BYTES", 64)
    store = fill(tmp_path, range(10))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not store.missing([key(n) for n in range(10)])


def test_a_key_is_all_that_decides_an_entry() -> None:
    keys = {
        cache_key(*parts)
        for parts in [
            ("latents", "f", "t", b"c"), ("text", "f", "t", b"c"), ("latents", "g", "t", b"c"),
            ("latents", "f", "u", b"c"), ("latents", "f", "t", b"d"),
        ]
    }  # fmt: skip
    assert len(keys) == 5


FILL = """
import sys, torch
from pathlib import Path
from simpletuner.data.cache import CacheStore, cache_key
store = CacheStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for start in range(0, 60, 5):
    keys = [cache_key("test", "f", "t", str(n).encode()) for n in range(start, start + 5)]
    missing = store.missing(keys)
    store.put({key: {"x": torch.full((64,), float(start + keys.index(key)))} for key in missing})
"""


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        child.communicate("\n", timeout=60)
        assert child.returncode == 0
    store = CacheStore(tmp_path)
    keys = [key(n) for n in range(60)]
    assert store.missing(keys) == []
    assert [float(got["x"][0]) for got in store.get(keys)] == list(range(60))
