"""Games of TextArena: seeds are episodes, a success is a whole point, and what was illegal pays nothing."""

import random

import pytest

from entropy_polarity.tasks import make_task
from entropy_polarity.tasks.textarena import GAMES

pytest.importorskip("textarena", reason="needs the extra [games]")


def two_numbers(rng):
    return f"{rng.randint(0, 4)} {rng.randint(0, 4)}"


def direction(rng):
    return rng.choice(["up", "down", "left", "right"])


PLAYERS = {
    "2048": direction,
    "Bandit": lambda rng: rng.choice(["red", "blue", "green"]),
    "Blackjack": lambda rng: rng.choice(["hit", "stand"]),
    "FrozenLake": direction,
    "GuessTheNumber": lambda rng: str(rng.randint(1, 20)),
    "LightsOut": two_numbers,
    "Mastermind": lambda rng: " ".join(map(str, rng.sample(range(1, 7), 4))),
    "Minesweeper-small": two_numbers,
    "Secretary": lambda rng: rng.choice(["continue", "continue", "accept"]),
    "Sokoban": direction,
}


def episode(game, seed, player, lane=0):
    """What was heard, the last answer and the facts."""
    env, rng = game.env(lane), random.Random(f"player {seed}")
    heard = [env.reset(seed)]
    for _ in range(game.max_turns):
        answer = env.step(player(rng))
        heard.append(answer.observation)
        if answer.done:
            break
    return heard, answer, env.facts()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "GuessTheNumber" else pytest.mark.slow) for n in PLAYERS]
)
def test_a_seed_is_an_episode(name):
    game = make_task(f"textarena:{name}", processes=2)
    played = [episode(game, seed, PLAYERS[name]) for seed in range(5)]
    assert played == [episode(game, seed, PLAYERS[name], lane=1) for seed in range(5)]
    assert len({str(heard) for heard, _, _ in played}) > 1
    for heard, answer, facts in played:
        assert not any(text.startswith("[") for text in heard[1:]), "its own action is not told again"
        assert 0 <= facts["illegal"] <= 1
        if answer.done:
            assert answer.reason in game.reasons
            assert (answer.reason == "won") == (answer.reward >= 1)
    game.close()


def test_every_kind_of_game_has_a_player():
    assert {name.partition("-")[0] for name in PLAYERS} == set(GAMES)


def test_an_illegal_ending_pays_nothing_whatever_it_scored():
    game = make_task("textarena:GuessTheNumber-v0", processes=1)
    env = game.env()
    env.reset(0)
    assert "higher" in (said := env.step("[10]").observation) or "lower" in said
    assert "invalid move" in env.step("[10]").observation, "one is forgiven"
    answer = env.step("ten")
    assert (answer.reward, answer.done, answer.reason) == (0.0, True, "illegal move")
    assert answer.observation.startswith("Invalid Move: ")
    assert env.facts()["score"] > 0.4
    assert env.facts()["illegal"] == 2 / 3
    game.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("textarena:Wordle-v0", f"not a game that works offline and from a seed, as these do: {', '.join(GAMES)}"),
        ("textarena:GuessWho", "task textarena:GuessWho: not a game that works offline"),
        ("textarena", "not a game that works offline"),
        ("textarena:Minesweeper-tiny", "TextArena has no Minesweeper-v0-tiny: expected one of Minesweeper-v0, Mines"),
    ],
)
def test_other_games_are_refused_in_a_line(name, message):
    with pytest.raises(ValueError, match=message) as told:
        make_task(name)
    assert "\n" not in str(told.value)
