"""Every task's answer is in the text where the task says, exactly; and batches are a function of their index."""

import random
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_cli.citations import check_citations
from nsa_cli.context import build_context
from nsa_cli.documents import Document
from nsa_models.errors import InputError
from nsa_models.text import Text
from nsa_models.training.batch import Example, pack
from nsa_models.training.config import Data, Stage, TrainConfig
from nsa_models.training.data import Corpus, Layout, Mixture, from_root, make_task, read_corpus
from nsa_models.training.found import definitions
from nsa_models.training.kinds import KINDS, PRACTISED
from nsa_models.training.tasks import ABSENT, Task, Unsuitable, held_out, is_right, practised, short_tasks

REREAD = 1500  # tokens of passages; the tests' tokenizer knows few words, a line is about 20 of them
CODE = '''class Lamp(Thing):
    def light_up(self, how_long: int = 3, *, colour="red") -> None:
        """Light the lamp for that long and
        watch it."""

async def fetch_all(urls, limit) -> list[str]:
    """Fetch every one of the urls, one by one.

    Not the body.
    """
    if not urls:
        raise ValueError("none")

    if limit < 0:
        raise LimitError
    raise ValueError("again")


def twice(a):
    return a


def twice(a, b):
    return b
'''
GUIDE = """# The Harbour

The harbour lies to the north of the town. It is old.

NAME
    tide-table - print when the water is high

Opening hours: 9 to 17
Ferries a day: 4

CHAPTER II. The Letter

On Monday the keeper wrote a letter to the harbour office.
Twice is no definition of this line, which is said again.

Twice again
-----------

Twice is no definition of this line, which is said again.
"""
DOCUMENTS = (
    Text("a/notes.txt", "".join(f"note {i} about the sea\n" for i in range(40))),
    Text("b/lamp.py", CODE),
    Text("b/no_line_end.txt", "one\nlight_up"),
    Text("c/guide.md", GUIDE),
)


FOUND = ("defines", "mentioned", "takes", "returns", "raises", "summary", "usage", "chapter", "field")


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), depth=st.none() | st.floats(0, 1))
@settings(max_examples=25, deadline=None)
def test_a_task_is_true_of_its_documents(kind, seed, depth):
    task = KINDS[kind](random.Random(seed), DOCUMENTS, depth)
    assert task.kind == kind and is_right(task, task.answer) and not is_right(task, "I do not know.")
    texts = {d.path: d.text for d in task.documents}
    lines = [texts[path].splitlines()[line - 1] for path, line in task.places]
    said = lines[0]
    assert task.place == "{}:{}".format(*task.places[0])
    whole = "".join(texts.values())
    if kind in ("defines", "mentioned"):
        name = task.question.split()[3].rstrip(".?")
        assert task.facts == (task.places[0][0],) and re.search(rf"(def|class) {name}\b", said)
    elif kind in ("takes", "returns"):
        assert all(fact in said for fact in task.facts) and "def " in said
    elif kind == "usage":
        assert (
            task.question == "How do I fetch every one of the urls, one by one? Answer with the function and its file."
        )
        assert task.answer == "With fetch_all, in b/lamp.py." and task.facts == ("fetch_all",)
    elif kind in ("raises", "summary", "chapter", "field"):
        assert all(fact in whole for fact in task.facts)
        name = re.search(
            r"function (\w+)|class (\w+)|section \"(.+?)\"|is ([\w-]+)\?|say \"(.+?)\"|of \"(.+?)\"", task.question
        )
        assert next(filter(None, name.groups())) in said
    elif kind == "absent":
        name = re.search(r"magic number of the ([a-z ]+)\?", task.question)[1]
        assert name not in whole and "magic number" in said
    else:
        assert all(fact in line for fact, line in zip(task.facts, lines, strict=True))
    if kind == "values":
        assert re.findall(r"\d+", task.answer) == re.findall(r"number of .* is (\d+)", whole)
    if depth is not None and kind in ("needle", "keys", "values", "queries", "variables", "absent"):
        before = whole[: whole.index(said + "\n")].count("\n") / max(whole.count("\n"), 1)
        assert abs(before - depth) < 0.25
    original = {line for d in DOCUMENTS for line in d.text.splitlines()}
    assert original <= {line for d in task.documents for line in d.text.splitlines()}, "planting destroys nothing"


def test_definitions_are_those_that_occur_once():
    names = {KINDS["defines"](random.Random(i), DOCUMENTS, None).question for i in range(60)}
    found = {re.search(r"defines (\w+)\?", question)[1] for question in names}
    assert found == {"Lamp", "light_up", "fetch_all"}
    taken = {KINDS["takes"](random.Random(i), DOCUMENTS, None).facts for i in range(60)}
    assert taken == {("how_long", "colour"), ("urls", "limit")}
    for kind in FOUND:
        with pytest.raises(Unsuitable):
            KINDS[kind](random.Random(0), DOCUMENTS[:1], None)


def test_a_name_that_another_text_assigns_is_not_asked_for():
    code = "{0} = None\n\ndef {0}(pid):\n    return pid\n"
    here, assigns = Text("a.py", code.format("pid_map")), Text("b.py", "pid_map: dict[int, int] = cext.pid_map\n")
    uses = Text("c.py", "def use(pid):\n    pid_map = pid\n    return call(\n        pid_map=pid_map,\n    )\n")
    assert [found.name for found in definitions([here, uses])] == ["pid_map"]
    assert definitions([here, assigns]) == definitions([assigns, here]) == []


def test_a_signature_of_several_lines():
    code = """def spread(
    self,
    urls: dict[str, int],  # by name, or not
    limit: tuple = (3, 4),
    *,
    last="a",
) -> list[str]:
    return urls
"""
    (found,) = definitions([Text("a.py", code)])
    assert (found.name, found.parameters, found.returned) == ("spread", ("urls", "limit", "last"), "list[str]")
    assert found.signature == 'spread(self, urls: dict[str, int], limit: tuple = (3, 4), *, last="a")'


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("returns", {"fetch_all returns list[str]."}),
        ("raises", {"fetch_all raises ValueError, LimitError."}),
        (
            "summary",
            {
                "Fetch every one of the urls, one by one.",
                "The harbour lies to the north of the town.",
                "print when the water is high",
                "On Monday the keeper wrote a letter to the harbour office.",
                "Twice is no definition of this line, which is said again.",
            },
        ),
        ("chapter", {'It stands under "The Harbour".', 'It stands under "CHAPTER II. The Letter".'}),
        ("field", {"Opening hours: 9 to 17", "Ferries a day: 4"}),
    ],
)
def test_what_is_found(kind, answers):
    assert {KINDS[kind](random.Random(i), DOCUMENTS, None).answer for i in range(80)} == answers


def test_a_chain_of_variables_is_in_order():
    for seed in range(20):
        task = KINDS["variables"](random.Random(seed), DOCUMENTS, None)
        whole = "".join(d.text for d in task.documents)
        value = re.search(r"value (\d+)", task.question)[1]
        held, expected = {value}, []
        for name, source in re.findall(r"VAR (\w+) = (\w+)", whole):
            if source in held:
                held.add(name)
                expected.append(name)
        assert tuple(expected) == task.facts


def test_an_answer_needs_every_fact_as_a_word():
    task = Task("values", (), "", "", ("123", "src/a.py"), 0.0, ())
    assert is_right(task, "123 and SRC/A.PY.") and is_right(task, "(123), src/a.py")
    assert (
        not is_right(task, "1234 and src/a.py") and not is_right(task, "123") and not is_right(task, "123 my_src/a.py")
    )
    assert is_right(KINDS["absent"](random.Random(0), DOCUMENTS, None), "Sorry. " + ABSENT.upper())


def test_packing():
    batch = pack([Example([5, 6, 7]), Example([1, 2, 3, 4], [range(2, 4)])])
    assert batch.ids.tolist() == [5, 6, 7, 1, 2, 3, 4] and batch.lengths == [3, 4]
    assert batch.targets.tolist() == [6, 7, -1, 2, 3, 4, -1]
    assert batch.answers.tolist() == [False, False, False, False, True, True, False]
    assert batch.asked.tolist() == [False] * 3 + [True] * 4


@pytest.fixture(scope="module")
def layout(tiny_checkpoint) -> Layout:
    from nsa_cli.train import layout
    from nsa_models import load_model, load_tokenizer

    config = replace(load_model(tiny_checkpoint, "cpu").config, reread=REREAD)
    return layout(load_tokenizer(tiny_checkpoint), config)


def plan(**data) -> TrainConfig:
    return TrainConfig(out="x", model="y", curriculum=(Stage(4, 300, 700), Stage(4, 1000)), data=Data(**data))


def test_a_batch_is_a_function_of_its_index(layout):
    corpora = [(Corpus(DOCUMENTS), 1.0), (Corpus(DOCUMENTS[:1]), 2.0)]
    settings = plan(tasks={"needle": 1, "defines": 1, "takes": 2}, task_share=0.5)
    one, other = (Mixture(settings, corpora, layout) for _ in range(2))
    other(0, 3), other(5, 9)
    batches = [one(0, i) for i in range(12)]
    for i in reversed(range(12)):
        assert torch.equal(batches[i].ids, other(0, i).ids)
    assert len({batch.ids.numpy().tobytes() for batch in batches}) == 12
    assert all(batch.tokens <= 700 and max(batch.lengths) <= 300 for batch in batches)
    assert any(batch.answers.any() for batch in batches) and any((~batch.asked).any() for batch in batches)
    scaled = Mixture(replace(settings, curriculum=(Stage(4, 300, context=5000),)), corpora, layout)(0, 3)
    assert scaled.context == scaled.to("cpu").context == 5000 and one(0, 3).context == 0


def test_a_task_is_laid_out_as_a_question_is(layout, tmp_path, nsa, monkeypatch):
    """The ids of a task's prompt are those that the model reads in `nsa ask` for the same files and question."""
    from nsa_models.transformer import NSAModel

    task = KINDS["needle"](random.Random(1), DOCUMENTS, 0.5)
    for document in task.documents:
        (tmp_path / "docs" / document.path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "docs" / document.path).write_text(document.text)
    read: list[int] = []
    advance = NSAModel.advance

    def spy(self, ids, *rest, **options):
        read.extend(ids.tolist())
        return advance(self, ids, *rest, **options)

    monkeypatch.setattr(NSAModel, "advance", spy)
    run = nsa("ask", tmp_path / "docs", task.question, "--max-tokens", 1, "--no-cache")
    prompt, reply = layout.asked(task)
    assert run.code == 0 and read == prompt
    assert reply[-1] in layout.tokenizer.eos_ids and layout.tokenizer.decode(reply) == task.answer


LONG = (
    Text("a/notes.txt", "".join(f"note {i} about the sea\n" for i in range(400))),
    Text("b/lamp.py", CODE),
    Text("c/guide.md", GUIDE),
    Text("d/log.txt", "".join(f"log {i} about the sea\n" for i in range(400)) + "light_up\n"),
)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("raises", "chapter")])  # too far apart
def test_passages_to_practise_on_hold_the_answer(layout, kind):
    """Among others, cut from the same texts and as full as a second reading is."""
    made = 0
    for seed in range(8):
        rng = random.Random(seed)
        task = KINDS[kind](rng, LONG)
        ((prompt, reply),) = layout.reread(rng, task, 4000)
        text = layout.tokenizer.decode(prompt)
        assert is_right(task, layout.tokenizer.decode(reply)) and text.count(task.question) == 1
        assert kind == "values" or layout.tokenizer.decode(reply) == task.answer
        around = layout.tokenizer.prompt(task.question)
        passages = len(prompt) - len(around.before) - len(around.after)
        assert REREAD / 2 < passages <= REREAD
        texts = {d.path: d.text.splitlines() for d in task.documents}
        paths = re.findall(r"^=== (\S+?)(?: \(from line \d+\))? ===$", text, re.M)
        assert set(paths) <= texts.keys()
        assert all(path in paths and texts[path][line - 1] in text for path, line in task.places)
        assert all(fact in text for fact in task.facts)
        made += len(paths)
    assert made > 8


def test_passages_to_practise_on_are_in_the_order_of_their_rank(layout):
    """What answers is mostly the best, which comes last; several numbers are told as they are read, in order."""
    last, turned = 0, 0
    for seed in range(20):
        rng = random.Random(seed)
        task = KINDS["needle"](rng, LONG)
        last += task.facts[0] in layout.passages(rng, task, REREAD)[-1].text.text
        task = KINDS["values"](rng, LONG)
        ((prompt, reply),) = layout.reread(rng, task, 4000)
        text, answer = layout.tokenizer.decode(prompt), layout.tokenizer.decode(reply)
        assert re.findall(r"\d+", answer) == re.findall(r"magic number of .+ is (\d+)", text)
        turned += answer != task.answer
    assert last > 10 and turned > 5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("raises", "chapter")])
def test_answers_that_cite(layout, kind):
    """References to all that the answer takes and no more, lines of the documents, in texts and in passages alike."""
    citing = replace(layout, cited=True)
    for seed in range(4):
        rng = random.Random(seed)
        task = KINDS[kind](rng, LONG)
        context = build_context([Document(text.path, text.text) for text in task.documents], layout.tokenizer)
        for _, reply in (citing.asked(task), *citing.reread(rng, task, 4000)):
            answer = layout.tokenizer.decode(reply)
            found = [c for c in check_citations(answer, context) if c.kind == "reference"]
            assert answer.startswith(task.answer) or kind == "values"
            assert all(c.status == "exists" for c in found)
            assert {(c.path, c.start) for c in found} == (set() if kind == "absent" else set(task.places))
            assert len(found) == answer.count(":") - task.answer.count(":")


def test_what_is_asked_after_it_is_cited_by_the_documents_lines(layout):
    note = "# of the sea, and of nothing else\n" * 16
    texts = [*LONG[:1], Text("b/lamp.py", note + CODE + note), *LONG[2:]]
    citing, lines = replace(layout, cited=True), {text.path: text.text.splitlines() for text in texts}
    cited = 0
    for seed in range(30):
        rng = random.Random(seed)  # so few tokens that a document has one passage now and then
        exchanges = citing.reread(rng, KINDS["takes"](rng, texts), 1300, [KINDS["defines"], KINDS["takes"]] * 3)
        for prompt, reply in exchanges[1:]:
            question, answer = layout.tokenizer.decode(prompt), layout.tokenizer.decode(reply)
            ((path, line),) = re.findall(r" \((\S+):(\d+)\)$", answer)
            name = next(word for word in re.findall(r"\w+", answer) if word in question and word in CODE)
            assert name in lines[path][int(line) - 1], (answer, seed)
            cited += 1
    assert cited > 2


def test_passages_that_cannot_hold_an_answer(layout):
    task = KINDS["queries"](random.Random(0), LONG)
    with pytest.raises(Unsuitable, match="300 tokens do not hold the places of this queries task"):
        layout.passages(random.Random(0), task, 300)
    far = Text("b/far.py", "def far(a):\n" + "    a += 1\n" * 300 + "    raise KeyError(a)\n")
    with pytest.raises(Unsuitable):  # what is raised stands too far from where it is looked for
        layout.passages(random.Random(0), KINDS["raises"](random.Random(0), [far]), 3000)


def test_paths_from_the_root_of_a_repository():
    texts = [Text("lamp/a/b.py", "1"), Text("lamp/c.py", "2")]
    assert from_root(texts) == [Text("a/b.py", "1"), Text("c.py", "2")]
    for other in (Text("a.py", "3"), Text("cord/c.py", "3")):
        assert from_root([*texts, other]) == [*texts, other]


def test_a_share_of_the_tasks_is_reread(layout):
    corpora = [(Corpus(LONG), 1.0)]
    settings = plan(tasks={"needle": 1}, task_share=1.0, reread_share=0.5)
    mixture = Mixture(replace(settings, curriculum=(Stage(1, 2500),)), corpora, layout)
    texts = [layout.tokenizer.decode(mixture(0, i).ids.tolist()) for i in range(12)]
    again = sum(" (from line " in text for text in texts)
    assert all("magic number" in text for text in texts) and 0 < again < 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1200, 3000])
def test_tasks_fill_their_length(layout, kind, length):
    if kind in ("chapter", "field"):
        texts = [Text(f"f{i}.md", re.sub("[Hh]arbour", rf"\g<0> {i}", GUIDE)) for i in range(30)]
    else:
        texts = [Text(f"f{i}.py", re.sub("light|fetch|urls", rf"\g<0>_{i}", CODE)) for i in range(30)]
        for i in range(1, 30):  # what the one before defines
            texts[i] = replace(texts[i], text=f"fetch_{i - 1}_all([], 1)\n{texts[i].text}")
    for seed in range(3):
        task = make_task(random.Random(seed), KINDS[kind], Corpus(texts), layout, length, 0.5)
        tokens = sum(map(len, layout.asked(task)))
        assert 0.6 * length < tokens <= length
    with pytest.raises(Unsuitable):
        make_task(random.Random(0), KINDS[kind], Corpus(texts), layout, 20)


def test_unknown_tasks_and_broken_corpora(layout, tmp_path):
    with pytest.raises(InputError, match="no task 'neddle'"):
        Mixture(plan(tasks={"neddle": 1}), [], layout)
    (tmp_path / "x.jsonl").write_text('{"path": "a", "text": "b"}\n{"path": "a"}\n')
    with pytest.raises(InputError, match=r"x.jsonl:2: not a document"):
        read_corpus(tmp_path / "x.jsonl")
    with pytest.raises(InputError, match="No such file"):
        read_corpus(tmp_path / "y.jsonl")


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_in_other_words(kind):
    """Of the same thing: the practised ones are as many as asked for, and the one to try them on is not among them."""
    usual = [KINDS[kind](random.Random(i), DOCUMENTS, None) for i in range(40)]
    other = [practised(KINDS[kind], 1.0)(random.Random(i), DOCUMENTS, None) for i in range(40)]
    never = [held_out(KINDS[kind])(random.Random(i), DOCUMENTS, None) for i in range(40)]
    for task, same, tried in zip(usual, other, never, strict=True):
        assert task == replace(same, question=task.question) == replace(tried, question=task.question)
        assert tried.question not in (task.question, *task.wordings.others)
        assert same.question in task.wordings.others and task.question not in task.wordings.others
        assert "{" not in tried.question + same.question
    assert all(practised(KINDS[kind], 0.0)(random.Random(i), DOCUMENTS, None) == usual[i] for i in range(40))
    some = [practised(KINDS[kind], 0.5)(random.Random(i), DOCUMENTS, None).question for i in range(40)]
    assert 5 < sum(task.question == question for task, question in zip(usual, some, strict=True)) < 35


def test_as_often_of_many_facts_as_of_one():
    code = "".join(f"def single_{i}(one):\n    pass\n\n" for i in range(30)) + "def several(a, b, c):\n    pass\n"
    takes = [KINDS["takes"](random.Random(i), [Text("a.py", code)], None) for i in range(60)]
    assert 15 < sum(task.facts == ("a", "b", "c") for task in takes) < 45


def test_names_that_more_files_have_are_asked_for_more_often():
    """1 and 4 * 4 of 17; how often a single file has a name does not count."""
    code = "def alone_one(a):\n    pass\n\n\nalone_one(alone_one(1))\n\n\ndef called_from_afar(a):\n    pass\n"
    callers = [Text(f"caller_{i}.py", "called_from_afar(1)\n") for i in range(9)]
    defines = [KINDS["defines"](random.Random(i), [Text("a.py", code), *callers], None) for i in range(170)]
    assert 1 <= sum("alone_one" in task.question for task in defines) < 25


def test_passages_have_what_is_asked_for_from_other_files(layout):
    """Which one defines it has to be told from the others."""
    caller = Text(
        "c/calls.py", "import lamp\n" + "x = 1  # the file and its path\n" * 300 + "\nlamp.fetch_all([], 2)\n"
    )
    task = next(
        task
        for task in (KINDS["defines"](random.Random(seed), [LONG[0], LONG[1], caller, LONG[3]]) for seed in range(99))
        if "fetch_all" in task.question
    )
    told = ["".join(p.text.text for p in layout.passages(random.Random(seed), task, REREAD)) for seed in range(12)]
    assert all("async def fetch_all" in text for text in told)
    assert sum("lamp.fetch_all" in text for text in told) > 8


def test_more_is_asked_of_the_same_passages(layout):
    """As in a chat: each answer ends, and the next question is of something else that the passages say."""
    tokenizer, takes = layout.tokenizer, KINDS["takes"]
    task = KINDS["needle"](random.Random(3), LONG[1:2])
    exchanges = layout.reread(random.Random(3), task, 4000, [takes, KINDS["chapter"], takes, takes, KINDS["defines"]])
    asked, *more = ((tokenizer.text(read), tokenizer.decode(answer)) for read, answer in exchanges)
    assert asked[1] == task.answer
    answers = {'light_up(self, how_long: int = 3, *, colour="red")', "fetch_all(urls, limit)"}
    assert {answer for read, answer in more if "parameters" in read} <= answers and 2 <= len(more) <= 3
    assert len({answer for _, answer in more}) == len(more)
    assert sum(len(read) + len(answer) for read, answer in exchanges) <= 4000
    for (read, answer), (_, before) in zip(exchanges[1:], exchanges, strict=False):
        around = tokenizer.follow_up("")
        assert [*before[-1:], *read][: len(around.before)] == around.before and answer[-1] in tokenizer.eos_ids
    example = Example.of(exchanges)
    assert [example.ids[r.start : r.stop] for r in example.answers] == [answer for _, answer in exchanges]
    learned = pack([example])
    assert learned.answers.sum() == sum(len(answer) for _, answer in exchanges)
    small = layout.reread(random.Random(3), task, sum(map(len, exchanges[0])) + 64 * 2, [takes] * 2)
    assert len(small) < 3


def test_a_stage_has_its_own_share_of_tasks(layout):
    settings = plan(tasks={"needle": 1}, task_share=1.0)
    stages = (Stage(1, 700), Stage(1, 700, task_share=0), Stage(1, 700, task_share=0.5))
    mixture = Mixture(replace(settings, curriculum=stages), [(Corpus(LONG), 1.0)], layout)
    asked = [sum(int(mixture(step, i).asked.all()) for i in range(20)) for step in range(3)]
    assert asked[0] >= 18 and asked[1] == 0 and 3 < asked[2] < 17  # now and then no needle fits, and text is read


def test_a_stage_has_its_own_share_of_rereading(layout):
    settings = plan(tasks={"needle": 1, "takes": 1}, task_share=1.0, reread_share=1.0, follow_ups=3)
    stages = (Stage(1, 2500), Stage(1, 2500, reread_share=0))
    mixture = Mixture(replace(settings, curriculum=stages), [(Corpus(LONG), 1.0)], layout)
    again, whole = ([mixture(step, i) for i in range(6)] for step in range(2))
    again, whole = ([layout.tokenizer.text(batch.ids.tolist()) for batch in made] for made in (again, whole))
    assert all(" (from line " in text for text in again) and not any(" (from line " in text for text in whole)
    assert any(text.count("<|im_start|>user") > 1 for text in again)


def test_questions_about_no_text(layout):
    """What a model must not unlearn is practised on other questions than those that measure it, asked as in a chat."""
    asked = {(task := PRACTISED["plain"](random.Random(i), DOCUMENTS, None)).question: task for i in range(400)}
    assert len(asked) > 150 and not asked.keys() & {task.question for task in short_tasks()}
    task = asked[min(asked)]
    tokenizer = layout.tokenizer
    prompt, answer = layout.asked(task)
    assert tokenizer.text(prompt) == tokenizer.text(tokenizer.prompt("").before) + task.question + tokenizer.text(
        tokenizer.prompt("").close
    )
    assert tokenizer.decode(answer) == task.answer and layout.reread(random.Random(0), task, 300) == [(prompt, answer)]
    for share in (0.0, 1.0):
        settings = plan(tasks={"plain": 1}, task_share=1.0, reread_share=share)
        batch = Mixture(settings, [(Corpus(DOCUMENTS), 1.0)], layout)(0, 0)
        assert len(batch.lengths) > 3 and batch.asked.all() and "===" not in tokenizer.text(batch.ids.tolist())
