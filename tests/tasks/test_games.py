"""Games: environments by hand, episodes against re-encoding, and what an environment says is never learnt."""

import random

import pytest
import torch
from heard import assert_only_the_policy_is_learnt, train_watched, written
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tasks_training import few_steps, policy

from entropy_polarity.experiments.setup import prompts_of, quiet_trainer, trainer_config
from entropy_polarity.experiments.training import train
from entropy_polarity.generation import GREEDY, Sampling
from entropy_polarity.generation.episodes import CachedContext, Format, play
from entropy_polarity.policy.loading import load_policy
from entropy_polarity.policy.tokenizer import character_tokenizer
from entropy_polarity.report.heatmap import heatmap_of
from entropy_polarity.runs.recipe import load_recipe, with_flags
from entropy_polarity.runs.record import Run
from entropy_polarity.tasks import distinct_problems, make_task
from entropy_polarity.tasks.games import Guess, GuessEnv, KeyDoor, KeyDoorEnv, SmallGame
from entropy_polarity.tasks.protocol import Game, StepResult, TextEnv


def won(game, player, episodes):
    wins = 0
    for index in range(episodes):
        env, rng = game.env(), random.Random(index)
        env.reset(game.problem(1, index, "train").metadata["seed"])
        for _ in range(game.max_turns):
            answer = env.step(player(env, rng))
            wins += answer.reward
            if answer.done:
                break
    return wins / episodes


def test_guess_by_hand():
    env = GuessEnv()
    assert env.reset(5) == "1-32:"
    assert env.number == 17
    assert [env.step(guess) for guess in ("16", "24", "08")] == [StepResult(">"), StepResult("<"), StepResult(">")]
    assert (env.low, env.high) == (17, 23)
    assert env.step("17") == StepResult("", 1.0, True, "won")
    assert env.counts()["infeasible"] == 1 / 4
    assert env.counts()["off_centre"] == pytest.approx((0 + 0 + 1 + 1) / 4)  # 16 and 24 halve what was possible


@pytest.mark.parametrize("action", ["", "0", "33", "1.5", "-3", "１６", "16 ", "9" * 10_000, "<eos>"])
def test_guess_refuses_what_is_no_guess(action):
    env = GuessEnv()
    env.reset(0)
    assert env.step(action) == StepResult("", 0.0, True, "malformed action")


def test_guess_references():
    assert won(Guess(), lambda env, rng: str((env.low + env.high) // 2), 500) == 1.0
    assert 0.65 < won(Guess(), lambda env, rng: str(rng.randint(env.low, env.high)), 3000) < 0.75


def test_keydoor_by_hand():
    env = KeyDoorEnv()
    assert env.reset(1) == "....A\n.....\n.....\n...K.\n....D\n:"
    assert env.step("u").observation == "....A\n.....\n.....\n...K.\n....D\n:", "a wall"
    for move in "lddd":
        answer = env.step(move)
    assert answer.observation == ".....\n.....\n.....\n...B.\n....D\n:"
    assert env.step("d").observation == ".....\n.....\n.....\n.....\n...BD\n:"
    assert env.step("r") == StepResult("", 1.0, True, "won")
    assert env.counts() == {"key": 1.0, "blocked": 1 / 7}
    env = KeyDoorEnv()
    env.reset(1)
    for move in "dddd":
        answer = env.step(move)
    assert not answer.done, "the door is shut without the key"
    assert env.step("x").reason == "malformed action"


@pytest.mark.parametrize("game", [Guess(), KeyDoor()])
def test_episodes_are_of_seed_and_index(game):
    assert isinstance(game, Game)
    assert isinstance(game.env(), TextEnv)
    assert make_task(game.name) == game
    train = [game.problem(0, i, "train") for i in range(50)]
    assert train == [game.problem(0, i, "train") for i in range(50)]
    assert {p.key for p in train}.isdisjoint({p.key for p in distinct_problems(game, 0, "test", 50)})
    assert all(game.env().reset(p.metadata["seed"]) == p.prompt for p in train)


class Forgiving(KeyDoorEnv):
    """Any action is a move: an untrained policy plays on."""

    def step(self, action):
        answer = super().step("udlr"[sum(map(ord, action)) % 4])
        return answer._replace(observation=answer.observation[: 1 + len(action) * 3])


class ForgivingGame(SmallGame):
    environment, name, max_turns, max_action_tokens = Forgiving, "forgiving", 5, 4


class Reencoding(CachedContext):
    """What `CachedContext` must agree with: every episode is read anew for each token."""

    def __init__(self, model, batch):
        self.model, self.ids = model, [[] for _ in range(batch)]

    def read(self, tokens):
        for row, new in zip(self.ids, tokens, strict=True):
            row += new
        return torch.stack([self.model(input_ids=torch.tensor([row])).logits[0, -1].float() for row in self.ids])


def talkative(folder, architecture, chat):
    """An untrained policy that often ends its actions."""
    model, tokenizer = load_policy(policy(folder, architecture, chat))
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        head.register_forward_hook(lambda module, inputs, out: out + 4.0 * (torch.arange(out.size(-1)) == 1))
    return model, tokenizer


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_the_cache_plays_what_re_encoding_plays(architecture, chat, tmp_path):
    model, tokenizer = talkative(tmp_path, architecture, chat)
    model = model.double()  # no ties that rounding breaks
    model.config.sliding_window = 512
    game = ForgivingGame()
    problems = [game.problem(0, i, "train") for i in range(12)]
    played = []
    for context in ({}, {"context": Reencoding}):
        torch.manual_seed(0)
        played.append(play(model, tokenizer, game, problems, Sampling(), batch_size=7, **context))
    assert played[0] == played[1]
    assert {episode.reason for episode in played[0]} >= {"out of turns", "action too long"}
    greedy = [play(model, tokenizer, game, problems, GREEDY, **c) for c in ({}, {"context": Reencoding})]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_tokens_know_who_said_them(chat, tmp_path):
    model, tokenizer = talkative(tmp_path, "llama", chat)
    game, form = ForgivingGame(), Format(tokenizer)
    torch.manual_seed(0)
    for episode in play(model, tokenizer, game, [game.problem(0, i, "train") for i in range(20)], Sampling()):
        assert len(episode.completion_ids) == len(episode.env_mask) == len(episode.turn)
        assert episode.turn == sorted(episode.turn)
        expected = []
        for turn, (action, heard) in enumerate(episode.said):
            ids = [*tokenizer(action, add_special_tokens=False)["input_ids"], form.end] if action else [form.end]
            expected += [(token, 1) for token in ids]
            if turn + 1 < len(episode.said) or episode.reason == "action too long":
                expected += [(token, 0) for token in form.next(heard)]
        found = list(zip(episode.completion_ids, episode.env_mask, strict=True))
        if not {0, 2} & set(episode.completion_ids):  # <pad> and <unk> have no text of their own
            assert found[: len(expected)] == expected
        assert episode.completion_ids[-1] == form.end, "TRL takes anything else for cut off"


class Breaking(GuessEnv):
    """Raises in its second turn, or at once."""

    def reset(self, seed):
        if seed % 5 == 0:
            raise RuntimeError("no start")
        return super().reset(seed)

    def step(self, action):
        if getattr(self, "asked", False):
            raise KeyError("broken")
        self.asked = True
        return StepResult("<")


class BreakingGame(SmallGame):
    environment, name, max_turns, max_action_tokens = Breaking, "breaking", 6, 4


def test_an_environment_that_raises_ends_its_episode_alone(tmp_path):
    model, tokenizer = talkative(tmp_path, "llama", chat=False)
    game = BreakingGame()
    problems = [Guess().problem(0, i, "train") for i in range(30)]
    torch.manual_seed(0)
    episodes = play(model, tokenizer, game, problems, Sampling())
    for problem, episode in zip(problems, episodes, strict=True):
        if problem.metadata["seed"] % 5 == 0:
            assert (episode.reason, episode.completion_ids) == ("raised", [])
        elif len(episode.said) == 2:
            assert episode.reason == "raised"
            assert episode.said[1][1] == "KeyError: 'broken'"
    assert {episode.reason for episode in episodes} == {"raised", "action too long"}


def test_the_same_seed_plays_the_same_and_the_mode_stays(tmp_path):
    model, tokenizer = talkative(tmp_path, "llama", chat=False)
    problems = [Guess().problem(0, i, "train") for i in range(9)]
    model.train()
    played = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        played.append(play(model, tokenizer, Guess(), problems, Sampling()))
    assert model.training
    assert played[0] == played[1] != played[2]


def games_policy(folder):
    """Untrained, with the tokenizer of the games."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer("guess")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
@pytest.mark.parametrize("name", ["guess", "keydoor"])
def test_a_few_steps_of_a_game(name, architecture, tmp_path):
    model = policy(tmp_path / "model", architecture, chat=name == "guess")
    summary = few_steps(model, f"{{name='{name}'}}", tmp_path / "run")
    assert summary["status"] == "finished"
    assert set(summary["after"]["facts"]) >= {"turns"}
    rows = [row for row in Run.read(tmp_path / "run").metrics if "verdict/won" in row]
    assert rows
    for row in rows:
        assert sum(value for key, value in row.items() if key.startswith("verdict/")) == pytest.approx(1)
        assert row["episode/turns"] >= 0


def test_a_resumed_game_goes_on_as_if_never_stopped(tmp_path):
    model = games_policy(tmp_path / "model")
    more = ("trainer.save_steps=2", "trainer.num_iterations=1")
    few_steps(model, "{name='guess'}", tmp_path / "whole", "trainer.max_steps=4", *more)
    few_steps(model, "{name='guess'}", tmp_path / "halves", "trainer.max_steps=2", *more)
    recipe = with_flags(load_recipe(str(tmp_path / "halves/config.toml")), max_steps=4)
    train(recipe, tmp_path / "halves", resume=True)
    whole, halves = (Run.read(tmp_path / name) for name in ("whole", "halves"))
    assert whole.series("reward") == halves.series("reward")
    assert whole.series("polarity/entropy") == halves.series("polarity/entropy")
    assert [r["completion"] for r in whole.rollouts] == [r["completion"] for r in halves.rollouts]


class Babbling(GuessEnv):
    """Says what it is told to say: whatever that is, training must not see it."""

    words = "<"

    def step(self, action):
        return StepResult(self.words)


class BabblingGame(SmallGame):
    environment, name, max_turns, max_action_tokens = Babbling, "babbling", 3, 4
    reasons = Guess.reasons


@settings(max_examples=6, deadline=None)
@given(
    words=st.text(alphabet="0123456789<>-", min_size=1, max_size=9),
    method=st.sampled_from(["grpo", "papo", "top_entropy", "clip_cov", "steer", "entropy_bonus"]),
)
def test_environment_tokens_enter_no_statistic_and_no_gradient(words, method, tmp_path_factory):
    """Their statistics are made NaN before any method sees them, and the states before them must get no gradient."""
    folder = tmp_path_factory.mktemp("babble")
    model, tokenizer = load_policy(games_policy(folder / "model"))
    Babbling.words = words
    overrides = ["trainer.max_steps=2", "trainer.per_device_train_batch_size=8", "trainer.num_generations=4",
                 "trainer.num_iterations=2", "trainer.use_cpu=true", "task={name='guess'}"]  # fmt: skip
    overrides += ["method.coefficient=0.01"] * (method == "entropy_bonus")
    recipe, game = load_recipe("countdown", overrides, method), BabblingGame()
    config = trainer_config(recipe, folder / "run", game)
    trainer = quiet_trainer(model, tokenizer, config, *prompts_of(game, tokenizer, config, 0))
    episodes = []
    reward = trainer.reward_funcs[0]
    play_rewards = type(reward).__call__

    def half_win(self, completions, **rest):
        play_rewards(self, completions, **rest)
        episodes.extend(rest["episode"])
        return [float(i % 2) for i in range(len(completions))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(reward), "__call__", half_win)
        watched = train_watched(trainer)

    mask = written(watched.rollouts[0])
    for row, episode in enumerate(episodes):
        assert mask[row].int().tolist() == episode.env_mask + [0] * (mask.size(1) - len(episode.env_mask))
    assert any(not all(episode.env_mask) for episode in episodes)
    assert_only_the_policy_is_learnt(trainer, watched)


def test_the_record_and_the_page_keep_the_words_of_the_environment(tmp_path):
    few_steps(games_policy(tmp_path / "model"), "{name='guess'}", tmp_path / "run", "record.completions=4")
    run = Run.read(tmp_path / "run")
    rows = [row for row in run.rollouts if row["step"] == 1]
    tokens = run.tokens(1)
    for row in rows:
        mine = [token for token in tokens if token["rollout"] == row["rollout"]]
        assert [token["position"] for token in mine] == list(range(len(mine)))
        for token in mine:
            assert token["from_policy"] == (token["entropy"] == token["entropy"])
    heard = [token for token in tokens if not token["from_policy"]]
    assert heard
    turns = [turn for rollout in heatmap_of(run).rollouts for turn in rollout.turns]
    recorded = [token for step in {row["step"] for row in run.rollouts} for token in run.tokens(step)]
    assert sum(token.colour is None for turn in turns for token in turn) == sum(not t["from_policy"] for t in recorded)
    for turn in turns:  # what the environment says, then the action
        said = [token.colour is None for token in turn]
        assert said == sorted(said, reverse=True)
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert page.count('<span class="token"') == sum(t["from_policy"] for t in recorded)
