"""Slow references: what the fast paths compute, said once more with loops over rows, queries, heads and episodes.

Plain Python numbers (float64) and lists; nothing is shared with the package but the meaning of its options.
"""

import math
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from hippoformer import HippoFormerConfig
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
    strength: float
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
            name: float(getattr(episodes, name)[row, slot])
            for name in ("salience", "priority", "age", "strength", "credit")
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
    return low + (high - low) * (2 * salience - 1) if salience > 0.5 else config.untagged_weight


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


def consolidate(store: list[Memory], segment: int, config: HippoFormerConfig) -> tuple[list[Memory], dict[str, int]]:
    """One consolidation of a store, oldest first; changes the memories in it."""
    for memory in store:
        memory.age += 1.0
        memory.credit *= config.decay_rate
    gone: set[int] = set()  # positions of what was merged into another
    reactivated = merged = 0

    def drawn(memory: Memory) -> float:
        weight = memory.priority * config.decay_rate**memory.age * (memory.credit + 0.1)
        return math.log(weight) - math.log(-math.log(uniform(config.seed, segment, memory.position)))

    rounds = config.max_replay_rounds if config.buffer_size > 1 else 0
    cues = sorted(store, key=drawn, reverse=True)[: rounds * config.replay_batch]
    reactivated = len(cues)
    times = dict.fromkeys((memory.position for memory in store), 0)
    claims: list[tuple[Memory, Memory]] = []
    places = {memory.position for memory in store}
    for cue in cues:
        times[cue.position] += 1
        others = [memory for memory in store if memory is not cue]
        like = max(others, key=lambda other, cue=cue: cosine(cue, other), default=None)
        if like is None or cosine(cue, like) <= 0:
            continue
        times[like.position] += 1
        if like.token == cue.token and cosine(cue, like) >= config.merge_threshold:
            older, newer = sorted((cue, like), key=lambda memory: memory.position)
            if older.position - 1 in places or older.position + 1 in places:
                continue  # part of a story
            # The first cue that claims a memory moves it.
            if not any(older is claimed for claimed, _ in claims):
                claims.append((older, newer))
    for memory in store:
        story = [memory.position]  # and whoever is joined to it without a gap, as far as a reactivation reaches
        for step in (-1, 1):
            place = memory.position + step
            while place in places and abs(place - memory.position) <= config.replay_span:
                story.append(place)
                place += step
        for _ in range(max(times[place] for place in story)):
            rate = config.replay_rate * min(1.0, memory.credit)
            memory.priority += rate * max(0.0, config.importance_weight_range[1] - memory.priority)
            memory.age = 0.0
    leaving = {older.position for older, _ in claims}
    for older, newer in claims:
        if newer.position in leaving:  # a memory that is to go takes nobody in
            continue
        newer.strength += older.strength
        newer.credit += older.credit
        newer.priority = max(newer.priority, older.priority)
        gone.add(older.position)
        merged += 1
    alive = [memory for memory in store if memory.position not in gone]
    kept = [m for m in alive if m.priority * config.decay_rate**m.age >= config.priority_threshold]
    return kept, {"reactivated": reactivated, "merged": merged, "forgotten": len(alive) - len(kept)}


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


def recall(
    module: Recall,
    hidden: Tensor,
    tokens: Tensor,
    own: Tensor,
    null_before: Tensor,
    episodes: Episodes,
    mass: Tensor,
    visible: Tensor,
    own_slot: Tensor,
) -> dict[str, Tensor]:
    """Weights (R, N, E), null mass (R, N), content (R, N, U), peak (R, N),
    matched (R, N, E) and followed (R, N), one number at a time."""
    hidden, mass, own = hidden.double(), mass.double(), own.double()
    rows, n_queries, _ = hidden.shape
    n_episodes, heads, width = episodes.position.shape[1], module.n_heads, module.head_dim
    weight = {name: parameter.detach().double() for name, parameter in module.named_parameters()}
    word, spelled = module.word_of_token.tolist(), [_letters(e) for e in module.ending_of_token.tolist()]
    result = torch.zeros(rows, n_queries, n_episodes + 1, dtype=torch.float64)
    matched = torch.zeros(rows, n_queries, n_episodes, dtype=torch.float64)
    followed = torch.zeros(rows, n_queries, dtype=torch.float64)
    for row in range(rows):
        position, token = episodes.position[row].tolist(), episodes.token[row].tolist()
        before = episodes.recalled[row].double().tolist()
        nothing, together = float(null_before[row]), episodes.matched[row].double().tolist()
        for number in range(n_queries):
            state = hidden[row, number]
            share = torch.softmax(weight["head_mixture.weight"] @ state + weight["head_mixture.bias"], 0)
            # Episodes that foretold the token just read lead to their successors.
            lead, in_common = [0.0] * n_episodes, [0.0] * n_episodes
            for slot in range(1, n_episodes):
                goes_on = position[slot - 1] >= 0 and position[slot] == position[slot - 1] + 1
                if goes_on and visible[row, number, slot] and word[token[slot - 1]] == word[int(tokens[row, number])]:
                    lead[slot], in_common[slot] = before[slot - 1], together[slot - 1] + 1.0
                    if together[slot - 1] == 0 and module.match_characters:
                        there, here = (
                            _text_before(at, position, token, spelled)
                            for at in (slot - 1, min(int(own_slot[row]) + number, n_episodes - 1))
                        )
                        pairs = zip(reversed(there), reversed(here), strict=False)
                        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                        in_common[slot] += same / module.match_characters
            evidence = sum(lead) + nothing * float(own[row, number])
            lead = [value / evidence if evidence > 0 else 0.0 for value in lead]
            together, matched[row, number] = in_common, torch.tensor(in_common, dtype=torch.float64)
            total = torch.zeros(n_episodes + 1, dtype=torch.float64)
            for head in range(heads):
                span = slice(head * width, (head + 1) * width)
                query = weight["query_proj.weight"][span] @ state
                query = query / max(float(query.norm()), 1e-12)
                scores = []
                for slot in range(n_episodes):
                    score = float(weight["log_scale"][head].exp() * (query @ episodes.key[row, slot, span].double()))
                    score += float(weight["priority_weight"][head]) * math.log(max(float(mass[row, slot]), 1e-6))
                    scores.append(score if visible[row, number, slot] else -math.inf)
                if 0 < module.top_k < n_episodes:
                    least = sorted(scores, reverse=True)[module.top_k - 1]
                    scores = [score if score >= least else -math.inf for score in scores]
                scores.append(float(weight["null_proj.weight"][head] @ state + weight["null_proj.bias"][head]))
                highest, kappa = max(scores), math.exp(float(weight["log_contiguity"][head]))
                now = [math.exp(score - highest) for score in scores]
                for slot in range(n_episodes):
                    now[slot] *= 1.0 + kappa * lead[slot]
                total += share[head] * torch.tensor(now, dtype=torch.float64) / sum(now)
            gate = float(weight["follow_gate.weight"][0] @ state + weight["follow_gate.bias"][0])
            power = module.match_power
            match = [
                (float(total[slot]) + 1e-4) * min(count, 1024.0) ** power if count else 0.0
                for slot, count in enumerate(in_common)
            ]
            for slot, count in enumerate(in_common):
                if count > 3.0:
                    newer = sum(abs(other - count) < 1e-3 for other in in_common[slot + 1 :])
                    match[slot] /= (1 + newer) ** (module.match_recency * math.log(count / 3.0))
            story = [0.0] * n_episodes
            for slot, count in enumerate(in_common):
                if count:
                    odds = gate + float(weight["match_weight"]) * math.log(min(count, 1024.0))
                    story[slot] = match[slot] / sum(match) / (1.0 + math.exp(-odds))
            total *= 1.0 - sum(story)
            total[:-1] += torch.tensor(story, dtype=torch.float64)
            followed[row, number] = sum(story)
            before, nothing = total[:-1].tolist(), float(total[-1])
            result[row, number] = total
    weights = result[..., :-1]
    return {
        "weights": weights,
        "nothing": result[..., -1],
        "content": weights @ episodes.value.double(),
        "peak": weights.amax(-1),
        "matched": matched,
        "followed": followed,
    }
