"""A driver to test: trains the student of a recipe file on a Ray cluster and writes its curve as it arrives."""

import sys
import threading
import time
from pathlib import Path

import ray

from raydfkd.config.load import load_recipe
from raydfkd.distributed.train_driver import new_coordinator, train_student
from raydfkd.job import open_job
from raydfkd.report.metrics import MetricsLog


def main(recipe: str, run_dir: str, address: str, metrics: str) -> None:
    job = open_job(load_recipe(recipe, (), run_dir))
    ray.init(address)
    coordinator = new_coordinator()
    training = threading.Thread(target=train_student, args=(job, job.phases[0], coordinator), daemon=True)
    training.start()
    log = MetricsLog(Path(metrics), fresh=True)
    while training.is_alive():
        for entry in ray.get(coordinator.take.remote()).entries:
            log.write("student", **entry)
        time.sleep(0.1)


if __name__ == "__main__":
    main(*sys.argv[1:])
