"""Games of TextArena: seeds are episodes, a success is a whole point, and what was illegal pays nothing."""

import itertools
import random

import pytest

from entropy_polarity.tasks import make_task
from entropy_polarity.tasks.textarena import GAMES, ArenaEnv

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


def episode(game, seed, player, process=0):
    """What was heard, the last answer and the counts."""
    env, rng = game.envs(2)[process][0], random.Random(f"player {seed}")
    heard = [env.reset(seed)]
    for _ in range(game.max_turns):
        answer = env.step(player(rng))
        heard.append(answer.observation)
        if answer.done:
            break
    return heard, answer, env.counts()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "GuessTheNumber" else pytest.mark.slow) for n in PLAYERS]
)
def test_a_seed_is_an_episode(name):
    game = make_task(f"textarena:{name}", processes=2)
    played = [episode(game, seed, PLAYERS[name]) for seed in range(5)]
    assert played == [episode(game, seed, PLAYERS[name], process=1) for seed in range(5)]
    assert len({str(heard) for heard, _, _ in played}) > 1
    for heard, answer, counts in played:
        assert not any(text.startswith("[") for text in heard[1:]), "its own action is not told again"
        assert 0 <= counts["illegal"] <= 1
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
    assert env.counts()["score"] > 0.4
    assert env.counts()["illegal"] == 2 / 3
    game.close()


def walk(start, goal, passable):
    """The moves of a shortest path; a state is hashable, `passable` yields (move, next state)."""
    paths, waiting = {start: []}, [start]
    for state in waiting:
        if goal(state):
            return paths[state]
        for move, after in passable(state):
            if after not in paths:
                paths[after] = [*paths[state], move]
                waiting.append(after)
    raise AssertionError("there is no way")


STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def best_bandit(env, turn):
    means = env.state.game_state["ground_truth"]
    return max(means, key=means.get)


def worst_bandit(env, turn):
    means = env.state.game_state["ground_truth"]
    return min(means, key=means.get)


def best_blackjack(env, turn):
    return "hit" if env._hand_score(env.state.game_state["player_hand"]) < 17 else "stand"


def frozen(env, goal):
    state = env.state.game_state
    grid, size = state["grid"], env.size

    def passable(at):
        for move, (down, right) in STEPS.items():
            after = at[0] + down, at[1] + right
            walked = at == state["player_pos"] or grid[at[0]][at[1]] == " "
            if walked and 0 <= after[0] < size and 0 <= after[1] < size:
                yield move, after

    return walk(state["player_pos"], lambda at: grid[at[0]][at[1]] == goal, passable)[0]


def best_lights_out(env, turn):
    """The fewest presses that put out all lights: each choice in the first row decides the rows below."""
    size, grid = env.size, env.state.game_state["grid"]

    def presses(first):
        lights, pressed = [list(row) for row in grid], []
        for row in range(size):
            wanted = first if row == 0 else lights[row - 1]
            for column in [column for column in range(size) if wanted[column]]:
                env._toggle_lights(lights, row, column)
                pressed.append((row, column))
        return pressed if not any(map(any, lights)) else None

    ways = [way for first in itertools.product([False, True], repeat=size) if (way := presses(first)) is not None]
    row, column = min(ways, key=len)[0]
    return f"{row} {column}"


def worst_lights_out(env, turn):
    """The press after which the most lights are on."""

    def on(place):
        lights = [list(row) for row in env.state.game_state["grid"]]
        env._toggle_lights(lights, *place)
        return sum(map(sum, lights))

    row, column = max(itertools.product(range(env.size), repeat=2), key=on)
    return f"{row} {column}"


def worst_mastermind(env, turn):
    """Another guess every time, with no digit in its place."""
    code = env.state.game_state["secret_code"]
    guesses = (g for g in itertools.permutations(range(1, 7), 4) if not any(map(int.__eq__, g, code)))
    return " ".join(map(str, next(itertools.islice(guesses, turn, None))))


def clear_sweeper(env, turn, mines=False):
    cells = itertools.product(range(env.rows), range(env.cols))
    row, column = next(
        (row, column)
        for row, column in cells
        if not env.revealed[row][column] and (turn == 0 or (env.grid[row][column] == -1) == mines)
    )
    return f"{row} {column}"


def mine_sweeper(env, turn):
    return clear_sweeper(env, turn, mines=turn > 0)


def best_secretary(env, turn):
    draws = env.state.game_state["draws"]
    return "accept" if draws[turn] == max(draws) else "continue"


def worst_secretary(env, turn):
    draws = env.state.game_state["draws"]
    return "accept" if draws[turn] < max(draws) else "continue"


def best_sokoban(env, turn):
    cells = {place: int(env.room_fixed[place]) for place in itertools.product(*map(range, env.room_fixed.shape))}
    targets = frozenset(place for place, kind in cells.items() if kind == 2)
    boxes = frozenset(place for place in cells if env.room_state[place] in (3, 4))

    def passable(state):
        player, boxes = state
        for move, (down, right) in STEPS.items():
            after, beyond = (player[0] + down, player[1] + right), (player[0] + 2 * down, player[1] + 2 * right)
            if after in boxes and cells.get(beyond) and beyond not in boxes:
                yield move, (after, boxes - {after} | {beyond})
            elif cells.get(after) and after not in boxes:
                yield move, (after, boxes)

    start = tuple(int(at) for at in env.player_position), boxes
    return walk(start, lambda state: state[1] == targets, passable)[0]


def back_and_forth_sokoban(env, turn):
    """Never a box pushed: where there is no way past them, the game is given up."""
    free = [
        move
        for move, (down, right) in STEPS.items()
        if env.room_state[env.player_position[0] + down, env.player_position[1] + right] in (1, 2)
    ]
    return free[0] if free else "stay"


def best_2048(env, turn):
    """Down and left as long as they change something: enough for a tile of 32."""
    import copy

    def moves(name):
        tried = copy.deepcopy(env.env)
        return tried._apply_move(tried.ACTIONS[f"[{name.upper()}]"])[0]

    return next(name for name in ("down", "left", "right", "up") if moves(name))


# The best player, the worst that makes no illegal move where there is one, and the turns that the best may take.
SCRIPTED = {
    "2048-ultra-easy": (best_2048, None, 60),
    "Bandit": (best_bandit, worst_bandit, 21),
    "Bandit-hard": (best_bandit, worst_bandit, 41),
    "Blackjack": (best_blackjack, lambda env, turn: "hit", 32),
    "FrozenLake": (lambda env, turn: frozen(env, "G"), lambda env, turn: frozen(env, "H"), 32),
    "GuessTheNumber": (
        lambda env, turn: str(env.state.game_state["game_number"]),
        lambda env, turn: str([n for n in range(1, 21) if n != env.state.game_state["game_number"]][turn]),
        32,
    ),
    "LightsOut": (best_lights_out, worst_lights_out, 32),
    "Mastermind": (lambda env, turn: " ".join(map(str, env.state.game_state["secret_code"])), worst_mastermind, 32),
    "Minesweeper-small": (clear_sweeper, mine_sweeper, 32),
    "Minesweeper": (clear_sweeper, mine_sweeper, 64),
    "Secretary": (best_secretary, worst_secretary, 32),
    "Sokoban": (best_sokoban, back_and_forth_sokoban, 32),
}  # fmt: skip


def played(name, seed, player, turns):
    """The last answer of an episode in this process, whose player sees the true state."""
    env = ArenaEnv(name)
    env.reset(seed)
    for turn in range(turns):
        answer = env.step(player(env.env, turn))
        if answer.done:
            return answer, env
    raise AssertionError(f"{name} {seed} takes more than {turns} turns")


def test_every_kind_of_game_has_a_best_and_a_worst_player():
    assert {name.partition("-")[0] for name in SCRIPTED} == set(GAMES)


@pytest.mark.parametrize("name", SCRIPTED)
def test_best_play_is_paid_1_and_worst_0(name):
    best, worst, turns = SCRIPTED[name]
    seeds = range(3 if name == "Sokoban" else 6)
    if name == "Blackjack":  # hands, of which luck decides most
        rewards = [played(name, seed, best, turns)[0].reward for seed in range(300)]
        assert set(rewards) == {k / 5 for k in range(6)}
    else:
        assert [played(name, seed, best, turns)[0].reward for seed in seeds] == [1.0] * len(seeds)
    if worst is not None:
        assert [played(name, seed, worst, 32 + turns)[0].reward for seed in seeds] == [0.0] * len(seeds)


def test_what_textarena_pays_is_kept_as_a_fact_and_is_no_reward():
    """If one of these fails, a new release of TextArena may be right, and `paid` may have less to do."""
    answer, env = played("Bandit", 0, best_bandit, 21)
    assert (answer.reward, answer.observation) == (1.0, "Congratulations! You chose the correct button.")
    assert env.counts()["score"] == 0.0, "nothing for the best button"
    assert played("Bandit", 0, worst_bandit, 21)[1].counts()["score"] > 0.1, "and the most for the worst"
    assert played("FrozenLake", 0, lambda env, turn: frozen(env, "H"), 32)[1].counts()["score"] > 0.1
    assert played("LightsOut", 0, worst_lights_out, 32)[1].counts()["score"] < -0.5


def test_buttons_are_paid_in_their_order():
    def choosing(button):
        return lambda env, turn: button if turn == 20 else "red"

    _, env = played("Bandit", 3, best_bandit, 21)
    means = env.env.state.game_state["ground_truth"]
    rewards = {button: played("Bandit", 3, choosing(button), 21)[0].reward for button in means}
    assert sorted(means, key=means.get) == sorted(rewards, key=rewards.get)
    assert sorted(rewards.values())[0] == 0.0
    assert sum(reward == 1.0 for reward in rewards.values()) == 1
    assert played("Bandit", 3, lambda env, turn: f"I press [{best_bandit(env, turn)}].", 21)[0].reward == 1.0


def test_a_lost_2048_is_paid_nothing_however_high_its_score():
    env = ArenaEnv("2048-ultra-easy")
    env.reset(0)
    board = [[16, 8, 16, 8], [8, 16, 8, 16], [16, 8, 16, 8], [16, 8, 16, 0]]
    env.env.state.game_state.update(board=board, score=500)
    answer = env.step("right")
    assert (answer.reward, answer.done) == (0.0, True)
    assert env.counts()["score"] == 1.0, "TextArena pays it like a win"


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
