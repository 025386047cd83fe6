"""Context -> (stored cache | prefill) -> answer: the one line that all commands that ask share."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from nsa_cli.budget import check_fit
from nsa_cli.checkpoint import Checkpoint
from nsa_cli.conversation import Conversation
from nsa_cli.reply import Answer
from nsa_cli.request import Request

if TYPE_CHECKING:
    from nsa_cli.context import Context


def answer(
    checkpoint: Checkpoint,
    context: "Context",
    question: str,
    request: Request,
    tell: Callable[[str], None],
) -> Answer:
    """Read the context, or find it read in the store, and answer the question. tell: gets the text as it comes, or at
    its end where it has a schema.

    What is stored ends at a block border before the question, and a stored context is entered at that same border: the
    model computes the same either way. Ctrl-C while generating keeps what was said; while reading, what was read.
    Raises BudgetError if prompt and answer do not fit the model, --max-context or memory, and CheckError if the answer
    is not of the schema.
    """
    (reply,) = answers(checkpoint, context, [question], request, tell)
    return reply


def answers(
    checkpoint: Checkpoint,
    context: "Context",
    questions: Sequence[str],
    request: Request,
    tell: Callable[[str], None],
) -> Iterator[Answer]:
    """The same for several questions, each on its own: the context is read once, and each enters where it ends."""
    prompts = [checkpoint.tokenizer.prompt(request.wording(question), request.system) for question in questions]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i].after))
    around = len(prompts[longest].before) + len(prompts[longest].after)
    capacity = around + len(context.ids) + request.sampling.max_tokens
    check_fit(checkpoint, context, questions[longest], request, capacity)
    conversation = Conversation(checkpoint, context, request, capacity)
    for question in questions:
        conversation.reset()
        yield conversation.ask(question, tell)
