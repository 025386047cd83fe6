"""Completion, as a shell asks for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NSA = Path(sys.executable).parent / "nsa"


@pytest.fixture
def environment(tmp_path, tiny_checkpoint):
    for name in ("tiny", "other"):
        shutil.copytree(tiny_checkpoint, tmp_path / "data" / "models" / name)
    return os.environ | {"NSA_DATA_DIR": str(tmp_path / "data"), "PATH": f"{NSA.parent}:{os.environ['PATH']}"}


def completed(words: list[str], environment: dict[str, str], tmp_path: Path) -> list[str]:
    """What bash offers for the last word, through the script that `nsa completion bash` prints."""
    script = tmp_path / "nsa.bash"
    if not script.exists():
        printed = subprocess.run([NSA, "completion", "bash"], check=True, stdout=subprocess.PIPE, env=environment)
        script.write_bytes(printed.stdout)
    line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
    shown = "_nsa_completion nsa; printf '%s\\n' \"${COMPREPLY[@]}\""
    run = f'source {script}; compopt() {{ echo "$@"; }}; {line}; {shown}'
    shell = subprocess.run(["bash", "-c", run], check=True, stdout=subprocess.PIPE, env=environment, text=True)
    return shell.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["nsa", "comp"], ["completion"]),
        (["nsa", "cache", "p"], ["path", "prune"]),
        (["nsa", "run", "code"], ["code-review"]),
        (["nsa", "recipes", "show", "time"], ["timeline"]),
        (["nsa", "ask", "--max-t"], ["--max-tokens"]),
        (["nsa", "ask", "-m", "''"], ["other", "tiny"]),
        (["nsa", "models", "check", "ti"], ["tiny"]),
        (["nsa", "plan", "-m", "./ch"], ["-o dirnames", ""]),
        (["nsa", "summarize", "boo"], ["-o default", ""]),
        (["nsa", "completion", "z"], ["zsh"]),
    ],
    ids=" ".join,
)
def test_what_bash_offers(environment, tmp_path, words, offered):
    assert completed(words, environment, tmp_path) == offered


def test_stored_contexts_are_offered_by_id(nsa, tmp_path, monkeypatch):
    from nsa_cli.completion import complete_stored

    (tmp_path / "a.txt").write_text("the quick fox jumps\n" * 60)
    assert nsa("ask", tmp_path / "a.txt", "who?", "--max-tokens", 2).code == 0
    (item,) = complete_stored(None, None, "")
    assert nsa("cache", "rm", item.value).code == 0
    assert item.help.endswith(" tokens, tiny")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_scripts_of_other_shells_ask_the_same_program(nsa, shell):
    run = nsa("completion", shell)
    assert run.code == 0 and f"_NSA_COMPLETE={shell}_complete" in run.out


def test_an_unknown_shell_is_a_usage_error(nsa):
    assert nsa("completion", "tcsh").code == 2
