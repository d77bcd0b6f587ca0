"""Cheeks and nasolabial folds: AU 6, 10 and 12 deepen them, 14 dimples the corner of the mouth."""

from experiments.data.faces.canvas import Canvas, bump
from experiments.data.faces.face import Face


def draw(canvas: Canvas, face: Face) -> None:
    who, au = face.who, face.au
    canvas = canvas.rows(-0.05, 0.75)
    x, y = canvas.x, canvas.y

    # AU 6 lifts the cheek: a bright mound with a dark edge above it.
    mound = bump((x - 0.43) / 0.24, (y - 0.14) / 0.14)
    edge = bump((x - 0.36) / 0.22, (y - 0.02) / 0.035)
    canvas.shade(au[6] * (0.32 * who.wrinkles * edge - 0.20 * mound))

    # From the wing of the nose, t = -1, to beside the mouth, t = 1.
    half = 0.5 * (who.mouth_height - who.nose_length) + 0.02
    t = (y - who.nose_length - half + 0.04) / half
    bow = 0.10 * au[12] + 0.03
    fold = who.nose_width + 0.13 + 0.11 * t + bow * (1 - t * t) + 0.03 * au[12]
    depth = who.folds + 0.34 * who.wrinkles * au[12]
    # AU 10 folds the upper half, beside the nose.
    upper = 0.40 * who.wrinkles * au[10] * bump((t + 0.45) / 0.6, (x - fold + 0.02) / 0.05)
    canvas.shade(upper + depth * bump(t / 1.1, (x - fold) / 0.045))
