"""The hub is asked for a name that is no folder here, and for nothing else; without an answer, that is one line."""

import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants
from small import SMALL

from entropy_polarity.policy.loading import load_policy
from entropy_polarity.support import hub as client
from entropy_polarity.tasks.tables import load_table

FIRST_HALF = "cannot load a model from 'someone/some-model' (no such folder here): "


@pytest.fixture
def online(monkeypatch):
    """As for a user who has set nothing."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # put back as it was, whatever is set meanwhile
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(client, "_silent", None)

    def at(endpoint: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return at


@pytest.fixture
def hub(online):
    """A hub that has no model at all; what it was asked for."""
    asked = []

    class Empty(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(404 if self.path != "/" else 200)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online(f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


def unused_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def test_a_name_that_is_no_folder_is_asked_for(hub):
    assert client.why_not_asked() is None
    with pytest.raises(FileNotFoundError) as failure:
        load_policy("someone/some-model")
    assert any("someone/some-model" in path for path in hub)
    assert str(failure.value).startswith(FIRST_HALF + "someone/some-model is not a local folder and is not a valid")
    assert "\n" not in str(failure.value)


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(online):
    online(f"http://127.0.0.1:{unused_port()}")
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as failure:
        load_policy("someone/some-model")
    said = f"nothing in this machine's cache, and the hub at {constants.ENDPOINT} cannot be reached ("
    assert str(failure.value).startswith(FIRST_HALF + said)
    assert "\n" not in str(failure.value)
    with pytest.raises(ConnectionError, match=r"cannot load someone/data from the hub \(the hub at .* be reached"):
        load_table("someone/data")
    assert time.monotonic() - began < 5  # its client's own pauses alone are twenty seconds for each file


def test_a_hub_that_hangs_or_fails_counts_as_not_reached(online, monkeypatch):
    monkeypatch.setattr(client, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        online(f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert "cannot be reached" in (client.why_not_asked() or "")
    assert constants.HF_HUB_OFFLINE, "nothing else of this process asks it again"
    assert "cannot be reached" in (client.why_not_asked() or "")


def test_a_hub_that_is_not_to_be_asked_is_not():
    with pytest.raises(FileNotFoundError, match="and HF_HUB_OFFLINE is set, so that the hub is not asked"):
        load_policy("someone/some-model")


def test_loading_a_policy_that_is_here_asks_nobody(hub, tmp_path, embedded):
    shutil.copytree(embedded, tmp_path / "policy")
    for model in ("embedded", "embedded:guess", "embedded:keydoor", str(tmp_path / "policy")):
        load_policy(model)
    assert hub == []


WITHOUT_A_NETWORK = """
import os, socket, sys
os.environ.pop("HF_HUB_OFFLINE", None)
touched = []

def refuse(*arguments, **_):
    touched.append(arguments)
    raise OSError("the network was touched")

socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
from entropy_polarity.cli import main
for arguments in {commands!r}:
    sys.argv = ["papo", *arguments]
    main()
sys.exit(f"touched: {{touched}}" if touched else 0)
"""


@pytest.mark.slow
def test_training_and_evaluating_a_policy_that_is_here_never_touches_the_network(tmp_path, embedded):
    shutil.copytree(embedded, tmp_path / "policy")
    small = [f"--set={override}" for override in (*SMALL, "trainer.max_steps=1")]
    commands = [
        ["train", "--model", str(tmp_path / "policy"), "--output", str(tmp_path / "run"), "--json", *small],
        ["eval", "--model", "embedded", str(tmp_path / "run"), "--problems", "2", "--samples", "2", "--json"],
    ]
    code = WITHOUT_A_NETWORK.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
