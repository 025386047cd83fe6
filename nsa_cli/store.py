"""Prefilled contexts on disk, found again by their tokens: a question about a known context skips its prefill.

An entry is a directory named by the hash of its `chain`, written once and never changed, so readers need no lock:

    entry.json  what it is; its modification time is when the entry was last used
    ids         the tokens, int32, a whole number of blocks of 64
    chain       a sha256 per block over the one before it and the block's ids; the first one's predecessor is a
                fingerprint of all that keys and values depend on besides tokens, so that equal at block i means
                equal up to block i. It finds candidates; the ids themselves decide.
    kv          the buffers of a `Cache` with free rows for questions and answers; a sparse file

Opening maps `kv` privately: attention reads from the page cache what it touches, what is appended stays in memory.
Names, sizes and tokens are checked; the bytes of keys and values are trusted, as those of weights are: to read them
all would cost what mapping saves. `Store.verify` reads them, and compares with a checksum from when they were written.
"""

import json
import os
import re
import secrets
import shutil
import tempfile
import time
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from nsa_cli.units import format_bytes
from nsa_models.errors import InputError

if TYPE_CHECKING:
    import torch

    from nsa_models import Cache, NSAModel

SCHEMA_VERSION = 1
BLOCK = 64  # tokens that one link of the chain covers
DIGEST = 32  # bytes of a link
SLACK = 4096  # free rows of a stored cache: more than most questions and answers, and holes take no disk space
PAGE = 4096
QUOTA = 20_000_000_000
STALE_SECONDS = 3600  # a temporary directory this old was left by a killed process


@dataclass(frozen=True)
class Entry:
    """One stored context; `bytes` is what it takes on disk, times are seconds since the epoch."""

    id: str
    tokens: int
    bytes: int
    created: float
    used: float
    model: str
    path: Path = field(repr=False)
    capacity: int = field(repr=False)  # rows of its buffers
    fingerprint: str = field(repr=False)
    rope_factor: float = field(repr=False)
    chunk: int = field(repr=False)  # of positions, whose queries its keys are rotated for
    chain: bytes = field(repr=False)
    checksum: int | None = field(repr=False)  # of `kv`; None = written before there was one


@dataclass(frozen=True)
class Stored:
    """A cache to go on from: its first `length` tokens are done; `note` says why not all but one, or is empty."""

    cache: "Cache"
    length: int
    note: str


class Miss(Exception):
    """Why no stored context could be used."""


class Store:
    """The stored contexts of a cache directory. Any number of processes may use it at a time."""

    def __init__(self, directory: Path, quota_bytes: int | None = None) -> None:
        """quota_bytes: None = 20 GB, or a quarter of the free disk if that is less."""
        self.root, self.quota_bytes = Path(directory) / "contexts", quota_bytes

    def open(self, model: "NSAModel", tokenizer_digest: str, ids: Sequence[int], capacity: int) -> Stored:
        """A writable cache of `capacity` tokens that holds the longest stored prefix of `ids`, but not their last
        token, whose logits are needed; an empty cache if nothing stored fits. Never raises for what is on disk.
        """
        from nsa_models import Cache

        wanted = Cache.for_model(model, capacity, device="meta")
        entries, damaged = self._scan()
        try:
            entry, length = _best(entries, _fingerprint(model, tokenizer_digest, wanted), wanted.rope_factor, ids)
            stored_ids, cache = self._load(entry, model, wanted, ids, length)
        except Miss as miss:
            return Stored(Cache.for_model(model, capacity), 0, _words(str(miss), damaged))
        return Stored(cache, length, _words(_difference(stored_ids, ids, length), damaged))

    def save(
        self,
        model: "NSAModel",
        tokenizer_digest: str,
        ids: Sequence[int],
        cache: "Cache",
        name: str = "",
        anew: bool = False,
    ) -> str | None:
        """Keep the whole blocks of `ids` that `cache` holds: all, or what was done when a prefill was interrupted.

        ids: what later questions share, so a context without its question. name: the model's, for people. anew: also
        where the same is stored already.
        Returns None, also where there is nothing new to keep, or in words why it could not be kept; never raises
        for what the disk does. Replaces entries that this one continues, and the least recently used over quota.
        """
        tokens = min(len(ids), cache.length) // BLOCK * BLOCK
        if not tokens or not model.fingerprint:
            return None
        fingerprint = _fingerprint(model, tokenizer_digest, cache)
        chain = _chain(fingerprint, cache.rope_factor, ids[:tokens])
        about = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint,
            "model": name or model.fingerprint[:12],
            "tokens": tokens,
            "rope_factor": cache.rope_factor,
            "chunk": cache.chunk,
            "created": time.time(),
        }
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sweep()
            entries, _ = self._scan()
            if any(e.chain.startswith(chain) for e in entries) and not anew:
                return None
            continued = [e for e in entries if chain.startswith(e.chain)]
            refusal = self._make_room(_payload(cache, tokens), [e for e in entries if e not in continued])
            if refusal:
                return refusal
            for entry in (e for e in continued if e.chain == chain):
                self._discard(entry.path)  # it has the name of the one to be written
            self._write(cache, array("i", ids[:tokens]), chain, about)
            for entry in (e for e in continued if e.chain != chain):
                self._discard(entry.path)
        except OSError as error:
            return f"cannot write to {self.root}: {error.strerror or error}"
        return None

    def entries(self) -> list[Entry]:
        """Every whole entry, the last used first; damaged ones are removed."""
        return sorted(self._scan()[0], key=lambda e: e.used, reverse=True)

    def find(self, id_prefix: str) -> Entry:
        """The one entry whose id starts so. InputError if there is none, or more than one."""
        found = [e for e in self.entries() if id_prefix and e.id.startswith(id_prefix)]
        if len(found) != 1:
            problem = f"{len(found)} stored contexts start" if found else "no stored context starts"
            raise InputError(f"{problem} with {id_prefix!r}; see: nsa cache ls")
        return found[0]

    def remove(self, id_prefix: str) -> Entry:
        """Delete the one entry whose id starts so. InputError if there is none, or more than one."""
        entry = self.find(id_prefix)
        self._discard(entry.path)
        return entry

    def prune(self, max_bytes: int | None, max_age: float | None) -> list[Entry]:
        """Delete entries that were last used more than max_age seconds ago, and the least recently used ones until the
        rest take max_bytes at most. Returns what was deleted. None = no limit.
        """
        removed, size = [], 0
        for entry in self.entries():
            size += entry.bytes
            old = max_age is not None and time.time() - entry.used > max_age
            if old or (max_bytes is not None and size > max_bytes):
                size -= entry.bytes
                removed.append(entry)
                self._discard(entry.path)
        return removed

    def verify(self, entry: Entry) -> str:
        """What is wrong with an entry, all of whose bytes are read, or an empty text."""
        try:
            if _chain(entry.fingerprint, entry.rope_factor, read_ids(entry)) != entry.chain:
                return "its tokens do not match their hashes"
            if entry.checksum is not None and _checksum(entry.path / "kv") != entry.checksum:
                return "its keys and values are not those that were written"
        except OSError as error:
            return (error.strerror or str(error)).lower()
        return ""

    def _load(
        self, entry: Entry, model: "NSAModel", wanted: "Cache", ids: Sequence[int], length: int
    ) -> tuple[Sequence[int], "Cache"]:
        """An entry's tokens, and a cache of their first `length`, which must be those of `ids`. Raises Miss."""
        try:
            stored_ids = read_ids(entry)
            if stored_ids[:length] != array("i", ids[:length]):
                raise ValueError("its tokens do not match their hashes")
            cache = _open_cache(entry, model, wanted, length)
        except ValueError as error:
            self._discard_if_possible(entry.path)
            raise Miss(f"removed damaged entry {entry.id[:12]}: {error}") from None
        except (OSError, RuntimeError) as error:  # torch reports a failed mapping as a RuntimeError
            raise Miss(f"entry {entry.id[:12]} cannot be read: {error}") from None
        with suppress(OSError):  # a store that is only readable works, but cannot tell what was used last
            os.utime(entry.path / "entry.json")
        return stored_ids, cache

    def _scan(self) -> tuple[list[Entry], str]:
        """All whole entries, and a remark on damaged ones, which are removed. Touches nothing it did not name."""
        entries, damaged, names = [], [], []
        with suppress(OSError):  # not there yet, or not ours to read
            names = sorted(name for name in os.listdir(self.root) if re.fullmatch("[0-9a-f]{32}", name))
        for path in (self.root / name for name in names):
            try:
                entries.append(_read_entry(path))
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                if path.exists():  # else another process has just removed it
                    damaged.append(path.name[:12])
                    self._discard_if_possible(path)
            except OSError:
                continue  # not ours to read
        return entries, f"removed damaged entry {', '.join(damaged)}" if damaged else ""

    def _make_room(self, need: int, entries: list[Entry]) -> str | None:
        """Remove the least recently used entries until `need` more bytes fit; a refusal if they never will."""
        used = sum(e.bytes for e in entries)
        quota = self.quota_bytes
        if quota is None:
            quota = min(QUOTA, (shutil.disk_usage(self.root).free + used) // 4)
        if need > quota:
            return f"the context takes {format_bytes(need)}, all stored contexts may take {format_bytes(quota)}"
        for entry in sorted(entries, key=lambda e: e.used):
            if used + need <= quota:
                break
            self._discard(entry.path)
            used -= entry.bytes
        return None

    def _write(self, cache: "Cache", ids: array, chain: bytes, about: dict) -> None:
        """Write an entry beside the others and rename it into place: it appears whole or not at all."""
        temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root))  # readable by its owner only
        try:
            about["capacity"], about["kv_bytes"] = _write_kv(temporary / "kv", cache, len(ids))
            about["kv_crc32"] = _checksum(temporary / "kv")
            for name, content in (
                ("ids", ids.tobytes()),
                ("chain", chain),
                ("entry.json", json.dumps(about, indent=1).encode()),
            ):
                with open(temporary / name, "wb") as file:
                    file.write(content)
                    _sync(file)
            _sync_directory(temporary)
            final = self.root / _entry_id(chain)
            try:
                os.rename(temporary, final)
            except OSError:
                if not final.is_dir():  # else another process was faster with the same context
                    raise
            _sync_directory(self.root)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _discard(self, path: Path) -> None:
        """Take an entry out in one step, then delete it; a process that has mapped it keeps its pages."""
        grave = self.root / f".tmp-{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):  # another process was faster
            os.rename(path, grave)
            shutil.rmtree(grave, ignore_errors=True)

    def _discard_if_possible(self, path: Path) -> None:
        with suppress(OSError):
            self._discard(path)

    def _sweep(self) -> None:
        """Delete what killed processes left behind."""
        for path in self.root.glob(".tmp-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _fingerprint(model: "NSAModel", tokenizer_digest: str, cache: "Cache") -> str:
    """Everything that keys and values depend on besides the tokens and, kept apart to name it, the RoPE factor.

    Weights without an identity (a model that was not loaded from a checkpoint) are like no others.
    """
    from nsa_models.cache import LAYOUT_VERSION

    parts = {
        "versions": [SCHEMA_VERSION, LAYOUT_VERSION],
        "weights": model.fingerprint or secrets.token_hex(),
        "config": model.config.to_dict(),
        "tokenizer": tokenizer_digest,
        "computed": [model.device.type, str(model.dtype)],
        "stored": [str(cache.dtype), str(cache.compressed_dtype)],
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _chain(fingerprint: str, rope_factor: float, ids: Sequence[int]) -> bytes:
    """The links of every whole block of ids, one after the other."""
    raw, step = array("i", ids).tobytes(), BLOCK * array("i").itemsize
    link, links = sha256(f"{fingerprint} {rope_factor}".encode()).digest(), []
    for start in range(0, len(raw) - step + 1, step):
        link = sha256(link + raw[start : start + step]).digest()
        links.append(link)
    return b"".join(links)


def _best(entries: list[Entry], fingerprint: str, rope_factor: float, ids: Sequence[int]) -> tuple[Entry, int]:
    """The entry that shares most blocks with ids, and how many tokens to take from it. Raises Miss."""
    entries = [e for e in entries if e.fingerprint == fingerprint]
    if not entries:
        raise Miss("no stored context for this model")
    alike = [e for e in entries if e.rope_factor == rope_factor]
    if not alike:
        factor = entries[0].rope_factor
        raise Miss(f"stored with RoPE factor {factor:g}, a context of this length needs {rope_factor:g}")
    chain = _chain(fingerprint, rope_factor, ids)
    entry = max(alike, key=lambda e: (_common_blocks(e.chain, chain), e.used))
    length = min(_common_blocks(entry.chain, chain) * BLOCK, len(ids) - 1)
    if length <= 0:
        raise Miss(f"no stored context starts with the same {BLOCK} tokens")
    return entry, length


def _common_blocks(a: bytes, b: bytes) -> int:
    """How many links two chains share; bisected, since they stay different once they differ."""

    def differ(block: int) -> bool:
        link = slice(block * DIGEST, (block + 1) * DIGEST)
        return a[link] != b[link]

    return bisect_left(range(min(len(a), len(b)) // DIGEST), True, key=differ)


def _entry_id(chain: bytes) -> str:
    return sha256(chain).hexdigest()[:32]


def _read_entry(path: Path) -> Entry:
    """Raises FileNotFoundError, ValueError, KeyError or TypeError where the entry is not what `_write` left."""
    about = json.loads((path / "entry.json").read_bytes())
    chain = (path / "chain").read_bytes()
    tokens = len(chain) // DIGEST * BLOCK
    parts = [(path / name).stat() for name in ("entry.json", "ids", "chain", "kv")]
    sizes = [part.st_size for part in parts]
    if about["schema_version"] != SCHEMA_VERSION or about["tokens"] != tokens or _entry_id(chain) != path.name:
        raise ValueError("entry.json or chain")
    if sizes[1] != tokens * array("i").itemsize or sizes[3] != about["kv_bytes"]:
        raise ValueError("cut short")
    return Entry(
        id=path.name,
        tokens=tokens,
        bytes=sum(part.st_blocks * 512 for part in parts),
        created=float(about["created"]),
        used=parts[0].st_mtime,
        model=str(about["model"]),
        path=path,
        capacity=int(about["capacity"]),
        fingerprint=about["fingerprint"],
        rope_factor=float(about["rope_factor"]),
        chunk=int(about.get("chunk", 0)),
        chain=chain,
        checksum=about.get("kv_crc32"),
    )


def read_ids(entry: Entry) -> array:
    ids = array("i")
    ids.frombytes((entry.path / "ids").read_bytes())
    return ids


def _checksum(path: Path) -> int:
    """CRC-32 of a file: it is for damaged disks, and takes 0.5 s for the 3 GB of 128k tokens."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return crc


def _layout(cache: "Cache") -> tuple[dict[str, int], int]:
    """Where each buffer starts in the file, at whole pages, and the file's size."""
    offsets, size = {}, 0
    for name, buffer in cache.buffers.items():
        offsets[name] = size
        size += -(-buffer.nbytes // PAGE) * PAGE
    return offsets, size


def _payload(cache: "Cache", tokens: int) -> int:
    """Bytes of keys and values that storing `tokens` tokens writes."""
    return sum(tensor.nbytes for tensor in cache.tensors(tokens).values())


def _write_kv(path: Path, cache: "Cache", tokens: int) -> tuple[int, int]:
    """Write the first `tokens` tokens as part of a larger cache. Returns that cache's capacity and the file's size."""
    import torch

    roomy = _shape_of(cache, tokens + SLACK)
    offsets, size = _layout(roomy)
    with open(path, "wb") as file:
        file.truncate(size)
        for name, filled in cache.tensors(tokens).items():
            head_bytes = roomy.buffers[name][0].nbytes
            for head, rows in enumerate(filled.cpu()):  # (tokens or blocks, D), contiguous
                file.seek(offsets[name] + head * head_bytes)
                file.write(rows.contiguous().view(torch.uint8).numpy())
        _sync(file)
    return roomy.capacity, size


def _open_cache(entry: Entry, model: "NSAModel", wanted: "Cache", length: int) -> "Cache":
    """The entry's first `length` tokens: mapped where its buffers have the rows wanted, else copied."""
    from nsa_models import Cache

    buffers = _map_kv(entry.path / "kv", _shape_of(wanted, entry.capacity))
    if entry.capacity < wanted.capacity or model.device.type != "cpu":
        cache = Cache.for_model(model, wanted.capacity, wanted.rope_factor)
        for name, rows in cache.tensors(length).items():
            rows.copy_(buffers[name][:, : rows.shape[1]])
        cache.restore(length, entry.chunk)
        return cache
    rows = {name: buffer.shape[1] for name, buffer in wanted.buffers.items()}
    cache = Cache(
        wanted.config,
        wanted.capacity,
        dtype=wanted.dtype,
        compressed_dtype=wanted.compressed_dtype,
        rope_factor=wanted.rope_factor,
        buffers={name: buffer[:, : rows[name]] for name, buffer in buffers.items()},
    )
    cache.restore(length, entry.chunk)
    return cache


def _map_kv(path: Path, shape: "Cache") -> dict[str, "torch.Tensor"]:
    """Buffers of `shape` over a private mapping of the file: writable, and the file stays as it is."""
    import torch

    offsets, size = _layout(shape)
    if path.stat().st_size != size:
        raise ValueError("its size is not that of its buffers")
    raw = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return {
        name: raw[offsets[name] : offsets[name] + buffer.nbytes].view(buffer.dtype).view_as(buffer)
        for name, buffer in shape.buffers.items()
    }


def _shape_of(cache: "Cache", capacity: int) -> "Cache":
    """A cache like this one for `capacity` tokens, without memory: names, shapes and dtypes."""
    from nsa_models import Cache

    return Cache(cache.config, capacity, "meta", cache.dtype, cache.compressed_dtype, cache.rope_factor)


def _difference(stored: Sequence[int], ids: Sequence[int], length: int) -> str:
    """Why only `length` tokens could be taken from storage; "" if all that could be were."""
    if length == len(ids) - 1:
        return ""
    found = f"first {length:,} of {len(ids):,} tokens match"
    for token in range(length, min(len(stored), len(ids))):
        if stored[token] != ids[token]:
            return f"{found}; differs at token {token:,}"
    return f"{found}; the rest was not stored"


def _words(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    """Make the names in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
