"""Jupyter notebook -> text, cell by cell, with the beginning of what each cell printed."""

import json
from collections.abc import Iterator

from nsa_cli.documents.document import Extract, NotText, assemble

OUTPUT_LINES = 20


def read_notebook(text: str) -> Extract:
    """Cells as `cell 3`, counted from 1 with the empty ones."""
    try:
        notebook = json.loads(text)
        cells = notebook.get("cells")
        if cells is None:  # nbformat 3
            cells = [cell for sheet in notebook["worksheets"] for cell in sheet["cells"]]
        extract = assemble((f"cell {number}", cell_text(cell)) for number, cell in enumerate(cells, 1))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise NotText("damaged notebook") from None
    if not extract.text:
        raise NotText("notebook without text")
    return extract


def cell_text(cell: dict) -> str:
    source = joined(cell.get("source", cell.get("input", "")))
    outputs = "\n".join(filter(str.strip, output_texts(cell.get("outputs") or [])))
    if not outputs.strip():
        return source
    lines = outputs.strip("\n").split("\n")
    if len(lines) > OUTPUT_LINES:
        lines[OUTPUT_LINES:] = [f"({len(lines) - OUTPUT_LINES:,} more lines)"]
    return "\n".join([source.rstrip("\n"), "Output:", *lines])


def output_texts(outputs: list) -> Iterator[str]:
    """What was printed or shown as text; pictures have none."""
    for output in outputs:
        if "ename" in output:
            yield f"{output['ename']}: {output.get('evalue', '')}"
        elif "text" in output:
            yield joined(output["text"])
        else:
            yield joined((output.get("data") or {}).get("text/plain", ""))


def joined(text: str | list[str]) -> str:
    """nbformat holds a text as one string or as its lines."""
    joint = text if isinstance(text, str) else "".join(text)
    return joint.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode()
