"""Environments of other people: what misbehaves ends its own episode, the others go on as if nothing had been."""

import random
import threading

import psutil
import pytest
import torch
from test_tasks_training import few_steps, policy

from entropy_polarity.experiments.evaluate import Settings, evaluate_models
from entropy_polarity.experiments.setup import check_recipe
from entropy_polarity.generation import Sampling
from entropy_polarity.generation.episodes import _Environments, play
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.runs.recipe import load_recipe
from entropy_polarity.runs.record import Run
from entropy_polarity.tasks import distinct_problems, make_task
from entropy_polarity.tasks.environment_worker import MAX_LIVE
from entropy_polarity.tasks.environments import Environment, Outcome
from entropy_polarity.tasks.games import GuessEnv, SmallGame
from entropy_polarity.tasks.protocol import EpisodeOverError, Game, StepResult, TextEnv


@pytest.fixture
def obedient():
    """A game in one process, of which nothing is left at the end."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    game = Environment(factory="misbehaving:Obedient", seconds=1.0, memory_gib=1.8, processes=1)
    yield game
    game.close()
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
    assert left == [], "a process or a zombie is left"


def started(game, seed):
    env = game.env()
    return env, env.reset(seed)


def heard(game, seed, *actions):
    env, first = started(game, seed)
    return [first, *(env.step(action).observation for action in actions)]


def test_it_is_a_game(obedient):
    assert isinstance(obedient, Game)
    assert isinstance(obedient.env(), TextEnv)
    made = make_task("env", factory="misbehaving:Obedient", seconds=1, memory_gib=1.8, processes=1)
    assert made == obedient
    assert obedient.reasons[-1] == "gave up"
    train, test = (distinct_problems(obedient, 0, split, 50) for split in ("train", "test"))
    assert train[:9] == distinct_problems(obedient, 0, "train", 9)
    assert {p.key for p in train}.isdisjoint({p.key for p in test})
    assert all(0 <= p.metadata["seed"] < 2**32 for p in train + test)
    made.close()


def test_an_episode_is_its_seed_and_its_actions(obedient):
    assert heard(obedient, 5, "a", "b") == heard(obedient, 5, "c", "d")
    assert heard(obedient, 5, "a") != heard(obedient, 6, "a")
    assert heard(obedient, 5, "print", "a")[1] == heard(obedient, 5, "a")[1], "what it prints is no answer"


def test_episodes_do_not_share_random_numbers(obedient):
    alone = [heard(obedient, seed, "a", "b", "c") for seed in (1, 2)]
    envs, together = zip(*(started(obedient, seed) for seed in (1, 2)), strict=True)
    together = [[first] for first in together]
    for action in "abc":
        for env, said in zip(envs, together, strict=True):
            said.append(env.step(action).observation)
    assert together == alone
    assert random.Random(1).random() != float(alone[0][1].split()[1]), "reseeded by the environment, and numpy with it"


def test_the_ends_of_an_episode(obedient):
    def end(action):
        env, _ = started(obedient, 1)
        answer = env.step(action)
        assert env.counts() == {"count": 1.0}
        return answer.reward, answer.done, answer.reason

    assert end("win") == (1.0, True, "won")
    assert end("end") == (0.5, True, "lost")
    assert end("give up") == (0.0, True, "gave up")
    assert len(started(obedient, 1)[0].step("long").observation) == obedient.max_observation_characters


@pytest.mark.parametrize(
    ("misdeed", "reason", "message"),
    [
        ("hang", "timed out", "timed out"),
        ("deaf", "timed out", "timed out"),
        ("child", "timed out", "timed out"),
        ("exit", "worker died", "worker died"),
        ("eat", "out of memory", "out of memory"),
        ("raise", "raised", "KeyError: 'broken\\nin two'"),
        ("sys.exit", "raised", "SystemExit: 3"),
        ("read", "raised", "EOFError: EOF when reading a line"),
        ("nan", "raised", "ValueError: a reward of nan"),
        ("nothing", "raised", "TypeError: .*"),
    ],
)
def test_what_misbehaves_ends_its_own_episode(obedient, misdeed, reason, message):
    undisturbed = heard(obedient, 3, "a", "b", "c")
    (other, first), (env, _) = started(obedient, 3), started(obedient, 4)
    said = [first, other.step("a").observation]
    env.step("a")
    with pytest.raises(EpisodeOverError, match=f"^{message}$".replace("\\n", r"\\n")) as over:
        env.step(misdeed)
    assert over.value.reason == reason
    assert reason in obedient.reasons
    assert [*said, other.step("b").observation, other.step("c").observation] == undisturbed


@pytest.mark.parametrize(("misdeed", "reason"), [("hang", "timed out"), ("raise", "raised"), ("exit", "worker died")])
def test_a_start_that_misbehaves(misdeed, reason):
    settings = {"start": misdeed}
    game = Environment(factory="misbehaving:Obedient", settings=settings, seconds=0.5, processes=1)
    with pytest.raises(EpisodeOverError) as over:
        started(game, 0)
    assert over.value.reason == reason
    game.close()


def test_where_no_episode_can_be_started_nothing_is(tmp_path):
    settings = ["factory=misbehaving:Obedient", "settings={start='raise'}", "processes=1"]
    said = r"task env: no episode can be started \(KeyError: 'broken"
    with pytest.raises(ValueError, match=said):
        evaluate_models(["embedded:guess"], Settings(3, 1), task="env", task_settings=settings, output=tmp_path / "out")
    recipe = load_recipe("guess", ["task={name='env'}", *(f"task.{setting}" for setting in settings)])
    with pytest.raises(ValueError, match=said):
        check_recipe(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_repeated_is_told_on(obedient):
    env, _ = started(obedient, 1)
    env.step("process")
    obedient.close()
    with pytest.raises(EpisodeOverError, match="not repeatable") as over:
        env.step("a")
    assert over.value.reason == "not repeatable"


def test_memory_is_each_episodes_own(obedient):
    """Both fit, but not together in one process."""
    (first, _), (second, _) = started(obedient, 1), started(obedient, 2)
    assert first.step("keep").observation.startswith("1 ")
    assert second.step("keep").observation.startswith("1 ")
    assert first.step("a").observation.startswith("2 ")


def test_live_episodes_are_bounded_and_those_that_are_over_leave(obedient):
    undisturbed = heard(obedient, 0, "a")
    episodes = [started(obedient, seed) for seed in range(MAX_LIVE + 1)]
    oldest, first = episodes[0]
    asked = oldest.process.ask("step", oldest.number, "a", 100)
    assert asked == Outcome(None), "it had to go"
    assert [first, oldest.step("a").observation] == undisturbed, "and is played again"
    number = oldest.number
    del episodes, oldest
    env, _ = started(obedient, 0)
    assert env.process.ask("step", number, "a", 100) == Outcome(None)
    assert env.process.over == [], "the process was told which are over"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "task env: factory is ''; expected 'module:Class'"),
        ({"factory": "no_such_module:Game"}, "no_such_module:Game cannot be imported: No module named 'no_such_mod"),
        ({"factory": "misbehaving:Disobedient"}, "task env: misbehaving:Disobedient cannot be played: .*no attribute"),
        ({"factory": "collections:Counter"}, "cannot be played: it has no reset and no step and no counts"),
        (
            {"factory": "misbehaving:Outdated"},
            "Outdated cannot be played: its method facts is called counts since .*: rename it",
        ),
        ({"factory": "misbehaving:Obedient", "settings": {"size": 3}}, "unexpected keyword argument 'size'"),
        ({"factory": "misbehaving:Obedient", "settings": {"build": "hang"}, "seconds": 0.2}, "played: timed out"),
        ({"factory": "misbehaving:Obedient", "settings": {"start": {1}}}, "what JSON can hold"),
        ({"factory": "misbehaving:Obedient", "seconds": 0}, "seconds is 0; expected a positive number"),
        ({"factory": "misbehaving:Obedient", "turns": 3}, "unknown setting of task 'env' 'turns': did you mean"),
    ],
)
def test_mistakes_are_told_at_once_in_a_line(settings, message):
    with pytest.raises(ValueError, match=message) as told:
        make_task("env", **settings)
    assert "\n" not in str(told.value)


class InTwoProcesses(SmallGame):
    """Environments that only answer when those of both processes are asked at the same time."""

    environment, name, max_turns, max_action_tokens = GuessEnv, "two", 3, 3
    barrier = threading.Barrier(2, timeout=20)

    def envs(self, count):
        return [[f"a{i}" for i in range(count // 2)], [f"b{i}" for i in range(count // 2)]]


def test_processes_are_asked_at_the_same_time():
    game = InTwoProcesses()
    environments = _Environments(game, 6)
    assert environments.envs == ["a0", "a1", "a2", "b0", "b1", "b2"]

    def call(i):
        game.barrier.wait()
        return StepResult(environments.envs[i])

    asked = environments.ask([0, 1, 4, 5], call)
    assert asked == {0: StepResult("a0"), 1: StepResult("a1"), 4: StepResult("b1"), 5: StepResult("b2")}
    assert list(environments.ask([5, 0, 4, 1], call)) == [0, 1, 4, 5]


def test_neighbours_share_a_process():
    game = Environment(factory="misbehaving:Obedient", processes=3)
    assert [len(group) for group in game.envs(8)] == [3, 3, 2]
    assert [len({env.process for env in group}) for group in game.envs(8)] == [1, 1, 1]
    assert len({group[0].process for group in game.envs(8)}) == 3
    assert sum(map(len, game.envs(2))) == 2
    game.close()


def test_play_ends_every_episode_with_its_reason(tmp_path):
    model, tokenizer = load_policy(policy(tmp_path, "llama", chat=False))
    game = Environment(factory="misbehaving:Moody", max_turns=3, max_action_tokens=200, seconds=1.0, processes=2)
    problems = [game.problem(0, i, "train") for i in range(18)]
    torch.manual_seed(0)
    episodes = play(model, tokenizer, game, problems, Sampling())
    expected = ["timed out", "worker died", "raised", *["out of turns"] * 3]
    for problem, episode in zip(problems, episodes, strict=True):
        assert episode.reason in (expected[problem.metadata["seed"] // 2 % 6], "action too long")
        assert episode.observation.startswith("start 0.")
    assert {episode.reason for episode in episodes} >= set(expected[:3])
    game.close()


def test_a_policy_trains_while_environments_hang(tmp_path):
    model = policy(tmp_path / "model", "llama", chat=True)
    task = (
        "{name='env', factory='misbehaving:Moody', max_turns=2, max_action_tokens=100, seconds=0.3, processes=2, "
        "max_observation_characters=40}"
    )
    summary = few_steps(model, task, tmp_path / "run", "trainer.max_steps=2", "trainer.num_iterations=1")
    assert summary["status"] == "finished"
    run = Run.read(tmp_path / "run")
    rows = [row for row in run.metrics if "verdict/timed_out" in row]
    assert len(rows) == 2
    assert all(sum(v for k, v in row.items() if k.startswith("verdict/")) == pytest.approx(1) for row in rows)
    assert sum(row["verdict/timed_out"] + row["verdict/worker_died"] + row["verdict/raised"] for row in rows) > 0
    assert run.rollouts[0]["prompt"].startswith("start 0."), "the record shows what the policy read"


def test_what_an_environment_of_0_1_imports_says_what_it_is_now(tmp_path, monkeypatch):
    (tmp_path / "former.py").write_text("from entropy_polarity.tasks.games import Answer\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be imported: .*StepResult now, and .* counts\(\) for facts\(\)"):
        make_task("env", factory="former:Env")
