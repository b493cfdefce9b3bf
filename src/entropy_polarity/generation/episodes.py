"""Episodes: a policy and many environments, turn by turn, in one batch.

    o_0 a_0 o_1 a_1 ...      o_t what the environment says, a_t the action: tokens of the policy up to its <eos>

What has been read stays in the key-value cache over the turns: each token goes through the model once. An episode ends
with a reason, whatever its environment does; the others go on.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from entropy_polarity.generation import Sampling, Tick
from entropy_polarity.support.modes import evaluating
from entropy_polarity.support.text import valid
from entropy_polarity.tasks.games import OUT_OF_TURNS, RAISED, TOO_LONG
from entropy_polarity.tasks.prompts import encoded
from entropy_polarity.tasks.protocol import EpisodeOverError, Game, Problem, StepResult, TextEnv
from entropy_polarity.tasks.workers import NoWorkerError


@dataclass
class Episode:
    """One episode as tokens, and how it went.

    `prompt_ids` is o_0, `completion_ids` the rest; `env_mask` is 1 at tokens of the policy and 0 at tokens of the
    environment, `turn` counts from 0. `observation` is o_0 as text, `said` holds (action, observation) of each turn.
    `counts` are the number of turns and what the environment counts.
    """

    observation: str
    prompt_ids: list[int]
    completion_ids: list[int] = field(default_factory=list)
    env_mask: list[int] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)
    reward: float = 0.0
    reason: str = ""
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, tokens: Sequence[int], turn: int, from_policy: bool) -> None:
        self.completion_ids += tokens
        self.env_mask += [int(from_policy)] * len(tokens)
        self.turn += [turn] * len(tokens)


class CachedContext:
    """What the policy read of each episode of a batch: a key-value cache with holes, where shorter ones are padded."""

    def __init__(self, model: Any, batch: int) -> None:
        self.model, self.cache = model, DynamicCache()
        self.mask = torch.zeros(batch, 0, dtype=torch.long, device=model.device)
        self.logits: Tensor | None = None

    def read(self, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "B V"]:
        """Read more tokens, none or some of each episode; the logits after the last token of each."""
        longest = max(map(len, tokens))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=self.mask.device)
        new = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in tokens], device=self.mask.device)
        positions = (self.mask.sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, new], 1)
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        last = output.logits[torch.arange(len(ids)), (new.sum(1) - 1).clamp(min=0)].float()
        self.logits = last = last if self.logits is None else torch.where(new.any(1, keepdim=True), last, self.logits)
        return last


class Format:
    """How turns become tokens: messages where the tokenizer has a chat template, plain text where not."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.end = tokenizer, tokenizer.eos_token_id
        self.chat = getattr(tokenizer, "chat_template", None) is not None

    def first(self, observation: str) -> list[int]:
        return encoded([{"role": "user", "content": observation}] if self.chat else observation, self.tokenizer)

    def next(self, observation: str) -> list[int]:
        """What stands between the end of an action and the start of the next."""
        if not self.chat:
            return self._ids(observation)
        # The template of a short conversation, with and without what follows the answer: the difference is what a
        # template puts between turns, whatever it does to earlier ones.
        talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        before = self.tokenizer.apply_chat_template(talk, tokenize=False)
        talk.append({"role": "user", "content": observation})
        after = self.tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
        if not after.startswith(before):
            raise ValueError("the chat template rewrites earlier turns: it cannot be used for several turns")
        closing = before.rpartition(self.tokenizer.eos_token)[2] if self.tokenizer.eos_token in before else ""
        return self._ids(closing + after[len(before) :])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        return valid(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def play(
    model: Any,
    tokenizer: Any,
    game: Game,
    problems: Sequence[Problem],
    sampling: Sampling,
    batch_size: int = 256,
    *,
    context: type[Any] = CachedContext,
    tick: Tick = lambda share: None,
) -> list[Episode]:
    """One episode of every problem; `tick(share)` is called with the share of a batch's turns that is played.

    An action ends with <eos>, which is a token of the policy; one that is longer than the game's `max_action_tokens`
    ends the episode. The same random state plays the same episodes. The mode of the model is left as it was.
    """
    episodes: list[Episode] = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(problems), batch_size):
            batch = problems[start : start + batch_size]
            policy = context(model, len(batch))
            episodes += _play_batch(policy, Format(tokenizer), game, batch, sampling, tick)
    return episodes


def _play_batch(
    policy: CachedContext, form: Format, game: Game, problems: Sequence[Problem], sampling: Sampling, tick: Tick
) -> list[Episode]:
    environments = _Environments(game, len(problems))
    envs, seeds = environments.envs, [problem.metadata["seed"] for problem in problems]
    starts = environments.ask(range(len(envs)), lambda i: _started(envs[i], seeds[i])).values()
    episodes = [Episode(start.observation, form.first(start.observation), reason=start.reason) for start in starts]
    unread = [list(episode.prompt_ids) for episode in episodes]
    for turn in range(game.max_turns):
        tick(turn / game.max_turns)
        going = [i for i, episode in enumerate(episodes) if not episode.reason]
        if not going:
            break
        actions = _act(policy, unread, going, form.end, game.max_action_tokens, sampling)
        for i in going:
            episodes[i].add(actions[i], turn, from_policy=True)
            if actions[i][-1] != form.end:
                episodes[i].reason = TOO_LONG
                # TRL takes what does not end in <eos> for cut off; the policy did not say it, and learns nothing of it.
                episodes[i].add([form.end], turn, from_policy=False)
        texts = {i: form.text(actions[i]) for i in going if not episodes[i].reason}
        for i, result in environments.ask(texts, lambda i, texts=texts: envs[i].step(texts[i])).items():
            episode = episodes[i]
            episode.said.append((texts[i], result.observation))
            episode.reward += result.reward
            if result.done or turn == game.max_turns - 1:
                episode.reason = result.reason or OUT_OF_TURNS
            else:
                heard = form.next(result.observation)
                episode.add(heard, turn + 1, from_policy=False)
                unread[i] = [actions[i][-1], *heard]
    for env, episode in zip(envs, episodes, strict=True):
        episode.counts = {"turns": float(len(episode.said)), **_counts(env)}
    return episodes


def _act(
    policy: CachedContext, unread: list[list[int]], going: Sequence[int], end: int, longest: int, sampling: Sampling
) -> dict[int, list[int]]:
    """An action of every episode that is going on; what it has not read yet is read, and its last token is not."""
    actions: dict[int, list[int]] = {i: [] for i in going}
    writing = list(going)
    logits = policy.read([unread[i] if i in actions else [] for i in range(len(unread))])
    while writing:
        chosen = _sampled(logits[writing], *sampling).tolist()
        for i, token in zip(writing, chosen, strict=True):
            actions[i].append(token)
        writing = [i for i in writing if actions[i][-1] != end and len(actions[i]) < longest]
        if writing:
            logits = policy.read([actions[i][-1:] if i in writing else [] for i in range(len(unread))])
    return actions


def _sampled(logits: Float[Tensor, "N V"], temperature: float, top_p: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = p.sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p  # what is more likely has enough already
        p = p.masked_fill(beyond.scatter(-1, places, beyond), 0.0)
    return torch.multinomial(p, 1).squeeze(-1)


class _Environments:
    """The environments of a batch, in the groups of `Game.envs`."""

    def __init__(self, game: Game, count: int) -> None:
        groups = game.envs(count)
        self.envs = [env for group in groups for env in group]
        self.group = [number for number, group in enumerate(groups) for _ in group]

    def ask(self, which: Iterable[int], call: Callable[[int], StepResult]) -> dict[int, StepResult]:
        """`call` for every environment of `which`: one after the other in a group, all groups at the same time."""
        queues: dict[int, list[int]] = {}
        for i in which:
            queues.setdefault(self.group[i], []).append(i)

        def one_by_one(queue: list[int]) -> list[tuple[int, StepResult]]:
            return [(i, _guarded(call, i)) for i in queue]

        if len(queues) < 2:
            return dict(pair for queue in queues.values() for pair in one_by_one(queue))
        with ThreadPoolExecutor(len(queues)) as threads:
            return dict(sorted(pair for pairs in threads.map(one_by_one, queues.values()) for pair in pairs))


def _started(env: TextEnv, seed: int) -> StepResult:
    observation = env.reset(seed)
    if not observation:
        raise ValueError("nothing to read at the start")
    return StepResult(observation)


def _guarded(call: Callable[[int], StepResult], i: int) -> StepResult:
    """Environments are other people's code: what they raise is their episode's end, not the run's."""
    try:
        result = call(i)
        return result._replace(observation=valid(result.observation), reason=valid(result.reason))
    except NoWorkerError:
        raise  # no episode can be played
    except EpisodeOverError as error:
        return StepResult(valid(str(error)), done=True, reason=error.reason)
    except Exception as error:
        return StepResult(valid(f"{type(error).__name__}: {error}"[:200]), done=True, reason=RAISED)


def _counts(env: TextEnv) -> dict[str, float]:
    try:
        return {valid(name): value for name, value in env.counts().items()}
    except Exception:
        return {}


def mean_counts(counts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of every number that environments counted, over the episodes that have it."""
    values: dict[str, list[float]] = {}
    for counted in counts:
        for name, value in counted.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
