"""The facts: countries, elements, animals, months and opposites. Most names are one word."""

from __future__ import annotations

from dataclasses import dataclass

_COUNTRIES = """
France Paris Europe French euro|Germany Berlin Europe German euro|Italy Rome Europe Italian euro
Spain Madrid Europe Spanish euro
Portugal Lisbon Europe Portuguese euro|Austria Vienna Europe German euro|Greece Athens Europe Greek euro
Finland Helsinki Europe Finnish euro|Slovakia Bratislava Europe Slovak euro|Slovenia Ljubljana Europe Slovene euro
Estonia Tallinn Europe Estonian euro|Latvia Riga Europe Latvian euro|Lithuania Vilnius Europe Lithuanian euro
Poland Warsaw Europe Polish zloty|Hungary Budapest Europe Hungarian forint|Czechia Prague Europe Czech koruna
Romania Bucharest Europe Romanian leu|Sweden Stockholm Europe Swedish krona|Norway Oslo Europe Norwegian krone
Denmark Copenhagen Europe Danish krone|Iceland Reykjavik Europe Icelandic krona|Ukraine Kyiv Europe Ukrainian hryvnia
Russia Moscow Europe Russian ruble|Serbia Belgrade Europe Serbian dinar|Albania Tirana Europe Albanian lek
England London Europe English pound|Japan Tokyo Asia Japanese yen|China Beijing Asia Chinese yuan
India New_Delhi Asia Hindi rupee
Nepal Kathmandu Asia Nepali rupee|Thailand Bangkok Asia Thai baht|Vietnam Hanoi Asia Vietnamese dong
Cambodia Phnom_Penh Asia Khmer riel|Laos Vientiane Asia Lao kip|Mongolia Ulaanbaatar Asia Mongolian tugrik
Indonesia Jakarta Asia Indonesian rupiah|Bangladesh Dhaka Asia Bengali taka|Iran Tehran Asia Persian rial
Iraq Baghdad Asia Arabic dinar|Jordan Amman Asia Arabic dinar|Turkey Ankara Asia Turkish lira
Armenia Yerevan Asia Armenian dram|Georgia Tbilisi Asia Georgian lari|Kazakhstan Astana Asia Kazakh tenge
Uzbekistan Tashkent Asia Uzbek som|Qatar Doha Asia Arabic riyal|Oman Muscat Asia Arabic rial
Malaysia Kuala_Lumpur Asia Malay ringgit
Egypt Cairo Africa Arabic pound|Morocco Rabat Africa Arabic dirham|Tunisia Tunis Africa Arabic dinar
Libya Tripoli Africa Arabic dinar
Algeria Algiers Africa Arabic dinar|Kenya Nairobi Africa Swahili shilling|Tanzania Dodoma Africa Swahili shilling
Somalia Mogadishu Africa Somali shilling|Ethiopia Addis_Ababa Africa Amharic birr|Madagascar Antananarivo Africa Malagasy ariary
Senegal Dakar Africa French franc|Mali Bamako Africa French franc|Angola Luanda Africa Portuguese kwanza
Ghana Accra Africa English cedi|Nigeria Abuja Africa English naira|Zambia Lusaka Africa English kwacha
Botswana Gaborone Africa English pula|Canada Ottawa America English dollar|Jamaica Kingston America English dollar
Cuba Havana America Spanish peso|Chile Santiago America Spanish peso|Peru Lima America Spanish sol
Brazil Brasilia America Portuguese real
Colombia Bogota America Spanish peso|Ecuador Quito America Spanish dollar|Uruguay Montevideo America Spanish peso
Venezuela Caracas America Spanish bolivar|Honduras Tegucigalpa America Spanish lempira|Nicaragua Managua America Spanish cordoba
Haiti Port-au-Prince America French gourde|Australia Canberra Oceania English dollar|Fiji Suva Oceania English dollar
Samoa Apia Oceania Samoan tala|Tonga Nukualofa Oceania Tongan paanga
"""
_ELEMENTS = """
hydrogen H 1|helium He 2|lithium Li 3|beryllium Be 4|boron B 5|carbon C 6|nitrogen N 7|oxygen O 8|fluorine F 9|neon Ne 10
sodium Na 11|magnesium Mg 12|aluminium Al 13|silicon Si 14|phosphorus P 15|sulfur S 16|chlorine Cl 17|argon Ar 18|potassium K 19
calcium Ca 20|titanium Ti 22|chromium Cr 24|manganese Mn 25|iron Fe 26|cobalt Co 27|nickel Ni 28|copper Cu 29|zinc Zn 30
arsenic As 33|bromine Br 35|krypton Kr 36|silver Ag 47|tin Sn 50|iodine I 53|xenon Xe 54|tungsten W 74|platinum Pt 78|gold Au 79
mercury Hg 80|lead Pb 82|radon Rn 86|uranium U 92
"""
_ANIMALS = """
dog puppy mammals|cat kitten mammals|cow calf mammals|horse foal mammals|sheep lamb mammals|goat kid mammals|pig piglet mammals
lion cub mammals|kangaroo joey mammals|deer fawn mammals|rabbit bunny mammals|hedgehog hoglet mammals|bat pup mammals
duck duckling birds|goose gosling birds|swan cygnet birds|hen chick birds|owl owlet birds|eagle eaglet birds|pigeon squab birds
frog tadpole amphibians|newt eft amphibians|snake snakelet reptiles|turtle hatchling reptiles|salmon smolt fish|eel elver fish
butterfly caterpillar insects|fly maggot insects|mosquito wriggler insects|dragonfly nymph insects
spider spiderling arachnids
"""
_MONTHS = """
January 31 winter|February 28 winter|March 31 spring|April 30 spring|May 31 spring|June 30 summer|July 31 summer
August 31 summer
September 30 autumn|October 31 autumn|November 30 autumn|December 31 winter
"""
_OPPOSITES = """
hot cold|big small|tall short|fast slow|light dark|wet dry|old young|rich poor|full empty|hard soft|strong weak|loud quiet
clean dirty|early late|happy sad|high low|open closed|deep shallow|wide narrow|sharp blunt|thick thin|near far
brave cowardly|cheap expensive|true false|right wrong|smooth rough|sweet bitter|tight loose
"""


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact. In wordings, `{s}` is the subject."""

    name: str
    subject: str
    """The kind of the subject."""
    answer: str
    """The kind of the answer, from which choices are drawn."""
    statement: str
    """The statement of a fact, with the answer as `{a}`."""
    asked: tuple[str, ...]
    """Questions that training sees."""
    unseen: tuple[str, ...]
    """Questions that only the evaluation asks."""
    phrase: str
    """Its phrase within another question; "" if that makes no sense."""
    facts: dict[str, str]
    """Subject -> answer."""


def _rows(text: str) -> list[list[str]]:
    """Rows of fields, which spaces separate; an underscore stands for a space within a field."""
    return [[f.replace("_", " ") for f in row.split()] for line in text.strip().splitlines() for row in line.split("|")]


def _pairs(text: str, key: int, value: int) -> dict[str, str]:
    return {row[key]: row[value] for row in _rows(text)}


_MONTH_NAMES = [row[0] for row in _rows(_MONTHS)]
_OPPOSITE = {a: b for row in _rows(_OPPOSITES) for a, b in (row, reversed(row))}

RELATIONS = (
    Relation(
        "capital",
        "country",
        "city",
        "The capital of {s} is {a}.",
        (
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "What is {s}'s capital?",
            "Name the capital of {s}.",
            "What city is the capital of {s}?",
            "What is the capital city of {s}?",
            "The capital of {s} is what?",
        ),
        ("What is the name of the capital of {s}?", "Which is the capital city of {s}?"),
        "capital of {s}",
        _pairs(_COUNTRIES, 0, 1),
    ),
    Relation(
        "country",
        "city",
        "country",
        "{s} is the capital of {a}.",
        (
            "Which country has the capital {s}?",
            "{s} is the capital of which country?",
            "What country is {s} the capital of?",
            "Of which country is {s} the capital?",
            "Name the country whose capital is {s}.",
        ),
        ("The capital of which country is {s}?", "What is the country whose capital is {s}?"),
        "country whose capital is {s}",
        _pairs(_COUNTRIES, 1, 0),
    ),
    Relation(
        "continent",
        "country",
        "continent",
        "The continent of {s} is {a}.",
        (
            "On which continent is {s}?",
            "What continent is {s} in?",
            "Which continent is {s} on?",
            "Where in the world is {s}?",
            "Name the continent of {s}.",
            "In which continent does {s} lie?",
        ),
        ("What is the continent of {s}?", "On what continent does {s} lie?"),
        "continent of {s}",
        _pairs(_COUNTRIES, 0, 2),
    ),
    Relation(
        "language",
        "country",
        "language",
        "The language of {s} is {a}.",
        (
            "What language is spoken in {s}?",
            "Which language do people speak in {s}?",
            "What is the language of {s}?",
            "Name the language of {s}.",
            "What do people speak in {s}?",
            "Which language is spoken in {s}?",
        ),
        ("What language do people speak in {s}?", "In {s}, which language is spoken?"),
        "language of {s}",
        _pairs(_COUNTRIES, 0, 3),
    ),
    Relation(
        "currency",
        "country",
        "currency",
        "The currency of {s} is the {a}.",
        (
            "What is the currency of {s}?",
            "Which currency is used in {s}?",
            "What money do people use in {s}?",
            "Name the currency of {s}.",
            "What do people pay with in {s}?",
            "Which money is used in {s}?",
        ),
        ("What currency do people use in {s}?", "In {s}, what is the currency?"),
        "currency of {s}",
        _pairs(_COUNTRIES, 0, 4),
    ),
    Relation(
        "symbol",
        "element",
        "symbol",
        "The symbol of {s} is {a}.",
        (
            "What is the chemical symbol of {s}?",
            "What is the symbol for {s}?",
            "Which symbol does {s} have?",
            "Name the symbol of {s}.",
            "How is {s} written as a symbol?",
        ),
        ("What is the symbol of the element {s}?", "Which is the chemical symbol for {s}?"),
        "symbol of {s}",
        _pairs(_ELEMENTS, 0, 1),
    ),
    Relation(
        "number",
        "element",
        "number",
        "The atomic number of {s} is {a}.",
        (
            "What is the atomic number of {s}?",
            "Which atomic number does {s} have?",
            "How many protons does {s} have?",
            "Name the atomic number of {s}.",
        ),
        ("What atomic number does {s} have?", "How many protons are in an atom of {s}?"),
        "atomic number of {s}",
        _pairs(_ELEMENTS, 0, 2),
    ),
    Relation(
        "element",
        "symbol",
        "element",
        "{s} is the symbol of {a}.",
        (
            "Which element has the symbol {s}?",
            "What element does {s} stand for?",
            "{s} is the symbol of which element?",
            "Name the element whose symbol is {s}.",
        ),
        ("What is the element whose symbol is {s}?", "Which element does the symbol {s} stand for?"),
        "element whose symbol is {s}",
        _pairs(_ELEMENTS, 1, 0),
    ),
    Relation(
        "atom",
        "number",
        "element",
        "{s} is the atomic number of {a}.",
        (
            "Which element has the atomic number {s}?",
            "What element has {s} protons?",
            "{s} is the atomic number of which element?",
            "Name the element with atomic number {s}.",
        ),
        ("What element has the atomic number {s}?", "Which element has {s} protons?"),
        "element with atomic number {s}",
        _pairs(_ELEMENTS, 2, 0),
    ),
    Relation(
        "young",
        "animal",
        "young",
        "The young of the {s} is the {a}.",
        (
            "What is a young {s} called?",
            "What do we call a baby {s}?",
            "What is the name of a young {s}?",
            "Name the young of the {s}.",
            "What is a baby {s} called?",
        ),
        ("What do we call a young {s}?", "How is a young {s} called?"),
        "young of the {s}",
        _pairs(_ANIMALS, 0, 1),
    ),
    Relation(
        "parent",
        "young",
        "animal",
        "The {s} is the young of the {a}.",
        (
            "Which animal has a young called {s}?",
            "A {s} is the young of which animal?",
            "What does a {s} grow into?",
            "What animal is a {s} when it is grown?",
        ),
        ("Which animal does a {s} grow into?", "A {s} is a young what?"),
        "animal whose young is the {s}",
        _pairs(_ANIMALS, 1, 0),
    ),
    Relation(
        "class",
        "animal",
        "class",
        "The {s} belongs to the {a}.",
        (
            "What kind of animal is the {s}?",
            "To which group of animals does the {s} belong?",
            "What group of animals is the {s} in?",
            "Which kind of animal is a {s}?",
        ),
        ("What kind of animal is a {s}?", "To what group does the {s} belong?"),
        "group of the {s}",
        _pairs(_ANIMALS, 0, 2),
    ),
    Relation(
        "days",
        "month",
        "days",
        "{s} has {a} days.",
        (
            "How many days does {s} have?",
            "How many days are in {s}?",
            "How many days long is {s}?",
            "What is the number of days in {s}?",
        ),
        ("How many days are there in {s}?", "{s} has how many days?"),
        "number of days in {s}",
        _pairs(_MONTHS, 0, 1),
    ),
    Relation(
        "season",
        "month",
        "season",
        "{s} is in the {a}.",
        (
            "In which season is {s}?",
            "What season is {s} in?",
            "Which season does {s} belong to?",
            "Name the season of {s}.",
        ),
        ("What season does {s} belong to?", "{s} is in which season?"),
        "season of {s}",
        _pairs(_MONTHS, 0, 2),
    ),
    Relation(
        "next",
        "month",
        "month",
        "{s} is followed by {a}.",
        (
            "Which month comes after {s}?",
            "What month follows {s}?",
            "What is the month after {s}?",
            "Name the month that follows {s}.",
        ),
        ("What month comes after {s}?", "Which month follows {s}?"),
        "month after {s}",
        {name: _MONTH_NAMES[(i + 1) % 12] for i, name in enumerate(_MONTH_NAMES)},
    ),
    Relation(
        "opposite",
        "quality",
        "quality",
        "The opposite of {s} is {a}.",
        (
            "What is the opposite of {s}?",
            "Which word is the opposite of {s}?",
            "Name the opposite of {s}.",
            "What word means the contrary of {s}?",
        ),
        ("What word is the opposite of {s}?", "Which word means the contrary of {s}?"),
        "",
        _OPPOSITE,
    ),
)
"""All relations. A fact leads to another if the kind of its answer is the kind of the other's subject."""

BY_SUBJECT = {kind: tuple(r for r in RELATIONS if r.subject == kind) for kind in {r.subject for r in RELATIONS}}

CHOICES: dict[str, tuple[str, ...]] = {
    kind: tuple(sorted({answer for r in RELATIONS if r.answer == kind for answer in r.facts.values()}))
    for kind in {r.answer for r in RELATIONS}
}
"""The possible choices for each kind of answer."""
