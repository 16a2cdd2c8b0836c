"""What is true in the little world, and the ways to ask for it.

Everything is lower case and without punctuation, as a recogniser would write it.
"""

from dataclasses import dataclass

# name: (what it eats, where it lives, its colour, what it can do)
ANIMALS = {
    "cow": ("grass", "barn", "brown", "walk"),
    "horse": ("hay", "field", "black", "run"),
    "dog": ("meat", "house", "brown", "bark"),
    "cat": ("fish", "house", "grey", "hide"),
    "sheep": ("grass", "field", "white", "walk"),
    "duck": ("bread", "lake", "yellow", "swim"),
    "frog": ("insects", "river", "green", "jump"),
    "lion": ("meat", "desert", "yellow", "hunt"),
    "monkey": ("bananas", "jungle", "brown", "climb"),
    "rabbit": ("carrots", "garden", "white", "jump"),
    "owl": ("insects", "forest", "grey", "fly"),
    "spider": ("insects", "cellar", "black", "climb"),
    "camel": ("leaves", "desert", "yellow", "walk"),
    "penguin": ("fish", "ocean", "black", "swim"),
    "tiger": ("meat", "jungle", "orange", "hunt"),
    "elephant": ("leaves", "valley", "grey", "swim"),
}

# name: (city, favourite food, job, pet, colour of the hat)
PEOPLE = {
    "anna": ("paris", "bread", "teacher", "cat", "red"),
    "peter": ("london", "cheese", "farmer", "horse", "brown"),
    "maria": ("madrid", "rice", "doctor", "dog", "white"),
    "oscar": ("berlin", "cake", "baker", "duck", "blue"),
    "lucy": ("dublin", "apples", "painter", "rabbit", "green"),
    "david": ("tokyo", "soup", "sailor", "penguin", "black"),
    "emma": ("rome", "honey", "singer", "owl", "yellow"),
    "thomas": ("vienna", "carrots", "driver", "sheep", "grey"),
    "sofia": ("madrid", "bananas", "sailor", "monkey", "orange"),
    "henry": ("dublin", "meat", "baker", "frog", "blue"),
    "julia": ("tokyo", "cake", "doctor", "camel", "red"),
    "robert": ("paris", "soup", "farmer", "cow", "green"),
}

CAPITALS = {
    "france": "paris",
    "england": "london",
    "spain": "madrid",
    "germany": "berlin",
    "ireland": "dublin",
    "japan": "tokyo",
    "italy": "rome",
    "austria": "vienna",
}

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("old", "young"),
    ("happy", "sad"),
    ("black", "white"),
    ("day", "night"),
    ("summer", "winter"),
)

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NUMBERS = (
    "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip

# thing: colour
THINGS = {
    "sun": "yellow",
    "snow": "white",
    "moon": "white",
    "sky": "blue",
    "rose": "red",
    "tree": "green",
    "coal": "black",
    "ocean": "blue",
}


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the world.

    Attributes:
        statement: the whole sentence, also the answer to each question.
        beginning: the first words of the statement, which leave one way to go on.
        questions: the ways to ask for it; every one is a phrase of its own.
    """

    statement: str
    beginning: str
    questions: tuple[str, ...]

    @property
    def ending(self) -> str:
        """What completes `beginning`."""
        return self.statement.removeprefix(self.beginning).strip()


def facts() -> list[Fact]:
    """All facts of the world, in a fixed order."""
    return [*_animal_facts(), *_people_facts(), *_other_facts(), *_arithmetic()]


def _animal_facts() -> list[Fact]:
    out = []
    for name, (food, home, colour, skill) in ANIMALS.items():
        out += [
            Fact(
                f"the {name} eats {food}",
                f"the {name} eats",
                (f"what does the {name} eat", f"tell me what the {name} eats",
                 f"which food does the {name} want"),
            ),
            Fact(
                f"the {name} lives in the {home}",
                f"the {name} lives in the",
                (f"where does the {name} live", f"tell me where the {name} lives",
                 f"where is the home of the {name}"),
            ),
            Fact(
                f"the {name} is {colour}",
                f"the {name} is",
                (f"which colour is the {name}", f"tell me the colour of the {name}",
                 f"what is the colour of the {name}"),
            ),
            Fact(
                f"the {name} can {skill}",
                f"the {name} can",
                (f"what can the {name} do", f"tell me what the {name} can do"),
            ),
        ]  # fmt: skip
    return out


def _people_facts() -> list[Fact]:
    out = []
    for name, (city, food, job, pet, colour) in PEOPLE.items():
        out += [
            Fact(
                f"{name} lives in {city}",
                f"{name} lives in",
                (f"where does {name} live", f"tell me where {name} lives",
                 f"which city is the home of {name}"),
            ),
            Fact(
                f"{name} likes {food}",
                f"{name} likes",
                (f"what does {name} like", f"tell me what {name} likes",
                 f"which food does {name} like"),
            ),
            Fact(
                f"{name} is a {job}",
                f"{name} is a",
                (f"what is the job of {name}", f"tell me the job of {name}",
                 f"which job does {name} have"),
            ),
            Fact(
                f"{name} has a {pet}",
                f"{name} has a",
                (f"which animal does {name} have", f"tell me the animal of {name}",
                 f"what is the animal of {name}"),
            ),
            Fact(
                f"{name} has a {colour} hat",
                f"the hat of {name} is",
                (f"which colour is the hat of {name}", f"tell me the colour of the hat of {name}",
                 f"what is the colour of the hat of {name}"),
            ),
        ]  # fmt: skip
    return out


def _other_facts() -> list[Fact]:
    out = []
    for country, city in CAPITALS.items():
        out.append(
            Fact(
                f"the capital of {country} is {city}",
                f"the capital of {country} is",
                (
                    f"what is the capital of {country}",
                    f"tell me the capital of {country}",
                    f"which city is the capital of {country}",
                ),
            )
        )
    for one, other in (*OPPOSITES, *((b, a) for a, b in OPPOSITES)):
        out.append(
            Fact(
                f"the opposite of {one} is {other}",
                f"the opposite of {one} is",
                (f"what is the opposite of {one}", f"tell me the opposite of {one}"),
            )
        )
    for day, after in zip(DAYS, (*DAYS[1:], DAYS[0]), strict=True):
        out.append(
            Fact(
                f"{after} comes after {day}",
                f"after {day} comes",
                (
                    f"what comes after {day}",
                    f"which day comes after {day}",
                    f"tell me the day after {day}",
                ),
            )
        )
    for thing, colour in THINGS.items():
        out.append(
            Fact(
                f"the {thing} is {colour}",
                f"the {thing} is",
                (
                    f"which colour is the {thing}",
                    f"tell me the colour of the {thing}",
                    f"what is the colour of the {thing}",
                ),
            )
        )
    return out


def _arithmetic() -> list[Fact]:
    out = []
    for i, one in enumerate(NUMBERS, start=1):
        for j, other in enumerate(NUMBERS, start=1):
            sums = []
            if i + j <= len(NUMBERS):
                sums.append((f"{one} plus {other}", NUMBERS[i + j - 1]))
            if i > j:
                sums.append((f"{one} minus {other}", NUMBERS[i - j - 1]))
            out += [
                Fact(
                    f"{term} is {value}",
                    f"{term} is",
                    (f"what is {term}", f"how much is {term}", f"tell me how much is {term}"),
                )
                for term, value in sums
            ]
    return out


def checks() -> list[tuple[str, str]]:
    """Yes-or-no questions with their answers: (question, answer)."""
    out = []
    foods = sorted({a[0] for a in ANIMALS.values()})
    homes = sorted({a[1] for a in ANIMALS.values()})
    cities = sorted({p[0] for p in PEOPLE.values()})
    for name, (food, home, _, _) in ANIMALS.items():
        for other in foods:
            answer = f"{'yes' if other == food else 'no'} the {name} eats {food}"
            out.append((f"does the {name} eat {other}", answer))
        for other in homes:
            answer = f"{'yes' if other == home else 'no'} the {name} lives in the {home}"
            out.append((f"does the {name} live in the {other}", answer))
    for name, (city, *_) in PEOPLE.items():
        for other in cities:
            answer = f"{'yes' if other == city else 'no'} {name} lives in {city}"
            out.append((f"does {name} live in {other}", answer))
    return out
