"""Writing in one move, never through a link; and the lock that keeps a second process out."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entropy_polarity.support import files
from entropy_polarity.support.files import DRAFT, append_text, locked, new_folder, refuse_links, replacing, write_text

SOURCE = Path(files.__file__).parent


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old λ")

    def killed_half_way():
        with replacing(path) as file:
            file.write(b"half of the n")
            assert path.read_text(encoding="utf-8") == "old λ"
            (draft,) = set(tmp_path.iterdir()) - {path}
            assert DRAFT.fullmatch(draft.name)["name"] == "a.txt"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        killed_half_way()
    assert path.read_text(encoding="utf-8") == "old λ"
    write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text(encoding="utf-8") == "new"


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order of the calls: the file's bytes, its name, the folder."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"file of {os.fstat(handle).st_size}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("name") or replace(a, b))
    write_text(tmp_path / "a", "12345")
    assert calls == ["file of 5", "name", "folder"]


def test_files_have_the_rights_that_new_files_have(tmp_path):
    (tmp_path / "plain").write_text("", encoding="utf-8")
    write_text(tmp_path / "ours", "")
    append_text(tmp_path / "lines", "")
    for name in ("ours", "lines"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_replaced_and_never_written_through(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "run.txt"
    victim.write_text("precious", encoding="utf-8")
    link.symlink_to(victim)
    with pytest.raises(OSError, match=r"run\.txt is a link, and nothing is written through one"):
        append_text(link, "more")
    write_text(link, "ours")
    assert victim.read_text(encoding="utf-8") == "precious"
    assert not link.is_symlink()


def test_a_folder_whose_links_lead_out_of_it_is_refused(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "checkpoints/checkpoint-4").mkdir(parents=True)
    outside.mkdir()
    (run / "checkpoints/best").symlink_to("checkpoint-4")  # within the run: a user's name for a part of it
    refuse_links(run)
    (tmp_path / "latest").symlink_to(run)
    refuse_links(tmp_path / "latest")  # whoever gave the folder named the link
    for place, target in (
        ("tokens", outside),
        ("checkpoints/checkpoint-4/model.safetensors", tmp_path / "not there yet"),
        ("up", ".."),
        ("chain", "tokens"),
    ):
        (run / "tokens").symlink_to(outside) if place == "chain" else None
        (run / place).symlink_to(target)
        with pytest.raises(OSError, match=r"is a link that leads out of"):
            refuse_links(run)
        (run / place).unlink()
        (run / "tokens").unlink(missing_ok=True)
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl is neither a file nor a folder"):
        refuse_links(run)


def test_a_new_folder_is_there_when_it_is_full(tmp_path):
    def killed_half_way():
        with new_folder(tmp_path / "deep/policy") as folder:
            (folder / "config.json").write_text("{}", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        killed_half_way()
    assert not list((tmp_path / "deep").iterdir())
    with new_folder(tmp_path / "deep/other") as folder:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        assert not (tmp_path / "deep/other").exists()
    assert [p.name for p in (tmp_path / "deep/other").iterdir()] == ["config.json"]


HOLDER = """
import sys, time
from pathlib import Path
from entropy_polarity.support.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match=r"another process is at work in .*run:"), locked(tmp_path / "run"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):  # and it can be taken again in one process
        pass


def test_a_place_in_which_nothing_came_is_free_again(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "run"):
        raise RuntimeError
    assert not (tmp_path / "run").exists()


def test_a_lock_that_was_deleted_while_it_was_waited_for_is_no_lock(tmp_path):
    """The first holder makes nothing and deletes its file; who waited for that file must not work beside a third."""
    waiter = [sys.executable, "-c", HOLDER.replace("sys.argv[1])", "sys.argv[1]), patience=30"), str(tmp_path / "run")]

    def make_nothing():
        process = subprocess.Popen(waiter, stdout=subprocess.PIPE)
        started.append(process)
        time.sleep(3)  # it looks at the lock now, again and again
        raise RuntimeError

    started: list[subprocess.Popen] = []
    with pytest.raises(RuntimeError), locked(tmp_path / "run"):
        make_nothing()
    (waiting,) = started
    try:
        assert waiting.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError), locked(tmp_path / "run"):
            pass
    finally:
        waiting.kill()
        waiting.wait()


def test_a_lock_is_not_put_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="is a link"), locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "victim").exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="no locks here"), locked(tmp_path / "run"):
        pass


def test_nothing_in_the_package_writes_a_file_in_another_way():
    """One module writes: elsewhere no write_text, no open for writing, no move into place, but for a few by name."""
    allowed = {
        "experiments/compare/runs.py": 'job.log.open("ab")',  # what a process prints
        "tasks/workers.py": 'os.fdopen(os.dup(1), "w")',  # a pipe
        "tasks/textworld.py": "Path(folder, name).write_bytes(",  # into a temporary folder of its own
    }
    writing = re.compile(
        r"""\.write_(text|bytes)\(|open\([^)]*["'][wax]b?["']|os\.(replace|rename)\(|savez\w*\(\w*file"""
    )
    for file in SOURCE.rglob("*.py"):
        name = str(file.relative_to(SOURCE))
        if name != "files.py":
            text = file.read_text(encoding="utf-8").replace(allowed.get(name, "\0"), "")
            assert not writing.search(text), name
