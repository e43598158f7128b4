"""Word problems whose answers are known: those that are shown to users, and others written by hand in such words."""

from __future__ import annotations

MIA = (
    "Mia has 7 apples. On Monday she buys 2 boxes of 5 apples. On Tuesday she gives 4 apples to Tom. "
    "How many apples does Mia have now?"
)
TOM = "Tom owns 12 pens. On Friday he buys 6 more. On Saturday he loses 4 of them. How many pens does Tom have?"
MIA_ON_MONDAY = "Mia has 7 apples. On Monday she buys 2 boxes of 5 apples. How many apples does Mia have now?"
TOM_ON_FRIDAY = "Tom owns 12 pens. On Friday he buys 6 more. How many pens does Tom have?"
ANNA = "Anna has 3 bags of 6 beads. On Monday she uses 9 beads. How many beads does Anna have now?"

SHOWN: dict[str, int] = {MIA: 13, MIA_ON_MONDAY: 17, TOM: 14, TOM_ON_FRIDAY: 18, ANNA: 9}
"""Every problem that the README, the documents, the model card or the demo shows, and its answer."""

WRITTEN: tuple[tuple[str, int], ...] = (
    # One thing happens.
    ("Sam has 5 pens. On Monday he buys 3 more pens. How many pens does Sam have?", 8),
    ("Lucy has 14 stickers. On Sunday she gives 5 of them to Ben. How many stickers does Lucy have left?", 9),
    ("Paul owns 6 coins. On Thursday he finds 11 more. How many coins does Paul have now?", 17),
    ("Emma starts with 19 eggs. On Tuesday she uses 8 eggs. How many eggs are left?", 11),
    # Two.
    (
        "Ben has 8 cards. On Monday he wins 7 more cards. On Tuesday he gives 6 cards to Nora. "
        "How many cards does Ben have now?",
        9,
    ),
    ("Kate has 15 shells. On Friday she loses 9 of them. On Saturday she finds 4 more. How many shells does Kate have?", 10),
    ("Max has 2 jars of 7 nuts. On Sunday he gives 3 nuts to Ella. How many nuts does Max have in the end?", 11),
    (
        "Rosa has 4 packs of 3 cards. On Monday she buys 5 more. On Tuesday she sells 10 cards. "
        "How many cards does Rosa have now?",
        7,
    ),
    # Three and more.
    (
        "Leo has 16 marbles. On Monday he gives 7 marbles to Zoe. On Tuesday he finds 8 more. On Wednesday he loses 5 of them. "
        "How many marbles does Leo have now?",
        12,
    ),
    (
        "Julia owns 3 plums. On Thursday she picks 12 more plums. On Friday she uses 6 plums. On Saturday she gets another 4. "
        "How many plums does Julia have?",
        13,
    ),
    (
        "Omar has 9 books. On Sunday he buys 2 boxes of 4 books. On Monday he sells 5 books. "
        "How many books does Omar have now?",
        12,
    ),
    (
        "Alice has 20 beads. On Monday she uses 6 beads. On Tuesday she buys 3 more. On Wednesday she gives 8 beads to Hugo. "
        "On Thursday she finds 7 more. How many beads does Alice have in the end?",
        16,
    ),
    # Other kinds.
    ("Noah has 6 stamps. Maria has 5 more stamps than Noah. How many stamps do they have together?", 17),
    ("A hall has 4 rows of 5 seats. On Monday 7 seats are taken away. How many seats are there now?", 13),
    ("A pen costs 2 dollars and a cup costs 3 dollars. Eric buys 4 pens and 2 cups. How many dollars does Eric pay?", 14),
    ("Nora reads 3 pages a day for 5 days. Then Nora reads 4 more pages. How many pages is that in all?", 19),
)
"""Numbers up to 20, in words that the shipped checkpoint knows."""
