"""The built-in dataset: a gripper that pushes coloured blocks over a table, rendered once as real MP4 files.

The blocks move only by contact, so what happened between two observations follows from both of them, while a
cross-fade shows every moving thing twice, half transparent.
"""

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator
from torch import Tensor
from tqdm import tqdm

from utils.io import save_mp4

SIZE, FRAMES, FPS = 64, 30, 10
TRAIN_CLIPS, VAL_CLIPS = 240, 24
RENDER_VERSION = 2  # part of the folder's name: change it whenever the pictures change
GRIPPER_RADIUS = 0.13  # in units of the picture's width, as are all lengths here
SUBSTEPS = 4
PALETTE = np.array(
    [[214, 40, 40], [36, 100, 210], [40, 160, 70], [240, 190, 30], [150, 60, 180], [20, 170, 180], [235, 120, 30]]
)


def make_synthetic_videos(root: str | Path, workers: int = 1) -> Path:
    """Render the dataset below `root` unless it is there; returns its folder, which holds train/ and val/.

    Raises: ValueError: if it cannot be written.
    """
    folder = Path(root) / f"synthetic_push_v{RENDER_VERSION}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    seeds = {f"train/{i:05d}.mp4": i for i in range(TRAIN_CLIPS)}
    seeds |= {f"val/{i:05d}.mp4": 1_000_000 + i for i in range(VAL_CLIPS)}

    def make(name: str) -> None:
        save_mp4(temporary / name, render_clip(seeds[name]), FPS)

    try:
        for side in ("train", "val"):
            (temporary / side).mkdir(parents=True)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            list(tqdm(pool.map(make, seeds), "rendering the built-in clips", len(seeds), disable=None))
        temporary.replace(folder)
    except OSError as error:
        if not folder.is_dir():  # else another run was faster
            raise ValueError(f"--cache_dir {root}: the built-in clips cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def render_clip(seed: int) -> Tensor:
    """One clip, uint8 [3,FRAMES,SIZE,SIZE], a function of the seed alone; edges are antialiased by signed distance."""
    rng = np.random.default_rng([2026, seed])
    blocks = int(rng.integers(2, 5))
    radius = rng.uniform(0.09, 0.14, blocks).astype(np.float32)  # of the contact circle
    colours = PALETTE[rng.permutation(len(PALETTE))[:blocks]] * rng.uniform(0.85, 1.0, (blocks, 1))
    gripper, centres, angles = simulate(rng, radius)

    # The table.
    y, x = (np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5) / SIZE
    picture = np.broadcast_to(draw_table(rng, x, y), (FRAMES, SIZE, SIZE, 3)).copy()

    def paint(distance: ndarray, colour: ndarray, opacity: float = 1.0) -> None:
        touched = distance < 0.5 / SIZE  # [T,H,W]: few pixels, so the blending is confined to them
        cover = np.clip(0.5 - distance[touched] * SIZE, 0, 1)[:, None] * np.float32(opacity)
        picture[touched] += cover * (np.asarray(colour, np.float32) - picture[touched])

    # Blocks, each with its shadow and a lighter top.
    for n, (r, colour) in enumerate(zip(radius, colours, strict=True)):
        dx, dy = (axis - centres[:, n, i, None, None] for i, axis in enumerate((x, y)))  # [T,H,W] each
        paint(length(dx - 0.015, dy - 0.02) - r, (0, 0, 0), 0.25)
        cos, sin = np.cos(angles[:, n, None, None]), np.sin(angles[:, n, None, None])
        from_centre = np.maximum(np.abs(cos * dx + sin * dy), np.abs(cos * dy - sin * dx))
        paint(from_centre - 0.8 * r, colour)
        paint(from_centre - 0.45 * r, np.minimum(colour * 1.25, 255))

    # The arm, with its shadow, and the gripper.
    base = np.array([0.5 + rng.uniform(-0.15, 0.15), -0.1], np.float32)
    arm = rng.uniform(30, 80) * np.array([1, 1, 1.15])
    tip = gripper[:, None, None, :]  # [T,1,1,2]
    paint(segment_distance(x - 0.03, y - 0.04, base, tip) - 0.12, (0, 0, 0), 0.25)
    paint(segment_distance(x, y, base, tip) - 0.11, arm)
    from_tip = length(x - tip[..., 0], y - tip[..., 1])
    paint(from_tip - GRIPPER_RADIUS, arm * 0.6)
    paint(from_tip - 0.45 * GRIPPER_RADIUS, (225, 225, 230))
    return torch.from_numpy(np.rint(picture).clip(0, 255).astype(np.uint8)).permute(3, 0, 1, 2)


def simulate(rng: Generator, radius: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Quasi-static pushing: a block moves only when touched. Gripper [T,2], block centres [T,N,2], angles [T,N]."""
    centres = scatter(rng, radius)
    angles = rng.uniform(-math.pi, math.pi, len(radius))
    position = rng.uniform(0.15, 0.85, 2)
    speed = rng.uniform(0.05, 0.07)  # per frame: 3.2 to 4.5 pixels of 64
    waypoints: list[ndarray] = []
    record = []
    for _ in range(FRAMES):
        record.append((position.copy(), centres.copy(), angles.copy()))
        for _ in range(SUBSTEPS):
            if not waypoints:
                waypoints = plan_push(rng, position, centres, radius)
            step = waypoints[0] - position
            distance = float(np.hypot(*step))
            if distance < speed / SUBSTEPS:
                waypoints.pop(0)
            else:
                position = position + step / distance * speed / SUBSTEPS
            resolve_contacts(position, centres, angles, radius)
    return tuple(np.stack(series).astype(np.float32) for series in zip(*record, strict=True))


def scatter(rng: Generator, radius: ndarray) -> ndarray:
    """Block centres [N,2] that do not overlap where possible."""
    centres = []
    for r in radius:
        for _ in range(100):
            centre = rng.uniform(0.15, 0.85, 2)
            if all(np.hypot(*(centre - c)) > r + q + 0.02 for c, q in zip(centres, radius, strict=False)):
                break
        centres.append(centre)
    return np.array(centres)


def plan_push(rng: Generator, position: ndarray, centres: ndarray, radius: ndarray) -> list[ndarray]:
    """Waypoints: the near side of a random block, then through it."""
    target = int(rng.integers(len(radius)))
    heading = centres[target] - position + rng.normal(0, 0.1, 2)
    heading /= max(float(np.hypot(*heading)), 1e-6)
    touch = centres[target] - heading * (radius[target] + GRIPPER_RADIUS)
    return [np.clip(p, 0.08, 0.92) for p in (touch, centres[target] + heading * rng.uniform(0.15, 0.35))]


def resolve_contacts(position: ndarray, centres: ndarray, angles: ndarray, radius: ndarray) -> None:
    """Push overlapping circles apart, in place: blocks off the gripper, off each other, and off the table's edge."""
    for i, r in enumerate(radius):
        overlap, normal = contact(centres[i], position, r + GRIPPER_RADIUS)
        centres[i] += normal * overlap
        angles[i] += 3 * overlap * math.copysign(1, normal[0] * normal[1])  # friction turns it a little
    for i in range(len(radius)):
        for j in range(i):
            overlap, normal = contact(centres[i], centres[j], radius[i] + radius[j])
            centres[i] += normal * overlap / 2
            centres[j] -= normal * overlap / 2
    np.clip(centres, radius[:, None], 1 - radius[:, None], out=centres)


def contact(centre: ndarray, other: ndarray, reach: float) -> tuple[float, ndarray]:
    """The overlap of two circles whose radii sum to `reach`, or 0, and the unit vector from the other to the first."""
    away = centre - other
    distance = float(np.hypot(*away))
    return max(reach - distance, 0), away / max(distance, 1e-6)


def draw_table(rng: Generator, x: ndarray, y: ndarray) -> ndarray:
    """A lit table top with a faint grain, [H,W,3] float32."""
    tint = np.array([178, 160, 140], np.float32) * rng.uniform(0.85, 1.15) + rng.uniform(-15, 15, 3).astype(np.float32)
    slope = rng.uniform(-0.2, 0.2, 2)
    light = 1 + slope[0] * (x - 0.5) + slope[1] * (y - 0.5)
    grain = 5 * np.sin(2 * math.pi * (rng.uniform(3, 8) * y + rng.uniform(0.5, 2) * x + rng.uniform()))
    return (light[..., None] * tint + grain[..., None]).astype(np.float32)


def segment_distance(x: ndarray, y: ndarray, start: ndarray, end: ndarray) -> ndarray:
    """Distance of each pixel [H,W] to the segments from `start` [2] to `end` [T,1,1,2]: [T,H,W]."""
    along = end - start
    px, py = x - start[0], y - start[1]
    share = np.clip((px * along[..., 0] + py * along[..., 1]) / (along**2).sum(-1), 0, 1)
    return length(px - share * along[..., 0], py - share * along[..., 1])


def length(x: ndarray, y: ndarray) -> ndarray:
    """Euclidean length; several times faster than np.hypot, whose care for overflow is not needed here."""
    return np.sqrt(x * x + y * y)
