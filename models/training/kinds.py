"""Every kind of task by its name."""

from nsa_models.training.found import chapter, defines, field, mentioned, raises, returns, summary, takes, usage
from nsa_models.training.tasks import Maker, absent, keys, needle, plain, queries, values, variables

PLANTED = (needle, keys, values, queries, variables, absent)
FOUND = (defines, mentioned, takes, returns, raises, summary, usage, chapter, field)  # what stands in the texts anyway
KINDS: dict[str, Maker] = {maker.__name__: maker for maker in (*PLANTED, *FOUND)}
PRACTISED = KINDS | {"plain": plain}  # evaluation asks other questions about no text: `short_tasks`
