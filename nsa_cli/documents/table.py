"""CSV, TSV and JSONL: the first rows of a long table, and the count of the others."""

import csv
import io
from itertools import islice

from nsa_cli.documents.document import Extract

MAX_ROWS = 200


def read_csv(text: str, delimiter: str = ",") -> Extract:
    """A record may hold line ends in quotes; where the quotes are broken, a line is a record."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    last_line = total = 0
    try:
        for total, _ in enumerate(reader, 1):
            last_line = reader.line_num if total <= MAX_ROWS else last_line
    except csv.Error:
        return read_lines(text)
    return first_lines(text, last_line, total)


def read_tsv(text: str) -> Extract:
    return read_csv(text, "\t")


def read_lines(text: str) -> Extract:
    """JSONL: a line is a record."""
    return first_lines(text, MAX_ROWS, len(text.removesuffix("\n").split("\n")))


def first_lines(text: str, lines: int, total: int) -> Extract:
    if total <= MAX_ROWS:
        return Extract(text)
    kept = "".join(islice(io.StringIO(text, newline=""), lines))
    rest = f"rows {MAX_ROWS + 1:,} to {total:,}"
    return Extract(f"{kept}({rest} are not shown)\n", note=f"{rest}; --all-rows reads them")
