"""Directories as those of BP4D and DISFA, with a few tiny pictures each."""

import zlib

import pytest
from PIL import Image

from experiments.data.au import disfa

SIZE = 16
FRAMES = (99, 100, 101)


def draw(path, level, size=(SIZE, SIZE)):
    """A grey picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)


def level(*frame):
    """The grey of a frame."""
    return 20 + zlib.crc32(repr(frame).encode()) % 200


def truncate(path):
    """Takes the end of a JPEG away: of noise, as one of a single grey is too short to miss it."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:1500])


def assert_greys(images, greys):
    """That pictures `[N, S, S, 3]` have one grey each."""
    pixels = images.float().flatten(1)
    assert pixels.mean(1).tolist() == pytest.approx(greys, abs=2)
    assert pixels.std(1).max() < 2


class _Tree:
    def cached(self, pattern):
        """A file of the cache."""
        (path,) = (self.root / "noisyq_fast").glob(pattern)
        return path

    def faults(self):
        """Those of the last time, but for subjects and sequences that the tree never had."""
        lines = self.cached("faults.txt").read_text().splitlines()
        absent = ("missing subject", "missing sequence")
        had = [f"{subject}_{task}" for subject, task in self.sequences]
        return [
            line
            for line in lines
            if not line.startswith(absent) or any(name in line for name in had)
        ]


class BP4D(_Tree):
    """By default a subject of each part, two sequences each and three frames in each."""

    def __init__(
        self,
        root,
        subjects=("F001", "F003", "F004"),
        tasks=("T1", "T2"),
        frames=FRAMES,
        occurrence="AU_OCC",
        recordings="Sequences(2D+3D)",
        digits=4,
        columns=range(1, 30),
    ):
        self.root = root
        self.frames = frames
        self.digits = digits
        self.coding = root / "AUCoding" / occurrence
        self.recordings = root / recordings
        self.coding.mkdir(parents=True)
        self.sequences = [(subject, task) for subject in subjects for task in tasks]
        for sequence in self.sequences:
            lines = [
                [frame, *(self.label(*sequence, frame, au) for au in columns)] for frame in frames
            ]
            self.write(*sequence, [[0, *columns], *lines])
            for frame in frames:
                draw(self.picture(*sequence, frame), level(*sequence, frame))

    @staticmethod
    def label(*key):
        return (0, 1, 9)[zlib.crc32(repr(key).encode()) % 3]

    def labels(self, subject, task):
        return self.coding / f"{subject}_{task}.csv"

    def write(self, subject, task, rows):
        text = "".join(",".join(map(str, row)) + "\n" for row in rows)
        self.labels(subject, task).write_text(text)

    def edit(self, sequence, line, old, new):
        """Replaces text in a line, counted from 1."""
        replace_in(self.labels(*sequence), line, old, new)

    def picture(self, subject, task, frame):
        return self.recordings / subject / task / f"{frame:0{self.digits}}.jpg"

    def expected(self):
        """`(subject, task, frame)` of all, in order."""
        return [(*sequence, frame) for sequence in self.sequences for frame in self.frames]


class DISFA(_Tree):
    """By default a subject of each part and three frames of each."""

    ALL_AUS = (*disfa.AUS, 5, 15, 17, 20)

    def __init__(self, root, subjects=("SN001", "SN003", "SN006"), frames=(1, 2, 3), suffix="jpg"):
        self.root = root
        self.sequences = [(subject, "au1") for subject in subjects]
        self.subjects = subjects
        self.frames = frames
        self.suffix = suffix
        for subject in subjects:
            for au in self.ALL_AUS:
                lines = [f"{frame},{self.intensity(subject, frame, au)}\n" for frame in frames]
                path = self.labels(subject, au)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(lines))
            for frame in frames:
                draw(self.picture(subject, frame), level(subject, frame))

    @staticmethod
    def intensity(*key):
        return zlib.crc32(repr(key).encode()) % 6

    def labels(self, subject, au):
        return self.root / "ActionUnit_Labels" / subject / f"{subject}_au{au}.txt"

    def picture(self, subject, frame):
        return self.root / "Images" / subject / f"{frame:05}.{self.suffix}"

    def expected(self):
        """`(subject, frame)` of all, in order."""
        return [(subject, frame) for subject in self.subjects for frame in self.frames]


def replace_in(path, line, old, new):
    """Replaces text in a line of a file, counted from 1."""
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("".join(lines))
