"""Stored contexts: what comes back is what was computed, or nothing and a reason."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_cli import store as store_module
from nsa_cli.commands.cache import command
from nsa_cli.store import BLOCK, SLACK, Store
from nsa_models import Cache, NSAConfig, Sampling, decode, prefill
from nsa_models.config import RopeScaling
from nsa_models.errors import InputError
from nsa_models.transformer import NSAModel
from tests.models import tiny

CONFIG = replace(tiny.CONFIG, max_position_embeddings=8192, gate_bias=False)
PAPER = replace(CONFIG, branch_kv=True, compress_kind="mlp", compress_positions=True, compress_rope="after")
CHUNKS = replace(CONFIG, rope_scaling=RopeScaling(8.0, 128, kind="dual_chunk", chunk=64))


def random_model(config: NSAConfig = CONFIG, seed: int = 0) -> NSAModel:
    model = tiny.random_model(config, seed=seed)
    model.fingerprint = f"weights {seed}"
    return model


def random_ids(n: int, seed: int = 1) -> list[int]:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def filled(model: NSAModel, ids: list[int], capacity: int | None = None) -> Cache:
    cache = Cache.for_model(model, capacity or len(ids))
    prefill(model, ids, cache)
    return cache


def answer(model: NSAModel, cache: Cache, ids: list[int], tokens: int = 12) -> list[int]:
    """Greedy tokens after `ids`, of which the cache holds the first."""
    logits = prefill(model, ids[cache.length :], cache)
    return list(decode(model, cache, logits, Sampling(max_tokens=tokens)))


def keep(store: Store, model: NSAModel, ids: list[int]) -> None:
    assert store.save(model, "tok", ids, filled(model, ids)) is None


def only_entry(store: Store) -> Path:
    (entry,) = store.entries()
    return entry.path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, quota_bytes=10**9)


@pytest.mark.parametrize("config", [CONFIG, PAPER, CHUNKS], ids=["mean", "paper", "dual-chunk"])
def test_cold_answer_is_warm_answer(store: Store, config: NSAConfig) -> None:
    model, context, question = random_model(config), random_ids(5 * BLOCK), random_ids(23, seed=2)
    cache = filled(model, context, 400)
    assert store.save(model, "tok", context, cache) is None
    cold = answer(model, cache, context + question)
    for _ in range(2):  # answering leaves the stored context as it was
        stored = store.open(model, "tok", context + question, 400)
        assert stored.length == stored.cache.length == 5 * BLOCK
        assert stored.cache.capacity == cache.capacity
        assert answer(model, stored.cache, context + question) == cold


def test_a_stored_context_is_mapped_not_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(), random_ids(3 * BLOCK)
    keep(store, model, ids)
    monkeypatch.setattr(Cache, "for_model", no_memory(Cache.for_model))
    stored = store.open(model, "tok", [*ids, 5], 3 * BLOCK + 500)
    before = (only_entry(store) / "kv").read_bytes()
    stored.cache.buffers["layers.0.k"].fill_(7)
    assert (only_entry(store) / "kv").read_bytes() == before


def no_memory(for_model: Callable) -> Callable:
    def on_meta_only(model, capacity, rope_factor=None, device=None):
        assert device == "meta"
        return for_model(model, capacity, rope_factor, device)

    return on_meta_only


def test_more_room_than_was_stored_is_made_by_copying(store: Store) -> None:
    model, ids = random_model(), random_ids(2 * BLOCK + 1)
    keep(store, model, ids)
    capacity = 2 * BLOCK + SLACK + 100
    stored = store.open(model, "tok", ids, capacity)
    assert stored.length == 2 * BLOCK and stored.cache.capacity >= capacity
    assert answer(model, stored.cache, ids) == answer(model, Cache.for_model(model, capacity), ids)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, NSAModel, list[int]]:
    store, model, ids = Store(tmp_path_factory.mktemp("shared"), 10**9), random_model(), random_ids(400)
    keep(store, model, ids)
    return store, model, ids


@settings(max_examples=40, deadline=None)
@given(common=st.integers(0, 400), rest=st.integers(0, 90))
def test_any_common_prefix_continues_as_a_fresh_prefill(shared, common: int, rest: int) -> None:
    store, model, ids = shared
    other = ids[:common] + [96 - t for t in random_ids(rest, seed=3)] or [1]
    if common < len(ids) and len(other) > common:
        other[common] = (ids[common] + 1) % 97
    stored = store.open(model, "tok", other, 500)
    expected = min(min(common, 384) // BLOCK * BLOCK, len(other) - 1)
    assert stored.length == stored.cache.length == expected
    assert (stored.note == "") == (expected == len(other) - 1 and expected > 0)
    fresh, again = Cache.for_model(model, 500), stored.cache
    if expected:
        prefill(model, other[:expected], fresh)
    logits = [prefill(model, other[expected:], cache) for cache in (fresh, again)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("capacity", [500, 300 + SLACK + 500], ids=["mapped", "copied"])
@pytest.mark.parametrize("common", [64, 128, 200, 300])
def test_a_prefix_in_an_earlier_chunk_of_positions_continues(store: Store, common: int, capacity: int) -> None:
    """The stored keys are rotated for a later chunk's queries: they are turned back."""
    model, ids = random_model(CHUNKS), random_ids(330)
    keep(store, model, ids)
    other = ids[:common] + random_ids(150, seed=3)
    stored, fresh = store.open(model, "tok", other, capacity), Cache.for_model(model, capacity)
    assert stored.length == common // BLOCK * BLOCK and stored.cache.chunk <= stored.length // 64
    truth = prefill(model, other, fresh)
    got = prefill(model, other[stored.length :], stored.cache)
    assert (got - truth).norm() / truth.norm() < 0.02  # of bfloat16 keys, rounded twice more


def test_notes_say_where_and_why(store: Store) -> None:
    model, ids = random_model(), random_ids(400)
    assert store.open(model, "tok", ids, 400).note == "no stored context for this model"
    keep(store, model, ids)
    changed = ids[:200] + [(ids[200] + 1) % 97] + ids[201:]
    assert store.open(model, "tok", changed, 400).note == "first 192 of 400 tokens match; differs at token 200"
    longer = ids + random_ids(1000, seed=4)
    assert store.open(model, "tok", longer, 1400).note == "first 384 of 1,400 tokens match; the rest was not stored"
    other = [(ids[0] + 1) % 97, *ids[1:]]
    assert store.open(model, "tok", other, 400).note == "no stored context starts with the same 64 tokens"


def test_the_last_token_is_computed_again(store: Store) -> None:
    model, ids = random_model(), random_ids(2 * BLOCK)
    keep(store, model, ids)
    stored = store.open(model, "tok", ids, 200)
    assert (stored.length, stored.note) == (2 * BLOCK - 1, "")
    assert answer(model, stored.cache, ids) == answer(model, filled(model, ids[:-1], 200), ids)


def test_other_weights_configs_tokenizers_and_dtypes_do_not_match(store: Store) -> None:
    model, ids = random_model(), random_ids(200)
    keep(store, model, ids)
    others = [
        (random_model(seed=1), "tok"),
        (random_model(replace(CONFIG, rope_theta=5e5)), "tok"),
        (model, "another tokenizer"),
        (random_model().to(torch.bfloat16), "tok"),
    ]
    for other, tokenizer in others:
        assert store.open(other, tokenizer, ids, 200).note == "no stored context for this model"
    assert store.open(model, "tok", ids, 200).length == 192


def test_a_model_without_identity_is_not_stored(store: Store) -> None:
    model, ids = random_model(), random_ids(200)
    model.fingerprint = ""
    keep(store, model, ids)
    assert store.entries() == [] and store.open(model, "tok", ids, 200).length == 0


def test_another_rope_factor_is_a_miss_with_its_reason(store: Store) -> None:
    model, ids = random_model(replace(CONFIG, rope_scaling=RopeScaling(8.0, 256))), random_ids(200)
    keep(store, model, ids)
    stored = store.open(model, "tok", ids, 300)
    assert stored.length == 0 and stored.cache.rope_factor == 2
    assert stored.note == "stored with RoPE factor 1, a context of this length needs 2"
    assert store.open(model, "tok", ids, 256).length == 192


def test_an_interrupted_prefill_is_resumed(store: Store) -> None:
    model, ids, cache = random_model(), random_ids(300), Cache.for_model(random_model(), 300)
    prefill(model, ids[:150], cache)
    assert store.save(model, "tok", ids, cache) is None
    stored = store.open(model, "tok", ids, 300)
    assert stored.length == 128
    prefill(model, ids[128:], stored.cache)
    assert store.save(model, "tok", ids, stored.cache) is None
    assert [e.tokens for e in store.entries()] == [256]  # what it continues is replaced
    again = store.open(model, "tok", ids, 300).cache
    for name, rows in again.tensors().items():
        assert torch.equal(rows, stored.cache.tensors(256)[name])


def test_what_is_stored_already_is_not_written_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(), random_ids(300)
    keep(store, model, ids)
    monkeypatch.setattr(Store, "_write", None)
    keep(store, model, ids)
    keep(store, model, ids[:130])


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "kv cut": lambda entry: cut(entry / "kv"),
    "kv gone": lambda entry: (entry / "kv").unlink(),
    "ids cut": lambda entry: cut(entry / "ids"),
    "ids changed": lambda entry: (entry / "ids").write_bytes(bytes(len((entry / "ids").read_bytes()))),
    "chain changed": lambda entry: (entry / "chain").write_bytes(bytes(len((entry / "chain").read_bytes()))),
    "json cut": lambda entry: cut(entry / "entry.json"),
    "json empty": lambda entry: (entry / "entry.json").write_text("{}"),
    "json a list": lambda entry: (entry / "entry.json").write_text("[1]"),
    "json gone": lambda entry: (entry / "entry.json").unlink(),
    "other version": lambda entry: edit(entry, schema_version=99),
    "other capacity": lambda entry: edit(entry, capacity=64),
}


def edit(entry: Path, **values) -> None:
    about = json.loads((entry / "entry.json").read_text())
    (entry / "entry.json").write_text(json.dumps(about | values))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_a_miss_and_goes(store: Store, damage: Callable[[Path], None]) -> None:
    model, ids = random_model(), random_ids(300)
    keep(store, model, ids)
    path = only_entry(store)
    damage(path)
    stored = store.open(model, "tok", ids, 300)
    assert stored.length == 0 and f"removed damaged entry {path.name[:12]}" in stored.note
    assert os.listdir(store.root) == []
    keep(store, model, ids)
    assert store.open(model, "tok", ids, 300).length == 256


def test_equal_hashes_of_other_tokens_are_caught(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(), random_ids(200)
    monkeypatch.setattr(store_module, "_chain", lambda fingerprint, rope_factor, ids: bytes(len(ids) // 64 * 32))
    keep(store, model, ids)
    assert store.open(model, "tok", ids, 200).length == 192
    stored = store.open(model, "tok", random_ids(200, seed=9), 200)
    assert stored.length == 0 and "tokens do not match their hashes" in stored.note


def test_quota_removes_the_least_recently_used(tmp_path: Path) -> None:
    model, contexts = random_model(), [random_ids(256, seed=s) for s in range(4)]
    keep(Store(tmp_path, 10**9), model, contexts[0])
    size = Store(tmp_path).entries()[0].bytes
    store = Store(tmp_path, 3 * size + size // 2)
    for age, context in ((30, contexts[1]), (20, contexts[2])):
        keep(store, model, context)
        for entry in store.entries():
            os.utime(entry.path / "entry.json", (time.time() - age, entry.used - age))
    store.open(model, "tok", contexts[0], 256)  # the oldest, but used last
    keep(store, model, contexts[3])
    found = [store.open(model, "tok", context, 256).length for context in contexts]
    assert found == [255, 0, 255, 255]


def test_a_context_beyond_the_quota_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    model = random_model()
    keep(Store(tmp_path), model, random_ids(64))
    ids = random_ids(640, seed=2)
    refusal = Store(tmp_path, 100_000).save(model, "tok", ids, filled(model, ids))
    assert refusal.startswith("the context takes 1") and refusal.endswith(" kB, all stored contexts may take 100 kB")
    assert [e.tokens for e in Store(tmp_path).entries()] == [64]


def test_free_rows_take_no_disk_space(store: Store) -> None:
    keep(store, random_model(), random_ids(256))
    (entry,) = store.entries()
    assert entry.bytes < 200_000 < 800_000 < (entry.path / "kv").stat().st_size


def save_one(directory: str) -> None:
    keep(Store(Path(directory), 10**9), random_model(), random_ids(300))


def test_processes_may_save_the_same_context_at_once(store: Store) -> None:
    script = "import runpy, sys; runpy.run_path(sys.argv[1])['save_one'](sys.argv[2])"
    save = [sys.executable, "-c", script, __file__, str(store.root.parent)]
    assert [process.wait() for process in [subprocess.Popen(save) for _ in range(2)]] == [0, 0]
    assert os.listdir(store.root) == [only_entry(store).name]
    assert store.open(random_model(), "tok", random_ids(300), 300).length == 256


def test_losing_the_race_keeps_the_other_entry(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(), random_ids(300)
    keep(store, model, ids)
    inode = (only_entry(store) / "kv").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_scan", lambda self: ([], ""))  # as it was before the other process was done
        keep(store, model, ids)
    assert (only_entry(store) / "kv").stat().st_ino == inode


@pytest.mark.parametrize("fail_at", [1, 3, 5])
def test_a_full_disk_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    model, ids, calls = random_model(), random_ids(300), iter(range(1, 99))

    def fsync(descriptor: int) -> None:
        if next(calls) == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    assert store.save(model, "tok", ids, filled(model, ids)) == f"cannot write to {store.root}: No space left on device"
    assert os.listdir(store.root) == []


def test_ctrl_c_while_saving_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        keep(store, random_model(), random_ids(100))
    assert os.listdir(store.root) == []


def test_a_directory_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store, model, ids = Store(tmp_path / "file"), random_model(), random_ids(100)
    assert store.save(model, "tok", ids, filled(model, ids)).startswith(f"cannot write to {store.root}: ")
    assert store.open(model, "tok", ids, 100).length == 0 and store.entries() == []


def test_only_what_killed_processes_left_is_swept(store: Store) -> None:
    store.root.mkdir(parents=True)
    for name, age in ((".tmp-old", 7200), (".tmp-new", 10), ("notes", 7200)):
        (store.root / name).mkdir()
        os.utime(store.root / name, (time.time() - age,) * 2)
    keep(store, random_model(), random_ids(100))
    assert sorted(os.listdir(store.root)) == sorted([".tmp-new", "notes", only_entry(store).name])


def test_entries_are_private(store: Store) -> None:
    keep(store, random_model(), random_ids(100))
    assert [path.stat().st_mode & 0o077 for path in (store.root, only_entry(store))] == [0, 0]


def test_cache_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_CACHE_DIR", str(tmp_path))
    store, model, run = Store(tmp_path), random_model(), CliRunner().invoke
    for seed in (1, 2, 3):
        ids = random_ids(64 * seed, seed)
        store.save(model, "tok", ids, filled(model, ids), "tiny")
    assert "rm" in run(command, []).stdout and run(command, []).exit_code == 0
    assert run(command, ["path"]).stdout == f"{store.root}\n"
    table = run(command, ["ls"]).stdout.splitlines()
    assert len(table) == 4 and table[1].split()[1] == "192" and table[1].endswith("now  tiny")
    records = [json.loads(line) for line in run(command, ["ls", "--json"]).stdout.splitlines()]
    assert [r["tokens"] for r in records] == [192, 128, 64]
    assert records[0].keys() == {"schema_version", "id", "tokens", "bytes", "created", "used", "model"}
    shown = json.loads(run(command, ["show", records[0]["id"][:10], "--json"]).stdout)
    assert records[0].items() <= shown.items() and Path(shown["path"]).is_dir() and shown["capacity"] >= 192 + SLACK
    assert "tokens       192\n" in run(command, ["show", records[0]["id"]]).stdout
    assert run(command, ["rm", records[0]["id"][:10]]).exit_code == 0
    assert [e.tokens for e in store.entries()] == [128, 64]
    assert run(command, ["rm"]).exit_code == run(command, ["rm", "--all", "ab"]).exit_code == 2
    assert run(command, ["rm", "--all"]).exit_code == 0
    assert store.entries() == []


def test_the_stored_text_can_be_read(nsa, tmp_path: Path) -> None:
    text = "the quick brown fox é jumps\n" * 30
    (tmp_path / "a.txt").write_text(text)
    assert nsa("ask", tmp_path / "a.txt", "who?", "--max-tokens", 1).code == 0
    (entry,) = Store(tmp_path / "store").entries()
    shown = nsa("cache", "show", entry.id[:6], "--text", "-m", os.environ["NSA_MODEL"])
    assert shown.out.startswith("<|im_start|>user\n") and shown.out[-200:] in text and shown.code == 0
    assert nsa("cache", "show", entry.id[:6], "--text").code == 5  # a directory's name is no installed model


def test_verify_finds_what_a_disk_has_damaged(nsa, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for seed in (1, 2, 3):
        keep(store, random_model(), random_ids(64, seed))
    run = nsa("cache", "verify")
    assert (run.code, run.out.count("  ok\n"), run.err) == (0, 3, "")
    whole, kv, ids = store.entries()
    for file in (kv.path / "kv", ids.path / "ids"):
        data = bytearray(file.read_bytes())
        data[11] ^= 1
        file.write_bytes(data)
    run = nsa("cache", "verify", "--remove")
    assert run.code == 5 and f"{kv.id[:12]}  its keys and values" in run.out and f"{ids.id[:12]}  its tokens" in run.out
    assert run.err == "nsa: 2 of 3 stored contexts are damaged; removed\n"
    assert [entry.id for entry in store.entries()] == [whole.id]


def test_prune_keeps_what_was_used_last(nsa, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for seed in range(4):
        keep(store, random_model(), random_ids(64, seed))
    for age, entry in enumerate(store.entries()):
        os.utime(entry.path / "entry.json", (time.time() - age * 3600 - 60,) * 2)
    kept = store.entries()
    assert nsa("cache", "prune", "--unused", "2.5h").code == 0
    assert store.entries() == kept[:3]
    assert nsa("cache", "prune", "--max-size", kept[0].bytes + kept[1].bytes).code == 0
    assert store.entries() == kept[:2]
    assert nsa("cache", "prune", "--max-size", 1, "--unused", "1d").err.startswith("removed 2, ")
    assert nsa("cache", "prune").code == nsa("cache", "prune", "--unused", "soon").code == 2


def test_removing_an_unknown_or_ambiguous_id_is_an_input_error(store: Store) -> None:
    with pytest.raises(InputError, match="no stored context starts with 'abc'; see: nsa cache ls"):
        store.remove("abc")
    for seed in range(17):  # two of 17 ids share a first digit
        keep(store, random_model(), random_ids(64, seed))
    first = [e.id[0] for e in store.entries()]
    twice = max(first, key=first.count)
    with pytest.raises(InputError, match=f"stored contexts start with {twice!r}"):
        store.remove(twice)
    assert len(store.entries()) == 17
