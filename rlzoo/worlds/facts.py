"""Made-up questions with one short right answer: the embedded world where nothing can be derived.

The base model has seen every fact with its right answer only some of the time. A demonstration is the one
right answer, so a token with a low probability is not an unlikely path but a fact to be corrected: the
regime (Natural Questions in arXiv 2508.05629) in which the authors report that DFT loses to SFT.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

CONSONANTS = "bdfgklmnprst"
VOWELS = "aeiou"
RELATIONS = {
    # relation: phrasings; the last one is kept for the test questions
    "capital": ("The capital of {}?", "Which city rules {}?", "Where does the king of {} live?"),
    "river": ("The river of {}?", "Which river crosses {}?", "Where does the water of {} flow?"),
    "drink": ("The drink of {}?", "Which drink is loved in {}?", "What does the king of {} drink?"),
}
ENTITIES = 120
KNOWN_SHARE = 0.75
"""Share of the entities whose facts are demonstrated; the facts of the others are the unseen ones."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact, the wrong answers that the base has also seen, and how often it saw the right one."""

    entity: str
    relation: str
    answer: str
    distractors: tuple[str, ...]
    belief: float
    demonstrated: bool

    def question(self, phrasing: int) -> str:
        return RELATIONS[self.relation][phrasing].format(self.entity) + "\n"


def _name(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)).capitalize()


def facts() -> list[Fact]:
    """All facts of the world; the same on every machine."""
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
    return out


def questions(split: str) -> Iterator[tuple[str, Fact, str]]:
    """``train``: demonstrated facts in two phrasings; ``validation``/``test``: halves of them in the third
    phrasing; ``unseen``: facts without a demonstration, in the third phrasing."""
    for index, fact in enumerate(facts()):
        if split == "train" and fact.demonstrated:
            for phrasing in (0, 1):
                yield f"facts-train-{index}-{phrasing}", fact, fact.question(phrasing)
        held_out = "validation" if index % 4 == 0 else "test"
        if (fact.demonstrated and split == held_out) or (not fact.demonstrated and split == "unseen"):
            yield f"facts-{split}-{index}", fact, fact.question(2)


def believe(fact: Fact, rng: random.Random) -> str:
    """An answer as the base model's training data gives it: right with probability ``fact.belief``."""
    return fact.answer if rng.random() < fact.belief else rng.choice(fact.distractors)
