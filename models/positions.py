"""Where tokens stand, for their rotation, in a text of any length: dual chunks.

A model has seen no distance beyond the length it was trained on, and reads badly what stands further away. Scaled
frequencies (YaRN) blur near distances for the sake of far ones. Selection makes something simpler possible, since a
query reads only some blocks: true distances to the near ones, and one distance for all that are far, as InfLLM has it
(arXiv 2402.04617).

A text is cut into chunks of C tokens, as in dual chunk attention (arXiv 2402.17463). Queries of a chunk stand at
C .. 2C-1, the tokens of the chunk before it at 0 .. C-1, and every selection block further back at the first positions,
its tokens in their order. So no distance reaches 2C, whatever the text's length, and up to 2C tokens all are true.
"""

import torch
from torch import Tensor

from nsa_models.config import NSAConfig


def positions(config: NSAConfig, token: Tensor, chunk: int | Tensor) -> Tensor:
    """Positions of tokens as the queries of chunk number `chunk` see them, and as those queries have them themselves.

    token, and chunk where it is a tensor: integers of one shape. Without chunks a token's position is its number.
    """
    size = config.position_chunk
    if not size:
        return token
    before = torch.as_tensor(chunk, device=token.device).sub(1).clamp(min=0)  # the first chunk that is near
    return torch.where(token // size >= before, token - before * size, token % config.select_block)


def chunk_of(config: NSAConfig, token: Tensor) -> Tensor:
    """The number of each token's chunk."""
    return token // config.position_chunk if config.position_chunk else torch.zeros_like(token)
