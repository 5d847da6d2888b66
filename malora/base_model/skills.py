"""Small skills as generated (input, output) examples: what a page of pre-training text shows.

A skill draws its settings once a page (which date format, which field, which labels) and then
gives examples that share them. A page's reader must infer the settings from the examples, so the
model learns to do all of these without preferring any: an adapter picks one.
"""

# ruff: noqa: SIM905 (lists of words read best as text)
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from random import Random

from malora.base_model import vocabulary as v

Example = tuple[str, str]


@dataclass(frozen=True)
class Pool:
    """Pieces of real text that skills work on."""

    sentences: Sequence[str]
    words: Sequence[str]


@dataclass(frozen=True)
class Skill:
    """What one page shows: the instruction that names it and a source of examples."""

    instruction: str
    example: Callable[[Random], Example]


def number_words(n: int) -> str:
    """Spell 0 <= n < 1,000,000 in English."""
    small = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
        "fifteen sixteen seventeen eighteen nineteen"
    ).split()
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    if n < 20:
        return small[n]
    if n < 100:
        return tens[n // 10 - 2] + (f"-{small[n % 10]}" if n % 10 else "")
    if n < 1000:
        rest = f" and {number_words(n % 100)}" if n % 100 else ""
        return f"{small[n // 100]} hundred{rest}"
    rest = f" {number_words(n % 1000)}" if n % 1000 else ""
    return f"{number_words(n // 1000)} thousand{rest}"


def ordinal(n: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def roman(n: int) -> str:
    """The Roman numeral of 1 <= n < 4000."""
    signs = "M CM D CD C XC L XL X IX V IV I".split()
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    out = ""
    for sign, value in zip(signs, values, strict=True):
        out += sign * (n // value)
        n %= value
    return out


def _month(d: date) -> str:
    return v.MONTHS[d.month - 1]


def _weekday(d: date) -> str:
    return v.WEEKDAYS[d.weekday()]


DATE_FORMATS: dict[str, Callable[[date], str]] = {
    "YYYY-MM-DD": lambda d: d.isoformat(),
    "DD/MM/YYYY": lambda d: f"{d.day:02}/{d.month:02}/{d.year}",
    "MM/DD/YYYY": lambda d: f"{d.month:02}/{d.day:02}/{d.year}",
    "DD.MM.YYYY": lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    "D.M.YYYY": lambda d: f"{d.day}.{d.month}.{d.year}",
    "YYYY/MM/DD": lambda d: f"{d.year}/{d.month:02}/{d.day:02}",
    "YYYYMMDD": lambda d: f"{d.year}{d.month:02}{d.day:02}",
    "DD-MM-YYYY": lambda d: f"{d.day:02}-{d.month:02}-{d.year}",
    "day month year": lambda d: f"{d.day} {_month(d)} {d.year}",
    "month day, year": lambda d: f"{_month(d)} {d.day}, {d.year}",
    "month ordinal, year": lambda d: f"{_month(d)} {ordinal(d.day)}, {d.year}",
    "the ordinal of month year": lambda d: f"the {ordinal(d.day)} of {_month(d)} {d.year}",
    "ordinal month year": lambda d: f"{ordinal(d.day)} {_month(d)} {d.year}",
    "short month": lambda d: f"{d.day} {_month(d)[:3]} {d.year}",
    "short month first": lambda d: f"{_month(d)[:3]} {d.day}, {d.year}",
    "weekday, day month year": lambda d: f"{_weekday(d)}, {d.day} {_month(d)} {d.year}",
    "weekday, month day, year": lambda d: f"{_weekday(d)}, {_month(d)} {d.day}, {d.year}",
}
_DATE_PARTS: dict[str, Callable[[date], str]] = {
    "the day": lambda d: str(d.day),
    "the month": _month,
    "the month's number": lambda d: str(d.month),
    "the year": lambda d: str(d.year),
    "month and year": lambda d: f"{_month(d)} {d.year}",
    "MM/YYYY": lambda d: f"{d.month:02}/{d.year}",
    "DD.MM.": lambda d: f"{d.day:02}.{d.month:02}.",
}
_DATE_CARRIERS = (
    "{} was a quiet day.|The letter is dated {}.|She was born on {} in {city}.|It opened on {}.|"
    "Built in {city}, finished {}.|We left {city} on {} and came home a week later.|Since {} it "
    "has been closed.|My contract ends {}.|On {} {name} moved to {city}.|{name} wrote this on {}.|"
    "the train leaves {city} {}|do you remember {}?|nothing happened until {}|updated {} by {name}|"
    "{name} ({}) agreed.|The first edition, {}, sold {n} copies.|Expires {}!|file {n}, saved {}|"
    "they signed it in {city}, {}, with {n} witnesses|valid from {}"
).split("|")


def _date(rng: Random) -> date:
    return date(1900, 1, 1) + timedelta(days=rng.randrange(55_000))


def dates(rng: Random, _: Pool) -> Skill:
    """A date, bare or in a sentence, in another format."""
    out_name, out = rng.choice([*DATE_FORMATS.items(), *_DATE_PARTS.items()])
    fixed = rng.choice(list(DATE_FORMATS.values())) if rng.random() < 0.4 else None
    carried = rng.random() < 0.6

    def example(rng: Random) -> Example:
        day = _date(rng)
        text = (fixed or rng.choice(list(DATE_FORMATS.values())))(day)
        if carried:
            text = rng.choice(_DATE_CARRIERS).format(
                text,
                city=rng.choice(v.CITIES),
                name=rng.choice(v.FIRST_NAMES),
                n=rng.randrange(2, 900),
            )
        return text, out(day)

    return Skill(f"Write the date as {out_name}", example)


def numbers(rng: Random, _: Pool) -> Skill:
    """Numbers spelled, in digits, as ordinals, Roman numerals or with separators."""
    forms: dict[str, Callable[[int], str]] = {
        "in words": number_words,
        "in digits": str,
        "with a thousands separator": lambda n: f"{n:,}",
        "as an ordinal": ordinal,
        "as a Roman numeral": lambda n: roman(n % 3999 + 1),
        "with five digits": lambda n: f"{n % 100_000:05}",
        "as a price": lambda n: f"${n}.00",
        "plus one": lambda n: str(n + 1),
        "doubled": lambda n: str(2 * n),
        "in spaced digits": lambda n: " ".join(str(n)),
    }
    source = rng.choice(list(forms.values())[:5])
    name, out = rng.choice(list(forms.items()))
    top = rng.choice((20, 100, 1000, 10_000, 100_000))
    roman_used = source is forms["as a Roman numeral"] or name == "as a Roman numeral"

    def example(rng: Random) -> Example:
        n = rng.randrange(0 if not roman_used else 1, min(top, 3998) if roman_used else top)
        shown = n - 1 if source is forms["as a Roman numeral"] else n
        target = n - 1 if name == "as a Roman numeral" else n
        return source(shown), out(target)

    return Skill(f"Write the number {name}", example)


def arithmetic(rng: Random, _: Pool) -> Skill:
    """Sums, differences, small products, comparisons and units."""
    kind = rng.choice(("+", "-", "*", "larger", "smaller", "unit", "sum", "count"))
    top = rng.choice((10, 20, 100, 1000))
    unit, other, factor = rng.choice(v.UNITS)

    def example(rng: Random) -> Example:
        a, b = rng.randrange(top), rng.randrange(top)
        if kind == "+":
            return f"{a} + {b}", str(a + b)
        if kind == "-":
            a, b = max(a, b), min(a, b)
            return f"{a} - {b}", str(a - b)
        if kind == "*":
            a, b = a % 13, b % 13
            return f"{a} * {b}", str(a * b)
        if kind == "larger":
            return f"{a}, {b}", str(max(a, b))
        if kind == "smaller":
            return f"{a}, {b}", str(min(a, b))
        if kind == "unit":
            return f"{a} {unit}", f"{a * factor} {other}"
        values = [rng.randrange(10) for _ in range(rng.randrange(2, 6))]
        if kind == "sum":
            return " + ".join(map(str, values)), str(sum(values))
        return " ".join(map(str, values)), str(len(values))

    name = {"unit": f"from {unit} to {other}"}.get(kind, kind)
    return Skill(f"Work it out ({name})", example)


_WORD_LISTS: dict[str, Callable[[list[str]], str]] = {
    "in alphabetical order": lambda w: " ".join(sorted(w)),
    "in reverse order": lambda w: " ".join(reversed(w)),
    "the first word": lambda w: w[0],
    "the last word": lambda w: w[-1],
    "the second word": lambda w: w[1],
    "how many words": lambda w: str(len(w)),
    "the longest word": lambda w: max(w, key=len),
    "the shortest word": lambda w: min(w, key=len),
    "separated by commas": ", ".join,
    "joined with underscores": "_".join,
    "joined with hyphens": "-".join,
    "as a JSON list": json.dumps,
    "each quoted": lambda w: " ".join(f"'{x}'" for x in w),
    "the initials": lambda w: "".join(x[0] for x in w).upper(),
    "in capitals": lambda w: " ".join(w).upper(),
    "with capital initials": lambda w: " ".join(w).title(),
    "without the first word": lambda w: " ".join(w[1:]),
    "without the last word": lambda w: " ".join(w[:-1]),
    "numbered": lambda w: " ".join(f"{i}. {x}" for i, x in enumerate(w, 1)),
    "twice": lambda w: " ".join([*w, *w]),
    "unchanged": " ".join,
}


def word_lists(rng: Random, pool: Pool) -> Skill:
    """Copying, ordering, counting and joining words."""
    name, out = rng.choice(list(_WORD_LISTS.items()))
    separator = rng.choice((" ", " ", ", ", ";", " / ", "-"))
    longest = rng.randrange(3, 9)

    def example(rng: Random) -> Example:
        words = rng.choices(pool.words, k=rng.randrange(2, longest))
        return separator.join(words), out(words)

    return Skill(f"Write the words {name}", example)


_SPELLINGS: dict[str, Callable[[str], str]] = {
    "spelled with hyphens": "-".join,
    "spelled with spaces": " ".join,
    "backwards": lambda w: w[::-1],
    "in capitals": str.upper,
    "first letter": lambda w: w[0],
    "last letter": lambda w: w[-1],
    "number of letters": lambda w: str(len(w)),
    "plural": lambda w: w + "s",
    "in brackets": lambda w: f"[{w}]",
    "three times": lambda w: " ".join([w] * 3),
}


def spelling(rng: Random, pool: Pool) -> Skill:
    """A word's letters."""
    name, out = rng.choice(list(_SPELLINGS.items()))

    def example(rng: Random) -> Example:
        word = rng.choice(pool.words)
        return word, out(word)

    return Skill(f"The word {name}", example)


def sentences(rng: Random, pool: Pool) -> Skill:
    """Copies and pieces of real sentences."""
    name, out = rng.choice(list(_WORD_LISTS.items()))

    def example(rng: Random) -> Example:
        words = rng.choice(pool.sentences).split()[:14]
        words += rng.choices(pool.words, k=max(0, 2 - len(words)))
        return " ".join(words), out(words)

    return Skill(f"The sentence {name}", example)


def categories(rng: Random, pool: Pool) -> Skill:
    """Things and their kinds, under labels that hold for one page."""
    kinds = rng.sample(sorted(v.CATEGORIES), rng.randrange(2, 7))
    named = rng.random() < 0.4
    labels = kinds if named else rng.sample(pool.words, len(kinds))
    carriers = ("{}", "a {}", "I like {}", "{} is what I meant", "look at the {}!", "no {} here")
    carrier = rng.choice(carriers)

    def example(rng: Random) -> Example:
        i = rng.randrange(len(kinds))
        return carrier.format(rng.choice(v.CATEGORIES[kinds[i]].split())), labels[i]

    return Skill(f"Choose one of {', '.join(labels)}", example)
