"""Going on with a run whose folder is not as it was left: whole or refused in one line, nobody's files touched."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from small import SMALL
from test_trl import make_trainer

from entropy_polarity import cli
from entropy_polarity.experiments.models import refuse_renamed, weights_of
from entropy_polarity.experiments.training import train
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.report.page import render_page
from entropy_polarity.runs.checkpoints import begin, last_checkpoint
from entropy_polarity.runs.recipe import load_recipe, with_flags
from entropy_polarity.runs.record import Run
from entropy_polarity.runs.resuming import resume_run
from entropy_polarity.support.files import locked
from entropy_polarity.trainers.trl import PolarityTrainer

RECIPE = load_recipe("countdown", [*SMALL, 'method={name="papo", controller="trend"}'])
LONGER = with_flags(RECIPE, max_steps=8)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Run:
    """Eight steps at once."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(LONGER, folder)
    return Run.read(folder)


@pytest.fixture
def run(small_runs, tmp_path) -> Path:
    """Six steps, finished, with the checkpoints of steps 4 and 6."""
    whole = next(run for run in small_runs if run.config["method"]["controller"] == "trend")
    shutil.copytree(whole.directory, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def path_of(run: Path | Run) -> list[dict]:
    rows = Run.read(run).metrics if isinstance(run, Path) else run.metrics
    return [{k: v for k, v in row.items() if k not in ("step_time", "epoch")} for row in rows]


def refused(run: Path, match: str, step: int | None = None) -> str:
    """The one line with which a resume is refused; nothing in the folder is changed by it."""
    before = contents(run)
    with pytest.raises((ValueError, OSError), match=match) as error:
        resume_run(run, LONGER.to_dict(), step)
    assert contents(run) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_or_changed_file_is_refused_and_the_last_whole_checkpoint_offered(run, straight):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"):
        file = run / "checkpoints/checkpoint-6" / name
        kept = file.read_bytes()
        file.unlink()
        line = refused(run, rf"checkpoint-6/{name} is missing; papo train --resume")
        assert line.endswith(f"papo train --resume {run} --from-checkpoint 4 goes on from the last whole one")
        file.write_bytes(kept[:100] + bytes(64) + kept[164:])
        refused(run, rf"checkpoint-6/{name} was changed after it was saved")
        file.write_bytes(kept)
    shutil.copy(run / "checkpoints/checkpoint-4/optimizer.pt", run / "checkpoints/checkpoint-6/optimizer.pt")
    refused(run, "checkpoint-6/optimizer.pt")
    train(LONGER, run, resume=True, from_step=4)
    assert path_of(run) == path_of(straight)
    assert [path.name for path in sorted((run / "checkpoints").glob("check*"))] == ["checkpoint-6", "checkpoint-8"]
    ours, theirs = (last_checkpoint(r) / "model.safetensors" for r in (run, straight.directory))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_step_without_a_checkpoint_is_refused(run):
    refused(run, "has no checkpoint of step 5; there are: 4, 6", step=5)


def test_a_clock_that_was_set_back_costs_no_checkpoint(run, straight):
    tomorrow = time.time() + 86_400
    for path in (run / "checkpoints").rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    train(LONGER, run, resume=True)
    assert [path.name for path in sorted((run / "checkpoints").glob("check*"))] == ["checkpoint-6", "checkpoint-8"]
    assert path_of(run) == path_of(straight)


def test_what_a_user_put_there_is_still_there(run):
    mine = ["checkpoints/checkpoint-mine", "checkpoints/checkpoint-99", "checkpoints/checkpoint-3", "tokens"]
    for folder in mine:
        (run / folder).mkdir(exist_ok=True)
        (run / folder / "notes.txt").write_text("mine", encoding="utf-8")
    (run / "checkpoints/best").symlink_to("checkpoint-6")
    train(LONGER, run, resume=True)
    assert all((run / folder / "notes.txt").read_text(encoding="utf-8") == "mine" for folder in mine)
    assert last_checkpoint(run).name == "checkpoint-8"


def test_what_stands_where_a_checkpoint_will_be_written_is_refused_at_once(run):
    (run / "checkpoints/checkpoint-8").mkdir()
    (run / "checkpoints/checkpoint-8/notes.txt").write_text("mine", encoding="utf-8")
    refused(run, "checkpoint-8 is no checkpoint of this run, or was not saved to its end, .*: move it away")
    (run / "checkpoints/checkpoint-8").rename(run / "checkpoints/kept")
    (run / "checkpoints/checkpoint-6/polarity_state.json").unlink()
    refused(run, "checkpoint-6 is no checkpoint of this run")


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
def test_a_record_that_ends_before_the_checkpoint_is_said(run, name):
    lines = (run / name).read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 3]
    for tail in (b"", b"\0" * 300, lines[len(kept)][:-3]):
        (run / name).write_bytes(b"".join(kept) + tail)
        line = refused(run, f"{name} ends at step 3, the checkpoint is of step 6")
        assert f"papo train --resume {run} --from-checkpoint 6 goes on without what is lost" in line
    (run / name).unlink()
    refused(run, f"{name} ends at step 0, the checkpoint is of step 6")


def test_a_run_goes_on_without_what_is_lost_where_that_is_said(run, straight):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        lines = (run / name).read_bytes().splitlines(keepends=True)
        (run / name).write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= 3))
    train(LONGER, run, resume=True, from_step=6)
    assert path_of(run) == [row for row in path_of(straight) if row["step"] not in (4, 5, 6)]
    assert {row["step"] for row in Run.read(run).rollouts} == {1, 3, 7}
    resume_run(run, LONGER.to_dict())  # told once is told


@pytest.mark.parametrize("line", ["\0\0\0", "{", "[" * 100_000, '["a"]', "{}", '{"step": "4"}', "\xff"])
def test_a_damaged_line_of_the_record_is_named(run, line):
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        file = run / name
        whole = file.read_bytes()
        first, *others = whole.splitlines(keepends=True)
        file.write_bytes(first + line.encode("latin-1") + b"\n" + b"".join(others))
        refused(run, rf"{name} is damaged in line 2 \(.*\): delete that line to go on without it, or papo train")
        with pytest.raises(ValueError, match=rf"{name} is damaged in line 2") as error:
            Run.read(run)
        assert len(str(error.value)) < 400
        file.write_bytes(whole)


def test_a_damaged_line_after_the_checkpoint_goes_with_the_rest(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\0\0\n{"step": 7}\n')
    resume_run(run, LONGER.to_dict())
    assert Run.read(run).metrics[-1]["step"] == 6


def test_a_config_cut_anywhere_is_refused_and_left_as_it_is(run):
    whole = (run / "config.toml").read_bytes()
    for end in range(len(whole)):
        (run / "config.toml").write_bytes(whole[:end])
        for read in (Run.read, lambda folder: resume_run(folder, LONGER.to_dict())):
            with pytest.raises(ValueError, match=r"config\.toml is (cut off|damaged)"):
                read(run)
        assert (run / "config.toml").read_bytes() == whole[:end]
    (run / "config.toml").write_bytes(whole[:-100] + bytes(100))
    refused(run, r"config\.toml is damaged")


@pytest.mark.parametrize("name", ["summary.json", "environment.json"])
@pytest.mark.parametrize("text", [None, "", "\0\0", "[1]", "[" * 100_000, '{"a"', "\xff"])
def test_a_damaged_summary_or_environment_is_named(run, name, text):
    (run / name).unlink() if text is None else (run / name).write_text(text, encoding="latin-1")
    with pytest.raises((ValueError, OSError), match=rf"{name} is (missing|damaged.*): write \{{\}} into it"):
        Run.read(run)
    (run / name).write_text("{}", encoding="utf-8")
    assert "Rollouts, coloured" in render_page(Run.read(run))


def test_the_page_leaves_out_what_cannot_be_read_and_says_so(run):
    whole = render_page(Run.read(run))
    assert "Left out" not in whole
    (run / "tokens/000001.parquet").unlink()
    page = render_page(Run.read(run))
    assert f"Left out: {run}/tokens/000001.parquet is missing" in page
    assert 0 < page.count('class="rollout"') < whole.count('class="rollout"')
    (run / "tokens/000003.parquet").write_bytes(b"PAR1 and then nothing")
    content = bytearray((run / "tokens/000005.parquet").read_bytes())
    content[len(content) // 3] ^= 255
    content[-20:] = bytes(20)
    (run / "tokens/000005.parquet").write_bytes(content)
    page = render_page(Run.read(run))
    assert all(f"{run}/tokens/00000{step}.parquet is damaged (" in page for step in (3, 5))
    assert 'class="rollout"' not in page
    (run / "rollouts.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    assert "Left out: 1 rows of rollouts.jsonl" in render_page(Run.read(run))


def test_the_second_process_gets_one_line(run, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["papo", "train", "--resume", str(run), "--max-steps", "8"])
    before = contents(run)
    with locked(run), pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith(f"papo: another process is at work in {run}")
    assert contents(run) == before
    with locked(run.parent / "new"), pytest.raises(BlockingIOError, match="another process is at work"):
        train(RECIPE, run.parent / "new")


@pytest.mark.parametrize(
    "place",
    ["tokens", "checkpoints", "checkpoints/README.md", "metrics.jsonl", "checkpoints/checkpoint-8",
     "checkpoints/checkpoint-6/optimizer.pt", "config.toml.part"],
)  # fmt: skip
def test_a_link_out_of_the_run_is_refused_and_its_target_untouched(run, tmp_path, place):
    target = tmp_path / "precious"
    if (run / place).is_dir() or place.endswith("8"):
        target.mkdir()
        for name in ("notes.txt", "000009.parquet", "000009.part"):
            (target / name).write_text("mine", encoding="utf-8")
        shutil.rmtree(run / place, ignore_errors=True)
    else:
        target.write_text("mine", encoding="utf-8")
        (run / place).unlink(missing_ok=True)
    (run / place).symlink_to(target)
    before = contents(target) if target.is_dir() else target.read_bytes()
    refused(run, "is a link that leads out of")
    assert (contents(target) if target.is_dir() else target.read_bytes()) == before


def make_older(checkpoint: Path) -> None:
    """As versions without sums left it."""
    state = json.loads((checkpoint / "polarity_state.json").read_text(encoding="utf-8"))
    kept = {key: state[key] for key in ("method", "settings", "state", "resumable")}
    (checkpoint / "polarity_state.json").write_text(json.dumps(kept), encoding="utf-8")


def test_an_older_version_s_run_goes_on_and_says_what_cannot_be_checked(run, straight):
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
        make_older(checkpoint)
    said = []
    train(LONGER, run, resume=True, say=said.append)
    assert any("checkpoint-6 was saved by an older version, without sums" in line for line in said)
    assert path_of(run) == path_of(straight)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_even_without_sums_a_damaged_file_is_named(run, name):
    make_older(run / "checkpoints/checkpoint-6")
    file = run / "checkpoints/checkpoint-6" / name
    whole = file.read_bytes()
    harmed = [None, b"", b"garbage", whole[: len(whole) // 2]]
    if name != "model.safetensors":  # whose format has no sums
        harmed.append(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    for content in harmed:
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=r"checkpoint-6.* (is damaged|has no|Can't find)|checkpoint at"):
            train(LONGER, run, resume=True)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_that_holds_more_than_tensors_is_refused_by_its_name(run, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_older(run / "checkpoints/checkpoint-6")
    torch.save({"state": Hostile()}, run / "checkpoints/checkpoint-6" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-6/{name} cannot be read as PyTorch's tensors and numbers"):
        train(LONGER, run, resume=True)
    assert not (tmp_path / "hostile").exists()


def test_a_changed_policy_is_not_evaluated_but_one_without_its_optimizer_is(run):
    checkpoint = run / "checkpoints/checkpoint-6"
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt"):
        (checkpoint / name).unlink()
    assert weights_of(str(run))[0] == weights_of(str(checkpoint))[0] == str(checkpoint)
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1000:] = bytes(1000)
    (checkpoint / "model.safetensors").write_bytes(content)
    for model in (run, checkpoint):
        with pytest.raises(ValueError, match=r"model.safetensors was changed .*; .*checkpoint-4 beside it is whole"):
            weights_of(str(model))


HEADER = 8  # bytes of the length of a safetensors header


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("model.safetensors", lambda whole: b""),
        ("model.safetensors", lambda whole: whole[:4]),
        ("model.safetensors", lambda whole: whole[:200]),
        ("model.safetensors", lambda whole: whole[:-1]),
        ("model.safetensors", lambda whole: whole + b"\0"),
        ("model.safetensors", lambda whole: bytes(len(whole))),
        ("model.safetensors", lambda whole: b"\xff" * HEADER + whole[HEADER:]),
        ("model.safetensors", lambda whole: whole[:HEADER] + b"[" * 50 + whole[HEADER + 50 :]),
        ("model.safetensors", lambda whole: whole.replace(b'"BF16"', b'"XF16"').replace(b'"F32"', b'"X32"')),
        ("config.json", lambda whole: whole[:-5]),
        ("config.json", lambda whole: b"[" * 100_000),
        ("config.json", lambda whole: bytes(len(whole))),
        ("tokenizer.json", lambda whole: whole[: len(whole) // 2]),
        ("tokenizer_config.json", lambda whole: b""),
    ],
)
def test_a_damaged_file_of_a_model_is_named(embedded, tmp_path, name, harm):
    shutil.copytree(embedded, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_bytes(harm(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\): take another") as error:
        load_policy(str(tmp_path / "model"))
    assert len(str(error.value)) < 500


def test_the_last_checkpoint_of_a_folder_is_the_last_whole_one_of_the_trainers_own(tmp_path):
    """resume_from_checkpoint=True: what else is called checkpoint-*, and a save that was cut off, is passed over; and
    the limit deletes by step what the trainer made, though that is dated tomorrow."""
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    first = make_trainer(PolarityTrainer, tmp_path, max_steps=4, **settings)
    first.train()
    (tmp_path / "checkpoint-99").mkdir()
    begin(tmp_path / "checkpoint-98")
    for path in tmp_path.rglob("*"):
        os.utime(path, (2e9, 2e9))
    again = make_trainer(PolarityTrainer, tmp_path, max_steps=8, **settings)
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in again.state.log_history if "loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    there = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert there == ["checkpoint-6", "checkpoint-8", "checkpoint-98", "checkpoint-99"]


def test_a_checkpoint_without_the_optimizer_is_not_resumed(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(PolarityTrainer, tmp_path, max_steps=2, **settings).train()
    with pytest.raises(FileNotFoundError, match=r"has no optimizer.pt, .*save_only_model=True leaves it out"):
        make_trainer(PolarityTrainer, tmp_path, max_steps=4).train(resume_from_checkpoint=True)


def test_a_run_that_ends_with_its_best_model_deletes_no_folder_of_a_user(tmp_path):
    """With a limit of 1 and a best model TRL deletes, at the end, every folder called checkpoint-* but the best."""
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "metric_for_best_model": "reward"}
    trainer = make_trainer(PolarityTrainer, tmp_path, max_steps=4, **settings)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    trainer.args.eval_strategy, trainer.args.eval_steps, trainer.args.greater_is_better = "steps", 2, False
    for name in ("checkpoint-98", "checkpoint-99"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("all of it", encoding="utf-8")
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    there = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert there >= {"checkpoint-98", "checkpoint-99", "checkpoint-4", Path(trainer.state.best_model_checkpoint).name}
    assert trainer.args.save_total_limit == 1


def test_a_run_whose_method_meant_another_rule_does_not_go_on_under_the_name(tmp_path):
    (tmp_path / "config.toml").write_text('[method]\nname = "opefo"\n[record]\ncompletions = 4\n', encoding="utf-8")
    for date, now in (("2026-11-23T20:19:45+00:00", "opefo_polarity"), ("2027-01-01", None)):
        (tmp_path / "environment.json").write_text(json.dumps({"date": date}), encoding="utf-8")
        if now is None:
            refuse_renamed(tmp_path)
            continue
        with pytest.raises(ValueError, match=f"'opefo' was what '{now}' is now"):
            refuse_renamed(tmp_path)
