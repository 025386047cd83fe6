"""`nsa eval`: perplexity and tasks with known answers, by length and depth, beside other kinds of attention."""

import json
from pathlib import Path

import click

from nsa_cli.checkpoint import Checkpoint
from nsa_cli.commands.bench import parse_lengths
from nsa_cli.commands.options import checkpoint_options, json_option, verbosity_options
from nsa_cli.output import emit
from nsa_models.training.kinds import KINDS

ATTENTIONS = ("full", "nsa", "ask", "h2o", "quest", "streaming")
WORDINGS = ("usual", "held-out")
TASKS = ("perplexity", *KINDS, "short")


@click.command("eval")
@click.option(
    "--task",
    "tasks",
    type=click.Choice(TASKS),
    multiple=True,
    default=("perplexity", "needle"),
    show_default=True,
    metavar="TASK",
    help="What to measure, see above; repeatable.",
)
@click.option(
    "--lengths",
    default="1Ki,2Ki,4Ki",
    show_default=True,
    callback=parse_lengths,
    metavar="TOKENS,...",
    help="Tokens of prompt and answer, such as 8k,32Ki; none beyond those that the texts have.",
)
@click.option(
    "--attention",
    "attentions",
    type=click.Choice(ATTENTIONS),
    multiple=True,
    default=("full", "nsa"),
    show_default=True,
    help="How tokens are read, with the same weights; repeatable.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    default=("psutil",),
    show_default=True,
    metavar="SOURCE|PATH",
    help="Text to read: a held-out source (nsa train --sources), a file or a folder; repeatable.",
)
@click.option("--depths", type=click.IntRange(1, 50), default=5, show_default=True, help="Places of what is asked for.")
@click.option(
    "--samples", type=click.IntRange(1), default=2, show_default=True, help="Prompts per depth; windows of a text."
)
@click.option(
    "--wording",
    type=click.Choice(WORDINGS),
    default="usual",
    show_default=True,
    help="Of the questions: the usual one, or one that training does not practise.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what is planted where.")
@click.option(
    "--heat-map",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw right answers by depth and length: the first task under the last --attention.",
)
@checkpoint_options
@json_option
@verbosity_options
def command(checkpoint: Checkpoint, as_json: bool, heat_map: Path | None, depths: int, **settings) -> None:
    """Measure how well a model reads.

    Perplexity is that of the same tokens at every length, with more and more text before them: the last of windows
    of the longest length, as many as the shortest length has. A task is a question about the text whose answer is
    known: needle (one planted number), keys, values, queries (several), variables (a chain of them), absent
    (nothing to find); defines, takes, returns, raises (Python functions), mentioned (defines, of names that other
    files have too), summary (the sentence that sums up), usage (the function that does it), chapter (the heading
    above a line), field (an entry). What is planted makes each text another; the others ask at all depths of one
    text a sample, which is read once. short is fifty questions about no text. An answer is right if it holds every
    fact. In brackets stands the 95 % confidence interval. h2o, quest and streaming attend to as many tokens a step
    as NSA does in the branches that its gates let through (read per step; what is read only to choose is not
    counted). ask answers as nsa ask does: NSA, and then the passages that the question leads to once more (--reread
    there); named is the share whose places were all among the five that it names.

    \b
    Examples:
      nsa eval
      nsa eval --task short
      nsa eval --task needle --lengths 4Ki,16Ki --depths 10 --heat-map needle.png
      nsa eval --task perplexity --text henry-viii --attention full --attention nsa --attention quest
    """
    from nsa_cli import evaluate

    asked = [task for task in settings["tasks"] if task not in (evaluate.PERPLEXITY, evaluate.SHORT)]
    if heat_map and not asked:
        raise click.UsageError("--heat-map needs a --task with depths, such as needle")
    if not asked and set(settings["attentions"]) == {evaluate.ASK}:
        raise click.UsageError(f"--attention {evaluate.ASK} needs a --task that is asked of a text, such as needle")
    where = tuple((i + 0.5) / depths for i in range(depths))
    settings["lengths"] = tuple(settings["lengths"])
    plan = evaluate.Plan(depths=where, **settings)
    rows = evaluate.measure(checkpoint, plan)
    if as_json:
        emit(json.dumps(evaluate.as_json(checkpoint, plan, rows), ensure_ascii=False) + "\n")
    else:
        emit(evaluate.table(rows))
    if heat_map:
        evaluate.heat_map(rows, heat_map, asked[0], plan.attentions[-1])
