from __future__ import annotations

from pipekern.schedule import Action
from pipekern.schedule.numbering import Token, numbered


def test_golden_row() -> None:
    f, b, w, whole = (Token(op, 0) for op in ("F", "B", "W", "BW"))
    other = Token("F", 1)
    row = numbered([f, f, other, b, w, (f, whole), b, w])
    assert list(row) == [
        Action("F", 0, 0),
        Action("F", 0, 1),
        Action("F", 1, 0),
        Action("B", 0, 0),
        Action("W", 0, 0),
        (Action("F", 0, 2), Action("BW", 0, 1)),
        Action("B", 0, 2),
        Action("W", 0, 2),
    ]


def test_first_microbatch_of_a_stage() -> None:
    row = numbered([Token("F", 0), Token("F", 3), Token("BW", 3), Token("F", 3)], first={3: 5})
    assert [str(action) for action in row] == [
        str(Action(*a)) for a in (("F", 0, 0), ("F", 3, 5), ("BW", 3, 5), ("F", 3, 6))
    ]
