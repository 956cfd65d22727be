"""Whether the nodes of a cluster have room for what a recipe wants to run on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import ray

from raydfkd.config.recipe import Recipe
from raydfkd.distributed.ray_internals import is_own_cluster
from raydfkd.errors import RecipeError
from raydfkd.job import Job, asks_student

Resources = Mapping[str, float]
Say = Callable[[str, str], None]
"""Tells people one line: its topic and its text."""


def check_room(job: Job, say: Say, *, synthesis: bool = True, training: bool = True) -> None:
    """See to it that the synthesis actors and the Train workers of ``job`` can start.

    A cluster that was started here has one node and no other joins it, so what does not fit there never will. Elsewhere
    pending actors are what an autoscaler sees as demand, and a line says that they wait.

    Args:
        job: what is to run.
        say: tells people one line: its topic and its text.
        synthesis: whether units are to be made, where any is missing.
        training: whether the student is to be trained.

    Raises:
        RecipeError: the cluster was started here and a resource is not enough.
    """
    nodes, workers, train_workers = _nodes(), job.recipe.runtime.workers, job.recipe.runtime.student_workers
    if synthesis and _is_open(job):
        actor = of_actor(job.recipe)
        room = _room(nodes, actor)
        if is_own_cluster() and not room:
            raise RecipeError(_shortage("worker", actor, nodes))
        if room < workers.max:
            others = "they wait" if not room else "the others wait"
            ending = "no more are started" if is_own_cluster() else f"{others} for nodes to join"
            say("workers", f"{_lack('workers.max', workers.max, room, actor)}; {ending}")
    if training:
        train_worker = of_train_worker(job.recipe)
        room = _room(nodes, train_worker)
        if is_own_cluster() and not room:
            raise RecipeError(_shortage("student_worker", train_worker, nodes))
        if room < train_workers.min:
            lack = _lack("student_workers.min", train_workers.min, room, train_worker)
            if is_own_cluster():
                raise RecipeError(f"{lack}; give at most {room:g}, or join a larger cluster with runtime.address")
            say("student", f"{lack}; the training waits for nodes to join")


def must_take_turns(job: Job, say: Say) -> bool:
    """Whether a cluster that was started here has room for synthesis or training, but not for both at once.

    Train workers hold what they reserve while they wait for images, so where they come first no image would be made.

    Raises:
        RecipeError: the synthesis asks the student that is trained meanwhile.
    """
    if not is_own_cluster() or fits_at_once(job) or not _is_open(job):
        return False
    if asks_student(job.recipe):
        actor, train_worker = of_actor(job.recipe), of_train_worker(job.recipe)
        num_train_workers = job.recipe.runtime.student_workers.min
        wanted = {
            name: actor.get(name, 0.0) + num_train_workers * train_worker.get(name, 0.0)
            for name in {*actor, *train_worker}
        }
        short = next(name for name in wanted if _room(_nodes(), {name: wanted[name]}) < 1)
        raise RecipeError(
            f"runtime: a synthesis actor and {num_train_workers} Train workers at once want {wanted[short]:g} "
            f"{short}s, more than there are here, and this objective asks the student while it is trained; give less "
            "to each, or use --on local"
        )
    say("plan", "there is no room here for synthesis and training at once: the images come first, then the student")
    return True


def fits_at_once(job: Job) -> bool:
    """Whether the nodes that are there have room for a synthesis actor beside the fewest Train workers."""
    nodes = [dict(node) for node in _nodes()]
    each = [of_actor(job.recipe), *[of_train_worker(job.recipe)] * job.recipe.runtime.student_workers.min]
    return all(_placed(nodes, wanted) for wanted in sorted(each, key=lambda wanted: -sum(wanted.values())))


def _placed(nodes: Sequence[dict[str, float]], wanted: Resources) -> bool:
    """Whether one of the nodes has room; what is wanted is taken from it."""
    for node in nodes:
        if _room([node], wanted):
            for name, share in wanted.items():
                node[name] = node.get(name, 0.0) - share
            return True
    return False


def capacity() -> dict[str, float]:
    """Resources of the cluster that this process is connected to, CPUs and GPUs always among them."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no stub for it
    return {"CPU": 0.0, "GPU": 0.0, **resources}


def _is_open(job: Job) -> bool:
    """Whether a unit of the plan is missing."""
    return not job.unit_ids <= job.transfer_set.committed()


def _nodes() -> list[Resources]:
    """Resources of each node that is there."""
    nodes: list[dict[str, dict[str, float]]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def of_actor(recipe: Recipe) -> Resources:
    """Resources that a synthesis actor reserves."""
    runtime = recipe.runtime
    return {"CPU": runtime.cpus_per_worker, "GPU": runtime.gpus_per_worker, **runtime.resources_per_worker}


def of_train_worker(recipe: Recipe) -> Resources:
    """Resources that a Train worker reserves."""
    runtime = recipe.runtime
    own = runtime.resources_per_student_worker
    return {"CPU": runtime.cpus_per_student_worker, "GPU": runtime.gpus_per_student_worker, **own}


def _room(nodes: Sequence[Resources], wanted: Resources) -> float:
    """How many that want so much fit on the nodes; infinitely many where they want nothing."""
    return sum(
        min((_times(node.get(name, 0.0), share) for name, share in wanted.items() if share), default=math.inf)
        for node in nodes
    )


def _times(has: float, share: float) -> int:
    return math.floor(has / share + 1e-6)  # 0.3 / 0.1 is a little less than 3


def _lack(key: str, wanted: int, room: float, of_each: Resources) -> str:
    has = capacity()
    others = "".join(f" and {has.get(name, 0.0):g} {name}" for name in of_each if name not in ("CPU", "GPU"))
    return (
        f"runtime.{key} is {wanted}, but Ray has {has['CPU']:g} CPUs and {has['GPU']:g} GPUs{others}, room for {room:g}"
    )


def _shortage(kind: str, wanted: Resources, nodes: Sequence[Resources]) -> str:
    """What no node has enough of, and the remedy."""
    for name, share in wanted.items():
        has = max((node.get(name, 0.0) for node in nodes), default=0.0)
        if share > has:
            break
    keys = {"CPU": f"cpus_per_{kind}", "GPU": f"gpus_per_{kind}"}
    key = keys.get(name, f"resources_per_{kind}.{name}")
    what = f"{name}s" if name in keys else f"of {name!r}"
    least = f"at most {has:g}" if has else "0" if name in keys else "none"
    return (
        f"runtime.{key} is {share:g}, but Ray, which was started here, has {has:g} {what}; give {least}, "
        "or join a cluster that has it with runtime.address"
    )
