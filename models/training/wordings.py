"""One question in the words that people ask it in: `nsa eval`'s own, others to practise on, and one to try it on.

Taught the usual ones alone, the built-in model listed the parameters of 9 of 12 functions of psutil when asked so,
and of 5 when asked in the words that are held out; taught the others too, of 10 and 10 (from passages).
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Wordings:
    """`usual`: of evaluation, unless it is told otherwise; `others`: practised besides; `held_out`: never practised."""

    usual: str
    others: tuple[str, ...]
    held_out: str

    def filled(self, **names: str) -> "Wordings":
        """With names in place of their braces."""
        usual, held_out, *others = (text.format(**names) for text in (self.usual, self.held_out, *self.others))
        return Wordings(usual, tuple(others), held_out)

    def practised(self, rng: random.Random) -> str:
        return rng.choice(self.others)


NEEDLE = Wordings(
    "What is the magic number of the {name}? Answer with the number.",
    (
        "What is the magic number of the {name}?",
        "Which magic number does the {name} have?",
        "Tell me the magic number of the {name}.",
        "Find the {name}'s magic number.",
        "What number is the magic number of the {name}?",
    ),
    "What's the {name}'s magic number?",
)
VALUES = Wordings(
    "What are all the magic numbers of {name}? Answer with the numbers.",
    (
        "What are the magic numbers of the {name}?",
        "Which magic numbers does the {name} have?",
        "List every magic number of the {name}.",
        "Tell me all magic numbers of the {name}.",
    ),
    "Give me each of the {name}'s magic numbers.",
)
QUERIES = Wordings(
    "What are the magic numbers of {names}? Answer with the numbers.",
    (
        "What are the magic numbers of {names}?",
        "Which magic numbers do {names} have?",
        "Tell me the magic number of each of {names}.",
        "Find the magic numbers of {names}.",
    ),
    "List the magic numbers that belong to {names}.",
)
VARIABLES = Wordings(
    "Which variables have the value {value}? A variable that is set to another has that one's value.",
    (
        "Which variables are {value}, directly or through another variable?",
        "List every variable whose value is {value}.",
        "Which variables hold {value}?",
    ),
    "What variables end up with the value {value}?",
)
ABSENT = Wordings(
    'What is the magic number of the {name}? If the text does not say, answer "{absent}" Else answer with the number.',
    (
        "What is the magic number of the {name}?",
        "Which magic number does the {name} have?",
        'What is the magic number of the {name}? Answer "{absent}" if it is not there.',
        'Does the text say what the magic number of the {name} is? Answer with the number, or "{absent}"',
    ),
    'Give me the magic number of the {name}, or say "{absent}"',
)
DEFINES = Wordings(
    "Which file defines {name}? Answer with its path.",
    (
        "Which file defines {name}?",
        "Where is {name} defined?",
        "Where is {name}?",
        "In which file is {name}?",
        "What file has {name}?",
        "Where can I find {name}?",
        "Find the definition of {name}.",
        "Where is the code of {name}?",
    ),
    "Which module contains the definition of {name}?",
)
TAKES = Wordings(
    "What are the parameters of the function {name}? Answer with its signature.",
    (
        "What are the parameters of {name}?",
        "What are the arguments of {name}?",
        "Which parameters does {name} have?",
        "What does {name} take?",
        "What arguments does the function {name} accept?",
        "List the parameters of {name}.",
        "What do I pass to {name}?",
        "How is {name} called?",
    ),
    "Which inputs does the function {name} expect?",
)
RETURNS = Wordings(
    "What type does the function {name} return? Answer with the type of its signature.",
    (
        "What does {name} return?",
        "What type does {name} return?",
        "What is the return type of {name}?",
        "What do I get from {name}?",
    ),
    "What kind of value comes back from {name}?",
)
RAISES = Wordings(
    "Which exceptions does the function {name} raise? Answer with their names.",
    (
        "What does {name} raise?",
        "Which exceptions can {name} raise?",
        "Which errors does {name} raise?",
        "How can {name} fail?",
    ),
    "What exceptions should I expect from {name}?",
)
SUMMARY = Wordings(
    "What does the {kind} {name} do? Answer with the sentence that its docstring says.",
    (
        "What does {name} do?",
        "What is {name} for?",
        "What is {name}?",
        "Explain {name}.",
        "Describe the {kind} {name} in a sentence.",
        "What is the purpose of {name}?",
    ),
    "Summarize what {name} does.",
)
LEAD = Wordings(
    'What is the section "{title}" about? Answer with its first sentence.',
    (
        'What is "{title}" about?',
        'What does the section "{title}" say?',
        'Summarize the section "{title}" in a sentence.',
    ),
    'How does the section "{title}" begin?',
)
MANUAL = Wordings(
    "What is {name}? Answer with the line under NAME.",
    ("What is {name}?", "What does {name} do?", "What can I do with {name}?"),
    "What is {name} good for?",
)
CHAPTER = Wordings(
    'Under which heading does it say "{line}"? Answer with the heading.',
    (
        'Under which heading does it say "{line}"?',
        'Where does it say "{line}"?',
        'Which section says "{line}"?',
        'In which chapter stands "{line}"?',
    ),
    'Below what heading can I read "{line}"?',
)
FIELD = Wordings(
    'What does {path} say of "{entry}"? Answer with its entry.',
    (
        'What does it say of "{entry}"?',
        'What is the "{entry}" in {path}?',
        "What is said of {entry}?",
        'Look up "{entry}".',
    ),
    'What does the entry "{entry}" of {path} read?',
)
USAGE = Wordings(
    "How do I {purpose}? Answer with the function and its file.",
    (
        "How do I {purpose}?",
        "How can I {purpose}?",
        "Which function is there to {purpose}?",
        "Where is the code to {purpose}?",
        "What do I call to {purpose}?",
        "Is there a function to {purpose}?",
    ),
    "I want to {purpose}. Which function does that?",
)
