"""Text adventures: a seed is a game, all its points are a success, and nothing is left on the disk."""

import random

import pytest

from entropy_polarity.tasks import make_task
from entropy_polarity.tasks.textworld import DEFAULTS

pytest.importorskip("textworld", reason="needs the extra [games]")


def episode(game, seed, process=0):
    """A player that picks any of the commands that it is told."""
    env, rng = game.envs(2)[process][0], random.Random(seed)
    heard, paid = [env.reset(seed)], 0.0
    for _ in range(12):
        answer = env.step(rng.choice(heard[-1].rpartition("Commands: ")[2].split(", ")))
        heard.append(answer.observation)
        paid += answer.reward
        if answer.done:
            break
    return heard, paid, answer.reason, env.counts()


@pytest.mark.slow
@pytest.mark.parametrize("challenge", list(DEFAULTS))
def test_a_seed_is_a_game(challenge, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    limits = {"processes": 2, "max_observation_characters": 9000}
    game = make_task(f"textworld:{challenge}", show_commands=True, **limits)
    played = [episode(game, seed) for seed in (0, 1)]
    assert played[1] == episode(game, 1, process=1), "and the same in another process"
    assert played[0][0][0] != played[1][0][0]
    for heard, paid, reason, counts in played:
        assert counts == {"score": paid, "useless": 0.0}
        assert (reason == "won") == (paid == 1)
        assert not any("$$" in text or "\n>" in text or "\n\n" in text for text in heard), "words of the game alone"
    game.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_game_by_hand():
    game = make_task("textworld:treasure_hunter", processes=1, options={"level": 1})
    env = game.env()
    assert "-= " in env.reset(3)
    # To the interpreter a backslash and keys beyond the printable ones say what to do, for ever or to its end.
    hostile = (
        "\\boxed{go east}",
        "\\help",
        "go east\\n",
        "z\x11",
        "\x12v",
        "z\x18\x11",
        "\x1b[A",
        "\x7f",
        "\x85",
        "z\0",
    )
    for command in ("", "  ", "save", "QUIT now", "xyzzy", "ü", "look\nlook", *hostile):
        assert not env.step(command).done
    assert env.counts() == {"score": 0.0, "useless": 1.0}
    assert "carrying nothing" in env.step(" inventory ").observation
    game.close()
    assert "carrying nothing" in env.step("inventory").observation, "made and played again"
    game.close()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("textworld:cook", {}, "unknown TextWorld challenge 'cook': did you mean 'cooking'?"),
        ("textworld:simple", {"rewards": "often"}, "argument --rewards: invalid choice: 'often'"),
        ("textworld:cooking", {"tke": 3}, "unrecognized arguments: --tke=3"),
        ("textworld:coin_collector", {"level": 500}, "level is 500; expected 1 to 300"),
    ],
)
def test_mistakes_are_told_at_once_in_a_line(name, options, message):
    with pytest.raises(ValueError, match=message) as told:
        make_task(name, options=options)
    assert "\n" not in str(told.value)
