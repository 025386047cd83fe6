"""git, run so that the repository it reads cannot make it run anything else."""

import os
import subprocess
from pathlib import Path

# A repository's own configuration may name programs; reading it must not run them, nor reach for a network.
HARMLESS = (
    *("-c", "core.fsmonitor=false"),
    *("-c", "log.showSignature=false"),
    *("-c", "protocol.allow=never"),
    *("-c", "core.quotePath=false"),
)
# A hook's GIT_DIR or GIT_INDEX_FILE points at another repository than the one that was named.
REDIRECTS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_EXTERNAL_DIFF")


def run_git(root: Path, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess:
    """`git -C root arguments...`, its output as bytes. OSError where git is missing."""
    environment = {name: value for name, value in os.environ.items() if name not in REDIRECTS}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    command = ["git", *HARMLESS, "-C", str(root), *arguments]
    stream = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(command, capture_output=True, env=environment, **stream)
