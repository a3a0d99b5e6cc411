"""Render the robot-pushing benchmark: a simulated Sawyer arm (Meta-World's, in MuJoCo) over a tray of objects.

    python data/robot_pushing.py --out_dir sim_push --train 1200 --test 256

Clips look and move like BAIR's: 64x64, 30 frames, 10 per second. Clip i of train/ is a function of the seed i alone,
clip i of test/ of 1,000,000 + i, so any part, order or number of processes gives the same clips, and a stopped run goes
on where it was. index.tsv beside the clips gives seed, policy and motion of each.

Needs: pip install metaworld==3.1.1 (MIT; it brings MuJoCo), and an off-screen OpenGL: on Debian libegl1 and
libgl1-mesa-dri, or libosmesa6 with MUJOCO_GL=osmesa. Other versions of these render slightly different pixels.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.processes import map_in_processes

from utils.flags import Parser, non_negative_int, nonempty_path, positive_int
from utils.io import replacing, save_mp4

FRAMES, SIZE, FPS = 30, 64, 10
RENDERED = 256  # pixels; averaged down to SIZE
TEST_SEED = 1_000_000  # of the first test clip
TIMESTEP, SUBSTEPS = 0.004, 25  # seconds; 25 of them are one frame
X_RANGE, Y_RANGE, Z_RANGE = (-0.27, 0.27), (0.46, 0.84), (0.045, 0.20)  # metres, of the hand; the table is at 0
OBJECTS = ("box", "cyl", "ell", "cap", "mug", "ham", "ball", "box", "cross", "cyl", "cup", "ell", "box", "bar")
POLICIES, POLICY_CHANCES = ("random", "push", "sweep", "grasp"), (0.3, 0.45, 0.15, 0.1)
COLUMNS = ("file", "seed", "policy", "objects", "objects_travel_m", "arm_speed_m_per_frame", "attempt")
ATTEMPTS = 10  # the physics of 1 clip in some 250 blows up; it is drawn again
SETUP = (
    "needs pip install metaworld==3.1.1 and an off-screen OpenGL (Debian: apt-get install libegl1 libgl1-mesa-dri; "
    "or libosmesa6 and MUJOCO_GL=osmesa)"
)
LIMBS = ("right_l0", "right_l1", "right_l2", "right_l3", "right_l4", "right_l5", "right_l6", "right_hand", "hand")
GRAYS = {
    "right_l2": 0.10, "right_l3": 0.13, "right_l4": 0.1, "right_l5": 0.13, "right_l6": 0.1, "right_hand": 0.12,
}  # fmt: skip
UNSEEN = (
    "pedestal", "head", "base", "torso", "pedestal_feet", "controller_box", "screen", "tablelink", "mocap",
    "right_arm_base_link", "right_l0", "right_l1",
)  # fmt: skip
FINGERS = {
    "rightclaw_it": (0.08, 0.08, 0.09), "rightpad_geom": (0.15, 0.15, 0.16), "leftclaw_it": (0.08, 0.08, 0.09),
    "leftpad_geom": (0.15, 0.15, 0.16), "rail": (0.2, 0.2, 0.2),
}  # fmt: skip


# --- model ------------------------------------------------------------------------------------------------------------


def build_model() -> Any:
    """MuJoCo's model of Meta-World's arm over a tray, with a pool of free objects parked beside it."""
    import metaworld
    import mujoco

    assets = Path(metaworld.__file__).parent / "assets"
    spec = mujoco.MjSpec.from_file(str(assets / "sawyer_xyz" / "sawyer_push_v3.xml"))
    spec.compiler.inertiagrouprange = [0, 5]
    spec.option.timestep = TIMESTEP
    spec.option.iterations = 20
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
    spec.stat.extent, spec.stat.center = 1.1, [0, 0.6, 0.1]  # not those of the objects parked far away
    elbow = spec.joint("right_j2")  # kept up, in the plane of the arm
    elbow.stiffness, elbow.springref = 60, 0
    for limb in LIMBS:
        spec.body(limb).gravcomp = 1
    spec.visual.quality.offsamples = 0
    screen = getattr(spec.visual, "global_")  # noqa: B009 - a name that ends like this is mangled in no other way
    screen.offwidth = screen.offheight = RENDERED
    for name in ("obj", "RetainingWall"):
        spec.detach_body(spec.body(name))
    spec.site("goal").delete()
    add_materials(spec, assets)
    add_tray(spec)
    for number, kind in enumerate(OBJECTS):
        add_object(spec, number, kind)
    model = spec.compile()
    model.vis.quality.offsamples = 0
    for i in range(model.neq):  # as Meta-World's reset_mocap_welds: the hand's weld to the body that is moved
        if model.eq_type[i] == mujoco.mjtEq.mjEQ_WELD:
            model.eq_data[i] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]
    return model


def add_materials(spec: Any, assets: Path) -> None:
    """Wood for the table, and three patterns for the objects."""
    import mujoco

    picture = str(assets / "textures" / "light_wood_v3.png")
    wood = spec.add_texture(name="T_bair", type=mujoco.mjtTexture.mjTEXTURE_2D, file=picture)
    table = spec.add_material(name="M_table", texrepeat=[1.5, 1.5], specular=0.15, shininess=0.1)
    table.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = wood.name
    kinds = mujoco.mjtBuiltin
    patterns = (
        (kinds.mjBUILTIN_CHECKER, (1, 1, 1), (0.35, 0.35, 0.35)),
        (kinds.mjBUILTIN_GRADIENT, (1, 1, 1), (0.1, 0.1, 0.1)),
        (kinds.mjBUILTIN_FLAT, (0.55, 0.55, 0.55), (1, 1, 1)),
    )
    for i, (builtin, first, second) in enumerate(patterns):
        texture = spec.add_texture(
            name=f"T_o{i}", type=mujoco.mjtTexture.mjTEXTURE_CUBE, width=64, height=64, builtin=builtin,
            rgb1=list(first), rgb2=list(second),
        )  # fmt: skip
        material = spec.add_material(name=f"M_o{i}", specular=0.4, shininess=0.4, texrepeat=[1, 1])
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = texture.name


def add_tray(spec: Any) -> None:
    """BAIR's tray: floor, back wall, slanted side walls, front lip."""
    import mujoco

    box = mujoco.mjtGeom.mjGEOM_BOX
    spec.worldbody.add_geom(
        name="bin_floor", type=box, size=[0.52, 0.36, 0.03], pos=[0, 0.64, -0.0299], material="M_table",
        friction=[1, 0.01, 0.001],
    )  # fmt: skip
    walls = (  # position, half extents, yaw
        ((0, 0.31, 0.06), (0.52, 0.012, 0.09), 0),
        ((-0.40, 0.62, 0.02), (0.012, 0.36, 0.06), 0.30),
        ((0.40, 0.62, 0.02), (0.012, 0.36, 0.06), -0.30),
        ((0, 0.945, 0.004), (0.52, 0.07, 0.014), 0),
    )
    for i, (place, size, yaw) in enumerate(walls):
        spec.worldbody.add_geom(
            name=f"bin_wall{i}", type=box, size=list(size), pos=list(place), rgba=[0.75, 0.77, 0.8, 1],
            quat=[np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)], material="M_table" if i == 3 else "",
        )  # fmt: skip


def add_object(spec: Any, number: int, kind: str) -> None:
    """One free body of the pool, of one or two primitives."""
    import mujoco

    shape = mujoco.mjtGeom
    root = 2**-0.5
    middle, upright, lying = (0, 0, 0), (1, 0, 0, 0), (root, 0, root, 0)
    parts = {  # type, size, position, orientation
        "box": [(shape.mjGEOM_BOX, (0.028, 0.022, 0.02), middle, upright)],
        "bar": [(shape.mjGEOM_BOX, (0.05, 0.014, 0.014), middle, upright)],
        "cyl": [(shape.mjGEOM_CYLINDER, (0.025, 0.022, 0), middle, upright)],
        "ell": [(shape.mjGEOM_ELLIPSOID, (0.036, 0.026, 0.02), middle, upright)],
        "cap": [(shape.mjGEOM_CAPSULE, (0.017, 0.03, 0), middle, lying)],
        "ball": [(shape.mjGEOM_SPHERE, (0.026, 0, 0), middle, upright)],
        "mug": [
            (shape.mjGEOM_CYLINDER, (0.028, 0.028, 0), middle, upright),
            (shape.mjGEOM_BOX, (0.008, 0.006, 0.018), (0.035, 0, 0), upright),
        ],
        "cup": [
            (shape.mjGEOM_CYLINDER, (0.022, 0.022, 0), middle, upright),
            (shape.mjGEOM_CYLINDER, (0.03, 0.005, 0), (0, 0, -0.017), upright),
        ],
        "ham": [
            (shape.mjGEOM_CAPSULE, (0.009, 0.045, 0), (0, 0, -0.006), (root, 0, root, 0)),
            (shape.mjGEOM_BOX, (0.013, 0.03, 0.015), (0.045, 0, 0), upright),
        ],
        "cross": [
            (shape.mjGEOM_BOX, (0.042, 0.012, 0.014), middle, upright),
            (shape.mjGEOM_BOX, (0.012, 0.042, 0.014), middle, upright),
        ],
    }[kind]
    body = spec.worldbody.add_body(name=f"o{number}", pos=[4 + number, 0, -0.85])
    body.add_freejoint()
    for i, (kind_of, size, place, turn) in enumerate(parts):
        body.add_geom(
            type=kind_of, size=list(size), pos=list(place), quat=list(turn), name=f"g{number}_{i}", condim=4,
            friction=[0.9, 0.02, 0.002], solref=[0.01, 1], solimp=[0.95, 0.99, 0.001, 0.5, 2], density=500,
            material=f"M_o{(number * 7) % 3}" if number % 2 else "",
        )  # fmt: skip


def saturated(rng: np.random.Generator) -> np.ndarray:
    """A bright toy colour, RGB in [0, 1]."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.35, 1), rng.uniform(0.3, 1)
    c = value * saturation
    x = c * (1 - abs(hue % 2 - 1))
    rgb = [(c, x, 0), (x, c, 0), (0, c, x), (0, x, c), (x, 0, c), (c, 0, x)][int(hue) % 6]
    return np.array(rgb) + value - c


# --- scene ------------------------------------------------------------------------------------------------------------


class Scene:
    """The simulated table; `clip` renders the clip of a seed, whatever was rendered before."""

    def __init__(self):
        import mujoco

        mujoco.set_mju_user_warning(lambda message: None)  # a clip that diverged is noticed and drawn again
        self.mujoco = mujoco
        self.model = model = build_model()
        self.data = mujoco.MjData(model)
        self.colour_arm()
        bodies = [model.body(f"o{i}") for i in range(len(OBJECTS))]
        self.geoms = [[g for g in range(model.ngeom) if model.geom_bodyid[g] == body.id] for body in bodies]
        self.bodies = [body.id for body in bodies]
        self.places = [model.joint(body.jntadr[0]).qposadr[0] for body in bodies]  # of x in qpos
        self.tray = [g for g in range(model.ngeom) if model.geom(g).name.startswith("bin")]
        varied = ("geom_size", "geom_pos", "geom_rbound", "geom_rgba", "body_mass", "body_inertia", "light_diffuse")
        self.initial = {name: getattr(model, name).copy() for name in varied}
        self.ambient = model.vis.headlight.ambient.copy()
        self.settle_arm()
        self.renderer = mujoco.Renderer(model, RENDERED, RENDERED)
        for flag in (mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_SHADOW):
            self.renderer.scene.flags[flag] = 0  # shadows cost twice the time and are barely seen at 64x64
        self.option = mujoco.MjvOption()
        self.option.geomgroup[:] = [1, 1, 1, 1, 0, 0]
        self.option.sitegroup[:] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.lookat[:] = [0, 0.60, 0.035]
        self.camera.distance, self.camera.azimuth, self.camera.elevation = 0.80, -90, -47

    def colour_arm(self) -> None:
        """BAIR's dark red arm; what the camera never sees is not drawn, which halves the triangles."""
        model = self.model
        for g in range(model.ngeom):
            body = model.body(model.geom_bodyid[g]).name
            if model.geom(g).name.startswith("bin") or (body[:1] == "o" and body[1:].isdigit()):
                continue
            if body in UNSEEN:
                model.geom_group[g] = 5
            elif body in GRAYS and model.geom_rgba[g, 3] > 0:
                red = body in ("right_l3", "right_l5")
                model.geom_rgba[g] = [0.34, 0.05, 0.07, 1] if red else [GRAYS[body]] * 3 + [1]
        for name, colour in FINGERS.items():
            g = self.mujoco.mj_name2id(model, self.mujoco.mjtObj.mjOBJ_GEOM, name)
            model.geom_rgba[g] = [*colour, 1]
            model.geom_matid[g] = -1
            model.geom_group[g] = 1
        for g in range(model.ngeom):
            if model.geom(g).name == "floor":
                model.geom_matid[g] = -1
                model.geom_rgba[g] = [0.32, 0.33, 0.36, 1]

    def settle_arm(self) -> None:
        """Find a joint pose with the hand over the middle of the table, once."""
        model, data = self.model, self.data
        self.mujoco.mj_resetData(model, data)
        for k, angle in enumerate([1.57, -1.18, 0, 2.18, 0, 0.57, 3.3]):  # Sawyer's neutral pose, turned to the table
            data.qpos[model.joint(f"right_j{k}").qposadr[0]] = angle
        data.mocap_pos[0] = [0, 0.6, 0.25]
        data.mocap_quat[0] = [1, 0, 1, 0]
        for _ in range(1500):
            self.mujoco.mj_step(model, data)
        self.rest = data.qpos.copy()

    def reset(self, rng: np.random.Generator) -> None:
        """A new table: light, tints, objects, and the hand at its start."""
        for name, value in self.initial.items():
            getattr(self.model, name)[:] = value
        self.vary_light(rng)
        count = int(rng.integers(5, 12))
        self.present = sorted(rng.choice(len(OBJECTS), count, replace=False).tolist())
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.rest
        placed: list[np.ndarray] = []
        for i in range(len(OBJECTS)):
            if i in self.present:
                self.place_object(i, placed, rng)
            else:
                at = self.places[i]
                self.data.qpos[at : at + 7] = [5 + 0.4 * i, 0, -0.88, 1, 0, 0, 0]
        self.bring_hand(rng)

    def vary_light(self, rng: np.random.Generator) -> None:
        """Brightness, direction and colour of the light, and the colour of the tray."""
        model = self.model
        brightness = rng.uniform(0.85, 1.15)
        model.light_diffuse[:] = self.initial["light_diffuse"] * brightness * 0.85
        model.light_dir[1] = np.array([rng.uniform(-0.5, 0.5), rng.uniform(-0.6, 0.3), -1])
        model.light_dir[1] /= np.linalg.norm(model.light_dir[1])
        model.vis.headlight.ambient[:] = self.ambient * rng.uniform(0.8, 1.1)
        model.vis.headlight.diffuse[:] = 0.35 * brightness
        tint = rng.uniform(0.78, 0.95) * np.array([1, rng.uniform(0.95, 1.0), rng.uniform(0.88, 1.02)])
        for g in self.tray:
            wooden = model.geom(g).name in ("bin_floor", "bin_wall3")
            colour = np.clip(tint, 0, 1) if wooden else np.array([0.66, 0.71, 0.80]) * rng.uniform(0.85, 1.15)
            model.geom_rgba[g] = [*colour, 1]
        model.geom_rgba[:, :3].clip(0, 1, out=model.geom_rgba[:, :3])

    def place_object(self, i: int, placed: list[np.ndarray], rng: np.random.Generator) -> None:
        """Scale, colour and place one object clear of those placed before, often near one of them."""
        model, initial = self.model, self.initial
        scale = rng.uniform(1.15, 1.8)
        colours = [
            saturated(rng) if rng.random() < 0.72 else np.full(3, rng.choice([0.08, 0.35, 0.92])) for _ in range(2)
        ]
        for part, g in enumerate(self.geoms[i]):
            for name in ("geom_size", "geom_pos", "geom_rbound"):
                getattr(model, name)[g] = initial[name][g] * scale
            model.geom_rgba[g, :3] = np.clip(colours[min(part, 1)], 0, 1)
        body = self.bodies[i]
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
        yaw = rng.uniform(-np.pi, np.pi)
        at = self.places[i]
        self.data.qpos[at : at + 7] = [*place, 0.034 * scale, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]

    def bring_hand(self, rng: np.random.Generator) -> None:
        """Let the objects settle while the hand comes over its start, then down."""
        model, data = self.model, self.data
        yaw = rng.uniform(-0.6, 0.6)
        down, turn = np.array([1, 0, 1, 0]) / 2**0.5, np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        self.mujoco.mju_mulQuat(data.mocap_quat[0], turn, down)
        start = np.array([rng.uniform(*X_RANGE), rng.uniform(*Y_RANGE), rng.uniform(0.09, 0.2)])
        grip = rng.choice([-1.0, 1.0], p=[0.7, 0.3])
        data.ctrl[:] = [grip, -grip]
        self.mujoco.mj_kinematics(model, data)
        data.mocap_pos[0] = data.body("hand").xpos
        above = data.mocap_pos[0].copy()
        above[2] = 0.25
        for i in range(150):
            share = min(1, i / 110)
            data.mocap_pos[0] = above + (np.array([start[0], start[1], 0.25]) - above) * min(1, share * 1.6)
            if share > 0.62:
                data.mocap_pos[0][2] = 0.25 + (start[2] - 0.25) * (share - 0.62) / 0.38
            self.mujoco.mj_step(model, data)
        data.qvel[:] *= 0.5

    def frame(self) -> np.ndarray:
        """The present picture, uint8 [SIZE,SIZE,3]."""
        self.renderer.update_scene(self.data, self.camera, self.option)
        factor = RENDERED // SIZE
        blocks = self.renderer.render().reshape(SIZE, factor, SIZE, factor, 3)
        return np.rint(blocks.mean((1, 3))).astype(np.uint8)

    def object_place(self, i: int) -> np.ndarray:
        """Where an object is on the table, (x, y) in metres."""
        return self.data.qpos[self.places[i] : self.places[i] + 2].copy()

    def clip(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """The frames of a seed, uint8 [T,H,W,3], and its entry in the index.

        Raises: RuntimeError: if its physics blew up ten times.
        """
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([20240, seed] + [attempt] * (attempt > 0))
            frames, entry = self.attempt(rng)
            if np.isfinite(self.data.qpos).all() and not any(w.number for w in self.data.warning):
                return frames, {"seed": seed, **entry, "attempt": attempt}
        raise RuntimeError(f"the clip of seed {seed} diverged {ATTEMPTS} times")

    def attempt(self, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        """One go at a clip."""
        self.reset(rng)
        policy = str(rng.choice(POLICIES, p=POLICY_CHANCES))
        speed = rng.uniform(0.022, 0.045)  # metres per frame: 2 to 4 pixels
        before = {i: self.object_place(i) for i in self.present}
        frames = [self.frame()]
        hand = Hand(self, policy, speed, rng)
        for _ in range(FRAMES - 1):
            hand.move()
            frames.append(self.frame())
        travel = sum(float(np.hypot(*(self.object_place(i) - place))) for i, place in before.items())
        return np.stack(frames), {
            "policy": policy, "objects": len(self.present), "objects_travel_m": round(travel, 4),
            "arm_speed_m_per_frame": round(float(speed), 4),
        }  # fmt: skip


class Hand:
    """The hand's policy: wander, sweep over the table, push an object, or grasp one and carry it.

    Args:
        scene: whose hand it moves.
        policy: of POLICIES.
        speed: metres per frame, at most.
        rng: of all its choices.
    """

    def __init__(self, scene: Scene, policy: str, speed: float, rng: np.random.Generator):
        self.scene = scene
        self.policy = policy
        self.speed = speed
        self.rng = rng
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

    def wander(self) -> np.ndarray:
        """A random walk with momentum, drawn towards the table."""
        kick = self.rng.normal(0, 1, 3) * self.speed * np.array([0.55, 0.55, 0.3])
        self.velocity = 0.75 * self.velocity + kick + [0, 0, (0.06 - self.place[2]) * 0.15]
        return self.velocity

    def sweep(self) -> np.ndarray:
        """Straight lines between random places low over the table."""
        if self.goal is None or np.linalg.norm(self.goal - self.place) < 0.03:
            low = self.rng.uniform(*X_RANGE), self.rng.uniform(*Y_RANGE), self.rng.uniform(Z_RANGE[0], 0.07)
            self.goal = np.array(low)
        return self.goal - self.place

    def handle(self) -> np.ndarray:
        """Push or grasp: stages about one object, then about another."""
        if self.goal is None:
            self.choose_object()
        target = self.scene.object_place(self.target) if self.target is not None else self.near_place()
        self.set_push_goal(target) if self.policy == "push" else self.set_grasp_goal(target)
        self.goal = np.clip(self.goal, self.low, self.high)
        step = self.goal - self.place
        if np.linalg.norm(step) < 0.015:
            if (self.policy == "push" and self.stage == 2) or self.stage == 3:
                self.goal, self.waited = None, 0
                if self.policy == "grasp":
                    self.scene.data.ctrl[:] = [-1, 1]
            elif not (self.policy == "grasp" and self.stage == 2):
                self.stage += 1
        return step + self.rng.normal(0, 0.004, 3)

    def near_place(self) -> np.ndarray:
        """Where to act when no object is in reach."""
        return self.place[:2] + self.rng.normal(0, 0.1, 2)

    def choose_object(self) -> None:
        """Pick an object within reach and a direction to push it."""
        low, high = self.low - 0.02, self.high + 0.02
        places = {i: self.scene.object_place(i) for i in self.scene.present}
        inside = [i for i, (x, y) in places.items() if low[0] < x < high[0] and low[1] < y < high[1]]
        self.target = int(self.rng.choice(inside)) if inside else None
        angle = self.rng.uniform(-np.pi, np.pi)
        self.direction = np.array([np.cos(angle), np.sin(angle)])
        self.stage = 0

    def set_push_goal(self, target: np.ndarray) -> None:
        """Above one side of the object, down, and through it."""
        if self.stage == 0:
            self.goal = np.array([*(target - self.direction * 0.085), 0.10])
        elif self.stage == 1:
            self.goal = np.array([*(target - self.direction * 0.075), Z_RANGE[0]])
        elif self.stage == 2 and self.waited == 0:
            self.goal = np.array([*(target + self.direction * self.rng.uniform(0.1, 0.25)), Z_RANGE[0]])
            self.waited = 1

    def set_grasp_goal(self, target: np.ndarray) -> None:
        """Above the object with open fingers, down, close, and away with it."""
        if self.stage == 0:
            self.goal = np.array([*target, 0.13])
            self.scene.data.ctrl[:] = [-1, 1]
        elif self.stage == 1:
            self.goal = np.array([*target, Z_RANGE[0]])
        elif self.stage == 2:
            self.scene.data.ctrl[:] = [1, -1]
            self.waited += 1
            if self.waited > 2:
                goal = self.rng.uniform(*X_RANGE), self.rng.uniform(*Y_RANGE), 0.16
                self.stage, self.goal = 3, np.array(goal)


# --- files ------------------------------------------------------------------------------------------------------------


def render(task: tuple[Path, int]) -> dict[str, Any]:
    """Render and write one clip (path, seed) in this process's scene; returns its entry in the index."""
    global scene
    path, seed = task
    if scene is None:
        scene = Scene()
        atexit.register(scene.renderer.close)  # while OpenGL is still there
    frames, entry = scene.clip(seed)
    whole = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_mp4(whole, torch.from_numpy(frames).permute(3, 0, 1, 2), FPS, crf=12, preset="slow")
    whole.replace(path)
    return {"file": path.name, **entry}


scene: Scene | None = None  # one per process: building it takes a second


def render_folder(folder: Path, seeds: Sequence[int], workers: int) -> None:
    """Render what is missing of a folder, clip i from seeds[i], and keep its index.tsv.

    Raises: OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "index.tsv"
    lines = index.read_text().splitlines()[1:] if index.is_file() else []
    known = {line.split("\t")[0]: line for line in lines if line.count("\t") == len(COLUMNS) - 1}
    paths = [folder / f"{i:05d}.mp4" for i in range(len(seeds))]
    tasks = [
        (path, seed)
        for path, seed in zip(paths, seeds, strict=True)
        if not (path.is_file() and known.get(path.name, "").split("\t")[1:2] == [str(seed)])
    ]
    missing = {path.name for path, _ in tasks}
    with replacing(index) as whole:
        kept = [line for name, line in sorted(known.items()) if name not in missing]
        whole.write("".join(f"{line}\n" for line in ["\t".join(COLUMNS), *kept]).encode())
    with index.open("a") as file:
        for entry in tqdm(map_in_processes(render, tasks, workers), folder.name, len(tasks), unit="clip", disable=None):
            file.write("\t".join(str(entry[name]) for name in COLUMNS) + "\n")
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
    parser.add_argument("--out_dir", type=nonempty_path, required=True, help="folder that gets train/ and test/")
    parser.add_argument("--train", type=non_negative_int, default=1200, help="clips in train/, of the seeds from 0")
    parser.add_argument(
        "--test", type=non_negative_int, default=256, help="clips in test/, of the seeds from 1,000,000"
    )
    parser.add_argument("--workers", type=positive_int, default=1, help="processes that render at once")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 wrong input or nothing to render with."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_setup()
        for side, count, first in (("train", args.train, 0), ("test", args.test, TEST_SEED)):
            if count:
                render_folder(Path(args.out_dir) / side, range(first, first + count), args.workers)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on where it was\n")
    print(f"{args.out_dir}: {args.train} clips in train, {args.test} in test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
