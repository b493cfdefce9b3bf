"""What strangers can do with a run folder, a text or a wrong input.

    python benchmarks/reliability/strangers.py --output benchmarks/results/reliability-strangers.json

Four parts, all through the commands as a user calls them:

folders   run folders that name code, names of the hub, services, pickles; a file on the disk shows whether code ran
texts     hostile text through every table, live view and page: control characters that come out raw, a policy in the
          page, its size without plotly
inputs    wrong input to every command: it has to end with exit code 2, one line on standard error, nothing else
locales   training, report, evaluation and comparison where the encoding is not UTF-8

It trains a run of two steps first; all takes some minutes on two cores.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import tomli_w
import torch

from entropy_polarity import cli
from entropy_polarity.experiments.auditing import audited_before
from entropy_polarity.experiments.compare.experiment import read_comparison
from entropy_polarity.experiments.results import write_document
from entropy_polarity.policy import resolve_model
from entropy_polarity.report.audit import render_audit
from entropy_polarity.report.comparison import render_comparison
from entropy_polarity.report.live import LiveView
from entropy_polarity.report.page import render_page
from entropy_polarity.report.progress import ComparisonView, RunState
from entropy_polarity.report.terminal import print_audit, print_comparison, print_estimates
from entropy_polarity.runs.record import Run
from entropy_polarity.support.provenance import environment

RESULTS = Path(__file__).parents[1] / "results"
SMALL = ("trainer.max_steps=2", "trainer.save_steps=1", "trainer.per_device_train_batch_size=8",
         "trainer.num_generations=4", "evaluation.problems=2", "evaluation.samples=2", "task.numbers=[3]")  # fmt: skip
CANARY = """
import os
from pathlib import Path
Path(os.environ["CANARY"]).touch()
class Env:
    def reset(self, seed): return "x"
    def step(self, action): return "x", 1.0, True, ""
    def counts(self): return {}
"""
PAGE_BOUND = 6_000_000  # characters without plotly
LONGEST_LINE = 2600
RAW = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp\u2066\u2028\0\ud800\x7f[red]b[/]</script><script>x</script><img src=x>"
)


def papo(*arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command in this process; 99 where it ends in a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["papo", *arguments]
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException as error:  # what a user would see as a traceback
            code = 99
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return code, out.getvalue(), err.getvalue()


def fault_of(code: int, out: str, err: str, wanted: tuple[int, ...] = (2,)) -> str:
    """What is wrong with how a command ended; empty where nothing is. One that may also end well may have begun to say
    how it goes."""
    if code not in wanted:
        return f"exit code {code}: {err[-300:]}"
    if code == 2:
        lines = err.strip().splitlines()
        if (out and wanted == (2,)) or len(lines) != 1 or len(err) > LONGEST_LINE or not lines[0].startswith("papo: "):
            return f"{len(lines)} lines, {len(err)} characters, {len(out)} of output: {err[-300:]}"
    return "raw control characters" if RAW.search(out + err) else ""


# ---- folders ----------------------------------------------------------------------------------------------


class _Touches:
    """A pickle that leaves a file where it is read."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['CANARY']}",)


def _config(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def _pickled(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(_Touches()))


CODE = {"AutoConfig": "canary.C", "AutoModelForCausalLM": "canary.M", "AutoTokenizer": ["canary.T", "canary.T"]}
ENV = {"name": "env", "factory": "canary:Env"}
# What the recipe of the folder says, and what becomes of its checkpoint.
FOLDERS: dict[str, tuple[dict[str, Any], Callable[[Path], Any] | None]] = {
    "a class": ({"task": ENV}, None),
    "a function": ({"task": {"name": "env", "factory": "subprocess:check_output"}}, None),
    "a class with arguments": ({"task": ENV | {"settings": {"args": ["touch", "x"]}}}, None),
    "a data set of the hub": ({"task": {"name": "math", "data": "someone/problems"}}, None),
    "the tool python": ({"task": {"name": "math:gsm8k", "tools": ["python"]}}, None),
    "a model of the hub": ({"policy": {"model": "someone/model"}}, None),
    "a service to report to": ({"trainer": {"report_to": ["wandb"]}}, None),
    "a repository to push to": ({"trainer": {"push_to_hub": True, "hub_model_id": "someone/model"}}, None),
    "remote code for the reference": ({"trainer": {"trust_remote_code": True, "beta": 0.1}}, None),
    "arguments of the model": ({"trainer": {"model_init_kwargs": {"trust_remote_code": True}}}, None),
    "settings of DeepSpeed": ({"trainer": {"deepspeed": "ds.json"}}, None),
    "a server of vLLM": ({"trainer": {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "h"}}, None),
    "code in generation": ({"trainer": {"generation_kwargs": {"custom_generate": "someone/x"}}}, None),
    "code beside a known model": ({}, lambda c: _config(c / "config.json", auto_map=CODE)),
    "code of an unknown model": ({}, lambda c: _config(c / "config.json", auto_map=CODE, model_type="own")),
    "code of a tokenizer": ({}, lambda c: _config(c / "tokenizer_config.json", auto_map=CODE)),
    "a kernel of the hub": ({}, lambda c: _config(c / "config.json", attn_implementation="someone/kernel")),
    "pickled weights": ({}, _pickled),
    "an adapter": (
        {},
        lambda c: (c / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}', encoding="utf-8"),
    ),
    "a pickled optimizer": ({}, lambda c: (c / "optimizer.pt").write_bytes(pickle.dumps(_Touches()))),
    "a pickled random state": ({}, lambda c: (c / "rng_state.pth").write_bytes(pickle.dumps(_Touches()))),
    "a template that reaches for globals": (
        {},
        lambda c: (c / "chat_template.jinja").write_text(
            "{{ cycler.__init__.__globals__.os.system('x') }}", encoding="utf-8"
        ),
    ),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "eval": ("eval", "--model", "run", "--problems", "1", "--samples", "1"),
    "resume": ("train", "--resume", "run", "--max-steps", "3"),
    "audit": ("audit", "--model", "run", "--steps", "4", "--output", "audit"),
    "report": ("report", "run"),
}


def folders(made: Path) -> Iterator[tuple[str, str]]:
    """(what, fault) of each kind of folder with each command: no code may run, whatever the command says."""
    for kind, (tables, change) in FOLDERS.items():
        for name, command in COMMANDS.items():
            with _folder(made, tables, change):
                ended = papo(*command)
                fault = "code ran" if Path(os.environ["CANARY"]).exists() else fault_of(*ended, wanted=(0, 2))
                yield f"{kind}, {name}", fault
    for module in ("json", "numpy", "sitecustomize"):
        with _folder(made, {}, None):
            Path(f"{module}.py").write_text(CANARY, encoding="utf-8")
            code = "from entropy_polarity.tasks.workers import Workers; print(Workers('operator:add').map([(1, 2)]))"
            done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, encoding="utf-8")
            fault = "code ran" if Path(os.environ["CANARY"]).exists() else "" if "3" in done.stdout else done.stderr
            yield f"{module}.py in the current folder, a worker", fault


@contextlib.contextmanager
def _folder(made: Path, tables: dict[str, Any], change: Callable[[Path], Any] | None) -> Iterator[None]:
    """The current folder holds `run`, a stranger's, and a module canary that can be imported."""
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        shutil.copytree(made, "run")
        os.environ["CANARY"] = f"{place}/imported"
        Path("canary.py").write_text(CANARY, encoding="utf-8")
        config = Run.read(made).config
        config |= {key: table if key == "task" else config[key] | table for key, table in tables.items()}
        Path("run/config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        for checkpoint in Path("run/checkpoints").glob("checkpoint-*"):
            if change:
                shutil.copy("canary.py", checkpoint)
                change(checkpoint)
        sys.path.insert(0, place)
        try:
            yield
        finally:
            sys.path.remove(place)
            sys.modules.pop("canary", None)


# ---- texts ------------------------------------------------------------------------------------------------


def _with_hostile(document: Any, *words: str) -> Any:
    text = json.dumps(document)
    for word in words:
        text = text.replace(json.dumps(word), json.dumps(HOSTILE + word))
    return json.loads(text)


def texts(made: Path) -> Iterator[tuple[str, str]]:
    comparison = _with_hostile(read_comparison(RESULTS / "keydoor.json"), "papo", "grpo")
    audit = _with_hostile(audited_before(RESULTS / "audit-small.json"), "countdown", "grpo")
    read = Run.read(made)
    rows = [row | {"prompt": HOSTILE, "completion": HOSTILE, "verdict": HOSTILE} for row in read.rollouts]
    run = replace(read, rollouts=rows, config=read.config | {"title": HOSTILE})
    long = replace(
        read,
        rollouts=[row | {"prompt": "x" * 1_000_000} for row in rows],
        config=read.config | {"title": "x" * 1_000_000},
        metrics=[read.metrics[-1] | {"step": step} for step in range(50_000)],
    )
    stream = io.StringIO()
    state = RunState(HOSTILE, 0, "failed", 1, 3, HOSTILE)
    printed: dict[str, Callable[[], Any]] = {
        "tables of a comparison": lambda: print_comparison(comparison | {"failed": {HOSTILE: HOSTILE}}),
        "tables of an audit": lambda: print_audit(audit),
        "tables of a training": lambda: print_estimates({HOSTILE: run.summary["before"]}),
        "lines of a training": lambda: LiveView(HOSTILE, 3, stream).say(HOSTILE),
        "lines of a comparison": lambda: ComparisonView(HOSTILE, stream).watch([state]),
    }
    for name, call in printed.items():
        with contextlib.redirect_stdout(stream):
            call()
        raw = len(RAW.findall(stream.getvalue()))
        yield name, f"{raw} raw control characters" if raw or not stream.getvalue() else ""
        stream.seek(0)
        stream.truncate()
    pages = {"run": render_page(run), "long run": render_page(long), "comparison": render_comparison(comparison)}
    for name, page in (pages | {"audit": render_audit(audit)}).items():
        ours = re.sub(r"<script>/\*.*?</script>", "", page, count=1, flags=re.DOTALL)
        yield f"page of a {name}: raw control characters", str(len(RAW.findall(ours)) or "")
        yield f"page of a {name}: elements of others", "script" if ours.count("<script>") > 1 or "<img" in ours else ""
        yield (
            f"page of a {name}: policy",
            "" if "default-src &#39;none&#39;" in ours or "default-src 'none'" in ours else "none",
        )
        yield f"page of a {name}: size", f"{len(ours)} characters" if len(ours) > PAGE_BOUND else ""


# ---- inputs -----------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
FILES = {
    "empty": b"", "list.json": b"[]", "deep.json": DEEP.encode(), "binary.json": bytes(range(256)), "text.json": b"x",
    "bare.json": b'{"comparison": 1, "audit": 2, "runs": []}', "odd.json": b'{"comparison": 1, "plan": 3, "runs": {}}',
    "odd_audit.json": b'{"audit": 2, "recipe": [], "environment": 1, "runs": [{"updates": [{}]}]}',
    "latin.toml": "title = 'ü'".encode("latin-1"), "deep.toml": f"a = {DEEP}".encode(), "cut.toml": b"[task\n",
    "types.toml": b"task = 3", "names.toml": b"[task]\nnumbers = [3]", "plan.toml": b"[methods.'a b']\nname = 'papo'",
    "problems.csv": b"a,b", "problems.jsonl": b'{"q": 1}\n', "broken.jsonl": b"{",
    "half.jsonl": b'{"problem": "\\ud800"}\n',
}  # fmt: skip
# In inputs.txt these stand for what cannot be written there: NUL, half a character, what is deep, what is long.
STAND_INS = {"<nul>": "\0", "<half>": "\ud800", "<deep>": DEEP, "<long>": "x" * 9000}


def _commands() -> list[list[str]]:
    lines = Path(__file__).with_name("inputs.txt").read_text(encoding="utf-8").splitlines()
    found = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    for stand_in, text in STAND_INS.items():
        found = [[word.replace(stand_in, text) for word in words] for words in found]
    return found


def _models() -> None:
    """Folders of models, each with something wrong in it."""
    for name in ("t5", "deep", "empty_config", "cut_weights", "cut_tokenizer", "pickled", "odd_sizes"):
        shutil.copytree(resolve_model("embedded"), name)
    _config(Path("t5/config.json"), model_type="t5", is_encoder_decoder=True)
    _config(Path("odd_sizes/config.json"), hidden_size=-3)
    Path("deep/config.json").write_text(DEEP, encoding="utf-8")
    Path("empty_config/config.json").write_bytes(b"")
    Path("cut_weights/model.safetensors").write_bytes(Path("cut_weights/model.safetensors").read_bytes()[:999])
    Path("cut_tokenizer/tokenizer.json").write_text("{", encoding="utf-8")
    Path("pickled/model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, "pickled/pytorch_model.bin")


def inputs(made: Path) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        _models()
        for name, content in FILES.items():
            Path(name).write_bytes(content)
        for arguments in _commands():
            shown = " ".join(text if len(text) < 60 else f"{text[:20]}...{len(text)}" for text in arguments)
            yield repr(shown), fault_of(*papo(*arguments))


# ---- locales ----------------------------------------------------------------------------------------------


def locales(made: Path) -> Iterator[tuple[str, str]]:
    commands = {
        "training": ["train", "recipe.toml", "--output", "new", *(f"--set={o}" for o in SMALL)],
        "report": ["report", "new"],
        "evaluation": ["eval", "--model", "new", "--problems", "2", "--samples", "2", "--output", "out"],
        "comparison": ["compare", "--from", str(RESULTS / "keydoor.json"), "--output", "page"],
    }
    for name, variables in (
        ("C", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        ("de_DE.iso88591", {"LC_ALL": "de_DE.iso88591", "PYTHONUTF8": "0"}),
    ):
        there = [sys.executable, "-c", "import locale; locale.setlocale(locale.LC_ALL, '')"]
        if subprocess.run(there, env=os.environ | variables, capture_output=True).returncode:
            print(f"locale {name} is not installed: left out")
            continue
        with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
            recipe = 'title = "Übung → λ 🙂"\ntask = {name = "countdown", numbers = [3]}\n'
            Path("recipe.toml").write_text(recipe, encoding="utf-8")
            for what, arguments in commands.items():
                call = [sys.executable, "-P", "-m", "entropy_polarity.cli", *arguments]
                done = subprocess.run(call, capture_output=True, env=os.environ | variables)
                yield f"{what} in {name}", "" if done.returncode == 0 else done.stderr.decode("latin-1")[-300:]
            page = Path("new/report.html").read_text(encoding="utf-8")
            yield f"title in {name}", "" if "Übung → λ 🙂</h1>" in page else "another"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=["folders", "texts", "inputs", "locales"])
    arguments = parser.parse_args()
    output, parts, failures = arguments.output.resolve(), {}, []
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / "made"
        code, _, err = papo("train", "--output", str(made), *(f"--set={o}" for o in SMALL))
        if code:
            sys.exit(f"the run that is to be changed could not be made: {err[-500:]}")
        for name in arguments.parts:
            found = list(globals()[name](made))
            bad = [{"part": name, "what": what, "fault": fault} for what, fault in found if fault]
            parts[name] = {"tried": len(found), "held": len(found) - len(bad)}
            failures += bad
            print(name, parts[name], *(f"\n  {one['what']}: {one['fault']}" for one in bad), flush=True)
    about = {key: value for key, value in environment(0).items() if key != "command"}
    totals = {key: sum(part[key] for part in parts.values()) for key in ("tried", "held")}
    document = {"benchmark": "reliability-strangers", "environment": about, **totals, "parts": parts}
    write_document(output, document | {"failures": failures})


if __name__ == "__main__":
    main()
