"""What a user can cause: one exception family, printed by the CLI as one line with its exit code."""


class NSAError(Exception):
    """A failure the user can act on. The message says what is wrong, where, and what to do."""

    exit_code = 1


class InputError(NSAError):
    """A document or argument that cannot be read: no such path, empty, binary, undecodable."""

    exit_code = 3


class BudgetError(NSAError):
    """More tokens or bytes than the model, the budget or the machine holds."""

    exit_code = 4


class ModelError(NSAError):
    """A checkpoint, tokenizer or stored cache that cannot be used."""

    exit_code = 5


class CheckError(NSAError):
    """An output that failed its schema or its checks."""

    exit_code = 6


class BatchError(NSAError):
    """Some jobs of a batch failed; the records say which."""

    exit_code = 7
