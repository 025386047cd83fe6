"""Evidence: attention to blocks -> places, best first, only of the document, only beyond what is expected."""

from pathlib import PurePosixPath

import pytest

from nsa_cli.context import build_context
from nsa_cli.documents import Document
from nsa_cli.documents.document import Part
from nsa_cli.evidence import Evidence, counted_tokens, find_evidence
from nsa_models import NSAConfig
from nsa_models.retrieval import RetrievalMass

BLOCK = 64
CONFIG = NSAConfig(
    vocab_size=320,
    hidden_size=8,
    num_hidden_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
)


class Letters:
    """A tokenizer with a token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        return self.encode(text), list(range(len(text)))


def context_of(*texts: str, folder: str = "."):
    paths = (PurePosixPath(folder, f"{'abc'[i]}.txt") for i in range(len(texts)))
    return build_context([Document(str(path), text) for path, text in zip(paths, texts, strict=True)], Letters())


def mass_of(blocks: int, drawn: dict[int, float]) -> RetrievalMass:
    """What some blocks drew; the others share what makes 10 the even share."""
    retrieval = RetrievalMass(CONFIG, blocks * BLOCK)
    rest = [block for block in range(1, blocks) if block not in drawn]
    retrieval.mass[:, rest] = (10 * (blocks - 1) - sum(drawn.values())) / len(rest)
    for block, mass in drawn.items():
        retrieval.mass[:, block] = mass
    return retrieval


LINES = "x" * 31 + "\n"  # two lines a block


def test_a_chosen_block_becomes_its_lines():
    context = context_of(LINES * 40)  # one header of 14 tokens, then 32 tokens a line
    header = len("=== a.txt ===\n")
    offset = 2 * BLOCK - header  # lines start where a block does
    (found,) = find_evidence(mass_of(30, {5: 40}), context, offset, 5)
    assert found == Evidence("a.txt", 7, 8, pytest.approx(4.0))
    assert str(found) == "a.txt:7-8  lift 4.0x"
    assert found.to_json() == {"path": "a.txt", "start": 7, "end": 8, "lift": 4.0, "place": "a.txt:7-8"}


def test_places_of_a_book_are_its_pages_each_once():
    parts = tuple(Part(1 + 10 * page, f"p. {page + 1}") for page in range(4))
    context = build_context([Document("b.pdf", LINES * 40, parts, converted=True)], Letters())
    found = find_evidence(mass_of(21, {1: 30, 3: 90, 8: 50, 17: 40}), context, 0, 9)
    assert [(e.place, round(e.lift)) for e in found] == [("b.pdf p. 1", 9), ("b.pdf p. 2", 5), ("b.pdf p. 4", 4)]


def test_the_best_come_first_and_no_more_than_asked_for():
    context = context_of(LINES * 60)
    retrieval = mass_of(30, {3: 30, 7: 90, 11: 50, 15: 40})
    found = find_evidence(retrieval, context, 0, 3)
    assert [round(e.lift, 1) for e in found] == [9.0, 5.0, 4.0]
    assert find_evidence(retrieval, context, 0, 0) == []


def test_neighbours_that_are_one_place_leave_room_for_others():
    context = context_of(LINES * 60)
    found = find_evidence(mass_of(30, {3: 90, 4: 80, 5: 70, 11: 50, 15: 40, 19: 30}), context, 0, 3)
    assert [round(e.lift, 1) for e in found] == [9.0, 5.0, 4.0]
    assert found[0].end - found[0].start >= 5  # three blocks of two lines


def test_neighbours_in_a_file_are_one_place_and_files_are_kept_apart():
    context = context_of(LINES * 8, LINES * 8)  # about 300 tokens each; the listing takes less than a block
    last_of_a, first_of_b = context.files[0].stop // BLOCK, context.files[1].start // BLOCK
    assert last_of_a == first_of_b  # one block straddles both
    found = find_evidence(mass_of(12, {last_of_a - 1: 60, last_of_a: 70, last_of_a + 1: 50}), context, 0, 9)
    assert [e.path for e in found] == ["a.txt", "b.txt"]
    assert all(e.lift == pytest.approx(7.0) for e in found)
    assert found[0].end == 8 and found[1].start == 1


def test_blocks_around_the_document_are_no_evidence():
    context = context_of(LINES * 8)
    before = 4 * BLOCK
    after = (before + len(context.ids)) // BLOCK + 1
    assert find_evidence(mass_of(20, {0: 99, 3: 99, after: 99, 19: 99}), context, before, 5) == []
    (found,) = find_evidence(mass_of(20, {4: 99, 3: 99}), context, before + 1, 5)
    assert (found.start, found.end) == (1, 2)  # only the document's part of block 3 and block 4


def test_what_chance_gives_is_no_evidence():
    context = context_of(LINES * 60)
    assert find_evidence(mass_of(30, {}), context, 0, 5) == []
    assert find_evidence(mass_of(30, {4: 19}), context, 0, 5) == []
    (found,) = find_evidence(mass_of(30, {4: 21}), context, 0, 5)
    assert found.lift == pytest.approx(2.1)
    assert find_evidence(RetrievalMass(CONFIG, 30 * BLOCK), context, 0, 5) == []  # nothing was asked


@pytest.mark.parametrize(
    ("question", "counted"),
    [
        ("What does| f|_x| do|?", " f|_x"),
        ("Where| is| the| harbour|, and| who| keeps| it|?", " harbour| keeps"),
        ("wo ist| der| Hafen|?", "wo ist| der| Hafen"),
        ("\u6771|\u4eac|?", "\u6771|\u4eac"),
        ("What| is| it|?", "What| is| it|?"),  # nothing else to go by
        ("", ""),
    ],
)
def test_words_that_every_question_has_do_not_count(question: str, counted: str):
    tokens = question.split("|") if question else []
    starts = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    found = counted_tokens("".join(tokens), starts)
    assert "|".join(t for t, c in zip(tokens, found, strict=True) if c) == counted


def test_all_bytes_of_a_character_count():
    assert counted_tokens("a \u6771!", [0, 2, 2, 2, 3]) == [False, True, True, True, False]
