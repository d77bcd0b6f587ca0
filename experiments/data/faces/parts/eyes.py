"""Eyes: AU 6 pushes the lower lid up and makes crow's feet, 7 narrows the eye."""

from experiments.data.faces.canvas import Canvas, bump
from experiments.data.faces.face import Face
from experiments.data.faces.palette import same

_HEIGHT = -0.12


def draw(canvas: Canvas, face: Face) -> None:
    who, au, pose = face.who, face.au, face.pose
    canvas = canvas.rows(-0.3, 0.1)
    x, y = canvas.x, canvas.y
    squint, cheek = au[7], au[6]

    t = (x - who.eye_distance) / who.eye_width
    lid = (1 - t * t).clamp_(min=0)
    slant = _HEIGHT + who.eye_slant * t
    upper = slant - who.eye_opening * 0.105 * (1 - 0.45 * squint - 0.10 * cheek) * lid
    lower = slant + who.eye_opening * 0.070 * (1 - 0.60 * squint - 0.55 * cheek) * lid

    # The fold above the eye, the bag of a tight lid below it, and the crow's feet beside it.
    fold = 0.22 * bump(t / 1.15, (y - upper + 0.055) / 0.04)
    bag = 0.28 * squint * bump(t / 1.1, (y - lower - 0.045) / 0.035)
    outward = x - who.eye_distance - who.eye_width
    feet = sum(
        bump((outward - 0.12) / 0.10, (y - _HEIGHT - slope * outward) / 0.022)
        for slope in (-0.55, 0.0, 0.55)
    )
    canvas.shade(fold + who.wrinkles * (bag + 0.34 * cheek * feet))

    width = canvas.within(who.eye_width * t.abs(), who.eye_width)
    opening = canvas.between(upper, lower) * width
    canvas.paint(opening, same(0.93, 0.91, 0.89))
    # The eyes look the same way: to the right of the picture is outward on the right side only.
    gaze_x = who.eye_distance + pose.gaze_x * 0.25 * canvas.u.sign()
    gaze_y = _HEIGHT - 0.015 + pose.gaze_y * 0.25
    canvas.paint(canvas.ellipse(x, gaze_x, gaze_y, 0.078, 0.078) * opening, face.palette.iris)
    canvas.paint(canvas.ellipse(x, gaze_x, gaze_y, 0.036, 0.036) * opening, same(0.03, 0.03, 0.03))

    lash = canvas.between(upper - 0.028, upper + 0.012) * width
    canvas.paint(lash.mul_(0.85), 0.25 * face.palette.skin)
    rim = canvas.between(lower - 0.006, lower + 0.016) * width
    canvas.paint(rim.mul_(0.45), 0.45 * face.palette.skin)
