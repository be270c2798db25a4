"""Write texts of a small synthetic language whose entropy is known.

A text is a run of scenes; a scene is a paragraph about one hero, the hero's animal, a place and a
weekday. Every word comes from a choice with known probabilities, and the choices can be read back
from the text (no two derivations write the same words), so

    - ln p(text) = Σ over choices of - ln p(choice)

is exact, and no model of the text can have a lower expected loss. Some choices depend on near words
(the verb on its noun, the object on its verb), others on words far back: the verb agrees with the
head noun across a relative clause, the animal keeps its colour and kind, the weekday advances by
one, the sum of two numbers is right, and the nouns of a scene depend on its place.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate


def words(text: str) -> tuple[str, ...]:
    """Return the words of a lexicon."""
    return tuple(text.split())


NAMES = words("Mira Tom Anna Bela Carl Dora Emil Frida Gita Hugo Ines Jon Kira Leo Nora Otto")
PLACES = words("farm river market harbour forest castle mill school")
WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
NUMBERS = words(
    """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen
    """
)
COLOURS = words("grey brown white black red golden")
ANIMALS = words("fox hen dog cat goat duck horse crow")
NOUNS = words(
    """
    apple barrel basket bell boat book boot bottle bridge broom button cake candle cart chair
    clock coat coin cook cup doctor door drum egg farmer feather field flag flower gate ghost
    giant guard hammer hat hunter jar kettle key king ladder lamp letter lion lock map merchant
    mirror monk nail needle oar owl pear pilot pot prince queen ring robber robot rope sailor
    shepherd ship shoe singer soldier spoon stone student sword table teacher tower tree
    trumpet wagon wall wheel window wizard worker
    """
)
VERBS = words(
    """
    admire avoid bring build burn buy call chase clean count cover draw drop fear fill find
    follow greet help hide hold keep know leave lift like lose love make mend move need open
    own paint pull remember save see sell show steal take turn want
    """
)
ADJECTIVES = words(
    """
    big bright broken clever cold common dark dear dry empty fine fresh funny gentle heavy
    hungry kind lazy long lucky merry narrow new noisy old plain proud quiet rare round sharp
    short silent slow soft strange strong tall tiny warm wise young
    """
)
ADVERBS = words(
    """
    again alone always badly early gladly late loudly often quickly quietly rarely slowly soon
    today well
    """
)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Options with their probabilities."""

    options: tuple[str, ...]
    probabilities: tuple[float, ...]

    def sample(self, rng: random.Random) -> int:
        """Draw an option with its probability and return its index."""
        index = bisect(list(accumulate(self.probabilities)), rng.random())
        return min(index, len(self.options) - 1)


def zipf(options: Sequence[str], exponent: float, context: str) -> Distribution:
    """Return Zipf's law over the options, in an order that belongs to `context`."""
    order = list(options)
    random.Random(f"order of {context}").shuffle(order)
    weights = [rank**-exponent for rank in range(1, len(order) + 1)]
    total = sum(weights)
    return Distribution(tuple(order), tuple(weight / total for weight in weights))


def uniform(options: Sequence[str]) -> Distribution:
    """Return equal probabilities."""
    return Distribution(tuple(options), (1 / len(options),) * len(options))


SENTENCE_KINDS = Distribution(
    ("action", "hero", "animal", "sum", "speech", "day"), (0.36, 0.18, 0.14, 0.12, 0.12, 0.08)
)
MORE_SENTENCES = Distribution(("more", "stop"), (0.92, 0.08))
YES_NO = {p: Distribution(("yes", "no"), (p, 1 - p)) for p in (0.2, 0.3, 0.35, 0.5)}
SUBJECTS = (*NOUNS, *ANIMALS, "hero")
CLASSES_OF_NOUNS = 6


@dataclass(frozen=True, slots=True)
class Tables:
    """The words that go with each word: one fixed draw, the same for every text."""

    subject: dict[str, Distribution]
    verb: dict[str, Distribution]
    object: dict[tuple[int, str], Distribution]
    adjective: dict[str, Distribution]
    adverb: dict[str, Distribution]

    @staticmethod
    def make() -> Tables:
        """Return the tables of the language."""
        objects = {}
        for kind in range(CLASSES_OF_NOUNS):
            for verb in VERBS:
                objects[kind, verb] = zipf(NOUNS, 1.5, f"objects, {kind}, {verb}")
        return Tables(
            subject={place: zipf(NOUNS, 1.1, f"subjects, {place}") for place in PLACES},
            verb={noun: zipf(VERBS, 1.5, f"verbs, {noun}") for noun in SUBJECTS},
            object=objects,
            adjective={noun: zipf(ADJECTIVES, 1.6, f"adjectives, {noun}") for noun in NOUNS},
            adverb={verb: zipf(ADVERBS, 1.4, f"adverbs, {verb}") for verb in VERBS},
        )


TABLES = Tables.make()


def class_of(noun: str) -> int:
    """Return the class of a noun, which decides the objects of its verbs."""
    return SUBJECTS.index(noun) % CLASSES_OF_NOUNS


@dataclass(slots=True)
class Writer:
    """A writer of text by seeded choices, whose exact information it adds up."""

    rng: random.Random
    surprisal: float = 0.0
    paragraphs: list[str] = field(default_factory=list)

    def choose(self, distribution: Distribution) -> str:
        """Choose an option and add its - ln p to `surprisal` (nats)."""
        index = distribution.sample(self.rng)
        self.surprisal -= math.log(distribution.probabilities[index])
        return distribution.options[index]

    def says_yes(self, probability: float) -> bool:
        return self.choose(YES_NO[probability]) == "yes"

    def noun_phrase(self, noun: str, *, plural: bool) -> str:
        """Write `the old ships` or `a ship`: the article of a plural is always `the`."""
        indefinite = not plural and self.says_yes(0.3)
        phrase = f"{noun}s" if plural else noun
        if self.says_yes(0.35):
            phrase = f"{self.choose(TABLES.adjective[noun])} {phrase}"
        if not indefinite:
            return f"the {phrase}"
        if phrase[0] in "aeiou":
            return f"an {phrase}"
        return f"a {phrase}"

    def verb_phrase(self, subject: str, *, plural: bool) -> str:
        """Write a verb that agrees with the subject, its object, perhaps an adverb."""
        verb = self.choose(TABLES.verb[subject])
        noun = self.choose(TABLES.object[class_of(subject), verb])
        conjugated = verb if plural else f"{verb}s"
        phrase = f"{conjugated} {self.noun_phrase(noun, plural=self.says_yes(0.35))}"
        if self.says_yes(0.2):
            phrase += f" {self.choose(TABLES.adverb[verb])}"
        return phrase

    def action(self, place: str) -> str:
        """Write a clause about a thing of the place, perhaps with a relative clause in it."""
        subject = self.choose(TABLES.subject[place])
        plural = self.says_yes(0.35)
        phrase = self.noun_phrase(subject, plural=plural)
        if self.says_yes(0.3):
            phrase += f" that {self.verb_phrase(subject, plural=plural)}"
        return f"{phrase} {self.verb_phrase(subject, plural=plural)}"

    def sum(self, place: str) -> str:
        """Write a true sum of things."""
        left, right = self.choose(uniform(NUMBERS[:9])), self.choose(uniform(NUMBERS[:9]))
        noun = self.choose(TABLES.subject[place])
        # The first number is one, at index 0.
        total = NUMBERS[NUMBERS.index(left) + NUMBERS.index(right) + 1]
        return f"{left} and {right} {noun}s are {total} {noun}s"

    def scene(self) -> str:
        """Write one paragraph."""
        place, hero = self.choose(uniform(PLACES)), self.choose(uniform(NAMES))
        animal = f"{self.choose(uniform(COLOURS))} {self.choose(uniform(ANIMALS))}"
        kind = animal.split()[1]
        day = WEEKDAYS.index(self.choose(uniform(WEEKDAYS)))
        sentences = [f"On {WEEKDAYS[day]} {hero} came to the {place} with a {animal}."]
        writers: dict[str, Callable[[], str]] = {
            "action": lambda: self.action(place),
            "hero": lambda: f"{hero} {self.verb_phrase('hero', plural=False)}",
            "animal": lambda: f"the {animal} {self.verb_phrase(kind, plural=False)}",
            "sum": lambda: self.sum(place),
            "speech": lambda: f'"{capital(self.action(place))}," says {hero}',
        }
        while len(sentences) < 3 or self.choose(MORE_SENTENCES) == "more":
            chosen = self.choose(SENTENCE_KINDS)
            if chosen == "day":
                day = (day + 1) % len(WEEKDAYS)
                sentences.append(f"It is {WEEKDAYS[day]}.")
            else:
                sentences.append(capital(writers[chosen]()) + ".")
        return " ".join(sentences)


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class Text:
    """A text of the language and its exact information in nats."""

    text: str
    surprisal: float


def write_text(seed: str, characters: int) -> Text:
    """Write whole scenes until the text has at least `characters`; empty lines separate scenes."""
    writer = Writer(random.Random(seed))
    length = 0
    while length < characters:
        writer.paragraphs.append(writer.scene())
        length += len(writer.paragraphs[-1]) + 2
    return Text("\n\n".join(writer.paragraphs) + "\n", writer.surprisal)
