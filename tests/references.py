"""Slow references: what the fast paths compute, said once more with loops over rows, queries, heads and episodes.

Plain Python numbers (float64) and lists; nothing is shared with the package but the meaning of its options.
"""

import math
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from hippoformer import HippoFormerConfig
from hippoformer.hippocampus import continuation, replay
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.recall import Recall


@dataclass
class Memory:
    """One episode as a plain value."""

    key: list[list[float]]  # per head
    token: int
    position: int
    salience: float
    surprise: float
    priority: float
    age: float
    credit: float


def uniform(*keys: int) -> float:
    """MurmurHash3's finaliser over 32-bit words, by hand."""
    state = 0x9E3779B9
    for key in keys:
        state = (state ^ (key & 0xFFFFFFFF)) & 0xFFFFFFFF
        state = ((state ^ (state >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        state = ((state ^ (state >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        state ^= state >> 16
    return ((state >> 8) + 0.5) / 2**24


def memories(episodes: Episodes, row: int, slots: range, heads: int) -> list[Memory | None]:
    """The episodes in the given slots, None where a slot is empty."""
    found: list[Memory | None] = []
    for slot in slots:
        position = int(episodes.position[row, slot])
        key = episodes.key[row, slot].double().unflatten(0, (heads, -1)).tolist()
        numbers = {
            name: float(getattr(episodes, name)[row, slot]) for name in ("salience", "priority", "age", "credit")
        }
        numbers["surprise"] = float(episodes.surprise[row, slot].sum())  # 0 where the rule does not read it
        found.append(None if position < 0 else Memory(key, int(episodes.token[row, slot]), position, **numbers))
    return found


def winners(score: list[float], k: int) -> list[int]:
    """The k best, the newer of equals, in their old order; fewer where fewer can win."""
    able = [index for index, value in enumerate(score) if value != -math.inf]
    best = sorted(able, key=lambda index: (score[index], index), reverse=True)[:k]
    return sorted(best)


def importance(salience: float, config: HippoFormerConfig) -> float:
    low, high = config.importance_weight_range
    return low + (high - low) * (2 * salience - 1) if salience > 0.5 else 1.0


def captured(working: list[Memory], leaving: int, config: HippoFormerConfig) -> list[Memory]:
    """The working episodes, the first `leaving` of them judged by the best passage near them."""
    if not config.capture_span:
        return working
    span = config.capture_span

    def judged(judgement: list[float]) -> list[float]:
        near = [judgement[max(0, middle - span) : middle + span + 1] for middle in range(len(judgement))]
        worth = [sum(passage) / len(passage) for passage in near]
        return [max(worth[max(0, place - span // 2) : place + span // 2 + 1]) for place in range(len(worth))]

    salience, surprise = judged([m.salience for m in working]), judged([m.surprise for m in working])
    for place, memory in enumerate(working[:leaving]):
        memory.salience, memory.surprise = salience[place], surprise[place]
        memory.priority = importance(memory.salience, config)
    return working


def admit(contenders: list[Memory], config: HippoFormerConfig) -> list[Memory]:
    """Who stays when stored and leaving episodes compete, oldest first."""
    measure = {
        "salience": lambda m: m.priority * config.decay_rate**m.age,
        "surprise": lambda m: m.surprise * config.decay_rate**m.age,
        "random": lambda m: uniform(config.seed, m.position),
        "fifo": lambda m: float(m.position),
    }[config.selection]
    return [contenders[index] for index in winners([measure(m) for m in contenders], config.buffer_size)]


def cosine(one: Memory, other: Memory) -> float:
    """Mean over heads; keys are unit vectors per head."""
    return sum(a * b for x, y in zip(one.key, other.key, strict=True) for a, b in zip(x, y, strict=True)) / len(one.key)


def consolidate(store: list[Memory], segment: int, config: HippoFormerConfig) -> int:
    """One consolidation of a store, oldest first; changes the memories in it. Returns how many were reactivated."""
    for memory in store:
        memory.age += 1.0
        memory.credit *= config.decay_rate

    def drawn(memory: Memory) -> float:
        weight = memory.priority * config.decay_rate**memory.age * (memory.credit + 0.1)
        return math.log(weight) - math.log(-math.log(uniform(config.seed, segment, memory.position)))

    rounds = config.max_replay_rounds if config.buffer_size > 1 else 0
    cues = sorted(store, key=drawn, reverse=True)[: rounds * replay.ROUND]
    times = dict.fromkeys((memory.position for memory in store), 0)
    for cue in cues:
        times[cue.position] += 1
        others = [memory for memory in store if memory is not cue]
        like = max(others, key=lambda other, cue=cue: cosine(cue, other), default=None)
        if like is not None and cosine(cue, like) > 0:
            times[like.position] += 1
    for memory in store:
        sequence = [memory.position]  # and whatever is joined to it without a gap, as far as a reactivation reaches
        for step in (-1, 1):
            place = memory.position + step
            while place in times and abs(place - memory.position) <= replay.SPAN:
                sequence.append(place)
                place += step
        for _ in range(max(times[place] for place in sequence)):
            rate = config.replay_rate * min(1.0, memory.credit)
            memory.priority += rate * max(0.0, config.importance_weight_range[1] - memory.priority)
            memory.age = 0.0
    return len(cues)


def _letters(ending: int) -> bytes:
    return ending.to_bytes(8, "big").lstrip(b"\0")


def _text_before(slot: int, position: list[int], token: list[int], spelled: list[bytes]) -> bytes:
    """The last seven letters of the text before a slot: of four tokens at most, up to a gap or an unknown one."""
    text = b""
    for place in range(slot, max(slot - 4, 0), -1):
        joined = position[place - 1] >= 0 and position[place] == position[place - 1] + 1
        if not joined or not spelled[token[place - 1]]:
            break
        text = spelled[token[place - 1]] + text
    return text[-7:]


def _shared(one: bytes, other: bytes) -> int:
    """How many letters two texts share at their ends."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(one), reversed(other), strict=False)))


def _match_lengths(
    module: Recall, tokens: list[int], token: list[int], position: list[int], visible: list[list[bool]], before: list
) -> list[list[int]]:
    """For each query and slot, how many tokens in a row, up to the query's own, the slot continues."""
    word, found = module.word_of_token.tolist(), []
    for read, seen in zip(tokens, visible, strict=True):
        length = [0] * len(token)
        for slot in range(1, len(token)):
            follows = position[slot - 1] >= 0 and position[slot] == position[slot - 1] + 1
            if follows and seen[slot] and word[token[slot - 1]] == word[read]:
                length[slot] = min(int(before[slot - 1]) + 1, 1024)
        found.append(length)
        before = length
    return found


def _match_in_tokens(module: Recall, length: int, slot: int, own: int, token: list[int], position: list[int]) -> float:
    """The length of a match that `slot` continues, with the letters that both texts share before it."""
    if not length:
        return float(length)
    spelled, texts = [_letters(e) for e in module.ending_of_token.tolist()], []
    for end in (slot - 1, min(own, len(token) - 1)):
        start = max(end - length + 1, 0)
        kept = position[start] == position[end] - length + 1
        texts.append(_text_before(start, position, token, spelled) if kept else b"")
    return min(length + _shared(*texts) / 3, 1024.0)


def _attention(module: Recall, state: Tensor, key: Tensor, mass: Tensor, visible: list[bool]) -> Tensor:
    """(E + 1,) recall by similarity, the mixture of all heads, the null last."""
    weight = {name: parameter.detach().double() for name, parameter in module.named_parameters()}
    share = torch.softmax(weight["head_mixture.weight"] @ state + weight["head_mixture.bias"], 0)
    total = torch.zeros(len(visible) + 1, dtype=torch.float64)
    for head in range(module.n_heads):
        span = slice(head * module.head_dim, (head + 1) * module.head_dim)
        query = weight["query_proj.weight"][span] @ state
        query = query / max(float(query.norm()), 1e-12)
        scores = []
        for slot, seen in enumerate(visible):
            score = float(weight["log_scale"][head].exp() * (query @ key[slot, span].double()))
            score += float(weight["priority_weight"][head]) * math.log(max(float(mass[slot]), 1e-6))
            scores.append(score if seen else -math.inf)
        scores.append(float(weight["null_proj.weight"][head] @ state + weight["null_proj.bias"][head]))
        total += share[head] * torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    return total


def _moved(module: Recall, state: Tensor, alike: list[float], length: list[float], places: list[int]) -> list[float]:
    """(E,) the part of the weights that moves to each slot that continues a match: phi q."""
    weight = {name: parameter.detach().double() for name, parameter in module.named_parameters()}
    gate = float(weight["follow_gate.weight"][0] @ state + weight["follow_gate.bias"][0])
    match = [0.0] * len(length)
    for slot in places:
        match[slot] = (alike[slot] + 1e-4) * length[slot] ** 8
        if length[slot] > 3.0:
            newer = sum(other > slot and abs(length[other] - length[slot]) < 1e-3 for other in places)
            match[slot] /= (1 + newer) ** (4 * math.log(length[slot] / 3.0))
    moved = [0.0] * len(length)
    for slot in places:
        odds = gate + float(weight["match_weight"]) * math.log(length[slot])
        moved[slot] = match[slot] / sum(match) / (1.0 + math.exp(-odds))
    return moved


def recall(
    module: Recall,
    hidden: Tensor,
    tokens: Tensor,
    episodes: Episodes,
    mass: Tensor,
    visible: Tensor,
    own_slot: Tensor,
) -> dict[str, Tensor]:
    """Weights (R, N, E), null mass (R, N), content (R, N, U), peak (R, N),
    matched (R, N, E) and followed (R, N), one number at a time."""
    rows, n_queries, n_episodes = visible.shape
    result = torch.zeros(rows, n_queries, n_episodes + 1, dtype=torch.float64)
    matched = torch.zeros(rows, n_queries, n_episodes, dtype=torch.float64)
    followed = torch.zeros(rows, n_queries, dtype=torch.float64)
    for row in range(rows):
        position, token = episodes.position[row].tolist(), episodes.token[row].tolist()
        seen = visible[row].tolist()
        lengths = _match_lengths(module, tokens[row].tolist(), token, position, seen, episodes.matched[row].tolist())
        matched[row] = torch.tensor(lengths)
        for number, run in enumerate(lengths):
            state, own = hidden[row, number].double(), int(own_slot[row]) + number
            total = _attention(module, state, episodes.key[row], mass[row].double(), seen[number])
            longest = sorted((slot for slot in range(n_episodes) if run[slot]), key=lambda s: (run[s], s), reverse=True)
            length = [_match_in_tokens(module, m, slot, own, token, position) for slot, m in enumerate(run)]
            moved = _moved(module, state, total.tolist(), length, longest[: continuation.PLACES])
            followed[row, number] = sum(moved)
            result[row, number] = (1.0 - sum(moved)) * total
            result[row, number, :-1] += torch.tensor(moved, dtype=torch.float64)
    weights = result[..., :-1]
    return {
        "weights": weights,
        "nothing": result[..., -1],
        "content": weights @ episodes.value.double(),
        "peak": weights.amax(-1),
        "matched": matched,
        "followed": followed,
    }
