"""Settings: a file, the environment, flags, the later going before; and what is wrong with a file, in one line."""

import json
import sys

import pytest

from nsa_cli.cli import cli
from nsa_cli.config import config_path, read_config, settable


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_CONFIG_DIR", str(tmp_path / "config"))

    def write(text: str) -> None:
        config_path().parent.mkdir(exist_ok=True)
        config_path().write_text(text)

    return write


def tokens(run) -> int:
    assert run.code == 0, run.err
    return json.loads(run.out)["usage"]["completion_tokens"]


def test_flags_before_environment_before_section_before_file_before_default(nsa, tmp_path, write, monkeypatch):
    (tmp_path / "a.txt").write_text("the quick fox\n")
    args = ("ask", tmp_path / "a.txt", "who?", "--json")
    write("max-tokens = 5\n")
    assert tokens(nsa(*args)) == 5
    write("max-tokens = 5\n[ask]\nmax-tokens = 6\n")
    assert tokens(nsa(*args)) == 6
    assert tokens(nsa("summarize", tmp_path / "a.txt", "--json")) == 5
    monkeypatch.setenv("NSA_MAX_TOKENS", "7")
    assert tokens(nsa(*args)) == 7
    assert tokens(nsa(*args, "--max-tokens", 8)) == 8


def test_show_says_what_holds_and_where_it_is_from(nsa, write, monkeypatch):
    write('max-tokens = 5\ntop-p = 0.5\nsystem = "Say \\"no\\"."\n[summarize]\nmax-tokens = 900\n')
    monkeypatch.setenv("NSA_TOP_P", "0.9")
    run = nsa("config", "show", "--origin")
    assert run.code == 0
    toml = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    lines = run.out.splitlines()
    assert f"max-tokens = 5  # {config_path()}" in lines
    assert f"summarize.max-tokens = 900  # {config_path()}" in lines
    assert 'top-p = "0.9"  # NSA_TOP_P' in lines
    assert "seed = 0  # default" in lines and "# device =  # default" in lines
    shown = toml.loads(nsa("config", "show").out)
    assert shown["system"] == 'Say "no".' and shown["summarize"] == {"max-tokens": 900}
    records = [json.loads(line) for line in nsa("config", "show", "--json").out.splitlines()]
    assert {"schema_version": 1, "key": "max-tokens", "value": 5, "origin": str(config_path())} in records
    write(nsa("config", "show").out)  # what is shown can be the file
    assert nsa("config", "show").code == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max-tokns = 5", "unknown key 'max-tokns'; did you mean 'max-tokens'?"),
        ("max_tokens = 5", "unknown key 'max_tokens'; did you mean 'max-tokens'?"),
        ("xyzzy = 5", "unknown key 'xyzzy'; nsa config show lists what there is"),
        ("[summarise]\nseed = 1", "unknown section [summarise]; did you mean 'summarize'?"),
        ("[plan]\nseed = 1", "unknown key 'seed' in [plan]"),
        ("[ask]\ntopp = 1", "unknown key 'topp' in [ask]; did you mean 'top-p'?"),
        ("max-tokens = 0", "max-tokens: 0 is not in the range"),
        ("max-tokens = true", "max-tokens: True where a value is expected"),
        ('max-tokens = "many"', "max-tokens: 'many' is not a valid integer"),
        ("seed = [1]", "seed: "),
        ('[ask]\nmax-context = "lots"', "max-context in [ask]: 'lots' is not a quantity"),
        ("max-tokens = ", "config.toml: Invalid value (at"),
        ("a = 1\na = 2", "config.toml: Cannot overwrite a value"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(nsa, tmp_path, write, text, says):
    (tmp_path / "a.txt").write_text("the quick fox\n")
    write(text)
    run = nsa("plan", tmp_path / "a.txt")
    assert (run.code, run.out, run.err.count("\n")) == (3, "", 1)
    assert run.err.startswith(f"nsa: {config_path()}: ") and says.removeprefix("config.toml: ") in run.err
    assert nsa("config", "path") == (0, f"{config_path()}\n", "")
    assert nsa("completion", "bash").code == nsa("--help").code == 0
    assert nsa("config", "show").code == 3
    doctor = nsa("doctor")
    assert doctor.code == 1 and "broken  settings" in doctor.out


def test_nothing_that_is_read_can_set_anything(nsa, tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    (project / "a.txt").write_text("the quick fox\n")
    for name in ("config.toml", "nsa.toml", ".nsa.toml", ".nsa.yaml", "pyproject.toml"):
        (project / name).write_text("max-tokens = 3\n")
    monkeypatch.chdir(project)
    assert tokens(nsa("ask", "a.txt", "who?", "--json", "--max-tokens", 4)) == 4
    assert tokens(nsa("ask", "a.txt", "who?", "--json")) > 4


def test_recipes_follow_it_too(nsa, tmp_path, write):
    (tmp_path / "a.txt").write_text("the quick fox\n")
    (tmp_path / "r.yaml").write_text("name: r\ndescription: R.\nsteps: [{id: all, prompt: What?}]\n")
    write("max-tokens = 3\n[run]\nevidence = 0\n")
    assert tokens(nsa("run", tmp_path / "r.yaml", tmp_path / "a.txt", "--json")) == 3


def test_every_setting_is_named_as_its_option_and_variable_are():
    for key, setting in settable(cli).items():
        assert setting.option.envvar == "NSA_" + key.upper().replace("-", "_")
    assert {"model", "max-tokens", "log", "device"} <= settable(cli).keys()


def test_no_file_is_no_setting(write):
    assert read_config(cli).default_map(cli) == {}
