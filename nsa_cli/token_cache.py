"""Token ids by the hash of their text, kept between runs: what was encoded once is only read again.

One SQLite file, safe between processes. A value carries its own hash, and a file that is damaged is begun anew: the
worst that can happen to the cache is that texts are encoded once more.
"""

import hashlib
import os
import sqlite3
import time
from array import array
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsa_models.tokenizer import Tokenizer

FILE = "tokens.sqlite"
SHORTEST = 1000  # characters; less is encoded faster than it is looked up
QUOTA = 200_000_000  # bytes of values; the least recently used go first
CHECK = 16  # bytes of a value's hash
BUSY_S = 2.0


class TokenCache:
    """Encodes as its tokenizer does, from the cache where it can. A context manager, which writes at its end.

    directory: None = keep nothing.
    """

    def __init__(self, directory: Path | None, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        self.new: dict[bytes, bytes] = {}
        self.used: set[bytes] = set()
        self.hits = 0
        self.lock = Lock()  # encoding leaves Python's lock alone, so that threads are worth while
        self.database = self._open(directory / FILE) if directory else None

    def __enter__(self) -> "TokenCache":
        return self

    def __exit__(self, *error: object) -> None:
        if self.database:
            with suppress(sqlite3.Error):  # busy, full or read-only: nothing is lost but time
                self._write()
            self.database.close()
            self.database = None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[array | list[int], array | list[int]]:
        """Ids, and for each the index of its first character."""
        if len(text) < SHORTEST or not self.database:
            return self.tokenizer.encode_with_offsets(text)
        key = self._key(text)
        found = self._read(key)
        if found:
            self.hits += 1
            self.used.add(key)
            return found
        ids, offsets = self.tokenizer.encode_with_offsets(text)
        value = array("I", [*ids, *offsets]).tobytes()
        self.new[key] = hashlib.sha256(key + value).digest()[:CHECK] + value
        return ids, offsets

    def _key(self, text: str) -> bytes:
        import tokenizers

        about = f"{tokenizers.__version__} {self.tokenizer.digest} "
        return hashlib.sha256(about.encode() + text.encode("utf-8", "surrogatepass")).digest()

    def _open(self, path: Path) -> sqlite3.Connection | None:
        for _ in range(2):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # tokens are the document: nobody else's
                database = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
                database.execute("CREATE TABLE IF NOT EXISTS tokens (key BLOB PRIMARY KEY, value BLOB, used REAL)")
                return database
            except sqlite3.OperationalError:  # busy or read-only
                return None
            except sqlite3.DatabaseError:  # not a database, or no longer
                path.unlink(missing_ok=True)
            except OSError:
                return None
        return None

    def _read(self, key: bytes) -> tuple[array, array] | None:
        try:
            with self.lock:
                row = self.database.execute("SELECT value FROM tokens WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            return None
        if not row or not isinstance(row[0], bytes) or len(row[0]) % 8 != CHECK % 8:
            return None
        check, value = row[0][:CHECK], row[0][CHECK:]
        if hashlib.sha256(key + value).digest()[:CHECK] != check:
            return None
        numbers = array("I", value)
        half = len(numbers) // 2
        return numbers[:half], numbers[half:]

    def _write(self) -> None:
        now = time.time()
        with self.database:
            rows = ((key, value, now) for key, value in self.new.items())
            self.database.executemany("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", rows)
            self.database.executemany("UPDATE tokens SET used = ? WHERE key = ?", ((now, key) for key in self.used))
            if self.new:
                self._prune()

    def _prune(self) -> None:
        (total,) = self.database.execute("SELECT coalesce(sum(length(value)), 0) FROM tokens").fetchone()
        oldest = self.database.execute("SELECT key, length(value) FROM tokens ORDER BY used").fetchall()
        for key, size in oldest if total > QUOTA else ():
            if total <= QUOTA // 2:
                break
            self.database.execute("DELETE FROM tokens WHERE key = ?", (key,))
            total -= size
