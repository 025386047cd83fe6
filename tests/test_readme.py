"""What the README shows is what happens: its `$` commands run in order, its Python example prints what is below it."""

import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nsa_cli.cli import COMMANDS
from nsa_cli.settings import BUILTIN, models_dir
from nsa_models.errors import BatchError, BudgetError, CheckError, InputError, ModelError, NSAError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
# What differs from machine to machine and from run to run.
VARIES = (
    (r"\d[\d.,]* (s|tokens/s|kB|MB|GB)\b", r"N \1"),
    (r"^\s*[0-9a-f]{12} ", "ID "),
    (r'_s": [\d.]+', '_s": N'),
    (r"\S+/models/", "MODELS/"),
    (r"computes in \w+: (.*) within .*", r"computes: \1"),
    (r"\d+(\.\d+)?e-\d+", "N"),
    (r" +", " "),
)
ALIKE = 0.8  # what an answer shares with the README's where another CPU rounds otherwise; here they are the same


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[tuple[str, list[str]]]:
    """Every `$` command of the console blocks, in order, with the lines shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def stable(line: str) -> str:
    for pattern, replacement in VARIES:
        line = re.sub(pattern, replacement, line)
    return line.strip()


def is_answer(command: str, line: str) -> bool:
    """Whether the model wrote this line, rather than the program."""
    return bool(re.search(r"\bnsa (ask|summarize) ", command)) and not line.startswith(("prefill ", "nsa: "))


def differences(command: str, expected: list[str], actual: list[str]) -> list[str]:
    """Lines of `expected` that are not in `actual` at their place, and what is there instead."""
    found = []
    for i in range(max(len(expected), len(actual))):
        want, got = (lines[i] if i < len(lines) else "<nothing>" for lines in (expected, actual))
        a, b = stable(want), stable(got)
        alike = is_answer(command, want) and difflib.SequenceMatcher(None, a, b).ratio() >= ALIKE
        if a != b and not alike:
            found.append(f"the README says {want!r}, but `{command}` said {got!r}")
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where the examples run: the files that earlier ones wrote are there for later ones."""
    if not (models_dir() / BUILTIN / "config.json").is_file():
        reason = f"{BUILTIN} is not installed; run: nsa models install"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return tmp_path_factory.mktemp("readme")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """As a new user's: no settings, an empty store, this interpreter's `nsa`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NSA_") or k == "NSA_DATA_DIR"}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return kept | {"PATH": path, "NSA_CACHE_DIR": str(tmp_path_factory.mktemp("store")), "NSA_CONFIG_DIR": os.devnull}


def test_the_commands_print_what_the_readme_shows(directory, environment):
    wrong = []
    for command, expected in commands():
        run = subprocess.run(
            ["bash", "-c", command],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
        )
        wrong += differences(command, expected, run.stdout.splitlines())
    assert not wrong, "\n".join(wrong)


def test_the_python_examples_print_what_the_readme_shows(directory, environment):
    (directory / "note.txt").write_text(
        "The harbour was closed on 3 May because the lighthouse keeper, Ada Brill, fell ill.\n"
    )
    examples = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", README, re.M | re.S)
    assert len(examples) == len(blocks("python")) > 1
    for example, expected in examples:
        run = subprocess.run(
            [sys.executable, "-c", example], cwd=directory, env=environment, capture_output=True, encoding="utf-8"
        )
        assert run.returncode == 0, run.stderr
        assert not differences("nsa ask ", expected.splitlines(), run.stdout.splitlines())


def test_a_command_with_its_output_comes_early():
    first = README.splitlines()[:20]
    assert any(line.startswith("$ nsa ask") for line in first) and any(line.startswith("prefill ") for line in first)


def test_comparison_tells_numbers_that_vary_from_words_that_do_not():
    told = "prefill 66 tokens in 0.5 s, 136 tokens/s · 16 tokens in 0.9 s, 23 tokens/s"
    assert not differences("nsa ask a", [told], [told.replace("136", "99").replace("0.9", "12.5")])
    assert differences("nsa ask a", [told], [told.replace("66", "67")])
    assert not differences("nsa ask a", ["Ada Brill fell ill on 3 May."], ["Ada Brill fell ill on 3 May 1931."])
    assert differences("nsa ask a", ["Ada Brill fell ill."], ["The harbour was closed."])
    assert differences("nsa plan a", ["65 a.txt", "65 tokens"], ["65 a.txt"])


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "BENCHMARKS.md"])
def test_commands_targets_and_links_exist(document):
    text = (ROOT / document).read_text("utf-8")
    code = "\n".join(re.findall(r"^```\w+\n(.*?)^```$", text, re.M | re.S) + re.findall(r"`([^`\n]+)`", text))
    named = set(re.findall(r"(?:^|\$ |\| )nsa ([a-z]+)\b", code, re.M))
    assert named and named <= COMMANDS.keys()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert set(re.findall(r"^make ([a-z]+)", code, re.M)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_tree_names_what_is_there():
    (tree,) = [block for block in blocks("text") if "native.c" in block]
    folder = ""
    named = []
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
            named.append(folder)
        named += [folder + name for name in re.findall(r"(?:^  |;  |: )([\w.]+(?:\.\w+|/))(?=[ :])", line)]
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_exit_codes_are_those_of_the_errors():
    codes = {int(a): b for a, b in re.findall(r"\| (\d+) \| ([^|]+?) (?=\|)", README)}
    errors = (NSAError, InputError, BudgetError, ModelError, CheckError, BatchError)
    words = ("failure", "input", "over budget", "model", "check", "batch")
    assert {e.exit_code: codes[e.exit_code].startswith(w) for e, w in zip(errors, words, strict=True)} == {
        e.exit_code: True for e in errors
    }
    assert set(codes) == {0, 2, 130, 141, *(e.exit_code for e in errors)}
