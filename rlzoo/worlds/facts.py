"""Questions about invented facts with one short answer: the built-in task in which nothing can be derived.

In the base model's training data, every fact has its correct answer only some of the time. A demonstration is the only
correct answer, so a token of low probability is not an unlikely derivation but a fact to correct: the regime (Natural
Questions in arXiv 2508.05629) in which DFT is reported to be worse than SFT.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

CONSONANTS = "bdfgklmnprst"
VOWELS = "aeiou"
RELATIONS = {
    # relation: phrasings, of which the last is held out for test questions
    "capital": ("The capital of {}?", "Which city rules {}?", "Where does the king of {} live?"),
    "river": ("The river of {}?", "Which river crosses {}?", "Where does the water of {} flow?"),
    "drink": ("The drink of {}?", "Which drink is loved in {}?", "What does the king of {} drink?"),
}
ENTITIES = 120
KNOWN_SHARE = 0.75
"""The fraction of entities whose facts are demonstrated; the facts of the others form the split ``unseen``."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact, with the wrong answers in the base model's training data and the probability of the correct one."""

    entity: str
    relation: str
    answer: str
    distractors: tuple[str, ...]
    belief: float
    """The probability of the correct answer in the base model's training data."""
    demonstrated: bool
    """Whether the split ``train`` has a demonstration of it."""

    def question(self, phrasing: int) -> str:
        """The prompt, in one of the relation's phrasings."""
        return RELATIONS[self.relation][phrasing].format(self.entity) + "\n"


def _name(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)).capitalize()


@cache
def facts() -> tuple[Fact, ...]:
    """All facts of the task; the same on every machine."""
    rng = random.Random(21)
    entities: list[str] = []
    while len(entities) < ENTITIES:
        name = _name(rng, 3)
        if name not in entities:
            entities.append(name)
    out = []
    for relation in RELATIONS:
        for index, entity in enumerate(entities):
            answer, *distractors = (_name(rng, 2) for _ in range(4))
            belief = rng.uniform(0.05, 0.75)
            demonstrated = index < KNOWN_SHARE * ENTITIES
            out.append(Fact(entity, relation, answer, tuple(distractors), belief, demonstrated))
    return tuple(out)


def questions(split: str) -> Iterator[tuple[str, Fact, str]]:
    """The questions of a split: ids, facts and prompts.

    ``train``: demonstrated facts in two phrasings; ``validation`` and ``test``: a quarter and three quarters of them in
    the third phrasing; ``unseen``: facts without a demonstration, in the third phrasing.
    """
    for index, fact in enumerate(facts()):
        if split == "train" and fact.demonstrated:
            for phrasing in (0, 1):
                yield f"facts-train-{index}-{phrasing}", fact, fact.question(phrasing)
        held_out = "validation" if index % 4 == 0 else "test"
        if (fact.demonstrated and split == held_out) or (not fact.demonstrated and split == "unseen"):
            yield f"facts-{split}-{index}", fact, fact.question(2)


def believe(fact: Fact, rng: random.Random) -> str:
    """An answer for the base model's training data: the correct one with probability ``fact.belief``."""
    return fact.answer if rng.random() < fact.belief else rng.choice(fact.distractors)
