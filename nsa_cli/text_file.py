"""A text file that the user names: a template, a schema, a conversation."""

import os

from nsa_models.errors import InputError


def read_text(file: str | os.PathLike, most: int = -1) -> str:
    """What a file says, its first `most` characters or all. Raises InputError if it cannot be read, or is not UTF-8."""
    try:
        with open(file, encoding="utf-8") as text:
            return text.read(most)
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8") from None
    except OSError as error:
        raise InputError(f"{file}: {(error.strerror or str(error)).lower()}") from None
