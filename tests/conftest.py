"""Settings that every test needs: no network, one thread for the tiny models, short and repeatable searches."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of processes that tests start, whose libraries would say on standard error that they trust the locale.
os.environ.setdefault("PYTHONWARNINGS", "ignore::EncodingWarning")

import jaxtyping
import pytest
import torch
from hypothesis import settings
from small import SMALL

if not torch.cuda.is_available():  # read when triton is first imported: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # two threads on matrices this small cost more than they give
settings.register_profile("project", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("project")


@pytest.fixture(scope="session")
def embedded() -> str:
    """The folder of the embedded policy."""
    from entropy_polarity.policy import resolve_model

    return resolve_model("embedded")


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory):
    """Two finished runs of six steps, one with each of the controllers that log metrics of their own."""
    from entropy_polarity.experiments.training import train
    from entropy_polarity.runs.recipe import load_recipe
    from entropy_polarity.runs.record import Run

    folder = tmp_path_factory.mktemp("runs")
    for controller in ("trend", "reference"):
        method = f'method={{name="papo", controller="{controller}"}}'
        train(load_recipe("countdown", [*SMALL, method]), folder / controller)
    return [Run.read(folder / controller) for controller in ("trend", "reference")]


@pytest.fixture
def untyped():
    """As users call it: the type checks of the test suite would answer a wrong argument before the code does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def python_runs():
    """The tool `python` runs here: where the system has no boundary for it, behind its other layers."""
    from entropy_polarity.tasks.boundary import examine
    from entropy_polarity.tasks.tools import CONSENT

    with pytest.MonkeyPatch.context() as patch:
        if examine().lacking:
            patch.setenv(CONSENT, "1")
        yield


@pytest.fixture(scope="session")
def chromium() -> list[str]:
    """The command of a browser without network or window."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return [path, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
                    "--window-size=1180,2400", "--virtual-time-budget=5000"]  # fmt: skip
    pytest.skip("no Chromium here: apt-get install chromium")
