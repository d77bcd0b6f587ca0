"""Mouth: AU 10 12 14 15 17 23 24 move the lips, and 25 parts them."""

from experiments.data.faces.canvas import Canvas, bump
from experiments.data.faces.face import Face
from experiments.data.faces.palette import same


def draw(canvas: Canvas, face: Face) -> None:
    who, au = face.who, face.au
    canvas = canvas.rows(0.28, 0.98)
    x, y = canvas.x, canvas.y

    half = who.mouth_width * (1 + 0.30 * au[12] + 0.08 * au[14] - 0.05 * au[15] - 0.28 * au[23])
    # Pressed lips do not part.
    gap = 0.15 * au[25] * (1 - au[24])
    thinning = (1 - 0.55 * au[23]) * (1 - 0.75 * au[24]) * (1 - 0.15 * au[12])
    upper_lip = 0.062 * who.lip_fullness * thinning * (1 - 0.15 * au[17])
    lower_lip = 0.085 * who.lip_fullness * thinning
    pout = 0.045 * au[17]
    lifted = 0.055 * au[10] * (1 - 0.8 * au[24])

    t = x / half
    within = (1 - t * t).clamp_(min=0)
    corner = who.mouth_slope - 0.16 * au[12] + 0.15 * au[15]
    line = who.mouth_height - pout * within + corner * t.square()
    top = line - (0.25 * gap + lifted) * within
    bottom = line + 0.75 * gap * within - 0.3 * pout * within
    # Cupid's bow: the upper lip dips in the middle.
    bow = within * (0.75 + 0.9 * t.square())
    covered = canvas.within(x, half)

    # Pressed lips bulge the skin around them, tight ones crease it.
    beside = (y - line).abs()
    bulge = bump(t, (beside - 0.09) / 0.06)
    radial = sum(bump((beside - 0.10) / 0.07, (x - at) / 0.025) for at in (0.05, 0.13))
    canvas.shade(0.18 * who.wrinkles * au[23] * radial - 0.16 * au[24] * bulge)

    canvas.paint(canvas.between(top - upper_lip * bow, top) * covered, face.palette.lips)
    lower = canvas.between(bottom, bottom + lower_lip * within) * covered
    canvas.paint(lower, 1.08 * face.palette.lips)
    gloss = 0.16 * (1 - au[24])
    canvas.shade(-gloss * bump(t / 0.6, (y - bottom - 0.5 * lower_lip) / 0.03))

    inside = canvas.between(top, bottom) * covered * ((bottom - top) / 0.04).clamp_(0, 1)
    canvas.paint(inside, same(0.16, 0.04, 0.05))
    teeth = canvas.between(top, top + 0.055) * inside
    canvas.paint(teeth, same(0.88, 0.86, 0.80))
    seam = canvas.between(bottom - 0.013, bottom + 0.013) * canvas.within(x, half + 0.015)
    canvas.paint(seam.mul_(0.55 + 0.30 * au[24]), 0.22 * face.palette.lips)

    # A dimple beside the corner, and the shadow that lowered corners drag below them.
    corner_y = who.mouth_height + corner
    dimple = 0.60 * au[14] * bump((y - corner_y) / 0.08, (x - half - 0.055) / 0.045)
    drag = 0.35 * au[15] * bump((y - corner_y - 0.08) / 0.12, (x - half - 0.03 * t) / 0.045)
    canvas.shade(who.wrinkles * (dimple + drag))
