"""The built-in dataset: a gripper pushes coloured blocks over a table, as MP4 files.

Blocks move only by contact, so what happened between two observations follows
from both of them; a cross-fade shows every moving thing twice, half transparent.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator
from torch import Tensor
from tqdm import tqdm

from utils.io import save_mp4, temporary_path

SIZE = 64
FRAMES = 30
FPS = 10
TRAIN_CLIPS = 240
VAL_CLIPS = 24
RENDER_VERSION = 2  # part of the folder's name: change it whenever pictures change
GRIPPER_RADIUS = 0.13  # all lengths are in units of the picture's width
SUBSTEPS = 4
COLOURS = ("d62828", "2464d2", "28a046", "f0be1e", "963cb4", "14aab4", "eb781e")


def make_synthetic_videos(root: str | Path, workers: int = 1) -> Path:
    """Render train/ and val/ below `root` unless they are there; returns their folder."""
    folder = Path(root) / f"synthetic_push_v{RENDER_VERSION}"
    if folder.is_dir():
        return folder
    seeds = {f"train/{i:05d}.mp4": i for i in range(TRAIN_CLIPS)}
    seeds.update({f"val/{i:05d}.mp4": 1_000_000 + i for i in range(VAL_CLIPS)})
    try:
        with temporary_path(folder) as temporary:
            (temporary / "train").mkdir(parents=True)
            (temporary / "val").mkdir()

            def render(name: str) -> None:
                save_mp4(temporary / name, render_clip(seeds[name]), FPS)

            with ThreadPoolExecutor(max(1, workers)) as pool:
                rendered = pool.map(render, seeds)
                list(tqdm(rendered, "rendering the built-in clips", len(seeds), disable=None))
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    return folder


def render_clip(seed: int) -> Tensor:
    """One clip, uint8 [3,FRAMES,SIZE,SIZE], as a function of its seed."""
    rng = np.random.default_rng([2026, seed])
    blocks = int(rng.integers(2, 5))
    radius = rng.uniform(0.09, 0.14, blocks).astype(np.float32)  # of the contact circle
    palette = np.array([list(bytes.fromhex(colour)) for colour in COLOURS])
    colours = palette[rng.permutation(len(palette))[:blocks]]
    colours = colours * rng.uniform(0.85, 1.0, (blocks, 1))
    gripper, centres, angles = simulate(rng, radius)

    # The table.
    y, x = (np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5) / SIZE
    table = draw_table(rng, x, y)
    picture = np.broadcast_to(table, (FRAMES, SIZE, SIZE, 3)).copy()
    paint = partial(paint_shape, picture)

    # Blocks, each with its shadow and a lighter top.
    for n, (r, colour) in enumerate(zip(radius, colours, strict=True)):
        dx = x - centres[:, n, 0, None, None]  # [T,H,W]
        dy = y - centres[:, n, 1, None, None]
        paint(length(dx - 0.015, dy - 0.02) - r, (0, 0, 0), 0.25)
        cos = np.cos(angles[:, n, None, None])
        sin = np.sin(angles[:, n, None, None])
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
    picture = np.rint(picture).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(picture).permute(3, 0, 1, 2)


def paint_shape(picture: ndarray, distance: ndarray, colour: ndarray, opacity: float = 1) -> None:
    """Blend a colour into a shape given by signed distances [T,H,W], which antialias it."""
    # Few pixels are touched, so the blending is confined to them.
    touched = distance < 0.5 / SIZE
    cover = np.clip(0.5 - distance[touched] * SIZE, 0, 1)[:, None] * np.float32(opacity)
    picture[touched] += cover * (np.asarray(colour, np.float32) - picture[touched])


def simulate(rng: Generator, radius: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Move blocks only by contact: gripper [T,2], block centres [T,N,2], angles [T,N]."""
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
            placed = zip(centres, radius, strict=False)
            if all(np.hypot(*(centre - c)) > r + q + 0.02 for c, q in placed):
                break
        centres.append(centre)
    return np.array(centres)


def plan_push(
    rng: Generator, position: ndarray, centres: ndarray, radius: ndarray
) -> list[ndarray]:
    """Waypoints: the near side of a random block, then through it."""
    target = int(rng.integers(len(radius)))
    heading = centres[target] - position + rng.normal(0, 0.1, 2)
    heading /= max(float(np.hypot(*heading)), 1e-6)
    touch = centres[target] - heading * (radius[target] + GRIPPER_RADIUS)
    through = centres[target] + heading * rng.uniform(0.15, 0.35)
    return [np.clip(touch, 0.08, 0.92), np.clip(through, 0.08, 0.92)]


def resolve_contacts(position: ndarray, centres: ndarray, angles: ndarray, radius: ndarray) -> None:
    """Push blocks off the gripper, each other and the table's edge, in place."""
    for i, r in enumerate(radius):
        overlap, normal = contact(centres[i], position, r + GRIPPER_RADIUS)
        centres[i] += normal * overlap
        # Friction turns the block a little.
        angles[i] += 3 * overlap * math.copysign(1, normal[0] * normal[1])
    for i in range(len(radius)):
        for j in range(i):
            overlap, normal = contact(centres[i], centres[j], radius[i] + radius[j])
            centres[i] += normal * overlap / 2
            centres[j] -= normal * overlap / 2
    np.clip(centres, radius[:, None], 1 - radius[:, None], out=centres)


def contact(centre: ndarray, other: ndarray, reach: float) -> tuple[float, ndarray]:
    """Overlap of two circles of radii that sum to `reach`, and the direction away."""
    away = centre - other
    distance = float(np.hypot(*away))
    return max(reach - distance, 0), away / max(distance, 1e-6)


def draw_table(rng: Generator, x: ndarray, y: ndarray) -> ndarray:
    """A lit table top with a faint grain, [H,W,3] float32."""
    tint = np.array([178, 160, 140], np.float32) * rng.uniform(0.85, 1.15)
    tint = tint + rng.uniform(-15, 15, 3).astype(np.float32)
    slope = rng.uniform(-0.2, 0.2, 2)
    light = 1 + slope[0] * (x - 0.5) + slope[1] * (y - 0.5)
    waves = rng.uniform(3, 8) * y + rng.uniform(0.5, 2) * x + rng.uniform()
    grain = 5 * np.sin(2 * math.pi * waves)
    return (light[..., None] * tint + grain[..., None]).astype(np.float32)


def segment_distance(x: ndarray, y: ndarray, start: ndarray, end: ndarray) -> ndarray:
    """Distances [T,H,W] of pixels [H,W] to segments from [2] to [T,1,1,2]."""
    along = end - start
    px = x - start[0]
    py = y - start[1]
    share = np.clip((px * along[..., 0] + py * along[..., 1]) / (along**2).sum(-1), 0, 1)
    return length(px - share * along[..., 0], py - share * along[..., 1])


def length(x: ndarray, y: ndarray) -> ndarray:
    """Euclidean length; np.hypot guards against overflow and is much slower."""
    return np.sqrt(x * x + y * y)
