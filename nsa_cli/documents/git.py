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
    stream = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(command(root, *arguments), capture_output=True, env=environment(), **stream)


class Objects:
    """The objects of repositories; one process a repository reads all that are asked for, until `close`."""

    def __init__(self) -> None:
        self.processes: dict[Path, subprocess.Popen] = {}

    def read(self, root: Path, identity: str) -> bytes:
        """The bytes of an object. OSError where it is missing, or git is."""
        if root not in self.processes:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self.processes[root] = subprocess.Popen(command(root, "cat-file", "--batch"), env=environment(), **pipes)
        process = self.processes[root]
        process.stdin.write(f"{identity}\n".encode())
        process.stdin.flush()
        fields = process.stdout.readline().split()  # object, type, size; then the bytes and a line end
        if len(fields) != 3:
            raise OSError(f"git has no object {identity}")
        return process.stdout.read(int(fields[2]) + 1)[:-1]

    def close(self) -> None:
        for process in self.processes.values():
            process.stdin.close()
            process.stdout.close()
            process.wait()


def command(root: Path, *arguments: str) -> list[str]:
    return ["git", *HARMLESS, "-C", str(root), *arguments]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in REDIRECTS}
    return kept | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
