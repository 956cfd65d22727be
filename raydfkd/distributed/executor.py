"""Synthesis and distillation at once on a Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor
from typing_extensions import override

from raydfkd.distillation.trainer import ignore
from raydfkd.distributed.connection import connected
from raydfkd.distributed.pool import SynthesisPool
from raydfkd.distributed.room import check_room, must_take_turns
from raydfkd.distributed.sharing import Sharing
from raydfkd.distributed.train_job import Training
from raydfkd.job import Job, SynthesisOutcome
from raydfkd.networks.teacher import Teacher
from raydfkd.runner.events import Events
from raydfkd.runner.executor import Executor, one_after_the_other
from raydfkd.runner.signals import Interruption
from raydfkd.units import Phase


class RayExecutor(Executor):
    """Works on the cluster that the recipe names, one that runs here, or one started here for the occasion."""

    @override
    def synthesize(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> SynthesisOutcome:
        with connected(job.recipe.runtime.address, events.say):
            check_room(job, events.say, training=False)
            return _Turns().synthesize(job, phase, teacher, events)

    @override
    def distill(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> Mapping[str, Tensor]:
        with connected(job.recipe.runtime.address, events.say):
            check_room(job, events.say, synthesis=False)
            return _Turns().distill(job, phase, teacher, events)

    @override
    def run(self, job: Job, teacher: Teacher, events: Events) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        with connected(job.recipe.runtime.address, events.say):
            check_room(job, events.say)
            if len(job.phases) > 1 or must_take_turns(job, events.say):
                return _Turns().run(job, teacher, events)
            queue = job.begin_synthesis()  # before the student, who would take the end of an earlier run for this one's
            with (
                Interruption(partial(events.say, "stop")) as interruption,
                Training(job, job.phases[0], events, interruption) as training,
            ):
                pool = SynthesisPool(job, events)
                sharing = Sharing(job, pool, training, events.say)
                sharing.begin()
                pool.run(queue, sharing.look, interruption)
                outcome = job.end_synthesis(queue)
                return outcome, training.wait()


class _Turns(Executor):
    """Synthesis or training by itself, on the cluster that this process is connected to."""

    @override
    def synthesize(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> SynthesisOutcome:
        queue = job.begin_synthesis(phase)
        with Interruption(partial(events.say, "stop")) as interruption:
            SynthesisPool(job, events).run(queue, ignore, interruption)
        return job.end_synthesis(queue)

    @override
    def distill(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> Mapping[str, Tensor]:
        with (
            Interruption(partial(events.say, "stop")) as interruption,
            Training(job, phase, events, interruption) as training,
        ):
            return training.wait()

    @override
    def run(self, job: Job, teacher: Teacher, events: Events) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        return one_after_the_other(job, teacher, events, self)
