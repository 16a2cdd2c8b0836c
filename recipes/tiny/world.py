"""A little world with a grammar: facts, spoken questions about them, and free sentences.

Everything is lower case and without punctuation, as a recogniser would write it. There are two
kinds of sentence. *Facts* are fixed ("the cow eats grass") and can be asked for in several ways.
*Free sentences* combine words as a grammar allows ("the small dog sleeps under the old tree"):
there are hundreds of thousands of them, and a hash of the text decides which are held out
(`is_held_out`), so that no script can train on a held-out sentence by accident.

No two words of the vocabulary sound alike (there is no "to" beside "two").
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from facts import ANIMALS, DAYS, NUMBERS, PEOPLE, checks, facts

ADJECTIVES = ("big", "small", "fast", "slow", "old", "young", "happy", "sad")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "grey")
FOODS = (
    "bread", "cheese", "rice", "cake", "apples", "soup", "honey", "carrots", "bananas", "meat",
    "fish", "grass", "hay", "leaves", "insects",
)  # fmt: skip
OBJECTS = ("apples", "bananas", "carrots", "books", "flowers", "boats", "hats", "stones", "cups")
PLACES = (
    "barn", "field", "house", "lake", "river", "desert", "jungle", "garden", "forest", "cellar",
    "ocean", "valley", "market", "bridge", "school", "station", "tree", "village",
)  # fmt: skip
PREPOSITIONS = ("in", "near", "behind", "under", "beside")
MOVING = ("walks", "runs", "jumps", "plays", "dances")
RESTING = ("sleeps", "sits", "stands", "waits", "hides")
TRANSITIVE = ("buys", "sells", "brings", "finds", "wants", "carries")
TIMES = ("today", "at night", "in summer", "in winter", "every day")
PLURAL = {
    "walks": "walk", "runs": "run", "jumps": "jump", "plays": "play", "dances": "dance",
    "sleeps": "sleep", "sits": "sit", "stands": "stand", "waits": "wait", "hides": "hide",
}  # fmt: skip


@dataclass(frozen=True)
class Free:
    """A free sentence and the one continuation that the world holds for it."""

    text: str
    continuation: str


def is_held_out(text: str, every: int = 12) -> bool:
    """True for about one text in `every`, by its hash: the same in all scripts and runs."""
    digest = hashlib.blake2s(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") % every == 0


def _animal_walk(rng: random.Random) -> Free:
    animal = rng.choice(list(ANIMALS))
    verb = rng.choice(MOVING + RESTING)
    which = rng.choice(ADJECTIVES + COLOURS)
    text = f"the {which} {animal} {verb} {rng.choice(PREPOSITIONS)} the {rng.choice(PLACES)}"
    if rng.random() < 0.3:
        text += f" {rng.choice(TIMES)}"
    food = ANIMALS[animal][0]
    return Free(text, f"and then it eats {food}" if verb in MOVING else f"and dreams of {food}")


def _person_walk(rng: random.Random) -> Free:
    name = rng.choice(list(PEOPLE))
    verb = rng.choice(MOVING + RESTING)
    text = f"{name} {verb} {rng.choice(PREPOSITIONS)} the {rng.choice(ADJECTIVES)} "
    text += rng.choice(PLACES)
    if rng.random() < 0.3:
        text = f"on {rng.choice(DAYS)} {text}"
    city, food, _, pet, _ = PEOPLE[name]
    return Free(text, f"and then eats {food} in {city}" if verb in MOVING else f"with the {pet}")


def _trade(rng: random.Random) -> Free:
    name = rng.choice(list(PEOPLE))
    text = f"{name} {rng.choice(TRANSITIVE)} {rng.choice(NUMBERS[1:])} {rng.choice(COLOURS)} "
    text += rng.choice(OBJECTS)
    if rng.random() < 0.3:
        text += f" near the {rng.choice(PLACES)}"
    return Free(text, f"and brings them home in {PEOPLE[name][0]}")


def _together(rng: random.Random) -> Free:
    one, other = rng.sample(list(PEOPLE), 2)
    verb = PLURAL[rng.choice(MOVING + RESTING)]
    text = f"{one} and {other} {verb} {rng.choice(PREPOSITIONS)} the {rng.choice(PLACES)}"
    return Free(text, f"and then {other} eats {PEOPLE[other][1]}")


def _feeding(rng: random.Random) -> Free:
    name, animal = rng.choice(list(PEOPLE)), rng.choice(list(ANIMALS))
    text = f"{name} gives the {animal} some {rng.choice(FOODS)}"
    if rng.random() < 0.4:
        text += f" {rng.choice(TIMES)}"
    return Free(text, f"because the {animal} can {ANIMALS[animal][3]}")


def _shopping(rng: random.Random) -> Free:
    name = rng.choice(list(PEOPLE))
    text = f"on {rng.choice(DAYS)} {name} {rng.choice(TRANSITIVE)} some {rng.choice(FOODS)}"
    return Free(text, f"and shares it with the {PEOPLE[name][3]}")


def _pair(rng: random.Random) -> Free:
    one, other = rng.sample(list(ANIMALS), 2)
    verb = PLURAL[rng.choice(MOVING + RESTING)]
    text = f"the {one} and the {other} {verb} {rng.choice(TIMES)}"
    return Free(text, f"but the {other} wants {ANIMALS[other][0]}")


_TEMPLATES: tuple[Callable[[random.Random], Free], ...] = (
    _animal_walk, _person_walk, _trade, _together, _feeding, _shopping, _pair,
)  # fmt: skip


def free_sentence(rng: random.Random, *, held_out: bool = False) -> Free:
    """Draws a free sentence from the training pool, or from the held-out pool."""
    while True:
        sentence = rng.choice(_TEMPLATES)(rng)
        if is_held_out(sentence.text) == held_out:
            return sentence


def questions(*, held_out: bool = False) -> list[tuple[str, str]]:
    """All (question, answer) pairs of the training pool, or of the held-out pool.

    A held-out question asks for a fact in words that no script trains on; the fact itself is
    known from its statement and from its other questions.
    """
    pairs = [(q, fact.statement) for fact in facts() for q in fact.questions] + checks()
    return [pair for pair in pairs if is_held_out(pair[0]) == held_out]


def vocabulary() -> list[str]:
    """Every word of the world, sorted."""
    rng = random.Random(0)
    texts = [t for f in facts() for t in (f.statement, f.beginning, *f.questions)]
    texts += [t for pair in checks() for t in pair]
    for _ in range(5000):
        sentence = free_sentence(rng)
        texts += [sentence.text, sentence.continuation]
    return sorted({word for text in texts for word in text.split()})


def word_salad(rng: random.Random, words: list[str]) -> str:
    """Draws 3 to 8 words in no order: makes rare words heard and copied as often as others."""
    return " ".join(rng.choices(words, k=rng.randint(3, 8)))
