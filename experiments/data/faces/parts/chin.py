"""Chin: AU 17 pushes it up and wrinkles its boss."""

from experiments.data.faces.canvas import Canvas, bump
from experiments.data.faces.face import Face


def draw(canvas: Canvas, face: Face) -> None:
    who, au = face.who, face.au
    canvas = canvas.rows(0.55, 1.05)
    x, y = canvas.x, canvas.y
    raised = au[17]

    groove = who.mouth_height + 0.17 - 0.03 * raised
    shadow = (0.14 + 0.32 * raised) * bump(x / 0.2, (y - groove - 0.25 * x * x) / 0.05)
    below = y - groove - 0.14
    pits = sum(
        bump((x - pit_x) / 0.035, (below - pit_y) / 0.035)
        for pit_x, pit_y in ((0.05, -0.03), (0.11, 0.03), (0.04, 0.07))
    )
    boss = 0.30 * who.wrinkles * pits - 0.14 * bump(x / 0.17, below / 0.10)
    canvas.shade(shadow + raised * boss)
