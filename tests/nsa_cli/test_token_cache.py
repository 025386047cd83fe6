"""Token ids kept between runs: the same as encoded, whatever happens to the file."""

import random
import sqlite3
from multiprocessing import get_context
from pathlib import Path

import pytest

from nsa_cli import token_cache
from nsa_cli.token_cache import FILE, TokenCache


class Counting:
    """A tokenizer with a token per character, which counts what it is asked for."""

    digest = "d"

    def __init__(self) -> None:
        self.calls = 0

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        self.calls += 1
        return [ord(c) for c in text], list(range(len(text)))


LONG = "some text é\n" * 200


def encode(directory: Path, text: str = LONG, digest: str = "d") -> int:
    """Encode through the cache and check the result; returns how often the tokenizer was asked."""
    tokenizer = Counting()
    tokenizer.digest = digest
    with TokenCache(directory, tokenizer) as cache:
        ids, offsets = cache.encode_with_offsets(text)
    assert (list(ids), list(offsets)) == Counting().encode_with_offsets(text)
    return tokenizer.calls


def test_the_second_time_nothing_is_encoded(tmp_path) -> None:
    assert [encode(tmp_path), encode(tmp_path)] == [1, 0]
    assert encode(tmp_path, LONG + "x") == 1
    assert encode(tmp_path, digest="another tokenizer") == 1
    assert [encode(tmp_path, "short"), encode(tmp_path, "short")] == [1, 1]
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


def test_damage_costs_time_only(tmp_path) -> None:
    encode(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    chance = random.Random(0)
    for _ in range(30):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 50, 5000))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / FILE).write_bytes(damaged[: chance.choice((len(damaged), 10, 5000))])
        encode(tmp_path)
    (tmp_path / FILE).write_bytes(b"not a database" * 100)
    assert [encode(tmp_path), encode(tmp_path)] == [1, 0]


def test_a_value_under_another_key_is_not_taken(tmp_path) -> None:
    encode(tmp_path)
    encode(tmp_path, LONG + "x")
    with sqlite3.connect(tmp_path / FILE) as database:
        (value,) = database.execute("SELECT value FROM tokens LIMIT 1").fetchone()
        database.execute("UPDATE tokens SET value = ?", (value,))
    database.close()
    assert encode(tmp_path) + encode(tmp_path, LONG + "x") == 1


def test_the_least_recently_used_go_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(token_cache, "QUOTA", 200_000)
    texts = [f"{i} {LONG}" for i in range(12)]  # 20 kB each
    for text in texts[:10]:
        encode(tmp_path, text)
    assert encode(tmp_path, texts[0]) == 0
    encode(tmp_path, texts[10])
    with sqlite3.connect(tmp_path / FILE) as database:
        (total,) = database.execute("SELECT sum(length(value)) FROM tokens").fetchone()
    database.close()
    assert total <= 200_000
    assert encode(tmp_path, texts[10]) == 0


def test_where_nothing_can_be_written_texts_are_encoded(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert [encode(tmp_path / "file"), encode(tmp_path / "file")] == [1, 1]
    (tmp_path / "directory" / FILE).mkdir(parents=True)
    assert encode(tmp_path / "directory") == 1


def write_many(directory: Path, seed: int) -> None:
    for i in range(10):
        encode(directory, f"{(seed + i) % 12} {LONG}")


@pytest.mark.parametrize("processes", [4])
def test_processes_share_one_cache(tmp_path, processes: int) -> None:
    context = get_context("spawn")
    running = [context.Process(target=write_many, args=(tmp_path, seed)) for seed in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * processes
    assert encode(tmp_path, f"3 {LONG}") == 0
