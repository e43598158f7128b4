"""The words that problems are made of."""

from __future__ import annotations

WOMEN = (
    "Anna", "Mia", "Lena", "Sara", "Emma", "Nora", "Ella", "Lucy", "Amy", "Rosa", "Kate", "Julia", "Maria", "Zoe",
    "Ruth", "Alice",
)  # fmt: skip
MEN = (
    "Tom", "Ben", "Sam", "Max", "Leo", "Paul", "John", "Omar", "Ivan", "Jack", "Noah", "Adam", "Luis", "Eric", "Hugo", "David",
)  # fmt: skip
NAMES = WOMEN + MEN

THINGS = (
    "apples", "pears", "plums", "lemons", "oranges", "marbles", "coins", "stamps", "cards", "stickers", "shells", "stones",
    "buttons", "beads", "balls", "books", "pencils", "pens", "candles", "cookies", "muffins", "eggs", "nuts", "flowers",
)  # fmt: skip
BOXES = ("boxes", "bags", "baskets", "jars", "packs", "bowls", "crates", "trays")

GOODS = (
    ("book", "books"), ("pen", "pens"), ("ball", "balls"), ("cup", "cups"), ("hat", "hats"), ("kite", "kites"),
    ("lamp", "lamps"), ("plate", "plates"), ("ticket", "tickets"), ("toy", "toys"), ("cake", "cakes"), ("rope", "ropes"),
)  # fmt: skip
"""Goods in the singular and plural."""

WORK = (
    ("reads", "pages"), ("walks", "miles"), ("bakes", "cakes"), ("paints", "fences"), ("writes", "letters"),
    ("plants", "trees"), ("washes", "cars"), ("solves", "puzzles"), ("runs", "laps"), ("makes", "toys"),
    ("packs", "boxes"), ("picks", "apples"),
)  # fmt: skip
"""Verbs of work, and their objects."""

PLACES = (
    ("hall", "rows", "seats"), ("shop", "shelves", "books"), ("garden", "rows", "flowers"), ("bus", "rows", "seats"),
    ("kitchen", "shelves", "plates"), ("school", "rooms", "tables"), ("farm", "fields", "trees"), ("hotel", "floors", "rooms"),
)  # fmt: skip


def pronoun(name: str) -> str:
    """She or He."""
    return "She" if name in WOMEN else "He"
