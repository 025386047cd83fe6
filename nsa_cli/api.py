"""The commands as methods: what `nsa ask`, `summarize`, `run` and `batch` do, for Python.

nsa = NSA()
reply = nsa.ask("Who owns the Heron?", "harbour/", max_tokens=40)
print(reply.text, reply.citations)
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import click

from nsa_cli.batch import TEXT, Settings, local_engine
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.options import answer_options, checkpoint_options, document_options, packing_options
from nsa_cli.documents import Document, ReadOptions, Skip, read_documents
from nsa_cli.held import Held
from nsa_cli.jobs import groups, parse_jobs
from nsa_cli.output import NORMAL, QUIET, Verbosity, describe, silent
from nsa_cli.packing import Packing, pack, reads_in_parts, room_beside
from nsa_cli.recipe import load_recipe
from nsa_cli.reply import Answer
from nsa_cli.request import Request
from nsa_cli.steps import RecipeAnswer, pack_for, run_recipe
from nsa_cli.summarize import JOIN, WHOLE, Wish, ask_about, summarize
from nsa_models.errors import InputError


class NSA:
    """A model, loaded when it is first needed; the text that was read last stays in memory.

    Options are those of the commands, with underscores: `max_tokens=40`, `include=["*.py"]`, `no_cache=True`. They
    are checked as there, and have the same defaults: those of the environment (NSA_MAX_TOKENS), but no settings
    file. Whatever fails raises an NSAError (nsa_models.errors) that says in one line what, where and what to do.
    """

    def __init__(self, model: str | os.PathLike | None = None, *, quiet: bool = False, **options: object) -> None:
        """options: device, threads, dtype, chat_template. quiet: say nothing on stderr."""
        self.level, self.held = QUIET if quiet else NORMAL, Held()
        with self._speaking():
            self.checkpoint: Checkpoint = _parsed(_checkpoint, options | {"model": model})

    def ask(
        self,
        question: str,
        *paths: str | os.PathLike,
        text: str | None = None,
        schema: str | Mapping | None = None,
        tell: Callable[[str], None] = silent,
        **options: object,
    ) -> Answer:
        """Answer a question about files and folders, or about `text`. tell: gets the answer piece by piece.

        schema: a JSON schema, the name of a file with one, or the short form; `data` of the answer is then its value.
        """
        from nsa_cli.schema import load_schema

        with self._speaking():
            read, packing, request = self._options(options)
            if schema:
                request = replace(
                    request, schema=load_schema(schema if isinstance(schema, str) else json.dumps(schema))
                )
            documents, skips = _documents(paths, text, read)
            context = pack(documents, skips, self.checkpoint, question, request, packing)
            room = room_beside(self.checkpoint, question, request, packing)
            (reply,) = ask_about(self.checkpoint, context, [question], request, room, tell)
            return reply

    def summarize(
        self,
        *paths: str | os.PathLike,
        text: str | None = None,
        focus: str | None = None,
        length: str | int | None = None,
        style: str | None = None,
        tell: Callable[[str], None] = silent,
        **options: object,
    ) -> Answer:
        """Summarize files and folders, or `text`, in parts where they are long. length, style: as of nsa summarize."""
        wish = Wish(focus, length, style)
        with self._speaking():
            read, packing, request = self._options({"max_tokens": wish.max_tokens() or None} | options)
            documents, skips = _documents(paths, text, read)
            context = pack(documents, skips, self.checkpoint, "", request, reads_in_parts(packing))
            return summarize(self.checkpoint, context, request.of_all(), tell, wish.wording(WHOLE), wish.wording(JOIN))

    def run(
        self,
        recipe: str | os.PathLike,
        *paths: str | os.PathLike,
        params: Mapping[str, object] | None = None,
        text: str | None = None,
        tell: Callable[[str], None] = silent,
        **options: object,
    ) -> RecipeAnswer:
        """Run a recipe, by name or file. What it expected and did not get is in `failed`; `require()` raises it."""
        with self._speaking():
            bound = load_recipe(os.fspath(recipe)).bind(params or {})
            read, packing, request = self._options(options)
            documents, skips = _documents(paths, text, bound.read_options(read))
            context = pack_for(bound, documents, skips, self.checkpoint, request, packing, _given(options))
            return run_recipe(self.checkpoint, bound, context, request, tell, _given(options))

    def batch(self, jobs: Iterable[Mapping], **options: object) -> list[dict]:
        """The records of jobs, in their order: each as a line of nsa batch's input and output, as dicts. Jobs about
        the same document have it read once.
        """
        with self._speaking():
            read, packing, request = self._options(options)
            listed = parse_jobs("\n".join(map(json.dumps, jobs)).encode())
            engine = local_engine(self.checkpoint, Settings(read, request, explicit=_given(options), packing=packing))
            records = {job.key: record for job, record in engine(groups(listed))}
            return [records[job.key] for job in listed]

    def _options(self, options: Mapping[str, object]) -> tuple[ReadOptions, Packing, Request]:
        read, packing, request = _parsed(_answering, options)
        return read, packing, replace(request, held=self.held)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """What is said on stderr is as much as this object was made to say."""
        verbosity = Verbosity()
        verbosity.level = self.level
        with click.Context(_answering, obj=verbosity):
            yield


@click.command()
@document_options
@packing_options
@answer_options
def _answering(read: ReadOptions, packing: Packing, request: Request):
    return read, packing, request


@click.command()
@checkpoint_options
def _checkpoint(checkpoint: Checkpoint):
    return checkpoint


def _parsed(command: click.Command, options: Mapping[str, object]):
    """What the command makes of the options. Raises InputError for one that it does not have or take."""
    arguments: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [value]
            arguments += [f"{flag}={os.fspath(v) if isinstance(v, os.PathLike) else v}" for v in values]
    try:
        return command.main(arguments, prog_name="nsa", standalone_mode=False)
    except click.UsageError as error:
        raise InputError(describe(error)[0]) from None


def _given(options: Mapping[str, object]) -> frozenset[str]:
    """What is not left to a recipe, as fields of Sampling, Request and Packing."""
    return frozenset("levels" if name == "level" else name for name in options)


def _documents(paths, text: str | None, read: ReadOptions) -> tuple[list[Document], list[Skip]]:
    if (text is None) == (not paths and not (read.listed or read.diff or read.log or read.revision)):
        raise InputError("name files or folders, or give a text; not both")
    return ([Document(TEXT, text)], []) if text is not None else read_documents([os.fspath(p) for p in paths], read)
