"""The words that problems are made of."""

from __future__ import annotations

import random

WOMEN = (
    "Anna", "Mia", "Lena", "Sara", "Emma", "Nora", "Ella", "Lucy", "Amy", "Rosa", "Kate", "Julia", "Maria", "Zoe",
    "Ruth", "Alice", "Lily", "Sofia", "Grace", "Clara", "Eva", "Ivy", "Jane", "Mary", "Olivia", "Priya", "Aisha", "Mei",
    "Hannah", "Laura", "Sarah", "Linda", "Susan", "Nina", "Ada", "Lisa", "Tina", "Maya", "Chloe", "Elena",
)  # fmt: skip
MEN = (
    "Tom", "Ben", "Sam", "Max", "Leo", "Paul", "John", "Omar", "Ivan", "Jack", "Noah", "Adam", "Luis", "Eric", "Hugo", "David",
    "Peter", "Mark", "James", "Bob", "Tim", "Dan", "Alex", "Ali", "Carlos", "Raj", "Ken", "Oscar", "Felix", "Simon", "Liam",
    "Henry", "George", "Michael", "Daniel", "Jim", "Joe", "Mike", "Nick", "Victor",
)  # fmt: skip

THINGS = (
    "apples", "pears", "plums", "lemons", "oranges", "marbles", "coins", "stamps", "cards", "stickers", "shells", "stones",
    "buttons", "beads", "balls", "books", "pencils", "pens", "candles", "cookies", "muffins", "eggs", "nuts", "flowers",
    "toys", "dolls", "cars", "kites", "hats", "cups", "plates", "spoons", "keys", "rings", "ropes", "boxes", "bottles",
    "balloons", "bananas", "grapes", "cherries", "peaches", "berries", "tomatoes", "potatoes", "carrots", "onions", "cakes",
    "candies", "sweets", "sandwiches", "pies", "rocks", "feathers", "leaves", "seeds", "roses", "tulips", "trees", "photos",
    "letters", "tickets", "games", "puzzles", "crayons", "markers", "erasers", "notebooks", "magazines", "comics", "badges",
    "blocks", "bricks", "nails", "screws", "tiles", "lamps", "chairs", "fish", "birds", "ducks", "hens", "sheep", "cows",
    "rabbits", "hamsters", "frogs", "bees", "socks", "shirts", "shoes", "gloves", "scarves", "points", "tokens", "shirts",
    "mangoes", "melons", "walnuts", "pebbles", "pins", "bells", "drums", "bags", "ribbons", "donuts",
)  # fmt: skip
BOXES = (
    "boxes", "bags", "baskets", "jars", "packs", "bowls", "crates", "trays", "packets", "cartons", "piles", "bunches", "sets",
    "groups", "stacks", "rows", "buckets", "tins", "cases", "shelves", "pockets",
)  # fmt: skip

GOODS = (
    ("book", "books"), ("pen", "pens"), ("ball", "balls"), ("cup", "cups"), ("hat", "hats"), ("kite", "kites"),
    ("lamp", "lamps"), ("plate", "plates"), ("ticket", "tickets"), ("toy", "toys"), ("cake", "cakes"), ("rope", "ropes"),
    ("pencil", "pencils"), ("notebook", "notebooks"), ("sandwich", "sandwiches"), ("apple", "apples"), ("shirt", "shirts"),
    ("candle", "candles"), ("doll", "dolls"), ("game", "games"), ("cookie", "cookies"), ("mug", "mugs"), ("bag", "bags"),
)  # fmt: skip
"""Goods in the singular and plural."""

WORK = (
    ("reads", "pages"), ("walks", "miles"), ("bakes", "cakes"), ("paints", "fences"), ("writes", "letters"),
    ("plants", "trees"), ("washes", "cars"), ("solves", "puzzles"), ("runs", "laps"), ("makes", "toys"),
    ("packs", "boxes"), ("picks", "apples"), ("draws", "pictures"), ("learns", "words"), ("bakes", "pies"), ("folds", "shirts"),
    ("runs", "miles"), ("sells", "tickets"), ("earns", "dollars"), ("saves", "dollars"), ("swims", "laps"), ("sews", "hats"),
    ("types", "pages"), ("cooks", "meals"), ("drinks", "cups"), ("builds", "chairs"), ("delivers", "letters"),
)  # fmt: skip
"""Verbs of work, and their objects."""

PLACES = (
    ("hall", "rows", "seats"), ("shop", "shelves", "books"), ("garden", "rows", "flowers"), ("bus", "rows", "seats"),
    ("kitchen", "shelves", "plates"), ("school", "rooms", "tables"), ("farm", "fields", "trees"), ("hotel", "floors", "rooms"),
    ("library", "shelves", "books"), ("theater", "rows", "seats"), ("classroom", "rows", "desks"), ("park", "rows", "trees"),
    ("store", "shelves", "toys"), ("train", "cars", "seats"), ("parking lot", "rows", "cars"), ("bakery", "trays", "cookies"),
)  # fmt: skip

GAINS = ("buys", "finds", "gets", "picks", "wins", "receives", "collects", "makes", "adds", "gathers", "borrows", "earns")
LOSSES = ("loses", "sells", "uses", "drops", "breaks", "donates", "eats", "mails", "spends", "trades", "returns", "hides")
AWAY = ("gives away", "throws away", "uses up", "takes away", "gives back", "puts away", "sells off")

ADJECTIVES = ("red", "blue", "green", "new", "old", "big", "small", "white", "black", "yellow", "round", "tiny")

PAST = {
    "has": "had", "owns": "owned", "is": "was", "are": "were", "does": "did", "do": "did", "buys": "bought", "finds": "found",
    "gets": "got", "picks": "picked", "wins": "won", "receives": "received", "collects": "collected", "makes": "made",
    "adds": "added", "gathers": "gathered", "borrows": "borrowed", "earns": "earned", "loses": "lost", "sells": "sold",
    "uses": "used", "drops": "dropped", "breaks": "broke", "donates": "donated", "eats": "ate", "mails": "mailed",
    "spends": "spent", "trades": "traded", "returns": "returned", "hides": "hid", "gives": "gave", "throws": "threw",
    "takes": "took", "puts": "put", "starts": "started", "begins": "began", "keeps": "kept", "shares": "shared",
    "splits": "split", "doubles": "doubled", "triples": "tripled", "ends": "ended", "costs": "cost", "pays": "paid",
    "counts": "counted", "needs": "needed", "reads": "read", "walks": "walked", "bakes": "baked", "paints": "painted",
    "writes": "wrote", "plants": "planted", "washes": "washed", "solves": "solved", "runs": "ran", "packs": "packed",
    "draws": "drew", "learns": "learned", "folds": "folded", "saves": "saved", "swims": "swam", "sews": "sewed",
    "types": "typed", "cooks": "cooked", "drinks": "drank", "builds": "built", "delivers": "delivered", "break": "broke",
    "fall": "fell", "share": "shared", "get": "got",
}  # fmt: skip
"""The forms of every verb in problems."""

SPELLED = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip

_ONSETS = ("b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "qu", "r", "s",
           "sh", "sk", "st", "t", "th", "tr", "v", "w", "y", "z", "")  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo", "ie", "ou")
_CODAS = ("", "", "n", "r", "l", "s", "t", "m", "ck", "nd", "rt", "ll", "p", "x")


def made_up(rng: random.Random, syllables: int) -> str:
    """A word of no list, so that solving problems does not depend on knowing their words."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def is_woman(name: str) -> bool:
    """Whether the name is a woman's; for an unknown name, its ending decides."""
    return name in WOMEN or (name not in MEN and name[-1] in "aeiy")


def singular(thing: str) -> str:
    """The singular of a plural."""
    if thing in ("fish", "sheep"):
        return thing
    if thing == "shelves":
        return "shelf"
    if thing in ("leaves", "scarves"):
        return thing[:-3] + "f"
    if thing.endswith("ies") and thing not in ("cookies", "pies"):
        return thing[:-3] + "y"
    if thing.endswith(("ches", "xes", "shes")) or thing in ("tomatoes", "potatoes", "mangoes"):
        return thing[:-2]
    return thing[:-1]
