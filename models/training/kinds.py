"""Every kind of task by its name."""

from nsa_models.training.found import chapter, defines, field, raises, returns, summary, takes
from nsa_models.training.tasks import Maker, absent, keys, needle, queries, values, variables

MAKERS = (needle, keys, values, queries, variables, defines, takes, returns, raises, summary, chapter, field, absent)
KINDS: dict[str, Maker] = {maker.__name__: maker for maker in MAKERS}
