"""Files whose text a program of the user's prints."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nsa_cli.documents.chapters import book_parts, markdown_parts
from nsa_cli.documents.decode import decode
from nsa_cli.documents.document import Extract, NotText
from nsa_cli.units import format_bytes

SECONDS = 120
MAX_BYTES = 64_000_000  # of what it prints


def convert(command: Sequence[str], path: Path | None, data: bytes, name: str) -> Extract:
    """What `command` prints about a file; its path takes the place of `{}`, or comes last. Raises NotText.

    path: of the file; None = it is on no disk, and `data` is put into a file for the time being.
    """
    with tempfile.TemporaryDirectory() as directory:
        if path is None:
            path = Path(directory, PurePosixPath(name).name)
            path.write_bytes(data)
        place = str(path.absolute())
        given = [part.replace("{}", place) for part in command]
        text = decode(printed(given if given != list(command) else [*command, place]))
    return Extract(text, markdown_parts(text) or book_parts(text), converted=True)


def printed(command: Sequence[str]) -> bytes:
    """What a command prints, into a file, so that it takes no memory before its size is known."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise NotText(f"{command[0]} took over {SECONDS} s") from None
        except OSError as error:
            raise NotText(f"{command[0]}: {(error.strerror or str(error)).lower()}") from None
        if run.returncode:
            errors.seek(0)
            said = errors.readline(300).decode("utf-8", "replace").strip()
            raise NotText(f"{command[0]} failed (exit code {run.returncode}){': ' * bool(said)}{said}")
        if output.seek(0, 2) > MAX_BYTES:
            raise NotText(f"{command[0]} printed more than {format_bytes(MAX_BYTES)}")
        output.seek(0)
        return output.read()
