"""Nose: AU 10 lifts its wings."""

from experiments.data.faces.canvas import Canvas, bump
from experiments.data.faces.face import Face
from experiments.data.faces.palette import same

_PROTRUSION = 0.12


def draw(canvas: Canvas, face: Face) -> None:
    who, au = face.who, face.au
    canvas = canvas.rows(-0.3, 0.4)
    # The nose stands out, so it turns further than the face.
    u = canvas.u - _PROTRUSION * face.pose.yaw
    x, y = u.abs(), canvas.y
    tip = who.nose_length - 0.03 * au[10]
    width = who.nose_width * (1 + 0.12 * au[10])

    bridge = (y - 0.5 * who.nose_length + 0.1) / (0.5 * who.nose_length + 0.2)
    shadow = 0.10 * bump(bridge, (x - 0.085) / 0.06) - 0.14 * bump(bridge, x / 0.055)
    shadow -= 0.12 * bump(x / 0.08, (y - tip + 0.05) / 0.08)
    shadow += 0.30 * bump(x / (width + 0.03), (y - tip - 0.055 + 0.03 * x / width) / 0.05)
    shadow += 0.30 * bump((y - tip + 0.01) / 0.09, (x - width) / 0.035)
    canvas.shade(shadow)
    nostril = canvas.ellipse(x, 0.5 * width, tip + 0.02, 0.035, 0.022)
    canvas.paint(nostril.mul_(0.7), same(0.12, 0.05, 0.04))
