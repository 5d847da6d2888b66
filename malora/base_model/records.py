"""Generated records (people, purchases, journeys …), told as sentences, tables and markup.

Each kind of record is a set of fields and several ways to say them; a page converts records from
one form into another, or asks for one field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from malora.base_model import vocabulary as v
from malora.base_model.skills import DATE_FORMATS, Example, Pool, Skill, _date, number_words

Record = dict[str, str | int]


def _person(rng: Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(v.FIRST_NAMES)
    return f"{rng.choice(v.FIRST_NAMES)} {rng.choice(v.LAST_NAMES)}"


def _code(rng: Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHKLMNPRSTXZ", k=rng.randrange(1, 4)))
    return f"{letters}{rng.choice(('-', '', '/'))}{rng.randrange(10, 99_999)}"


def _email(rng: Random) -> str:
    host = rng.choice(v.COMPANIES).replace(" ", "").lower()
    ending = rng.choice(("com", "org", "net", "example"))
    return f"{rng.choice(v.FIRST_NAMES).lower()}{rng.choice(('', '.', '_', '7'))}@{host}.{ending}"


FIELDS: dict[str, Callable[[Random], str | int]] = {
    "person": _person,
    "city": lambda rng: rng.choice(v.CITIES),
    "place": lambda rng: rng.choice(v.CITIES),
    "colour": lambda rng: rng.choice(v.COLOURS),
    "thing": lambda rng: rng.choice(v.ITEMS),
    "goods": lambda rng: rng.choice(v.ITEMS) + "s",
    "count": lambda rng: rng.randrange(2, rng.choice((10, 30, 500))),
    "price": lambda rng: rng.randrange(1, rng.choice((50, 1000))),
    "day": lambda rng: rng.choice(v.WEEKDAYS),
    "time": lambda rng: f"{rng.randrange(24):02}:{rng.randrange(12) * 5:02}",
    "when": lambda rng: DATE_FORMATS[rng.choice(sorted(DATE_FORMATS))](_date(rng)),
    "job": lambda rng: rng.choice(v.JOBS),
    "company": lambda rng: rng.choice(v.COMPANIES),
    "code": _code,
    "email": _email,
    "age": lambda rng: rng.randrange(18, 95),
    "quality": lambda rng: rng.choice(v.ADJECTIVES),
    "phone": lambda rng: " ".join(str(rng.randrange(100, 999)) for _ in range(3)),
}


@dataclass(frozen=True)
class Kind:
    """A kind of record: the table it would live in and the sentences that tell it."""

    table: str
    sentences: tuple[str, ...]

    def fields(self) -> list[str]:
        """The fields that every sentence of this kind tells."""
        return [name for name in FIELDS if all(f"{{{name}}}" in s for s in self.sentences)]


def _kind(table: str, sentences: str) -> Kind:
    return Kind(table, tuple(sentences.split("|")))


KINDS = (
    _kind(
        "purchases",
        "{person} bought {count} {colour} {goods} in {city}.|In {city}, {count} {colour} {goods} "
        "went to {person}.|{count} {goods} ({colour}) for {person}, {city}|{person} from {city} "
        "got {count} {goods}, all of them {colour}.|we sold {person} of {city} {count} {colour} "
        "{goods}|there were {count} {goods}, {colour} ones, that {person} found in {city}",
    ),
    _kind(
        "staff",
        "{person} is a {job} at {company} and is {age} years old.|{company} employs {person}, "
        "{age}, as a {job}.|A {job} of {age}, {person} works for {company}.|at {company} our {job} "
        "is called {person} (age {age})|{person}, {job}, {age}, {company}",
    ),
    _kind(
        "journeys",
        "{person} travels from {city} to {place} on {day} at {time}.|On {day} at {time} the train "
        "from {city} takes {person} to {place}.|{city} to {place}, {day} {time}, one seat for "
        "{person}|leaving {city} {day}, {time}; {person} will be in {place} that night|I, "
        "{person}, fly {city}-{place} this {day} ({time})",
    ),
    _kind(
        "stock",
        "The {quality} {thing} with number {code} costs {price} dollars.|{code}: {thing}, "
        "{quality}, ${price}|For {price} dollars you get {code}, a {quality} {thing}.|item {code} "
        "is a {quality} {thing} and we ask {price} for it|a {thing} ({quality}) lies in box "
        "{code}, price tag {price}",
    ),
    _kind(
        "contacts",
        "You can reach {person} at {email} or {phone}.|{person}'s number is {phone} and the "
        "address {email}.|Write to {email}, ask for {person}, or call {phone}.|{person} <{email}>, "
        "tel. {phone}|call {phone} if {email} does not answer, says {person}",
    ),
    _kind(
        "events",
        "{company} meets {person} in {city} on {when}.|On {when}, {person} of {city} visits "
        "{company}.|{person} wrote to {company} from {city}, {when}.|{city}, {when}: {company} "
        "thanks {person}|the {when} visit by {person} to {company} took place in {city}",
    ),
    _kind(
        "loans",
        "{person} lent me {count} {goods} until {day}.|until {day} I keep the {count} {goods} of "
        "{person}|{count} {goods} were given by {person} and are due {day}.|dear {person}, your "
        "{count} {goods} come back {day}",
    ),
)


def _xml(record: Record) -> str:
    return "".join(f"<{k}>{x}</{k}>" for k, x in record.items())


RENDERINGS: dict[str, Callable[[Record], str]] = {
    "JSON": lambda r: json.dumps(r, ensure_ascii=False),
    "compact JSON": lambda r: json.dumps(r, ensure_ascii=False, separators=(",", ":")),
    "CSV": lambda r: ",".join(str(x) for x in r.values()),
    "key=value pairs": lambda r: " ".join(f"{k}={x}" for k, x in r.items()),
    "key: value pairs": lambda r: "; ".join(f"{k}: {x}" for k, x in r.items()),
    "bracketed pairs": lambda r: ", ".join(f"{k}[{x}]" for k, x in r.items()),
    "a table row": lambda r: "| " + " | ".join(str(x) for x in r.values()) + " |",
    "XML": _xml,
    "a tuple": lambda r: repr(tuple(r.values())),
    "values split by slashes": lambda r: " / ".join(str(x) for x in r.values()),
    "values split by semicolons": lambda r: ";".join(str(x) for x in r.values()),
}


def draw(rng: Random, kind: Kind) -> Record:
    """A record of this kind."""
    return {name: FIELDS[name](rng) for name in kind.fields()}


def _tell(rng: Random, kind: Kind, record: Record, spelled: bool) -> str:
    shown = dict(record)
    if spelled and "count" in shown and rng.random() < 0.5:
        shown["count"] = number_words(int(shown["count"]))
    return rng.choice(kind.sentences).format(**shown)


def extraction(rng: Random, _: Pool) -> Skill:
    """One field, or several in some markup, out of a sentence or another markup."""
    kind = rng.choice(KINDS)
    names = rng.sample(kind.fields(), rng.choice((1, 1, 1, 2, 2, 3)) % len(kind.fields()) or 1)
    source = None if rng.random() < 0.75 else rng.choice(sorted(RENDERINGS))
    target = rng.choice(sorted(RENDERINGS))
    spelled = rng.random() < 0.3
    upper = rng.random() < 0.1

    def example(rng: Random) -> Example:
        record = draw(rng, kind)
        text = RENDERINGS[source](record) if source else _tell(rng, kind, record, spelled)
        chosen: Record = {name: record[name] for name in names}
        out = str(chosen[names[0]]) if len(names) == 1 else RENDERINGS[target](chosen)
        return text, out.upper() if upper else out

    return Skill(f"Give the {' and '.join(names)}", example)


def conversion(rng: Random, _: Pool) -> Skill:
    """A whole record from one form into another, or into a sentence, its keys the page's own."""
    kind = rng.choice(KINDS)
    source = rng.choice([None, None, *sorted(RENDERINGS)])
    target = rng.choice([None, *sorted(RENDERINGS)])
    sentence = rng.choice(kind.sentences)
    renamed = {name: rng.choice((name, name, name.title(), name.upper())) for name in kind.fields()}

    def example(rng: Random) -> Example:
        record = draw(rng, kind)
        keyed: Record = {renamed[k]: x for k, x in record.items()}
        text = RENDERINGS[source](keyed) if source else _tell(rng, kind, record, False)
        return text, RENDERINGS[target](keyed) if target else sentence.format(**record)

    return Skill(f"Rewrite it as {target or 'a sentence'}", example)


def queries(rng: Random, _: Pool) -> Skill:
    """A question about a table of records, as SQL."""
    kind = rng.choice(KINDS)
    names = kind.fields()
    aliased = rng.random() < 0.3
    lower = rng.random() < 0.3
    asked = ("which {a} has {b} {x}?", "show me the {a} where {b} is {x}", "{a} for {b} {x}")

    def example(rng: Random) -> Example:
        a, b, c = (rng.sample(names, 3) + names)[:3]
        x, y = FIELDS[b](rng), FIELDS[c](rng)
        text = rng.choice(asked).format(a=a, b=b, x=x)
        prefix = "t." if aliased else ""
        table = f"{kind.table} AS t" if aliased else kind.table
        literal = x if isinstance(x, int) else f'"{x}"'
        column = f"{prefix}{a}"
        form = rng.random()
        if form < 0.2:
            text, column = f"how many {a}s for {b} {x}", f"COUNT( DISTINCT {column} )"
        statement = f"SELECT {column} FROM {table} WHERE {prefix}{b} = {literal}"
        if 0.2 < form < 0.45:
            text += f" and {c} {y}"
            statement += f" AND {prefix}{c} = " + (str(y) if isinstance(y, int) else f'"{y}"')
        elif 0.45 < form < 0.6:
            text += f" sorted by {c}"
            statement += f" ORDER BY {prefix}{c}"
        statement += " ;"
        return text, statement.lower() if lower else statement

    return Skill(f"Ask the table {kind.table} ({', '.join(names)})", example)
