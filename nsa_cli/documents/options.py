"""The options of every command that reads documents."""

import functools

import click

from nsa_cli.documents.document import ReadOptions
from nsa_cli.units import format_bytes, parse_quantity

PATTERN = dict(metavar="PATTERN", multiple=True)
OPTIONS = (
    click.option("--include", **PATTERN, help="Read only matching files of directories: '*.py', docs, 'src/**/*.c'."),
    click.option("--exclude", **PATTERN, help="Leave matching files out: tests, '*.svg', /docs/old. As in .gitignore."),
    click.option("--hidden", is_flag=True, help="Also read hidden files; those that git tracks are read anyway."),
    click.option("--no-gitignore", is_flag=True, help="Also read what .gitignore and git's other excludes leave out."),
    click.option("--no-default-ignores", is_flag=True, help="Also read lock files, node_modules, *.min.js etc."),
    click.option(
        "--max-file-size",
        metavar="BYTES",
        type=parse_quantity,
        default=str(ReadOptions.max_file_bytes),
        help=f"Skip larger files of directories: 500k, 2M. [default: {format_bytes(ReadOptions.max_file_bytes)}]",
    ),
)


def document_options(command):
    """Adds the options above to a click command, which receives them as `read`, a ReadOptions."""

    @functools.wraps(command)
    def reading(*args, include, exclude, hidden, no_gitignore, no_default_ignores, max_file_size, **others):
        read = ReadOptions(include, exclude, hidden, not no_gitignore, not no_default_ignores, max_file_size)
        return command(*args, read=read, **others)

    for option in reversed(OPTIONS):
        reading = option(reading)
    return reading
