"""Recipe files: what is refused and where, parameters, who shadows whom, and the schema for editors."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_cli.commands.recipes import TEMPLATE
from nsa_cli.recipe import builtin_dir, load_recipe, read_recipe, recipe_paths
from nsa_cli.recipe_keys import json_schema
from nsa_cli.safe_yaml import parse
from nsa_models.errors import InputError

GOOD = """\
name: mine
description: Say something.
params:
  tone: {type: choice, choices: [kind, stern], default: kind, help: How to say it.}
  count: {type: int, default: 3, help: How many.}
  share: {type: float, default: 0.5, help: How much.}
  loud: {type: bool, help: In capitals.}
  about: {type: string, required: true, help: What about.}
sources: {include: ["*.md"], exclude: ["{{ about }}"], match: ["{{ about }}"], around: 2}
context: {max_context: 4k, evidence: 2}
system: Be {{ tone }}.
generate: {max_tokens: 20, temperature: 0.5, stop: [END]}
steps:
  - {id: notes, over: shard, prompt: "{{ count }} things about {{about}}, {{ share }}, {{ loud }}"}
  - {id: report, from: [notes], prompt: Report., system: Be brief., generate: {max_tokens: 9}, schema: "name, age int"}
expect: {min_words: 1, contains: ["{{ about }}"], citations: {min: 1, verified: 0.5}}
examples:
  - {text: A short one., params: {about: a, count: 4}, expect: {max_words: 9, matches: "[a-z]"}}
  - {paths: [docs], params: {about: b}}
"""


def write(folder: Path, text: str, name: str = "mine") -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, old: str = "", new: str = "") -> list[str]:
    """What is wrong with GOOD after a replacement; without the path."""
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    return [line.removeprefix(f"{path}:") for line in read_recipe(path)[1]]


def test_a_good_recipe_is_read_whole(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert [p.name for p in recipe.params] == ["tone", "count", "share", "loud", "about"]
    assert recipe.params[-1].default is None and recipe.params[3].default is False
    assert (recipe.max_context, recipe.evidence, recipe.around) == (4000, 2, 2)
    assert [(e.text, e.paths, e.params, e.expect) for e in recipe.examples] == [
        ("A short one.", (), {"about": "a", "count": 4}, {"max_words": 9, "matches": "[a-z]"}),
        (None, ("docs",), {"about": "b"}, {}),
    ]
    notes, report = recipe.steps
    assert recipe.generate == {"max_tokens": 20, "temperature": 0.5, "stop": ["END"]}
    assert (notes.generate, report.generate) == ({}, {"max_tokens": 9})
    assert (recipe.system, notes.system, report.system) == ("Be {{ tone }}.", None, "Be brief.")
    assert (notes.over, report.over, report.inputs) == ("shard", "document", ("notes",))


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        (
            "generate: {max_tokens",
            "generate: {max_token",
            12,
            "unknown key 'generate.max_token'; did you mean 'max_tokens'",
        ),
        ("params: {about: a, count: 4}", "params: {abuot: a}", 18, "no parameter 'abuot'; did you mean 'about'?"),
        ("params: {about: a, count: 4}", "params: {about: a, count: x}", 18, "parameter count must be of type int"),
        ("params: {about: a, count: 4}, ", "", 18, "parameter about is required"),
        ("text: A short one.", "paths: [a], text: b", 18, "an example needs either text or paths"),
        ("paths: [docs], ", "", 19, "an example needs either text or paths"),
        ('matches: "[a-z]"', 'matches: "[a-z"', 18, "is not a regular expression"),
        ("max_words: 9", "max_word: 9", 18, "unknown key 'examples[0].expect.max_word'; did you mean 'max_words'?"),
        ("expect:", "expects:", 16, "unknown key 'expects'; did you mean 'expect'?"),
        ("over: shard", "ovr: shard", 14, "unknown key 'steps[0].ovr'; did you mean 'over'?"),
        ("over: shard", "over: chapters", 14, "did you mean 'chapter'?"),
        ("description: Say something.\n", "", 1, "description is missing"),
        ("name: mine", "name: yours", 1, "the file is called mine.yaml"),
        ("default: 3", "default: three", 5, "params.count.default must be of type int, not 'three'"),
        ("default: 3", "default: true", 5, "params.count.default must be of type int, not True"),
        ("default: kind", "default: kin", 4, "did you mean 'kind'?"),
        ("choices: [kind, stern], ", "", 4, "choices belong to type choice"),
        ("default: 3, ", "", 5, "params.count needs a default, or required: true"),
        ("default: 0.5", "default: 0.5, required: true", 6, "cannot be required"),
        ("type: float", "type: flaot", 6, "did you mean 'float'?"),
        ("{{about}}", "{{abot}}", 14, "no parameter 'abot'; did you mean 'about'?"),
        ("{{about}}", "{{ about.upper() }}", 14, "{{ must begin the name of a parameter"),
        ("from: [notes]", "from: [note]", 15, "no step 'note' comes before 'report'; did you mean 'notes'?"),
        ("from: [notes]", "from: [report]", 15, "no step 'report' comes before"),
        ("id: report", "id: notes", 15, "two steps are called 'notes'"),
        ("name, age int", "name, age in t", 15, "is not a field"),
        ("temperature: 0.5", "temperature: -1", 12, "generate.temperature is -1"),
        ("temperature: 0.5", "temperature: hot", 12, "generate.temperature must be a number"),
        ("max_tokens: 20", "max_tokens: 2.5", 12, "must be a whole number"),
        ("max_context: 4k", "max_context: lots", 10, "a number of tokens, such as 4096 or 32k"),
        ('match: ["{{ about }}"]', 'match: ["("]', 9, "is not a regular expression"),
        ('include: ["*.md"]', "include: '*.md'", 9, "sources.include must be a list"),
        ("Say something.", "12", 2, "description must be a text; put it in quotes"),
        ("tone:", "Tone:", 4, "the name 'Tone' must be lower case"),
        ("steps:\n", "steps: []\nold:\n", 13, "steps is empty"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, old, new, line, says):
    found = problems(tmp_path, old, new)
    assert any(p.startswith(f"{line}: ") and says in p for p in found), found


def test_every_problem_is_found_at_once_and_the_first_is_raised(tmp_path):
    path = write(tmp_path, GOOD.replace("over:", "ovr:").replace("\nexpect:", "\nexpects:"))
    assert len(read_recipe(path)[1]) == 2
    with pytest.raises(InputError, match=r"mine.yaml:14: unknown key .*; 1 more: nsa recipes validate"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
        ("a: 1\nb: !x y", 2, "tag"),
        ("a: &x [1]\nb: *x", 1, "anchors and aliases"),
        ("a: [" + "\n" + "[" * 1000 + "]" * 1000 + "]", 2, "nested more than"),
        ("a: 1\na: 2", 2, "'a' stands here twice"),
        ("? [1]\n: 2", 1, "a key must be a text"),
        ("a: [1\n", 2, "not YAML"),
        ("a: 1\n---\nb: 2", 2, "not YAML"),
    ],
)
def test_yaml_that_runs_refers_or_grows_is_refused(text, line, says):
    with pytest.raises(InputError, match=f"^f:{line}: .*{says}"):
        parse(text.encode(), "f")


def test_large_empty_and_undecodable_files_are_refused():
    for data, says in (
        (b"a" * 64_001, "at most 64,000"),
        (b"", "empty"),
        (b"# only\n", "empty"),
        (b"\xff\xfe", "UTF-8"),
    ):
        with pytest.raises(InputError, match=says):
            parse(data, "f")


def test_plain_scalars_are_those_of_yaml_1_2():
    text = "[no, on, 12:30, 0o7, 2024-01-02, 1_000, '1', 1, 1.5, 1e3, true, ~, =, <<, 1e999, " + "9" * 30 + "]"
    values = parse(text.encode(), "f").plain()
    assert values[:7] == ["no", "on", "12:30", "0o7", "2024-01-02", "1_000", "1"]
    assert values[7:12] == [1, 1.5, 1000.0, True, None]
    assert values[12:] == ["=", "<<", "1e999", "9" * 30]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text("ab:#{}[]'\" \n-é", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
    max_leaves=12,
)


@given(JSON.filter(lambda value: isinstance(value, (list, dict))))
def test_what_pyyaml_writes_is_read_back(value):
    assert parse(yaml.safe_dump(value).encode(), "f").plain() == value


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.text("abc:[]{}&*!|>-?#'\"%@` \n\t,1", max_size=80).map(str.encode))
def test_any_bytes_are_a_recipe_or_one_line(tmp_path, data):
    path = tmp_path / "any.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        load_recipe(path)
    assert str(path) in str(refused.value)


# The YAML of a recipe, with any one value replaced by any other, is either valid in both eyes or in neither's.
def paths_in(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths_in(item, (*path, key))


PLAIN = yaml.safe_load(GOOD)
VALUES = st.sampled_from(["", "x", 0, -1, 2.5, True, None, [], {}, ["x"], {"x": 1}, [[]], "4k", "shard", [1]])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([p for p in paths_in(PLAIN) if p]), VALUES)
def test_the_editors_schema_accepts_all_that_is_accepted(tmp_path, path, value):
    recipe = json.loads(json.dumps(PLAIN))
    inner = recipe
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    found = read_recipe(write(tmp_path, yaml.safe_dump(recipe)))[1]
    if not found:
        jsonschema.validate(recipe, json_schema())


def test_the_schema_for_editors_is_the_shipped_one():
    shipped = json.loads((builtin_dir() / "recipe.schema.json").read_text("utf-8"))
    assert shipped == json_schema(), "run: nsa recipes schema > recipes/recipe.schema.json"
    jsonschema.Draft7Validator.check_schema(shipped)
    jsonschema.validate(PLAIN, shipped)
    with pytest.raises(jsonschema.ValidationError, match="ovr"):
        jsonschema.validate(PLAIN | {"ovr": 1}, shipped)


def test_parameters_fill_the_recipes_texts_in_one_pass(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    bound = recipe.bind({"about": "a.b {{ tone }}", "count": 5, "loud": True})
    assert bound.steps[0].prompt == "5 things about a.b {{ tone }}, 0.5, true"
    assert bound.system == "Be kind."
    assert bound.exclude == ("a.b {{ tone }}",) == bound.expect["contains"]
    (pattern,) = bound.match
    assert pattern.startswith(r"a\.b")  # a value is no regular expression


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "parameter about is required"),
        ({"about": "x", "abut": 1}, "no parameter 'abut'; did you mean 'about'?"),
        ({"about": 1}, "parameter about must be of type string, not 1"),
        ({"about": "x", "count": "3"}, "parameter count must be of type int, not '3'"),
        ({"about": "x", "tone": "rude"}, "parameter tone is 'rude'"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(tmp_path, given, says):
    with pytest.raises(InputError, match=says):
        load_recipe(write(tmp_path, GOOD)).bind(given)


def test_a_name_is_looked_up_in_the_users_folder_then_among_the_built_in_never_here(tmp_path, monkeypatch):
    monkeypatch.setenv("NSA_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path, GOOD)  # what lies in the working directory, such as a repository that is read, is not run
    with pytest.raises(InputError, match="no recipe 'mine'"):
        load_recipe("mine")
    assert load_recipe("./mine.yaml").name == "mine"
    assert load_recipe("changelog").path.parent == builtin_dir()
    own = write(tmp_path / "config" / "recipes", GOOD.replace("mine", "changelog"), "changelog")
    assert load_recipe("changelog").path == own == recipe_paths()["changelog"]
    with pytest.raises(InputError, match="no recipe 'changelg'; did you mean 'changelog'?"):
        load_recipe("changelg")
    with pytest.raises(InputError, match="no recipe file nowhere.yaml"):
        load_recipe("nowhere.yaml")


def test_ls_show_path_new_and_validate(nsa, tmp_path):
    folder = tmp_path / "config" / "recipes"
    assert nsa("recipes", "path").out == f"{folder}\n"
    run = nsa("recipes", "new", "my-review")
    assert run.out == f"{folder / 'my-review.yaml'}\n"
    assert nsa("recipes", "new", "my-review").code == 3
    assert nsa("recipes", "new", "My Review").code == 2
    assert nsa("recipes", "new", "changelog", "--from", "changelog").code == 0
    rows = [json.loads(line) for line in nsa("recipes", "ls", "--json").out.splitlines()]
    assert {row["name"]: row["builtin"] for row in rows}["changelog"] is False
    assert [row["name"] for row in rows] == sorted(recipe_paths())
    assert "* my-review" in nsa("recipes", "ls").out
    assert nsa("recipes", "show", "my-review").out == (folder / "my-review.yaml").read_text()
    assert nsa("recipes", "path", "code-review").out == f"{builtin_dir() / 'code-review.yaml'}\n"
    assert nsa("recipes", "validate").out.count(": ok\n") == 2

    bad = write(folder, GOOD.replace("mine", "bad").replace("over:", "ovr:").replace("\nexpect:", "\nexpects:"), "bad")
    run = nsa("recipes", "validate", "bad", "my-review")
    assert run.code == 6 and run.err == "nsa: 1 of 2 recipes cannot be used\n"
    assert [line.split(":")[1] for line in run.out.splitlines() if str(bad) in line] == ["14", "16"]
    assert "bad" in nsa("recipes", "ls").out and "unusable: " in nsa("run", "--help").out


def test_edit_copies_a_built_in_recipe_and_checks_what_was_written(nsa, tmp_path, monkeypatch):
    own = tmp_path / "config" / "recipes" / "changelog.yaml"
    monkeypatch.setenv("VISUAL", "true")
    assert nsa("recipes", "edit", "changelog") == (0, "", "nsa: nothing was changed\n")
    assert not own.exists()
    monkeypatch.setenv("VISUAL", "sed -i 's/^description:.*/description: Mine./'")
    assert nsa("recipes", "edit", "changelog") == (0, f"{own}\n", "")
    assert load_recipe("changelog").description == "Mine."
    monkeypatch.setenv("VISUAL", "sed -i 's/^description:/descripton:/'")
    run = nsa("recipes", "edit", "changelog")
    assert (run.code, run.out) == (6, f"{own}\n") and "did you mean 'description'?" in run.err
    monkeypatch.setenv("VISUAL", "sed -i 's/^name:.*/]/'")
    run = nsa("recipes", "edit", "changelog")
    assert run.code == 6 and "not YAML" in run.err  # and can be mended
    monkeypatch.setenv("VISUAL", "no-such-editor")
    run = nsa("recipes", "edit", "changelog")
    assert run.code == 1 and run.err.startswith("nsa: no-such-editor: Editing failed")


TRIED = """
name: tried
description: Try.
params: {what: {type: string, default: dogs, help: What.}}
generate: {max_tokens: 6}
steps: [{id: all, prompt: "How many {{ what }}?"}]
expect: {min_words: 1}
examples:
  - {text: the lazy dog runs, expect: {max_words: 60}}
  - {paths: [docs], params: {what: foxes}, expect: {contains: [no such word], max_words: 0}}
"""


def test_a_recipe_is_tried_on_its_examples(nsa, tmp_path):
    path = write(tmp_path, TRIED, "tried")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("the quick fox\n")
    run = nsa("recipes", "test", path, "-q")
    assert run.code == 6 and run.err == "nsa: recipe tried: 1 of 2 examples failed\n"
    first, second = run.out.splitlines()
    assert first == "1: ok" and second == "2: 3 words, at most 0 expected; 'no such word' is not in the answer"
    rows = [json.loads(line) for line in nsa("recipes", "test", path, "--json").out.splitlines()]
    assert [len(row["failed"]) for row in rows] == [0, 2]
    alone = nsa("run", path, tmp_path / "docs", "--what", "foxes").out
    assert rows[1]["answer"] + "\n" == alone
    write(tmp_path, TRIED.replace("contains: [no such word], max_words: 0", "min_words: 1"), "tried")
    assert nsa("recipes", "test", path, "-q") == (0, "1: ok\n2: ok\n", "")
    (tmp_path / "docs" / "a.txt").unlink()
    assert nsa("recipes", "test", path, "-q").code == 3
    write(tmp_path, TRIED.partition("examples:")[0], "tried")
    run = nsa("recipes", "test", path, "-q")
    assert run.code == 3 and "has no examples" in run.err


def test_an_example_whose_answer_is_not_of_its_schema_fails(nsa, tmp_path):
    step = '[{id: all, prompt: "Who?", schema: {type: string, minLength: 90}}]'
    path = write(tmp_path, TRIED.replace('[{id: all, prompt: "How many {{ what }}?"}]', step), "tried")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("the quick fox\n")
    run = nsa("recipes", "test", path, "-q")
    assert run.code == 6 and run.out.count("the JSON was cut at 6 tokens") == 2


def test_a_new_recipe_is_valid_and_names_an_existing_schema(tmp_path):
    text = TEMPLATE.format(name="mine", schema=(builtin_dir() / "recipe.schema.json").as_posix())
    assert load_recipe(write(tmp_path, text)).name == "mine"
    assert Path(text.splitlines()[0].partition("$schema=")[2]).is_file()


def test_a_parameter_cannot_be_called_like_an_option_of_every_command(nsa, tmp_path):
    path = write(tmp_path, GOOD.replace("loud", "json"))
    run = nsa("recipes", "validate", path)
    assert run.code == 6 and "parameter json is an option of nsa run already" in run.out
    assert nsa("run", path, "--help").code == 3
