"""`papo train` without training: writes a run directory as the real one does, with numbers made up from its title.

What a run does is told by SCRIPT, JSON from the name of its directory to "fail", "kill" (itself), "stall" (until it is
killed), or "slow" (half a second a step); the rest is done at once.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.runs.record import Run, RunWriter
from entropy_polarity.runs.resuming import resume_run

if __name__ == "__main__":
    arguments = sys.argv[1:]
    resumed = arguments[0] == "--resume"
    directory = Path(arguments[-1])
    recipe = load_recipe(str(directory / "config.toml") if resumed else arguments[0])
    act = json.loads(os.environ.get("SCRIPT", "{}")).get(directory.name, "work")
    print("started", os.environ["OMP_NUM_THREADS"], flush=True)
    if act == "fail":
        sys.exit("the disk is on fire")
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if resumed:
        writer = resume_run(directory, recipe.to_dict())[0]
    else:
        writer = RunWriter.create(directory, recipe.to_dict(), recipe.seed)
    rng = random.Random(recipe.title)
    held_out = recipe.evaluation
    sides = {
        when: {
            "samples": held_out.samples,
            "successes": [rng.randint(0, held_out.samples) for _ in range(held_out.problems)],
            "greedy": [rng.randint(0, 1) for _ in range(held_out.problems)],
        }
        for when in ("before", "after")
    }
    for step in range(1, recipe.trainer["max_steps"] + 1):
        row = {"step": step, "reward": rng.random(), "polarity/entropy": rng.random(), "step_time": 0.5}
        writer.metrics(row)
        time.sleep({"slow": 0.5, "stall": 60}.get(act, 0))
    assert Run.read(directory).metrics[-1]["step"] == recipe.trainer["max_steps"]
    writer.write_summary({"status": "finished", "steps": recipe.trainer["max_steps"], **sides})
