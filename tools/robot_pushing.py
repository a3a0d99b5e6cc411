"""Render simulated robot pushing: a Sawyer arm over a tray of objects.

    python tools/robot_pushing.py --out_dir sim_push --train 1200 --test 256

Clips look and move like BAIR's: 64x64, 30 frames, 10 per second. Clip i of train/ depends on the
seed i only, clip i of test/ on 1,000,000 + i. So any number of processes renders the same clips,
and a stopped run goes on where it was.

Needs: pip install metaworld==3.1.1 (MIT; it brings MuJoCo), and OpenGL without a screen: on Debian
libegl1 and libgl1-mesa-dri, or libosmesa6 with MUJOCO_GL=osmesa.
"""

import colorsys
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from numpy.random import Generator
from tqdm import tqdm

# As a script, Python searches this folder and not the repository.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.flags import Parser, non_negative_int, nonempty_path, positive_int
from utils.io import save_mp4, temporary_path

FRAMES = 30
SIZE = 64
FPS = 10
RENDERED = 256  # pixels, averaged down to SIZE
SUBSTEPS = 25  # of 4 ms, per frame
POOL = 14  # objects, some of which are on the table
TEST_SEED = 1_000_000  # of the first test clip
POLICIES = {"random": 0.3, "push": 0.45, "sweep": 0.15, "grasp": 0.1}
NEEDS = "rendering needs pip install metaworld==3.1.1 and OpenGL (Debian: libegl1 libgl1-mesa-dri)"

# Where the hand may be, in metres; the table is at z = 0.
LOW = np.array([-0.27, 0.46, 0.045])
HIGH = np.array([0.27, 0.84, 0.20])
ENTRY = 0.25  # height at which the hand comes in
OPEN = (-1, 1)  # controls of the two fingers
CLOSED = (1, -1)

# Bodies outside the picture are not drawn: half of the triangles.
UNSEEN = "pedestal pedestal_feet controller_box screen head torso tablelink mocap"
UNSEEN += " right_arm_base_link right_l0 right_l1"
RED = (0.34, 0.05, 0.07)
LIMB_COLOURS = {f"right_l{i}": RED if i % 2 else (0.1, 0.1, 0.1) for i in range(2, 7)}
LIMB_COLOURS["right_hand"] = (0.12, 0.12, 0.12)
GEOM_COLOURS = {
    "rightclaw_it": (0.08, 0.08, 0.09),
    "leftclaw_it": (0.08, 0.08, 0.09),
    "rightpad_geom": (0.15, 0.15, 0.16),
    "leftpad_geom": (0.15, 0.15, 0.16),
    "rail": (0.2, 0.2, 0.2),
    "floor": (0.32, 0.33, 0.36),
}
# Fields of the model that differ from clip to clip.
VARIED = "geom_size geom_pos geom_rbound geom_rgba body_mass body_inertia light_diffuse"


def build_model() -> Any:
    """MuJoCo's model: Meta-World's arm, and the tray and objects of robot_pushing.xml."""
    import metaworld
    import mujoco

    # Meta-World's scene without its own object and wall.
    assets = Path(metaworld.__file__).parent / "assets"
    spec = mujoco.MjSpec.from_file(str(assets / "sawyer_xyz" / "sawyer_push_v3.xml"))
    spec.detach_body(spec.body("obj"))
    spec.detach_body(spec.body("RetainingWall"))
    spec.compiler.inertiagrouprange = [0, 5]
    spec.option.timestep = 0.004
    spec.option.iterations = 20
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
    spec.visual.global_.offwidth = RENDERED
    spec.visual.global_.offheight = RENDERED
    # As if there were no objects far away.
    spec.stat.extent = 1.1
    spec.stat.center = [0, 0.6, 0.1]
    # A spring keeps the elbow up, in the plane of the arm.
    spec.joint("right_j2").stiffness = 60
    for limb in (*(f"right_l{i}" for i in range(7)), "right_hand", "hand"):
        spec.body(limb).gravcomp = 1

    added = mujoco.MjSpec.from_file(str(Path(__file__).with_suffix(".xml")))
    added.texture("wood").file = str(assets / "textures" / "light_wood_v3.png")
    spec.attach(added, prefix="", frame=spec.worldbody.add_frame())
    model = spec.compile()
    model.vis.quality.offsamples = 0
    # Weld the hand to the body that is moved, as Meta-World does.
    welds = model.eq_type == int(mujoco.mjtEq.mjEQ_WELD)
    model.eq_data[welds] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]

    # BAIR's dark red arm.
    for g in range(model.ngeom):
        body = model.body(model.geom_bodyid[g]).name
        if body in UNSEEN.split():
            model.geom_group[g] = 5
        elif body in LIMB_COLOURS and model.geom_rgba[g, 3] > 0:
            model.geom_rgba[g] = [*LIMB_COLOURS[body], 1]
    for name, colour in GEOM_COLOURS.items():
        g = model.geom(name).id
        model.geom_rgba[g] = [*colour, 1]
        model.geom_matid[g] = -1
        model.geom_group[g] = 1
    return model


def turned(yaw: float) -> ndarray:
    """The quaternion of a turn about the vertical, in radians."""
    return np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])


def toy_colour(rng: Generator) -> ndarray:
    """A bright colour, or now and then a gray, RGB in [0, 1]."""
    if rng.random() >= 0.72:
        return np.full(3, rng.choice([0.08, 0.35, 0.92]))
    hue, saturation, value = rng.uniform([0, 0.35, 0.3], 1)
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value))


class Scene:
    """The simulated table; a clip never depends on those rendered before it."""

    def __init__(self):
        import mujoco

        # `clip` notices when physics diverges.
        mujoco.set_mju_user_warning(lambda message: None)
        self.mujoco = mujoco
        self.model = build_model()
        self.data = mujoco.MjData(self.model)
        self.initial = {name: getattr(self.model, name).copy() for name in VARIED.split()}
        self.ambient = self.model.vis.headlight.ambient.copy()
        self.bodies = [self.model.body(f"toy{i}") for i in range(POOL)]
        # Where x, y, z and the quaternion of each object are in qpos.
        self.offsets = [self.model.jnt_qposadr[body.jntadr[0]] for body in self.bodies]

        # From Sawyer's neutral pose, the hand comes over the middle of the table.
        for k, angle in enumerate([1.57, -1.18, 0, 2.18, 0, 0.57, 3.3]):
            self.data.qpos[self.model.joint(f"right_j{k}").qposadr[0]] = angle
        self.data.mocap_pos[0] = [0, 0.6, ENTRY]
        self.data.mocap_quat[0] = [1, 0, 1, 0]
        self.mujoco.mj_step(self.model, self.data, 1500)
        self.rest = self.data.qpos.copy()

        # Shadows take twice the time and are barely seen at 64x64.
        self.renderer = mujoco.Renderer(self.model, RENDERED, RENDERED)
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.option = mujoco.MjvOption()
        self.option.sitegroup[:] = 0
        self.camera = mujoco.MjvCamera()
        self.camera.lookat[:] = [0, 0.60, 0.035]
        self.camera.distance = 0.80
        self.camera.azimuth = -90
        self.camera.elevation = -47

    def reset(self, rng: Generator) -> None:
        """Draw light, colours, objects, and where the hand starts."""
        for name, value in self.initial.items():
            getattr(self.model, name)[:] = value
        self.draw_light(rng)
        number = int(rng.integers(5, 12))
        self.present = sorted(rng.choice(POOL, number, replace=False).tolist())
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.rest
        places: list[ndarray] = []
        for i, offset in enumerate(self.offsets):
            if i in self.present:
                pose = self.draw_object(i, places, rng)
            else:
                pose = [5 + 0.4 * i, 0, -0.88, 1, 0, 0, 0]
            self.data.qpos[offset : offset + 7] = pose
        self.bring_hand(rng)

    def draw_light(self, rng: Generator) -> None:
        """Draw the light's strength and direction, and the colours of the tray."""
        model = self.model
        strength = rng.uniform(0.85, 1.15)
        model.light_diffuse[:] = self.initial["light_diffuse"] * strength * 0.85
        model.light_dir[1] = [*rng.uniform([-0.5, -0.6], [0.5, 0.3]), -1]
        model.light_dir[1] /= np.linalg.norm(model.light_dir[1])
        model.vis.headlight.ambient[:] = self.ambient * rng.uniform(0.8, 1.1)
        model.vis.headlight.diffuse[:] = 0.35 * strength
        wood = rng.uniform(0.78, 0.95) * np.array([1, *rng.uniform([0.95, 0.88], [1.0, 1.02])])
        for name in ("floor", "back", "left", "right", "front"):
            colour = wood
            if name not in ("floor", "front"):
                colour = np.array([0.66, 0.71, 0.80]) * rng.uniform(0.85, 1.15)
            model.geom(f"tray_{name}").rgba = [*colour, 1]

    def draw_object(self, i: int, places: list[ndarray], rng: Generator) -> list[float]:
        """Draw size, colours and pose of an object, clear of the places taken."""
        model = self.model
        scale = rng.uniform(1.15, 1.8)
        colours = [toy_colour(rng), toy_colour(rng)]
        body = self.bodies[i].id
        for part in range(model.body_geomnum[body]):
            g = model.body_geomadr[body] + part
            for name in ("geom_size", "geom_pos", "geom_rbound"):
                getattr(model, name)[g] = self.initial[name][g] * scale
            model.geom_rgba[g, :3] = colours[part]
        model.body_mass[body] = self.initial["body_mass"][body] * scale**3
        model.body_inertia[body] = self.initial["body_inertia"][body] * scale**5

        # Often beside another object: clusters, as on the real table.
        clustered = bool(places) and rng.random() < 0.55
        for attempt in range(60):
            if clustered and attempt < 40:
                place = places[rng.integers(len(places))] + rng.normal(0, 0.09, 2)
            else:
                place = rng.uniform([-0.30, 0.40], [0.30, 0.84])
            inside = abs(place[0]) < 0.31 and 0.39 < place[1] < 0.85
            if inside and all(np.hypot(*(place - other)) > 0.08 for other in places):
                break
        places.append(place)
        return [*place, 0.034 * scale, *turned(rng.uniform(-np.pi, np.pi))]

    def bring_hand(self, rng: Generator) -> None:
        """Move the hand over its start, then down, while the objects come to rest."""
        data = self.data
        turn = turned(rng.uniform(-0.6, 0.6))
        down = np.array([1, 0, 1, 0]) / 2**0.5
        self.mujoco.mju_mulQuat(data.mocap_quat[0], turn, down)
        *start, height = rng.uniform([*LOW[:2], 0.09], [*HIGH[:2], 0.2])
        data.ctrl[:] = OPEN if rng.choice([True, False], p=[0.7, 0.3]) else CLOSED
        self.mujoco.mj_kinematics(self.model, data)
        above = np.array([*data.body("hand").xpos[:2], ENTRY])
        path = np.array([*start, ENTRY]) - above
        for i in range(150):
            share = min(1, i / 110)
            data.mocap_pos[0] = above + path * min(1, share * 1.6)
            if share > 0.62:
                data.mocap_pos[0][2] = ENTRY + (height - ENTRY) * (share - 0.62) / 0.38
            self.mujoco.mj_step(self.model, data)
        data.qvel[:] *= 0.5

    def render(self) -> ndarray:
        """The current frame, uint8 [SIZE,SIZE,3]."""
        self.renderer.update_scene(self.data, self.camera, self.option)
        factor = RENDERED // SIZE
        blocks = self.renderer.render().reshape(SIZE, factor, SIZE, factor, 3)
        return np.rint(blocks.mean((1, 3))).astype(np.uint8)

    def places(self) -> dict[int, ndarray]:
        """Where each object is on the table, (x, y) in metres."""
        return {i: self.data.qpos[self.offsets[i] :][:2].copy() for i in self.present}

    def clip(self, seed: int, attempt: int = 0) -> ndarray:
        """The frames of a seed, uint8 [T,H,W,3]."""
        rng = np.random.default_rng([20240, seed, attempt] if attempt else [20240, seed])
        self.reset(rng)
        policy = str(rng.choice(list(POLICIES), p=list(POLICIES.values())))
        speed = rng.uniform(0.022, 0.045)  # metres per frame: 2 to 4 pixels
        frames = [self.render()]
        hand = Hand(self, policy, speed, rng)
        for _ in range(FRAMES - 1):
            hand.move()
            frames.append(self.render())
        # The physics of one clip in 250 diverges: it is drawn again.
        diverged = any(warning.number for warning in self.data.warning)
        if diverged or not np.isfinite(self.data.qpos).all():
            return self.clip(seed, attempt + 1)
        return np.stack(frames)


class Hand:
    """The hand: it wanders, sweeps over the table, pushes or grasps objects."""

    def __init__(self, scene: Scene, policy: str, speed: float, rng: Generator):
        self.scene = scene
        self.policy = policy
        self.speed = speed  # metres per frame, at most
        self.rng = rng
        self.place = scene.data.mocap_pos[0].copy()
        self.velocity = rng.normal(0, 0.5, 3) * speed
        self.goal = None
        self.stage = 0
        self.waited = 0

    def move(self) -> None:
        """Advance the physics by one frame."""
        policies = {"random": self.wander, "sweep": self.sweep}
        step = policies.get(self.policy, self.handle)()
        length = np.linalg.norm(step)
        if length > self.speed:
            step = step * (self.speed / length)
        # A wandering hand rebounds at the border of its space.
        after = np.clip(self.place + step, LOW, HIGH)
        free = after == self.place + step
        self.velocity = np.where(free, self.velocity, -0.5 * self.velocity)
        data = self.scene.data
        for i in range(SUBSTEPS):
            data.mocap_pos[0] = self.place + (after - self.place) * (i + 1) / SUBSTEPS
            self.scene.mujoco.mj_step(self.scene.model, data)
        self.place = after

    def wander(self) -> ndarray:
        """A step of a random walk with momentum, drawn towards the table."""
        kick = self.rng.normal(0, 1, 3) * self.speed * np.array([0.55, 0.55, 0.3])
        fall = [0, 0, (0.06 - self.place[2]) * 0.15]
        self.velocity = 0.75 * self.velocity + kick + fall
        return self.velocity

    def sweep(self) -> ndarray:
        """A step on a line to a random place low over the table."""
        if self.goal is None or np.linalg.norm(self.goal - self.place) < 0.03:
            self.goal = self.rng.uniform(LOW, [*HIGH[:2], 0.07])
        return self.goal - self.place

    def handle(self) -> ndarray:
        """A step of pushing or grasping an object, stage by stage; then another."""
        places = self.scene.places()
        if self.goal is None:
            low = LOW[:2] - 0.02
            high = HIGH[:2] + 0.02
            near = [i for i, xy in places.items() if (low < xy).all() and (xy < high).all()]
            self.target = int(self.rng.choice(near)) if near else None
            angle = self.rng.uniform(-np.pi, np.pi)
            self.direction = np.array([np.cos(angle), np.sin(angle)])
        if self.target is None:
            target = self.place[:2] + self.rng.normal(0, 0.1, 2)
        else:
            target = places[self.target]
        goal = self.push(target) if self.policy == "push" else self.grasp(target)
        self.goal = np.clip(goal, LOW, HIGH)

        # Once the hand is there, the next stage, or another object.
        step = self.goal - self.place
        if np.linalg.norm(step) < 0.015:
            if self.stage == (2 if self.policy == "push" else 3):
                self.goal = None
                self.stage = 0
                self.waited = 0
                if self.policy == "grasp":
                    self.scene.data.ctrl[:] = OPEN
            elif self.policy == "push" or self.stage != 2:
                self.stage += 1
        return step + self.rng.normal(0, 0.004, 3)

    def push(self, target: ndarray) -> ndarray:
        """The goal: above one side of the target, down, and through it."""
        if self.stage == 0:
            return np.array([*(target - self.direction * 0.085), 0.10])
        if self.stage == 1:
            return np.array([*(target - self.direction * 0.075), LOW[2]])
        if self.waited:
            return self.goal
        self.waited = 1
        return np.array([*(target + self.direction * self.rng.uniform(0.1, 0.25)), LOW[2]])

    def grasp(self, target: ndarray) -> ndarray:
        """The goal: above the target, down, close, and away with it."""
        if self.stage == 0:
            self.scene.data.ctrl[:] = OPEN
            return np.array([*target, 0.13])
        if self.stage == 1:
            return np.array([*target, LOW[2]])
        if self.stage == 2:
            self.scene.data.ctrl[:] = CLOSED
            self.waited += 1
            if self.waited > 2:
                self.stage = 3
                return np.array([*self.rng.uniform(LOW[:2], HIGH[:2]), 0.16])
        return self.goal


def start_worker() -> None:
    """Build the scene of a process, which takes a second."""
    global scene
    # Ctrl-C is for the main process; this one ends after the clip at hand.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    scene = Scene()


def render_clip(path: Path, seed: int) -> None:
    """Render and write a clip, unless it is there."""
    if not path.is_file():
        clip = torch.from_numpy(scene.clip(seed)).permute(3, 0, 1, 2)
        with temporary_path(path) as temporary:
            save_mp4(temporary, clip, FPS, preset="slow")


def render_clips(out_dir: Path, train: int, test: int, workers: int) -> None:
    """Render the clips of both folders, `workers` at once."""
    seeds = {}
    for name, first, count in (("train", 0, train), ("test", TEST_SEED, test)):
        (out_dir / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seeds[out_dir / name / f"{i:05d}.mp4"] = first + i
    # OpenGL does not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    try:
        rendered = pool.map(render_clip, seeds.keys(), seeds.values())
        list(tqdm(rendered, "rendering", len(seeds), unit="clip", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)


def check_setup() -> None:
    """Raise a ValueError that says what to install, unless rendering works."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import metaworld  # noqa: F401
        import mujoco  # loads OpenGL

        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
    # What MuJoCo and PyOpenGL raise without a library.
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        raise ValueError(f"{NEEDS}; {error}") from error


def build_parser() -> Parser:
    """Define the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=nonempty_path, required=True, help="folder that gets train/ and test/")
    add("--train", type=non_negative_int, default=1200, help="clips in train/")
    add("--test", type=non_negative_int, default=256, help="clips in test/")
    add("--workers", type=positive_int, default=1, help="processes that render at once")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; exit status 0 = done, 2 = no renderer."""
    parser = build_parser()
    args = parser.parse_args(argv)
    out_dir = Path(args.out_dir)
    with parser.one_line_errors("stopped; the same command goes on"):
        check_setup()
        render_clips(out_dir, args.train, args.test, args.workers)
    print(f"{out_dir}: {args.train} clips in train, {args.test} in test")
    return 0


if __name__ == "__main__":
    sys.exit(main())
