"""The run directory: what was written is read back, and a kill at any moment costs the tail only."""

import json
import math
from pathlib import Path

import pytest

from entropy_polarity.runs.checkpoints import begin, checkpoint_step, finish, last_checkpoint
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.runs.record import TOKEN_COLUMNS, Run, RunWriter
from entropy_polarity.runs.resuming import resume_run
from entropy_polarity.support.provenance import environment

nan, inf = math.nan, math.inf
CONFIG = {
    "seed": 3,
    "task": {"name": "countdown", "numbers": [3, 4]},
    "trainer": {"learning_rate": 1e-4},
    "record": {"completions": 1},
}


def columns(*polarities: float) -> dict[str, list]:
    """Token columns of one rollout with these polarities."""
    count = len(polarities)
    texts = {"rollout": [0] * count, "position": list(range(count)), "token": list("(1+2)λ"[:count])}
    numbers = {name: [0.5] * count for name in ("logp", "entropy", "sensitivity", "weight")}
    return {**texts, **numbers, "polarity": list(polarities), "from_policy": [True] * count}


def train(writer: RunWriter, steps: range, note: str = "") -> None:
    """What a run writes in each of its steps."""
    for step in steps:
        writer.metrics({"step": step, "loss": step / 10, "note": note})
        writer.rollouts([{"step": step, "rollout": 0, "completion": f"1+{step}", "note": note}], columns(0.5, -0.25))


def checkpoint(directory: Path, step: int, whole: bool = True, resumable: bool = True) -> Path:
    folder = directory / "checkpoints" / f"checkpoint-{step}"
    begin(folder)
    (folder / "model.safetensors").write_text("weights", encoding="utf-8")
    if whole:
        finish(folder, "papo", {}, {}, resumable)
    return folder


def steps(rows: list[dict]) -> list[int]:
    return [row["step"] for row in rows]


def token_files(run: Run) -> list[str]:
    return sorted(path.name for path in (run.directory / "tokens").iterdir())


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "runs" / "first"


@pytest.fixture
def writer(directory) -> RunWriter:
    return RunWriter.create(directory, CONFIG, seed=3)


def test_what_was_written_is_read_back(writer, directory):
    writer.metrics({"step": 1, "loss": 0.1, "name": "λ"})
    writer.metrics({"step": 2, "loss": 1e-300, "nested": {"a": [1, None]}})
    rows = [{"step": 2, "completion": 'a "quoted"\nline\u2028 ٣', "reward": 1.0}, {"step": 2, "completion": ""}]
    writer.rollouts(rows, columns(0.5, -0.25, 0.0))
    writer.write_summary({"status": "finished"})
    run = Run.read(directory)
    assert run.config == CONFIG
    assert run.metrics == [
        {"step": 1, "loss": 0.1, "name": "λ"},
        {"step": 2, "loss": 1e-300, "nested": {"a": [1, None]}},
    ]
    assert run.rollouts == rows
    assert run.summary == {"status": "finished"}
    tokens = run.tokens(2)
    assert [token["polarity"] for token in tokens] == [0.5, -0.25, 0]
    assert [token["token"] for token in tokens] == ["(", "1", "+"]
    assert set(tokens[0]) == set(TOKEN_COLUMNS.names)


def test_numbers_that_json_does_not_have_become_null(writer, directory):
    writer.metrics({"step": 1, "loss": nan, "deep": {"list": [1.0, inf, -inf]}})
    writer.write_summary({"pass": nan})
    for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    run = Run.read(directory)
    assert run.metrics == [{"step": 1, "loss": None, "deep": {"list": [1.0, None, None]}}]
    assert run.summary == {"pass": None}


def test_token_columns_keep_what_is_not_a_number(writer, directory):
    writer.rollouts([{"step": 1}], columns(nan, inf, 0.5))
    found = [token["polarity"] for token in Run.read(directory).tokens(1)]
    assert math.isnan(found[0])
    assert found[1:] == [inf, 0.5]


def test_a_series_leaves_out_the_steps_where_it_is_unknown(writer, directory):
    for step, loss in enumerate((0.5, nan, 0.25), start=1):
        writer.metrics({"step": step, "loss": loss})
    writer.metrics({"step": 4, "other": 1.0})
    assert Run.read(directory).series("loss") == ([1, 3], [0.5, 0.25])
    assert Run.read(directory).series("nothing") == ([], [])


def test_the_recipe_of_a_run_is_read_back_as_it_was(directory):
    recipe = load_recipe("countdown", ["seed=7", "trainer.beta=0.1", "trainer.run_name=λ"])
    RunWriter.create(directory, recipe.to_dict(), recipe.seed)
    assert load_recipe(str(directory / "config.toml")) == recipe


def test_settings_that_are_none_are_left_out_of_the_config(directory):
    kept = {"record": {"completions": 1}}
    RunWriter.create(directory, {"a": None, "b": {"c": None, "d": [{"e": None, "f": 1}]}} | kept, seed=0)
    assert Run.read(directory).config == {"b": {"d": [{"f": 1}]}} | kept


def test_the_environment_says_with_what_and_by_which_seed():
    found = environment(11)
    assert found["seed"] == 11
    assert found["packages"].keys() >= {"torch", "trl", "numpy"}
    assert json.loads(json.dumps(found)) == found


def test_a_new_run_takes_an_empty_folder(directory):
    directory.mkdir(parents=True)
    RunWriter.create(directory, CONFIG, seed=0)
    assert Run.read(directory).summary == {"status": "running"}


def test_a_new_run_never_overwrites_another(writer, directory):
    train(writer, range(1, 3))
    with pytest.raises(FileExistsError, match=r"first already holds a run: .*--resume"):
        RunWriter.create(directory, CONFIG, seed=0)
    assert steps(Run.read(directory).metrics) == [1, 2]


def test_a_new_run_refuses_a_folder_with_anything_in_it_and_a_file(tmp_path):
    (tmp_path / ".hidden").touch()
    with pytest.raises(FileExistsError, match="--output"):
        RunWriter.create(tmp_path, CONFIG, seed=0)
    with pytest.raises(FileExistsError, match="--output"):
        RunWriter.create(tmp_path / ".hidden", CONFIG, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run: config.toml is missing"):
        Run.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no run: config.toml is missing"):
        resume_run(tmp_path, CONFIG)


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_line_cut_off_by_a_kill_is_left_out_and_never_joined_to_the_next(writer, directory, cut):
    train(writer, range(1, 4))
    checkpoint(directory, 2)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        path = directory / name
        path.write_bytes(path.read_bytes()[:-cut])
    run = Run.read(directory)
    assert steps(run.metrics) == [1, 2]
    assert steps(run.rollouts) == [1, 2]
    resumed, _ = resume_run(directory, CONFIG)
    train(resumed, range(3, 5))
    run = Run.read(directory)
    assert steps(run.metrics) == [1, 2, 3, 4]
    assert steps(run.rollouts) == [1, 2, 3, 4]


def test_resuming_drops_what_came_after_the_checkpoint_so_that_no_step_is_there_twice(writer, directory):
    train(writer, range(1, 8), note="before")
    kept, *broken = checkpoint(directory, 4), checkpoint(directory, 2, whole=False), checkpoint(directory, 6, False)
    (directory / "tokens" / "000008.part").touch()  # the kill fell into step 8
    resumed, found = resume_run(directory, CONFIG)
    assert found == kept
    assert kept.exists()
    assert not any(folder.exists() for folder in broken)
    train(resumed, range(5, 10), note="after")
    run = Run.read(directory)
    assert steps(run.metrics) == steps(run.rollouts) == list(range(1, 10))
    assert [row["note"] for row in run.metrics] == ["before"] * 4 + ["after"] * 5
    assert [row["completion"] for row in run.rollouts] == [f"1+{step}" for step in range(1, 10)]
    assert token_files(run) == [f"{step:06d}.parquet" for step in range(1, 10)]
    assert Run.read(directory).config == CONFIG


def test_resuming_without_a_checkpoint_starts_over(writer, directory):
    train(writer, range(1, 4))
    checkpoint(directory, 2, whole=False)
    resumed, found = resume_run(directory, CONFIG)
    assert found is None
    run = Run.read(directory)
    assert (run.metrics, run.rollouts, token_files(run)) == ([], [], [])
    train(resumed, range(1, 2))
    assert steps(Run.read(directory).metrics) == [1]


def test_resuming_twice_is_resuming_once(writer, directory):
    train(writer, range(1, 6))
    checkpoint(directory, 3)
    resume_run(directory, CONFIG)
    once = Run.read(directory)
    resume_run(directory, CONFIG)
    assert Run.read(directory) == once
    assert steps(once.metrics) == [1, 2, 3]


def test_the_last_checkpoint_is_the_highest_whole_one(writer, directory):
    assert last_checkpoint(directory) is None
    for step in (2, 10, 9):
        checkpoint(directory, step)  # by number: as text, 9 comes last
    checkpoint(directory, 12, whole=False)
    assert last_checkpoint(directory).name == "checkpoint-10"
    assert checkpoint_step(last_checkpoint(directory)) == 10


def test_summary_and_report_are_replaced_in_one_move(writer, directory):
    writer.write_report("<html>a longer page</html>")
    assert writer.write_report("<html></html>").read_text(encoding="utf-8") == "<html></html>"
    writer.write_summary({"status": "interrupted", "more": 1})
    writer.write_summary({"status": "done"})
    assert json.loads((directory / "summary.json").read_text(encoding="utf-8")) == {"status": "done"}
    assert not list(directory.glob("*.part"))


def test_a_checkpoint_inside_a_rollout_is_evaluated_but_not_resumed(writer, directory):
    """The run ended at 5, inside a rollout: its policy is that of 5, and it goes on from 4."""
    train(writer, range(1, 6))
    checkpoint(directory, 4)
    checkpoint(directory, 5, resumable=False)
    assert last_checkpoint(directory).name == "checkpoint-5"
    _, found = resume_run(directory, CONFIG)
    assert found.name == "checkpoint-4"


def test_resuming_leaves_what_others_wrote_beside_the_checkpoints(writer, directory):
    """TensorBoard and completion logs live in the trainer's output folder too."""
    train(writer, range(1, 3))
    checkpoint(directory, 2)
    logs = directory / "checkpoints" / "runs" / "events.tfevents"
    logs.parent.mkdir()
    logs.write_text("mine", encoding="utf-8")
    resume_run(directory, CONFIG)
    assert logs.read_text(encoding="utf-8") == "mine"


def test_a_folder_of_empty_folders_can_hold_a_run(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    RunWriter.create(tmp_path / "run", CONFIG, seed=0)
