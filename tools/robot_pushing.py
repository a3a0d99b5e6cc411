"""Render the robot-pushing benchmark: a simulated Sawyer arm (Meta-World's, in MuJoCo) over a tray of objects.

    python tools/robot_pushing.py --out_dir sim_push --train 1200 --test 256

Clips look and move like BAIR's: 64x64, 30 frames, 10 per second. Clip i of train/ is a function of the seed i alone,
clip i of test/ of 1,000,000 + i, so any part, order or number of processes gives the same clips, and a stopped run goes
on where it was. index.tsv beside the clips gives seed, policy and motion of each.

Needs: pip install metaworld==3.1.1 (MIT; it brings MuJoCo), and an off-screen OpenGL: on Debian libegl1 and
libgl1-mesa-dri, or libosmesa6 with MUJOCO_GL=osmesa. Other versions of these render slightly different pixels.
"""

import atexit
import colorsys
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator
from tqdm import tqdm

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.processes import map_in_processes
from utils.flags import BrokenRunError, Parser, non_negative_int, nonempty_path, positive_int
from utils.io import atomic_write, save_mp4

FRAMES, SIZE, FPS = 30, 64, 10
RENDERED = 256  # pixels; averaged down to SIZE
TEST_SEED = 1_000_000  # of the first test clip
TIMESTEP, SUBSTEPS = 0.004, 25  # seconds; 25 of them are one frame
X_RANGE, Y_RANGE, Z_RANGE = (-0.27, 0.27), (0.46, 0.84), (0.045, 0.20)  # metres, of the hand; the table is at 0
POLICIES, POLICY_CHANCES = ("random", "push", "sweep", "grasp"), (0.3, 0.45, 0.15, 0.1)
COLUMNS = ("file", "seed", "policy", "objects", "objects_travel_m", "arm_speed_m_per_frame", "attempt")
OPEN, CLOSED = (-1, 1), (1, -1)  # controls of the two fingers
ATTEMPTS = 10  # the physics of 1 clip in some 250 blows up; it is drawn again
SETUP = (
    "needs pip install metaworld==3.1.1 and an off-screen OpenGL (Debian: apt-get install libegl1 libgl1-mesa-dri; "
    "or libosmesa6 and MUJOCO_GL=osmesa)"
)
DARK_RED, BLACK, CLAW, PAD = (0.34, 0.05, 0.07), (0.1, 0.1, 0.1), (0.08, 0.08, 0.09), (0.15, 0.15, 0.16)
LIMB_COLOURS = {"right_l2": BLACK, "right_l3": DARK_RED, "right_l4": BLACK, "right_l5": DARK_RED, "right_l6": BLACK}
LIMB_COLOURS |= {"right_hand": (0.12, 0.12, 0.12)}
GEOM_COLOURS = {"rightclaw_it": CLAW, "leftclaw_it": CLAW, "rightpad_geom": PAD, "leftpad_geom": PAD}
GEOM_COLOURS |= {"rail": (0.2, 0.2, 0.2), "floor": (0.32, 0.33, 0.36)}
UNSEEN = {"pedestal", "pedestal_feet", "controller_box", "screen", "head", "torso", "tablelink", "mocap"}
UNSEEN |= {"right_arm_base_link", "right_l0", "right_l1"}  # half of all triangles

# Primitives: MuJoCo's shape, half extents in metres, and the place and turn of those that are not in the middle.
MIDDLE, LYING = (0, 0, 0), (2**-0.5, 0, 2**-0.5, 0)
OBJECTS = {
    "box": [("BOX", (0.028, 0.022, 0.02))],
    "bar": [("BOX", (0.05, 0.014, 0.014))],
    "cyl": [("CYLINDER", (0.025, 0.022, 0))],
    "ell": [("ELLIPSOID", (0.036, 0.026, 0.02))],
    "cap": [("CAPSULE", (0.017, 0.03, 0), MIDDLE, LYING)],
    "ball": [("SPHERE", (0.026, 0, 0))],
    "mug": [("CYLINDER", (0.028, 0.028, 0)), ("BOX", (0.008, 0.006, 0.018), (0.035, 0, 0))],
    "cup": [("CYLINDER", (0.022, 0.022, 0)), ("CYLINDER", (0.03, 0.005, 0), (0, 0, -0.017))],
    "ham": [("CAPSULE", (0.009, 0.045, 0), (0, 0, -0.006), LYING), ("BOX", (0.013, 0.03, 0.015), (0.045, 0, 0))],
    "cross": [("BOX", (0.042, 0.012, 0.014)), ("BOX", (0.012, 0.042, 0.014))],
}
POOL = ("box", "cyl", "ell", "cap", "mug", "ham", "ball", "box", "cross", "cyl", "cup", "ell", "box", "bar")
CONTACT = {"condim": 4, "friction": [0.9, 0.02, 0.002], "solref": [0.01, 1], "solimp": [0.95, 0.99, 0.001, 0.5, 2]}


# --- model ------------------------------------------------------------------------------------------------------------


def build_model() -> Any:
    """MuJoCo's model of Meta-World's arm over BAIR's tray, with a pool of free objects parked beside it."""
    import metaworld
    import mujoco

    # Meta-World's scene: the arm kept up, without its object and wall.
    assets = Path(metaworld.__file__).parent / "assets"
    spec = mujoco.MjSpec.from_file(str(assets / "sawyer_xyz" / "sawyer_push_v3.xml"))
    spec.compiler.inertiagrouprange = [0, 5]
    spec.option.timestep = TIMESTEP
    spec.option.iterations = 20
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
    spec.stat.extent, spec.stat.center = 1.1, [0, 0.6, 0.1]  # not those of the objects parked far away
    elbow = spec.joint("right_j2")  # kept up, in the plane of the arm
    elbow.stiffness, elbow.springref = 60, 0
    for limb in (*(f"right_l{i}" for i in range(7)), "right_hand", "hand"):
        spec.body(limb).gravcomp = 1
    screen = getattr(spec.visual, "global_")  # noqa: B009 - a name that ends like this is mangled in no other way
    screen.offwidth = screen.offheight = RENDERED
    for name in ("obj", "RetainingWall"):
        spec.detach_body(spec.body(name))

    # Materials: wood for the table, three patterns for the objects.
    picture = str(assets / "textures" / "light_wood_v3.png")
    spec.add_texture(name="T_bair", type=mujoco.mjtTexture.mjTEXTURE_2D, file=picture)
    table = spec.add_material(name="M_table", texrepeat=[1.5, 1.5], specular=0.15, shininess=0.1)
    table.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "T_bair"
    patterns = (("CHECKER", 1, 0.35), ("GRADIENT", 1, 0.1), ("FLAT", 0.55, 1))  # of two grays
    cube = {"type": mujoco.mjtTexture.mjTEXTURE_CUBE, "width": 64, "height": 64}
    for i, (name, first, second) in enumerate(patterns):
        builtin = getattr(mujoco.mjtBuiltin, f"mjBUILTIN_{name}")
        spec.add_texture(name=f"T_o{i}", **cube, builtin=builtin, rgb1=[first] * 3, rgb2=[second] * 3)
        material = spec.add_material(name=f"M_o{i}", specular=0.4, shininess=0.4, texrepeat=[1, 1])
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = f"T_o{i}"

    # The tray: floor, back wall, slanted side walls, front lip.
    box = mujoco.mjtGeom.mjGEOM_BOX
    floor = {"size": [0.52, 0.36, 0.03], "pos": [0, 0.64, -0.0299], "friction": [1, 0.01, 0.001]}
    spec.worldbody.add_geom(name="bin_floor", type=box, material="M_table", **floor)
    walls = (  # position, half extents, yaw
        ([0, 0.31, 0.06], [0.52, 0.012, 0.09], 0),
        ([-0.40, 0.62, 0.02], [0.012, 0.36, 0.06], 0.30),
        ([0.40, 0.62, 0.02], [0.012, 0.36, 0.06], -0.30),
        ([0, 0.945, 0.004], [0.52, 0.07, 0.014], 0),
    )
    for i, (place, size, yaw) in enumerate(walls):
        look = {"rgba": [0.75, 0.77, 0.8, 1], "material": "M_table" if i == 3 else ""}
        spec.worldbody.add_geom(name=f"bin_wall{i}", type=box, size=size, pos=place, quat=turned(yaw), **look)

    # The objects, parked.
    for number, kind in enumerate(POOL):
        body = spec.worldbody.add_body(name=f"o{number}", pos=[4 + number, 0, -0.85])
        body.add_freejoint()
        material = f"M_o{(number * 7) % 3}" if number % 2 else ""
        for i, (shape, size, *placed) in enumerate(OBJECTS[kind]):
            form = {"type": getattr(mujoco.mjtGeom, f"mjGEOM_{shape}"), "size": size}
            form |= zip(("pos", "quat"), placed, strict=False)
            body.add_geom(name=f"g{number}_{i}", material=material, density=500, **form, **CONTACT)

    model = spec.compile()
    model.vis.quality.offsamples = 0
    # as Meta-World's reset_mocap_welds: the hand's weld to the body that is moved
    model.eq_data[model.eq_type == int(mujoco.mjtEq.mjEQ_WELD)] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]

    # Colours: BAIR's dark red arm; what the camera never sees is not drawn.
    for g in range(model.ngeom):
        body = model.body(model.geom_bodyid[g]).name
        if body in UNSEEN:
            model.geom_group[g] = 5
        elif body in LIMB_COLOURS and model.geom_rgba[g, 3] > 0:
            model.geom_rgba[g] = [*LIMB_COLOURS[body], 1]
    for name, colour in GEOM_COLOURS.items():
        g = model.geom(name).id
        model.geom_rgba[g], model.geom_matid[g], model.geom_group[g] = [*colour, 1], -1, 1
    return model


def turned(yaw: float) -> list[float]:
    """The quaternion of a turn about the vertical."""
    return [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]


def toy_colour(rng: Generator) -> ndarray:
    """A bright colour, or now and then a gray, RGB in [0, 1]."""
    if rng.random() >= 0.72:
        return np.full(3, rng.choice([0.08, 0.35, 0.92]))
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.35, 1), rng.uniform(0.3, 1)))


# --- scene ------------------------------------------------------------------------------------------------------------


class Scene:
    """The simulated table; `clip` renders the clip of a seed, whatever was rendered before."""

    def __init__(self):
        import mujoco

        mujoco.set_mju_user_warning(lambda message: None)  # a clip that diverged is noticed and drawn again
        self.mujoco = mujoco
        self.model = model = build_model()
        self.data = data = mujoco.MjData(model)
        self.places = [model.jnt_qposadr[model.body(f"o{i}").jntadr[0]] for i in range(len(POOL))]  # of x in qpos
        self.tray = [g for g in range(model.ngeom) if model.geom(g).name.startswith("bin")]
        varied = ("geom_size", "geom_pos", "geom_rbound", "geom_rgba", "body_mass", "body_inertia", "light_diffuse")
        self.initial = {name: getattr(model, name).copy() for name in varied}
        self.ambient = model.vis.headlight.ambient.copy()

        # The joint pose with the hand over the middle of the table.
        for k, angle in enumerate([1.57, -1.18, 0, 2.18, 0, 0.57, 3.3]):  # Sawyer's neutral pose, turned to the table
            data.qpos[model.joint(f"right_j{k}").qposadr[0]] = angle
        data.mocap_pos[0] = [0, 0.6, 0.25]
        data.mocap_quat[0] = [1, 0, 1, 0]
        for _ in range(1500):
            mujoco.mj_step(model, data)
        self.rest = data.qpos.copy()

        # Camera and renderer.
        self.renderer = mujoco.Renderer(model, RENDERED, RENDERED)
        for flag in (mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_SHADOW):
            self.renderer.scene.flags[flag] = 0  # shadows cost twice the time and are barely seen at 64x64
        self.option = mujoco.MjvOption()
        self.option.sitegroup[:] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.lookat[:] = [0, 0.60, 0.035]
        self.camera.distance, self.camera.azimuth, self.camera.elevation = 0.80, -90, -47

    def reset(self, rng: Generator) -> None:
        """A new table: light, tints, objects, and the hand at its start."""
        model = self.model
        for name, value in self.initial.items():
            getattr(model, name)[:] = value

        # Brightness, direction and colour of the light, and the colour of the tray.
        brightness = rng.uniform(0.85, 1.15)
        model.light_diffuse[:] = self.initial["light_diffuse"] * brightness * 0.85
        model.light_dir[1] = np.array([rng.uniform(-0.5, 0.5), rng.uniform(-0.6, 0.3), -1])
        model.light_dir[1] /= np.linalg.norm(model.light_dir[1])
        model.vis.headlight.ambient[:] = self.ambient * rng.uniform(0.8, 1.1)
        model.vis.headlight.diffuse[:] = 0.35 * brightness
        tint = rng.uniform(0.78, 0.95) * np.array([1, rng.uniform(0.95, 1.0), rng.uniform(0.88, 1.02)])
        for g in self.tray:
            wooden = model.geom(g).name in ("bin_floor", "bin_wall3")
            colour = tint if wooden else np.array([0.66, 0.71, 0.80]) * rng.uniform(0.85, 1.15)
            model.geom_rgba[g] = [*colour, 1]

        # Some objects of the pool; the others stay parked.
        self.present = sorted(rng.choice(len(POOL), int(rng.integers(5, 12)), replace=False).tolist())
        self.mujoco.mj_resetData(model, self.data)
        self.data.qpos[:] = self.rest
        placed: list[ndarray] = []
        for i, at in enumerate(self.places):
            if i in self.present:
                self.place_object(i, placed, rng)
            else:
                self.data.qpos[at : at + 7] = [5 + 0.4 * i, 0, -0.88, 1, 0, 0, 0]
        self.bring_hand(rng)

    def place_object(self, i: int, placed: list[ndarray], rng: Generator) -> None:
        """Scale, colour and place one object clear of those placed before, often near one of them."""
        model, initial = self.model, self.initial
        scale = rng.uniform(1.15, 1.8)
        colours = [toy_colour(rng) for _ in range(2)]
        for part in range(len(OBJECTS[POOL[i]])):
            g = model.geom(f"g{i}_{part}").id
            for name in ("geom_size", "geom_pos", "geom_rbound"):
                getattr(model, name)[g] = initial[name][g] * scale
            model.geom_rgba[g, :3] = colours[part]
        body = model.body(f"o{i}").id
        model.body_mass[body] = initial["body_mass"][body] * scale**3
        model.body_inertia[body] = initial["body_inertia"][body] * scale**5
        near = bool(placed) and rng.random() < 0.55  # clusters, as on the real table
        for attempt in range(60):
            if near and attempt < 40:
                place = placed[rng.integers(len(placed))] + rng.normal(0, 0.09, 2)
            else:
                place = np.array([rng.uniform(-0.30, 0.30), rng.uniform(0.40, 0.84)])
            inside = abs(place[0]) < 0.31 and 0.39 < place[1] < 0.85
            if inside and all(np.hypot(*(place - other)) > 0.08 for other in placed):
                break
        placed.append(place)
        at = self.places[i]
        self.data.qpos[at : at + 7] = [*place, 0.034 * scale, *turned(rng.uniform(-np.pi, np.pi))]

    def bring_hand(self, rng: Generator) -> None:
        """Let the objects come to rest while the hand comes over its start, then down."""
        model, data = self.model, self.data
        down, turn = np.array([1, 0, 1, 0]) / 2**0.5, np.array(turned(rng.uniform(-0.6, 0.6)))
        self.mujoco.mju_mulQuat(data.mocap_quat[0], turn, down)
        start = np.array([rng.uniform(*X_RANGE), rng.uniform(*Y_RANGE), rng.uniform(0.09, 0.2)])
        data.ctrl[:] = OPEN if rng.choice([True, False], p=[0.7, 0.3]) else CLOSED
        self.mujoco.mj_kinematics(model, data)
        above = np.array([*data.body("hand").xpos[:2], 0.25])
        for i in range(150):
            share = min(1, i / 110)
            data.mocap_pos[0] = above + (np.array([start[0], start[1], 0.25]) - above) * min(1, share * 1.6)
            if share > 0.62:
                data.mocap_pos[0][2] = 0.25 + (start[2] - 0.25) * (share - 0.62) / 0.38
            self.mujoco.mj_step(model, data)
        data.qvel[:] *= 0.5

    def frame(self) -> ndarray:
        """The present picture, uint8 [SIZE,SIZE,3]."""
        self.renderer.update_scene(self.data, self.camera, self.option)
        factor = RENDERED // SIZE
        blocks = self.renderer.render().reshape(SIZE, factor, SIZE, factor, 3)
        return np.rint(blocks.mean((1, 3))).astype(np.uint8)

    def object_place(self, i: int) -> ndarray:
        """Where an object is on the table, (x, y) in metres."""
        return self.data.qpos[self.places[i] : self.places[i] + 2].copy()

    def clip(self, seed: int) -> tuple[ndarray, tuple]:
        """The frames of a seed, uint8 [T,H,W,3], and its entry in the index: all COLUMNS but the first.

        Raises: BrokenRunError: if its physics blew up ten times.
        """
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([20240, seed] + [attempt] * (attempt > 0))
            self.reset(rng)
            policy = str(rng.choice(POLICIES, p=POLICY_CHANCES))
            speed = rng.uniform(0.022, 0.045)  # metres per frame: 2 to 4 pixels
            before = {i: self.object_place(i) for i in self.present}
            frames = [self.frame()]
            hand = Hand(self, policy, speed, rng)
            for _ in range(FRAMES - 1):
                hand.move()
                frames.append(self.frame())
            if np.isfinite(self.data.qpos).all() and not any(w.number for w in self.data.warning):
                travel = sum(float(np.hypot(*(self.object_place(i) - place))) for i, place in before.items())
                entry = (seed, policy, len(self.present), round(travel, 4), round(float(speed), 4), attempt)
                return np.stack(frames), entry
        raise BrokenRunError(f"the clip of seed {seed} diverged {ATTEMPTS} times")


class Hand:
    """The hand, at most `speed` metres a frame: it wanders, sweeps over the table, pushes or grasps objects."""

    def __init__(self, scene: Scene, policy: str, speed: float, rng: Generator):
        self.scene, self.policy, self.speed, self.rng = scene, policy, speed, rng
        self.low, self.high = np.array([X_RANGE, Y_RANGE, Z_RANGE]).T
        self.place = scene.data.mocap_pos[0].copy()
        self.velocity = rng.normal(0, 0.5, 3) * speed
        self.stage, self.goal, self.waited = 0, None, 0

    def move(self) -> None:
        """Advance the physics by one frame."""
        step = {"random": self.wander, "sweep": self.sweep}.get(self.policy, self.handle)()
        length = np.linalg.norm(step)
        if length > self.speed:
            step = step * (self.speed / length)
        after = np.clip(self.place + step, self.low, self.high)
        self.velocity = np.where(after == self.place + step, self.velocity, -0.5 * self.velocity)
        for i in range(SUBSTEPS):
            self.scene.data.mocap_pos[0] = self.place + (after - self.place) * (i + 1) / SUBSTEPS
            self.scene.mujoco.mj_step(self.scene.model, self.scene.data)
        self.place = after

    def wander(self) -> ndarray:
        """A random walk with momentum, drawn towards the table."""
        kick = self.rng.normal(0, 1, 3) * self.speed * np.array([0.55, 0.55, 0.3])
        self.velocity = 0.75 * self.velocity + kick + [0, 0, (0.06 - self.place[2]) * 0.15]
        return self.velocity

    def sweep(self) -> ndarray:
        """Straight lines between random places low over the table."""
        if self.goal is None or np.linalg.norm(self.goal - self.place) < 0.03:
            self.goal = self.rng.uniform(self.low, [X_RANGE[1], Y_RANGE[1], 0.07])
        return self.goal - self.place

    def handle(self) -> ndarray:
        """Push an object, or grasp it and carry it away, in stages; then another."""
        if self.goal is None:  # pick an object within reach and a direction to push it
            low, high = self.low - 0.02, self.high + 0.02
            places = {i: self.scene.object_place(i) for i in self.scene.present}
            inside = [i for i, (x, y) in places.items() if low[0] < x < high[0] and low[1] < y < high[1]]
            self.target = int(self.rng.choice(inside)) if inside else None
            angle = self.rng.uniform(-np.pi, np.pi)
            self.direction = np.array([np.cos(angle), np.sin(angle)])
            self.stage = 0
        if self.target is not None:
            target = self.scene.object_place(self.target)
        else:
            target = self.place[:2] + self.rng.normal(0, 0.1, 2)

        def beyond(distance: float, height: float) -> ndarray:
            return np.array([*(target + self.direction * distance), height])

        # Push: above one side of the object, down, and through it. Grasp: above it, down, close, and away with it.
        floor = Z_RANGE[0]
        match self.policy, self.stage:
            case "push", 0:
                self.goal = beyond(-0.085, 0.10)
            case "push", 1:
                self.goal = beyond(-0.075, floor)
            case "push", 2 if not self.waited:
                self.goal, self.waited = beyond(self.rng.uniform(0.1, 0.25), floor), 1
            case "grasp", 0:
                self.goal = beyond(0, 0.13)
                self.scene.data.ctrl[:] = OPEN
            case "grasp", 1:
                self.goal = beyond(0, floor)
            case "grasp", 2:
                self.scene.data.ctrl[:] = CLOSED
                self.waited += 1
                if self.waited > 2:
                    self.stage = 3
                    self.goal = np.array([self.rng.uniform(*X_RANGE), self.rng.uniform(*Y_RANGE), 0.16])

        # The next stage, once the hand is there.
        self.goal = np.clip(self.goal, self.low, self.high)
        step = self.goal - self.place
        if np.linalg.norm(step) < 0.015:
            if self.stage == (2 if self.policy == "push" else 3):
                self.goal, self.waited = None, 0
                if self.policy == "grasp":
                    self.scene.data.ctrl[:] = OPEN
            elif self.policy == "push" or self.stage != 2:
                self.stage += 1
        return step + self.rng.normal(0, 0.004, 3)


# --- files ------------------------------------------------------------------------------------------------------------


scene: Scene | None = None  # one per process: building it takes a second


def render(task: tuple[Path, int]) -> tuple:
    """Render and write one clip (path, seed) in this process's scene; returns its line of the index."""
    global scene
    path, seed = task
    if scene is None:
        scene = Scene()
        atexit.register(scene.renderer.close)  # while OpenGL is still there
    frames, entry = scene.clip(seed)
    whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_mp4(whole, torch.from_numpy(frames).permute(3, 0, 1, 2), FPS, preset="slow")
    whole.replace(path)
    return path.name, *entry


def render_folder(folder: Path, seeds: Sequence[int], workers: int) -> None:
    """Render what is missing of a folder, clip i from seeds[i], and keep its index.tsv."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.tsv"
    lines = index.read_text().splitlines()[1:] if index.is_file() else []
    known = {row[0]: row for row in (line.split("\t") for line in lines) if len(row) == len(COLUMNS)}
    tasks = []
    for i, seed in enumerate(seeds):
        path = folder / f"{i:05d}.mp4"
        if not (path.is_file() and path.name in known and known[path.name][1] == str(seed)):
            tasks.append((path, seed))
            known.pop(path.name, None)
    with atomic_write(index) as file:
        file.write("".join("\t".join(row) + "\n" for row in [COLUMNS, *sorted(known.values())]).encode())
    with index.open("a") as file:
        for entry in tqdm(map_in_processes(render, tasks, workers), folder.name, len(tasks), unit="clip", disable=None):
            file.write("\t".join(map(str, entry)) + "\n")
            file.flush()


def check_setup() -> None:
    """Raises: ValueError: saying what to install, unless a frame can be rendered here."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    if find_spec("metaworld") is None or find_spec("mujoco") is None:
        raise ValueError(f"rendering {SETUP}")
    try:
        import mujoco  # loads OpenGL

        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # what PyOpenGL and MuJoCo raise without it
        raise ValueError(f"rendering {SETUP}; {type(error).__name__}: {error}") from error


def build_parser() -> Parser:
    """Every flag."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=nonempty_path, required=True, help="folder that gets train/ and test/")
    add("--train", type=non_negative_int, default=1200, help="clips in train/, of the seeds from 0")
    add("--test", type=non_negative_int, default=256, help="clips in test/, of the seeds from 1,000,000")
    add("--workers", type=positive_int, default=1, help="processes that render at once")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 a process or a clip broke, 2 wrong input or no renderer."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.one_line_end("stopped; the same command goes on where it was"):
        check_setup()
        for side, count, first in (("train", args.train, 0), ("test", args.test, TEST_SEED)):
            if count:
                render_folder(Path(args.out_dir) / side, range(first, first + count), args.workers)
    print(f"{args.out_dir}: {args.train} clips in train, {args.test} in test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
