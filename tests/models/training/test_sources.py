"""Sources out of packages made here: what becomes a document, what is held out, what a broken package leaves behind."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from nsa_models.errors import InputError, NSAError
from nsa_models.training import sources
from nsa_models.training.rdata import character_vectors

ALBANIA = {"Geography": {"Area": {"total": {"text": "28,748 sq km"}}, "Climate": {"text": "mild,\nwet"}}}


def r_vector(lines: list[str]) -> bytes:
    item = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    for line in lines:
        item += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
    return struct.pack(">I", len(item)) + zlib.compress(item)


@pytest.fixture
def package(tmp_path: Path, monkeypatch):
    """package({path: bytes}) -> the next download is a .tgz (or .whl) with these files."""

    def make(files: dict[str, bytes], kind: str = "tgz") -> None:
        archive = tmp_path / f"archive.{kind}"
        if kind == "whl":
            with zipfile.ZipFile(archive, "w") as wheel:
                for name, data in files.items():
                    wheel.writestr(name, data)
        else:
            with tarfile.open(archive, "w:gz") as tar:
                for name, data in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        monkeypatch.setattr(sources, "_download", lambda source, folder: archive)

    return make


def fetched(name: str, folder: Path) -> dict[str, str]:
    lines = sources.fetch(name, folder).read_text("utf-8").splitlines()
    return {value["path"]: value["text"] for value in map(json.loads, lines)}


def test_a_factbook_is_lines_of_entries_and_a_region_is_held_out(package, tmp_path):
    facts = json.dumps(ALBANIA).encode()
    names = ("package/europe/al.json", "package/australia-oceania/fj.json", "package/meta/x.json")
    package(dict.fromkeys(names, facts) | {"package/LICENSE": b"public domain"})
    text = "\n# Geography\n\nArea, total: 28,748 sq km\nClimate: mild, wet\n"
    assert fetched("factbook", tmp_path / "a") == {"factbook/europe/al.txt": text}
    assert fetched("factbook-oceania", tmp_path / "a") == {"factbook-oceania/australia-oceania/fj.txt": text}
    assert (tmp_path / "a" / "factbook.licences" / "package_LICENSE").read_bytes() == b"public domain"


def test_novels_come_out_of_r_and_one_is_held_out(package, tmp_path):
    data = r_vector(["EMMA", "", "Émile came."]) + r_vector(["Persuasion", "", "Sir Walter"])
    package({"x/janeaustenr/data/Rdata.rdb": data})
    assert fetched("austen", tmp_path / "a") == {"austen/emma.txt": "EMMA\n\nÉmile came.\n"}
    assert fetched("persuasion", tmp_path / "a") == {"persuasion/persuasion.txt": "Persuasion\n\nSir Walter\n"}


def test_code_keeps_its_paths_and_what_is_no_text_is_left_out(package, tmp_path):
    files = {"click/data/core.py": b"x = 1", "click/latin.py": b"\xe9", "click/empty.py": b" ", "click/a.txt": b"no"}
    package(files, "whl")
    assert fetched("click", tmp_path / "a") == {"click/data/core.py": "x = 1\n"}


@pytest.mark.parametrize("data", [b"abc", b"\0\0\0\1" + zlib.compress(b"X\n\0\0\0\2"), r_vector(["a"])[:20]])
def test_what_is_no_r_data(data):
    with pytest.raises(ValueError, match="not R data"):
        list(character_vectors(data))


@pytest.mark.parametrize("files", [{"package/europe/al.json": b"{"}, {"x/janeaustenr/data/Rdata.rdb": b"abc"}])
def test_a_damaged_package_leaves_nothing(package, tmp_path, files):
    package(files)
    name = "factbook" if "package/europe/al.json" in files else "austen"
    with pytest.raises(NSAError, match="damaged .*; nothing was kept"):
        sources.fetch(name, tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_a_package_without_documents_leaves_nothing(package, tmp_path):
    package({"click/readme.txt": b"no code"}, "whl")
    with pytest.raises(NSAError, match=r"click==8.1.8: no file in it matches \*.py"):
        sources.fetch("click", tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(InputError, match="no source 'wikipedia'"):
        sources.fetch("wikipedia", tmp_path / "a")
