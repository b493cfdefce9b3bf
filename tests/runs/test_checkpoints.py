"""Checkpoints: whole or refused by name, deleted by step, and only those of our own making."""

import json
import os
import time
from pathlib import Path

import pytest

from entropy_polarity.methods import make_transform
from entropy_polarity.runs.checkpoints import (
    begin,
    check,
    checkpoint_step,
    finish,
    last_of,
    own_checkpoints,
    refuse_broken,
    refuse_in_the_way,
    rotate,
    strangers,
)
from entropy_polarity.runs.method_state import STATE_FILE, load_state, read_state, save_state
from entropy_polarity.support.files import remove_folder

FILES = {
    "model.safetensors": os.urandom(3000),
    "optimizer.pt": os.urandom(5000),
    "scheduler.pt": os.urandom(50),
    "rng_state.pth": os.urandom(500),
    "tokenizer.json": b'{"version": "1.0"}',
    "trainer_state.json": b'{"global_step": 4}',
    "global_step4/shard.pt": os.urandom(100),
}


def save(folder: Path, step: int, resumable: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    begin(checkpoint)
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(content)
    finish(checkpoint, "papo", {"gain": 0.1, "path": ("a", 1)}, {"k": 0.1 + 0.2}, resumable)
    return checkpoint


def save_as_older_versions_did(folder: Path, step: int) -> Path:
    checkpoint = save(folder, step)
    state = {"method": "papo", "settings": {"gain": 0.1, "path": ["a", 1]}, "state": {"k": 1}, "resumable": True}
    (checkpoint / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
    return checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_checkpoint_passes_and_gives_its_state_back(tmp_path):
    assert check(save(tmp_path, 4)) is True
    assert load_state(tmp_path / "checkpoint-4", "papo", {"gain": 0.1, "path": ["a", 1]}, {"k": 0}) == {"k": 0.1 + 0.2}
    assert read_state(tmp_path / "checkpoint-4")["files"].keys() == FILES.keys()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "harm", [Path.unlink, cut, lengthen, zero, flip, replace_by_a_folder], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", [*FILES, STATE_FILE])
def test_whatever_happens_to_a_file_is_refused_by_its_name(tmp_path, name, harm):
    save(tmp_path, 2)
    checkpoint = save(tmp_path, 4)
    harm(checkpoint / name)
    with pytest.raises((ValueError, OSError)) as refused:
        refuse_broken(checkpoint, lambda whole: f"take {whole.name}")
    line = str(refused.value)
    assert name in line
    assert line.endswith("; take checkpoint-2")
    assert "\n" not in line


def test_a_flipped_bit_anywhere_in_the_state_itself_is_seen(tmp_path):
    checkpoint = save(tmp_path, 4)
    whole = (checkpoint / STATE_FILE).read_bytes()
    for position in range(0, len(whole), 7):
        content = bytearray(whole)
        content[position] ^= 1 << (position % 7)
        (checkpoint / STATE_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=STATE_FILE):
            check(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", "1", "{", "\0\0", '{"unfinished": false}', '{"resumable": true}', "\xff"]
)
def test_a_state_file_that_is_none_is_one_line(tmp_path, text):
    checkpoint = save(tmp_path, 4)
    (checkpoint / STATE_FILE).write_text(text, encoding="latin-1")
    for read in (read_state, check, lambda folder: load_state(folder, "papo", {}, {})):
        with pytest.raises(ValueError, match=f"{STATE_FILE} is damaged") as refused:
            read(checkpoint)
        assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "files", [[], {"model.safetensors": 3}, {"model.safetensors": [1, 2, 3]}, {"a": ["b", "c"]}, 5]
)
def test_sums_that_are_none_are_one_line(tmp_path, files):
    save_state(tmp_path / "checkpoint-4", "papo", {}, {}, files=files)
    with pytest.raises(ValueError, match=f"{STATE_FILE} is damaged: its sums"):
        check(tmp_path / "checkpoint-4")


def test_what_a_policy_does_not_need_may_be_gone_when_it_is_evaluated(tmp_path):
    checkpoint = save(tmp_path, 4)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "global_step4/shard.pt"):
        (checkpoint / name).unlink()
    assert check(checkpoint, policy_only=True)
    flip(checkpoint / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json was changed"):
        check(checkpoint, policy_only=True)


def test_what_somebody_adds_or_writes_into_the_card_is_no_harm(tmp_path):
    checkpoint = tmp_path / "checkpoint-4"
    begin(checkpoint)
    (checkpoint / "README.md").write_text("made by a machine", encoding="utf-8")
    finish(checkpoint, "papo", {}, {}, True)
    (checkpoint / "README.md").write_text("mine", encoding="utf-8")
    (checkpoint / "notes.txt").write_text("mine", encoding="utf-8")
    assert check(checkpoint)


def test_an_older_version_s_checkpoint_cannot_be_checked_but_read(tmp_path):
    checkpoint = save_as_older_versions_did(tmp_path, 4)
    assert check(checkpoint) is False
    assert load_state(checkpoint, "papo", {"gain": 0.1, "path": ["a", 1]}, {"k": 0}) == {"k": 1}
    assert own_checkpoints(tmp_path) == [checkpoint]


def test_only_a_whole_checkpoint_is_offered(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    flip(tmp_path / "checkpoint-6/model.safetensors")
    begin(tmp_path / "checkpoint-7")
    save(tmp_path, 5, resumable=False)
    cut(tmp_path / "checkpoint-8/optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer.pt has 4999 bytes, not the 5000 that were saved; checkpoint-4$"):
        refuse_broken(tmp_path / "checkpoint-8", lambda whole: whole.name)
    flip(tmp_path / "checkpoint-4/model.safetensors")
    flip(tmp_path / "checkpoint-2/model.safetensors")
    with pytest.raises(ValueError, match="no other checkpoint beside it is whole"):
        refuse_broken(tmp_path / "checkpoint-8", lambda whole: whole.name)
    (tmp_path / "checkpoint-8/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json is missing; checkpoint-5$"):
        refuse_broken(tmp_path / "checkpoint-8", lambda whole: whole.name, policy_only=True)


def test_the_last_one_is_that_of_the_highest_step_which_was_finished(tmp_path):
    assert last_of(tmp_path) is None
    for step in (2, 10, 9):
        save(tmp_path, step)
    begin(tmp_path / "checkpoint-12")
    save(tmp_path, 11, resumable=False)
    assert last_of(tmp_path).name == "checkpoint-11"
    assert last_of(tmp_path, resumable=True).name == "checkpoint-10"


def test_rotation_goes_by_step_and_not_by_date(tmp_path):
    """The old checkpoints are dated tomorrow: a clock that was set back."""
    tomorrow = time.time() + 86_400
    for step in (2, 4):
        os.utime(save(tmp_path, step), (tomorrow, tomorrow))
    for step, left in ((6, [4, 6]), (8, [6, 8]), (10, [8, 10]), (12, [10, 12])):
        rotate(save(tmp_path, step), 2)
        assert [checkpoint_step(path) for path in own_checkpoints(tmp_path)] == left


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_without_a_limit_nothing_goes(tmp_path, limit):
    for step in (2, 4, 6):
        rotate(save(tmp_path, step), limit)
    assert len(own_checkpoints(tmp_path)) == 3


def test_the_best_and_the_newest_stay_whatever_the_limit(tmp_path):
    best = save(tmp_path, 2)
    for step in (4, 6, 8):
        rotate(save(tmp_path, step), 1, best)
        assert names(tmp_path) == ["checkpoint-2", f"checkpoint-{step}"]
    rotate(save(tmp_path, 10), 3, best)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-8"]


def test_rotation_touches_nothing_that_is_not_ours(tmp_path):
    mine = ("checkpoint-mine", "checkpoint-3", "checkpoint-03", "checkpoint-1-old", "runs", "checkpoint-")
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("all of it", encoding="utf-8")
    (tmp_path / "checkpoint-5").write_text("a file", encoding="utf-8")
    copied = save(tmp_path, 4)
    copied.rename(tmp_path / "checkpoint-1")  # a copy that a user renamed: its own file says 4
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-0").symlink_to(save(tmp_path / "elsewhere", 0))
    save(tmp_path, 7)
    rotate(save(tmp_path, 8), 1)
    assert names(tmp_path) == sorted(
        [*mine, "checkpoint-0", "checkpoint-1", "checkpoint-5", "checkpoint-8", "elsewhere"]
    )
    assert check(tmp_path / "elsewhere/checkpoint-0")
    assert {p.name for p in strangers(tmp_path)} == {f"checkpoint-{n}" for n in ("3", "03", "5", "1", "0")}


def test_a_run_that_starts_again_leaves_the_checkpoints_of_the_one_before(tmp_path):
    """Steps that it has not come to are not its own: they are neither counted nor deleted."""
    for step in (50, 100):
        save(tmp_path, step)
    for step in (2, 4, 6):
        rotate(save(tmp_path, step), 2)
    assert [checkpoint_step(path) for path in own_checkpoints(tmp_path)] == [4, 6, 50, 100]


def test_a_save_that_was_cut_off_is_none_and_goes_first(tmp_path):
    save(tmp_path, 2)
    begin(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4/model.safetensors").write_text("half", encoding="utf-8")
    with pytest.raises(ValueError, match="was not saved to its end"):
        check(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="was not saved to its end"):
        load_state(tmp_path / "checkpoint-4", "papo", {}, {})
    rotate(save(tmp_path, 6), 2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"]


def test_a_checkpoint_that_is_saved_again_is_none_in_between(tmp_path):
    old = save(tmp_path, 4)
    (old / "left.bin").write_text("of the old one", encoding="utf-8")
    begin(old)
    assert names(old) == [STATE_FILE]
    with pytest.raises(ValueError, match="was not saved to its end"):
        check(old)


@pytest.mark.parametrize("first", [STATE_FILE, "optimizer.pt"])
def test_a_deletion_that_was_cut_off_leaves_a_draft_which_the_next_one_takes(tmp_path, monkeypatch, first):
    checkpoint = save(tmp_path, 4)
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda path: (path / first).unlink())
        remove_folder(checkpoint)
    assert last_of(tmp_path) is None
    assert strangers(tmp_path) == []
    (tmp_path / "checkpoint-mine.0123456789abcdef.part").mkdir()
    rotate(save(tmp_path, 6), 2)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-mine.0123456789abcdef.part"]


def test_a_save_that_was_cut_off_as_it_began_is_nobodys(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr("shutil.rmtree", lambda path: None)
        killed.setattr("entropy_polarity.runs.checkpoints.write_text", lambda path, text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin(tmp_path / "checkpoint-4")
    assert len(names(tmp_path)) == 1
    assert strangers(tmp_path) == own_checkpoints(tmp_path) == []
    begin(tmp_path / "checkpoint-4")
    assert [path.name for path in own_checkpoints(tmp_path)] == ["checkpoint-4"]


def test_what_is_somebody_elses_is_never_taken_over_and_is_told_before_training(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-²").mkdir()
    refuse_in_the_way(tmp_path, 0, 10)  # an empty folder is in nobody's way
    (tmp_path / "checkpoint-4/thesis.txt").write_text("all of it", encoding="utf-8")
    with pytest.raises(ValueError, match=r"checkpoint-4 is no checkpoint of this run.*: move it away"):
        refuse_in_the_way(tmp_path, 0, 10)
    for reached, last in ((4, 10), (0, 3)):
        refuse_in_the_way(tmp_path, reached, last)
    with pytest.raises(OSError, match="checkpoint-4 is no checkpoint of ours"):
        begin(tmp_path / "checkpoint-4")
    rotate(save(tmp_path, 6), 1)
    assert (tmp_path / "checkpoint-4/thesis.txt").is_file()


def test_nothing_is_saved_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint-4").symlink_to(outside)
    with pytest.raises(OSError, match="checkpoint-4 is a link"):
        begin(tmp_path / "run/checkpoint-4")
    (tmp_path / "run/checkpoint-6").mkdir()
    (tmp_path / "run/checkpoint-6/model.safetensors").symlink_to(outside / "victim")
    with pytest.raises(OSError, match=r"model.safetensors is a link that leads out of"):
        begin(tmp_path / "run/checkpoint-6")
    assert names(outside) == []


def test_the_state_of_what_a_name_meant_before_is_no_state_of_today(tmp_path):
    """In version 0.1 papo without settings was the controller trend."""
    before, today = (make_transform("papo", settings).init() for settings in ({"controller": "trend"}, {}))
    save_state(tmp_path / "checkpoint-4", "papo", {}, before)
    with pytest.raises(ValueError, match=r"another rule .*'trend' in version 0.1.*: train again"):
        load_state(tmp_path / "checkpoint-4", "papo", {}, today)
    save_state(tmp_path / "checkpoint-6", "papo", {}, today)
    assert load_state(tmp_path / "checkpoint-6", "papo", {}, today) == today
