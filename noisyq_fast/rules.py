"""The rules of learned quantizers: the code and the quantized value y of an input x, and the
derivatives of y with respect to x and to each parameter.

``n = high`` is the largest code, ``rint`` rounds half to even, ``s`` is at least the smallest
normal float32, and ``clip`` keeps a NaN. The derivative of rounding is taken as 1
(*straight-through*)::

    rule         parameters          y = code * s, code =                          outside where
    lsq          step s              rint(clip(x / s, low, high))                  x / s is clipped
    pact, sat    clip a              rint(clip(x / s, 0, n)), s = a / n            x < 0, x >= a
    aqd          clip a              rint(clip(x / s, 0, n)), s = a / n            x < 0, x > a
    aqd_odd      clip a              2 rint((clip(x / s, -n, n) + n) / 2) - n      x < -a, x > a
    qil          center c, distance drint(n clip(v, 0, 1)), s = 1 / n              v <= 0, v >= 1
    qil_odd      c, d, exponent g    sign(x) rint(n clip(v, 0, 1)^g), s = 1 / n    v <= 0, v >= 1
    dsq          low l, high u,      floor((clip(x, l, u) - l) / s + 1 / 2),       x < l, x > u
                 alpha               s = (u - l) / n, y = l + code * s
    dorefa_*     absmax m, scale r   see below; y = code * (r / d)                 nowhere

``v = 1/2 + (x - c) / (2 d)``, for qil_odd with ``|x|`` in place of x. With ``t = tanh(x) /
tanh(m)`` and ``w = (t + 1) / 2`` the codes of dorefa are, with ``b`` bits::

    dorefa_original     2 rint((2^b - 1) w) - (2^b - 1)                            d = 2^b - 1
    dorefa_modified     min(floor(2^b w), 2^b - 1) - 2^(b-1)                       d = 2^(b-1)
    dorefa_centered     2 min(floor(2^b w), 2^b - 1) - (2^b - 1)                   d = 2^b

Inside, with ``e = code - x / s``::

    lsq            dy/dx = 1                         dy/ds = e; below low, above high
    pact           dy/dx = 1                         dy/da = 0; above 1
    sat, aqd       dy/dx = 1                         dy/da = e / n; above 1, below 0, of aqd_odd -1
    qil, qil_odd   dy/dx = p / (2 d)                 dy/dc = -sign p / (2 d), p = g v^(g-1)
                   dy/dd = dy/dc (x - c) / d         dy/dg = sign v^g ln v; outside all 0
    dsq            dy/dx = h = z k (1 - tanh(k q)^2) / 2, with k = ln(2 / alpha - 1),
                   z = 1 / (1 - alpha), and q = (x - l) / s - floor(...) - 1 / 2 the place
                   in a cell, -1/2 to 1/2
                   dy/dl = 1 - code / n + h ((x - l) / (n s) - 1); below 1
                   dy/du = code / n - h (x - l) / (n s);           above 1
                   dy/dalpha = s / 2 (z^2 tanh(k q) - z (1 - tanh(k q)^2) 2 q / (alpha (2 - alpha)))
    dorefa         dy/dx = r (1 - tanh(x)^2) / tanh(m)      dy/dm = -r t (1 - tanh(m)^2) / tanh(m)
                   dy/dr = 0: the scale is not learned

Sums over a group have a fixed order, whatever the threads and the backend: the elements, in memory
order, are cut into chunks of 4096, each seen as 64 rows of 64; the rows are added one after the
other, the resulting row is folded in halves (64, 32, .. 1), and the sums of the chunks are summed
in the same way. So sums have the same bits in every backend, as codes and values do: tanh, exp and
ln are computed in float32 from correctly rounded sums, products and quotients.
"""

from dataclasses import dataclass

LSQ = "lsq"
PACT = "pact"
SAT = "sat"
AQD = "aqd"
AQD_ODD = "aqd_odd"
QIL = "qil"
QIL_ODD = "qil_odd"
DSQ = "dsq"
DOREFA_ORIGINAL = "dorefa_original"
DOREFA_MODIFIED = "dorefa_modified"
DOREFA_CENTERED = "dorefa_centered"

PARAMETERS = {
    LSQ: ("step",),
    PACT: ("clip",),
    SAT: ("clip",),
    AQD: ("clip",),
    AQD_ODD: ("clip",),
    QIL: ("center", "distance"),
    QIL_ODD: ("center", "distance", "exponent"),
    DSQ: ("low", "high", "alpha"),
    DOREFA_ORIGINAL: ("absmax", "scale"),
    DOREFA_MODIFIED: ("absmax", "scale"),
    DOREFA_CENTERED: ("absmax", "scale"),
}
NAMES = tuple(PARAMETERS)
"""In the order of the enumerators of ``csrc/kernels.h``."""

LANES = 64
CHUNK = LANES * LANES
"""Elements in one chunk of a sum: see above."""


@dataclass(frozen=True)
class Rule:
    """A rule, with its smallest and its largest code."""

    name: str
    low: int
    high: int

    @property
    def parameters(self) -> int:
        """How many parameters a group has."""
        return len(PARAMETERS[self.name])


def check_rule(name: object, low: int, high: int) -> None:
    if name not in PARAMETERS:
        raise ValueError(f"rule: got {name!r}, takes one of {', '.join(NAMES)}")
    if not (-256 < low <= 0 < high < 256):
        raise ValueError(f"low, high: got {low}, {high}, takes -255..0 and 1..255")
