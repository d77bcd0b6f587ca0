"""Brows and forehead: AU 1 raises the inner brow, 2 the outer one, 4 lowers and knits."""

from experiments.data.faces.canvas import Canvas, bump
from experiments.data.faces.face import Face


def draw(canvas: Canvas, face: Face) -> None:
    who, au = face.who, face.au
    canvas = canvas.rows(-0.78, -0.02)
    x, y = canvas.x, canvas.y

    # From the inner end, t = -1, to the outer one, t = 1.
    half = 0.205
    t = (x - who.eye_distance - 0.015 + 0.055 * au[4]) / half
    inner, outer = (0.5 - 0.5 * t).clamp_(0, 1), (0.5 + 0.5 * t).clamp_(0, 1)
    raised = 0.15 * au[1] * inner + 0.15 * au[2] * outer * (1.4 - 0.4 * outer)
    lowered = au[4] * (0.075 + 0.065 * inner)
    arch = who.brow_arch * (1 - t * t)
    centre = who.brow_height - arch - raised + lowered

    # A frown folds the skin between the brows, and a raised brow the forehead.
    level = y - who.brow_height
    folds = 0.45 * au[4] * bump((level + 0.01) / 0.17, (x - 0.07) / 0.05)
    for height in (0.26, 0.34):
        middle, side = level + height - 0.3 * x * x, level + height - 0.08 + 0.3 * x
        folds += 0.22 * au[1] * bump(x / 0.26, middle / 0.035)
        folds += 0.22 * au[2] * bump((x - 0.42) / 0.2, side / 0.035)
    canvas.shade(who.wrinkles * folds)

    thickness = who.brow_thickness * (1 - t.square().square_()).clamp_(min=0).sqrt_()
    thickness *= 1.15 - 0.35 * outer
    coverage = canvas.between(centre - thickness, centre + thickness)
    canvas.paint(coverage * canvas.within(half * t.abs(), half), face.palette.brows)
