"""Questions about the world. Training and evaluation ask about the same facts in different words."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from twotower.train.families.answers import final_answer
from twotower.train.families.item import SPLITS, Item, Split, in_eval
from twotower.train.families.knowledge.world import BY_SUBJECT, CHOICES, RELATIONS, Relation

EVAL_SHARE = 8
"""One wording of a question in `EVAL_SHARE` belongs to the evaluation split; so do all wordings that training never sees."""

LETTERS = "ABCD"
CHOICE_SHARE = 0.5
"""Share of questions with four answers to choose from."""

HOP_SHARE = 0.35
"""Share of questions over two facts."""

OPENERS = (
    "", "", "", "", "Tell me: ", "Question: ", "Quiz: ", "Do you know this? ", "Please answer: ", "A question for you. ",
    "Here is a question: ", "Answer this: ", "Can you tell me? ",
)  # fmt: skip
UNSEEN_OPENERS = ("", "", "Please tell me: ", "A quiz question: ", "Do you know? ", "Answer this question: ")
_FRAMES = ("What is the {p}?", "Name the {p}.", "Which is the {p}?", "Tell me the {p}.", "The {p} is what?")
_UNSEEN_FRAMES = ("Please name the {p}.", "What is the name of the {p}?")


@dataclass(frozen=True, slots=True)
class AnswerCheck:
    """The last "The answer is ..." must state this answer, or the letter of its choice."""

    answer: str
    letter: str | None

    def passes(self, text: str) -> bool:
        """See `Check`."""
        said = final_answer(text)
        if said is None:
            return False
        said = re.sub(r"^the ", "", said)
        if self.letter is None:
            return said == self.answer
        return said in (self.letter, f"{self.letter}) {self.answer}", f"{self.letter}. {self.answer}")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, the facts that lead to its answer, and the answer."""

    question: str
    facts: tuple[str, ...]
    answer: str
    kind: str
    """The kind of the answer: see `CHOICES`."""
    unseen: bool
    """Whether its wording is one that training never sees."""


def items(split: Split, seed: int) -> Iterator[Item]:
    """An endless stream of questions; equal for equal arguments. No wording of a question occurs in two splits."""
    assert split in SPLITS, split
    rng = random.Random(f"knowledge:{split}:{seed}")
    while True:
        unseen = split == "eval" and rng.random() < 0.5
        asked = two_hops(rng, unseen) if rng.random() < HOP_SHARE else one_hop(rng, unseen)
        if unseen or split_of(asked.question) == split:
            yield _posed(rng, asked, UNSEEN_OPENERS if split == "eval" else OPENERS)


def split_of(question: str) -> Split:
    """The split of a question, without its opening words and choices: train or eval."""
    return "eval" if in_eval(question, EVAL_SHARE) else "train"


def one_hop(rng: random.Random, unseen: bool) -> Asked:
    """A question about a single fact."""
    relation = rng.choice(RELATIONS)
    subject = rng.choice(tuple(relation.facts))
    wording = rng.choice(relation.unseen if unseen else relation.asked)
    answer = relation.facts[subject]
    question, fact = wording.format(s=subject), relation.statement.format(s=subject, a=answer)
    return Asked(_capital(question), (_capital(fact),), answer, relation.answer, unseen)


_HOPS = tuple(
    (first, second)
    for first in RELATIONS
    for second in BY_SUBJECT.get(first.answer, ())
    if first.phrase and second.phrase and second.answer != first.subject
)


def two_hops(rng: random.Random, unseen: bool) -> Asked:
    """A question about the answer to another fact."""
    first, second = rng.choice(_HOPS)
    subject = rng.choice(tuple(first.facts))
    middle = first.facts[subject]
    answer = second.facts[middle]
    inner = second.phrase.format(s=_inner(first, subject, second))
    frame = rng.choice(_UNSEEN_FRAMES if unseen else _FRAMES)
    facts = (first.statement.format(s=subject, a=middle), second.statement.format(s=middle, a=answer))
    return Asked(_capital(frame.format(p=inner)), tuple(map(_capital, facts)), answer, second.answer, unseen)


def _inner(first: Relation, subject: str, second: Relation) -> str:
    """A description of the first fact's answer, with "the" unless the second phrase has its own."""
    described = first.phrase.format(s=subject)
    return described if "the {s}" in second.phrase else f"the {described}"


def _posed(rng: random.Random, asked: Asked, openers: tuple[str, ...]) -> Item:
    question = rng.choice(openers) + _as_typed(rng, asked.question)
    steps = "\n".join(asked.facts)
    if rng.random() >= CHOICE_SHARE:
        return Item("knowledge", question, f"{steps}\nThe answer is {asked.answer}.", AnswerCheck(asked.answer, None))
    others = [choice for choice in CHOICES[asked.kind] if choice != asked.answer]
    options = [asked.answer, *rng.sample(others, min(3, len(others)))]
    rng.shuffle(options)
    letter = LETTERS[options.index(asked.answer)]
    form = rng.choice((" {l}) {o}", "\n{l}) {o}", "\n{l}. {o}", " {l}. {o}"))
    listed = "".join(form.format(l=name, o=option) for name, option in zip(LETTERS, options, strict=False))
    return Item("knowledge", question + listed, f"{steps}\nThe answer is {letter}.", AnswerCheck(asked.answer, letter))


def _as_typed(rng: random.Random, question: str) -> str:
    """A question as people type it, sometimes without the question mark."""
    return question[:-1] if question.endswith("?") and rng.random() < 0.08 else question


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
