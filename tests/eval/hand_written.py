"""Thirty word problems written by hand, of one to six steps, in words of the README's kind, and their answers."""

from __future__ import annotations

PROBLEMS: tuple[tuple[str, int], ...] = (
    # One step.
    ("Sam has 5 pens. On Monday he buys 3 more pens. How many pens does Sam have?", 8),
    ("Lisa has 14 stickers. She gives 5 of them to Ben. How many stickers does Lisa have left?", 9),
    ("Paul has 4 boxes with 12 pencils in each. How many pencils does Paul have?", 48),
    ("Emma has 23 marbles. On Sunday she finds 19 more. How many marbles does she have now?", 42),
    ("Jack has 30 cookies. He shares them equally among 5 friends. How many cookies does each friend get?", 6),
    ("Nora has 17 shells and Omar has 26 shells. How many shells do they have together?", 43),
    ("A hall has 7 rows of 9 seats. How many seats does the hall have?", 63),
    ("What is 38 + 47?", 85),
    # Two steps.
    ("Anna has 3 bags of 6 beads. On Monday she uses 9 beads. How many beads does Anna have now?", 9),
    (
        "Tom owns 12 pens. On Friday he buys 6 more. On Saturday he loses 4 of them. How many pens does Tom have?",
        14,
    ),
    (
        "Mary has 50 stamps. On Tuesday she sells 18 stamps. On Wednesday she gets 7 more. How many stamps does Mary have now?",
        39,
    ),
    ("Ben buys 6 books for 8 dollars each. He pays with 60 dollars. How many dollars does Ben have left?", 12),
    ("Leo has 15 cards. Mia has 4 more cards than Leo. How many cards do they have together?", 34),
    ("Kate reads 12 pages a day for 6 days. The goal is 90 pages. How many more pages are needed?", 18),
    ("David has 9 balls. Then he doubles the number of balls. Later he loses 5. How many balls does David have now?", 13),
    # Three steps.
    (
        "Mia has 7 apples. On Monday she buys 2 boxes of 5 apples. On Tuesday she gives 4 apples to Tom. "
        "How many apples does Mia have now?",
        13,
    ),
    (
        "Lucy has 20 eggs. On Monday she uses 6 eggs. On Tuesday she buys 12 more. On Wednesday she breaks 3 of them. "
        "How many eggs does Lucy have?",
        23,
    ),
    (
        "A book costs 5 dollars and a pen costs 2 dollars. Max buys 4 books and 7 pens. How many dollars does Max pay?",
        34,
    ),
    (
        "Sara has 40 coins. She gives half of the coins to Ivan. On Friday she finds 8 more coins. On Sunday she spends 11. "
        "How many coins does Sara have left?",
        17,
    ),
    (
        "Adam has 10 plums. Eric has twice as many plums as Adam. Hugo has 6 fewer plums than Eric. "
        "How many plums does Hugo have?",
        14,
    ),
    (
        "There are 6 shelves of 11 books in the library. On Thursday 15 books are taken away. On Friday 20 books are added. "
        "How many books are there now?",
        71,
    ),
    # Four steps.
    (
        "Rosa has 5 bags of 8 nuts. On Monday she eats 7 nuts. On Tuesday she gives 10 nuts to Luis. "
        "On Wednesday she gets 4 more. "
        "How many nuts does Rosa have?",
        27,
    ),
    (
        "A cup costs 3 dollars and a plate costs 6 dollars. Zoe buys 8 cups and 5 plates. She has 70 dollars. "
        "How many dollars does Zoe have left?",
        16,
    ),
    (
        "Noah has 33 toys. On Monday he sells 9 of them. On Tuesday he buys 5 more. On Wednesday he gives 12 to Amy. "
        "On Thursday he finds 2 more. How many toys does Noah have now?",
        19,
    ),
    ("Ella has 12 roses. Ruth has 8 more roses than Ella. Jane has 5 fewer than Ruth. How many roses do they have in all?", 47),
    # Five steps.
    (
        "Peter has 60 bricks. On Monday he uses 22 bricks. On Tuesday he buys 3 boxes of 9 bricks. On Wednesday he loses 14. "
        "On Thursday he gets 6 more. How many bricks does Peter have now?",
        57,
    ),
    (
        "Julia has 4 jars of 7 candies. On Friday she eats 5 candies. On Saturday she buys 16 more. "
        "On Sunday she gives 9 candies "
        "to Tim. On Monday she finds 3 more. How many candies does Julia have?",
        33,
    ),
    (
        "Alice has 25 flowers. Then she picks 15 more flowers. Then she gives 8 flowers to Ken. "
        "Then she gets 4 flowers from Nina. "
        "Then she loses 6 of them. Then she sells 10. How many flowers does Alice have left?",
        20,
    ),
    # Six steps.
    (
        "Oscar has 8 packs of 10 cards. On Monday he sells 13 cards. On Tuesday he gives 7 cards to Raj. "
        "On Wednesday he buys 9 more. "
        "On Thursday he loses 21 cards. On Friday he gets 2 more. How many cards does Oscar have in the end?",
        50,
    ),
    (
        "Clara starts with 18 beads. On Monday she buys 4 bags of 6 beads. On Tuesday she uses 17 beads. "
        "On Wednesday she finds 5 more. "
        "On Thursday she gives 11 beads to Grace. On Friday she gets 20 beads from Leo. How many beads does Clara have now?",
        39,
    ),
)
