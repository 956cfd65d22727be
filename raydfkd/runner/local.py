"""The executor without Ray: everything in this process, one thing after another."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor
from typing_extensions import override

from raydfkd.devices import device_name, pick_device
from raydfkd.distillation.trainer import TrainingHooks
from raydfkd.distillation.training import StudentCheckpoint, StudentTraining, forget_epochs, outdated
from raydfkd.job import Job, SynthesisOutcome
from raydfkd.networks.teacher import Teacher
from raydfkd.runner.estimate import judge_of
from raydfkd.runner.events import Events
from raydfkd.runner.executor import Executor, one_after_the_other, tell_of_new_training
from raydfkd.runner.setbacks import Setbacks
from raydfkd.runner.signals import Interruption
from raydfkd.store.errors import OutageError
from raydfkd.synthesis.build import generator_maker
from raydfkd.synthesis.checkpoint import Interrupted
from raydfkd.synthesis.worker import SynthesisWorker
from raydfkd.units import Phase, UnitQueue

FINISH_S = 6.0
"""Seconds that the unit in work has to finish once the run is interrupted; after that its checkpoint is saved."""


class LocalExecutor(Executor):
    """Synthesizes unit by unit, then trains the student, here."""

    @override
    def synthesize(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> SynthesisOutcome:
        queue = job.begin_synthesis(phase)
        if not queue.is_drained:
            events.synthesis_started()
            with Interruption(partial(events.say, "stop")) as interruption:
                self._work(job, queue, teacher, events, interruption)
        return job.end_synthesis(queue)

    def _work(self, job: Job, queue: UnitQueue, teacher: Teacher, events: Events, interruption: Interruption) -> None:
        device = pick_device(job.recipe.runtime.device)
        events.worker_ready(device_name(device))
        worker = SynthesisWorker(
            job,
            teacher,
            device=device,
            should_stop=lambda: interruption.seconds >= FINISH_S,
            on_progress=events.progressed,
        )
        setbacks = Setbacks(events)
        while not queue.is_drained or not self._is_over(job, queue, setbacks):
            if interruption.is_requested:
                raise KeyboardInterrupt
            unit = queue.take()
            if unit is None:
                continue  # the store was out of reach: nobody knows whether there is anything left
            try:
                commit = worker.run(unit, queue.attempt_of(unit))
            except Interrupted:
                raise KeyboardInterrupt from None
            except Exception as error:  # the edge of a unit: whatever it was, the other units are made
                setbacks.unit_failed(unit, error, queue)
            else:
                queue.finished(unit)
                job.transfer_set.remember(commit)
                events.committed(commit, running=queue.num_running)

    def _is_over(self, job: Job, queue: UnitQueue, setbacks: Setbacks) -> bool:
        """Whether nothing is left once others' work and damage are known too; False while nobody can tell."""
        try:
            news = job.news(at_once=True)
        except OutageError as outage:
            setbacks.store_failed(outage)
            return False
        if news is not None:
            job.catch_up(queue, news)
        return queue.is_drained

    @override
    def distill(self, job: Job, phase: Phase, teacher: Teacher, events: Events) -> Mapping[str, Tensor]:
        tell_of_new_training(job, events)
        if not job.units:  # the images are made by who learns from them
            events.worker_ready(device_name(pick_device(job.recipe.runtime.device)))
        checkpoint = StudentCheckpoint(job)
        saved = checkpoint.load()
        if saved is not None and (why := outdated(job, saved)):
            events.say("student", why)
            forget_epochs(job)
            checkpoint.remove()
            saved = None
        training = StudentTraining(
            job,
            teacher,
            phase,
            hooks=TrainingHooks(on_log=events.student, on_checkpoint=checkpoint.save, on_publish=job.publisher()),
            generator=generator_maker(job.recipe, teacher.module),
            judge=judge_of(job.recipe, teacher.module),
        )
        if saved is not None:
            training.load_state_dict(saved)
            events.say("student", f"resumes at step {training.trainer.step:,}")
        student = training.run()
        return student if training.trainer.step else {}

    @override
    def run(self, job: Job, teacher: Teacher, events: Events) -> tuple[SynthesisOutcome, Mapping[str, Tensor]]:
        return one_after_the_other(job, teacher, events, self)
