"""Breaks the package on purpose, one line at a time, and checks that the test named for it fails.

    python tests/mutations.py                 # all of them; a table in Markdown on stdout, as in docs/mutations.md
    python tests/mutations.py --only rows     # those whose invariant contains the word

Each mutation works on a copy of `src`; the checkout is never touched. First every named test must pass on an unchanged
copy. Exits with 1 if a mutation survives, a named test fails without one, or a snippet is no longer in its file
exactly once.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """One wrong line.

    Attributes:
        invariant: of the design, by number and name.
        what: the mistake, in words.
        file: under src/hippoformer.
        old, new: a snippet that occurs once, and what takes its place.
        test: id of a test that must fail, under tests/.
    """

    invariant: str
    what: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    Mutation(
        "1 causality",
        "recall sees one episode too many: the one the next token completes",
        "tensors/masks.py",
        "slots < seen.unsqueeze(-1)",
        "slots <= seen.unsqueeze(-1)",
        "test_causality.py::test_the_future_changes_nothing[llama-train]",
    ),
    Mutation(
        "1 causality",
        "the base sees one token ahead",
        "tensors/masks.py",
        "(slots <= query)",
        "(slots <= query + 1)",
        "test_causality.py::test_the_future_changes_nothing[gpt2-train]",
    ),
    Mutation(
        "1 causality",
        "the gate judges a token by what the whole step holds",
        "hippocampus/salience.py",
        "mask = (visible | ~sees).unsqueeze(1)",
        "mask = (visible.any(1, keepdim=True) | ~sees).unsqueeze(1)",
        "test_causality.py::test_the_future_changes_nothing[llama-train]",
    ),
    Mutation(
        "2 rows",
        "padding is stored as if it were text",
        "hippocampus/circuit.py",
        "(column < length.unsqueeze(-1)) &",
        "(column >= 0) &",
        "test_rows.py::test_a_row_alone_is_the_row_in_a_batch[llama-right]",
    ),
    Mutation(
        "2 rows",
        "every row replays with the draws of the first",
        "hippocampus/circuit.py",
        "[done[r] // config.segment_len for r in rows]",
        "[done[0] // config.segment_len for r in rows]",
        "test_rows.py::test_one_row_reset_among_others",
    ),
    Mutation(
        "2 rows",
        "reset clears the episodes of all rows",
        "hippocampus/circuit.py",
        "state.episodes.position.index_fill_(0, index, -1)",
        "state.episodes.position.fill_(-1)",
        "test_rows.py::test_one_row_reset_among_others",
    ),
    Mutation(
        "3 streaming",
        "smoothing forgets the transitions before the step",
        "hippocampus/circuit.py",
        "recent_salience=last_of_each_row(extended, length, config.salience_min_duration - 1)",
        "recent_salience=state.recent_salience",
        "test_streaming.py::test_chunks_of_any_size_give_the_same_numbers[llama-7]",
    ),
    Mutation(
        "3 streaming",
        "the first token of a step is scored without the vote carried over",
        "hippocampus/circuit.py",
        "torch.cat((vote.mixture.unsqueeze(-1),",
        "torch.cat((0 * vote.mixture.unsqueeze(-1),",
        "test_streaming.py::test_score_is_the_logits_of_forward[llama]",
    ),
    Mutation(
        "3 streaming",
        "a segment is counted from the start of the call",
        "model/modeling.py",
        "segment_len - done % segment_len",
        "segment_len - s % segment_len",
        "test_streaming.py::test_chunks_of_any_size_give_the_same_numbers[gpt2-7]",
    ),
    Mutation(
        "3 streaming",
        "the first token of a step is judged by the inner layer instead of the final state",
        "model/modeling.py",
        "last = cache.memory.last_hidden if self.config.memory_layers == (-1,) else cache.last_output",
        "last = cache.memory.last_hidden",
        "test_memory_layer.py::test_chunks[read_out1-llama-1]",
    ),
    Mutation(
        "3 streaming",
        "of several layers the first is read twice",
        "model/window.py",
        "[final if layer == -1 else outputs[layer] for layer in layers]",
        "[outputs[layers[0]] for layer in layers]",
        "test_memory_layer.py::test_keys_come_from_the_layers_named",
    ),
    Mutation(
        "marginals",
        "predictions follow the marginals before the segment has ended",
        "model/modeling.py",
        "ended = _ended(cache, new)\n        if not ended:",
        "ended = list(range(len(new)))\n        if not ended:",
        "test_marginals.py::test_chunks_and_scores_agree[5]",
    ),
    Mutation(
        "marginals",
        "padding is counted",
        "model/modeling.py",
        "counted = predicted & real",
        "counted = predicted",
        "test_marginals.py::test_neither_the_future_nor_a_neighbour_nor_padding_is_counted",
    ),
    Mutation(
        "marginals",
        "a frozen memory goes on counting",
        "model/modeling.py",
        "if not one.frozen:",
        "if True:",
        "test_marginals.py::test_they_are_frozen_reset_adopted_and_saved_with_the_memory",
    ),
    Mutation(
        "4 base",
        "a silent fusion is heard a thousandth",
        "hippocampus/fusion.py",
        "self.strength.clamp(0.0, 1.0)",
        "self.strength.clamp(1e-3, 1.0)",
        "test_base_equality.py::test_fresh_is_memory_off_to_the_last_bit[llama]",
    ),
    Mutation(
        "4 base",
        "moved keys are turned the wrong way",
        "model/window.py",
        "rotation.shift(keys[:, :, sinks:], -moved)",
        "rotation.shift(keys[:, :, sinks:], moved)",
        "test_base_equality.py::test_beyond_the_window_it_is_the_base_under_a_band[llama]",
    ),
    Mutation(
        "4 base",
        "the sinks are kept but not seen",
        "tensors/masks.py",
        "(slots < sink_tokens)",
        "(slots < 0)",
        "test_base_equality.py::test_sinks_stay_visible_up_to_the_first_shift[gpt-neox]",
    ),
    Mutation(
        "4 base",
        "a layer's own narrower window is forgotten",
        "model/window.py",
        "if self._sliding is not None and self._sliding < config.window_slots:",
        "if False:",
        "test_base_equality.py::test_beyond_the_window_it_is_the_base_under_a_band[gemma2]",
    ),
    Mutation(
        "5 purity",
        "replay draws from the global generator",
        "tensors/selection.py",
        "return ((state >> 8).to(torch.float32) + 0.5) / 2.0**24",
        "return torch.rand(state.shape)",
        "test_purity.py::test_random_state_is_left_alone",
    ),
    Mutation(
        "5 purity",
        "a copy of a cache shares its tensors",
        "model/cache.py",
        "self._with_rows(Tensor.clone, range(self.batch_size))",
        "self._with_rows(lambda tensor: tensor, range(self.batch_size))",
        "test_purity.py::test_a_copy_is_independent[copy]",
    ),
    Mutation(
        "6 bounded state",
        "slots of losers keep their position: more episodes than there are",
        "hippocampus/episodes.py",
        "moved.position[:, :n_stored].masked_fill_(~holds, -1)",
        "pass",
        "test_bounded_state.py::test_stored_and_seen_never_exceed_their_bounds[6]",
    ),
    Mutation(
        "6 bounded state",
        "positions go on counting instead of staying within the slots",
        "model/window.py",
        "position_ids=slots.clamp_max(self.config.window_slots - 1),",
        "position_ids=slots + max(getattr(cache, 'lengths', [0])),",
        "test_bounded_state.py::test_stored_and_seen_never_exceed_their_bounds[1]",
    ),
    Mutation(
        "7 references: write",
        "the worst win",
        "tensors/selection.py",
        "descending=True",
        "descending=False",
        "test_references.py::test_admit[0-salience]",
    ),
    Mutation(
        "7 references: replay",
        "memories do not age",
        "hippocampus/replay.py",
        'store["age"] + 1.0',
        'store["age"] + 0.0',
        "test_references.py::test_consolidate[0-options0]",
    ),
    Mutation(
        "7 references: replay",
        "a merge loses the strength of what it takes in",
        "hippocampus/replay.py",
        "take(strength, older) * fuse",
        "0.0 * take(strength, older) * fuse",
        "test_references.py::test_consolidate[0-options1]",
    ),
    Mutation(
        "7 references: replay",
        "replay raises what never earned anything",
        "hippocampus/replay.py",
        "rate = config.replay_rate * credit.clamp_max(1.0)",
        "rate = config.replay_rate",
        "test_references.py::test_consolidate[0-options0]",
    ),
    Mutation(
        "7 references: recall",
        "priority enters as such, not as its logarithm",
        "hippocampus/recall.py",
        "mass.clamp_min(1e-6).log()",
        "mass.clamp_min(1e-6)",
        "test_references.py::test_recall[0-options0-inference]",
    ),
    Mutation(
        "7 references: recall",
        "a match goes on over gaps in the text",
        "hippocampus/continuation.py",
        "torch.where(joined(position), words[:, :-1], -1)",
        "torch.where(position[:, :-1] >= 0, words[:, :-1], -1)",
        "test_references.py::test_recall[0-options0-training]",
    ),
    Mutation(
        "7 references: replay",
        "merging cuts stories",
        "hippocampus/replay.py",
        " & take(_alone(position), older)",
        "",
        "test_replay.py::test_a_story_is_not_cut[3-False]",
    ),
    Mutation(
        "7 references: replay",
        "a reactivation reaches across gaps",
        "hippocampus/replay.py",
        "same = (story[:, distance:] == story[:, :-distance]).to(times.dtype)",
        "same = torch.ones_like(times[:, distance:])",
        "test_replay.py::test_a_reactivation_takes_its_story_along_up_to_a_gap[9-young3]",
    ),
    Mutation(
        "7 references: write",
        "odd words compete by themselves, not their passages",
        "hippocampus/episodes.py",
        "torch.where(leaver, new, old[:, low:high])",
        "torch.where(leaver, torch.maximum(new, old[:, low:high]), old[:, low:high])",
        "test_references.py::test_what_stands_among_things_of_note_is_kept",
    ),
    Mutation(
        "7 references: recall",
        "runs of any length go on with what ended before them",
        "hippocampus/continuation.py",
        "goes_on = length[:, reach:, reach:] == reach",
        "goes_on = length[:, reach:, reach:] > 0",
        "test_references.py::test_match_lengths_are_counted_along_the_text",
    ),
    Mutation(
        "7 references: recall",
        "the first matches are considered, not the longest",
        "hippocampus/continuation.py",
        "(length.int() * n_slots + slots).topk",
        "(-slots * (length.int() > 0)).topk",
        "test_references.py::test_only_the_longest_matches_are_considered",
    ),
    Mutation(
        "2 rows",
        "a row that has read its document sleeps on while others read theirs",
        "training/readers.py",
        "if piece.length[r] and d %",
        "if d %",
        "test_training.py::test_a_row_that_is_done_waits_as_it_is",
    ),
    Mutation(
        "devices",
        "the gate normalises half precision with float32 weights",
        "hippocampus/salience.py",
        "both.to(self.local_norm.weight.dtype)",
        "both",
        "test_gpu.py::test_no_norm_mixes_precisions",
    ),
    Mutation(
        "3 streaming",
        "how many tokens have matched is forgotten at the edge of a step",
        "hippocampus/circuit.py",
        "matched=_of_last_query(recollection.matched, length, low, episodes.matched)",
        "matched=torch.zeros_like(episodes.matched)",
        "test_streaming.py::test_a_match_goes_on_across_every_edge",
    ),
    Mutation(
        "8 losses",
        "the gate never tags what it was measured to",
        "training/foresight.py",
        "gate.tagging_threshold.copy_(",
        "gate.tagging_threshold.add_(0.0 * ",
        "test_foresight.py::test_the_target_share_is_tagged",
    ),
    Mutation(
        "7 references: recall",
        "every episode leads on, whether it predicted the token or not",
        "hippocampus/continuation.py",
        "(predicted.unsqueeze(1) == read.unsqueeze(-1))",
        "(predicted.unsqueeze(1) >= 0 * read.unsqueeze(-1))",
        "test_references.py::test_recall[0-options0-inference]",
    ),
    Mutation(
        "7 references: words",
        "a word with a space before it is another word",
        "hippocampus/recall.py",
        "self.word_of_token[tokens.long()]",
        "tokens.to(torch.int32)",
        "test_words.py::test_a_match_goes_on_in_other_tokens_of_the_same_words",
    ),
    Mutation(
        "7 references: words",
        "the power of a match without end",
        "hippocampus/continuation.py",
        "found = found.clamp_max(LONGEST)",
        "found = found * 1e6",
        "test_words.py::test_the_longest_match_stays_finite_in_a_text_of_one_token",
    ),
    Mutation(
        "7 references: words",
        "a name in other tokens is another name",
        "hippocampus/recall.py",
        "1.0 / self.match_characters",
        "0.0",
        "test_words.py::test_a_name_cut_into_other_tokens_is_recognised_by_its_characters",
    ),
    Mutation(
        "7 references: words",
        "what was told first counts as much as what was told last",
        "hippocampus/recall.py",
        "self.match_power * log_length - fading",
        "self.match_power * log_length - 0.0 * fading",
        "test_words.py::test_what_was_told_last_is_recalled",
    ),
    Mutation(
        "7 references: words",
        "what stands before a gap counts as what stands before a match",
        "hippocampus/continuation.py",
        "(earlier(pad(joined(position), (1, 0)), 0) & (token != 0))",
        "(token != 0)",
        "test_references.py::test_recall[0-options0-inference]",
    ),
    Mutation(
        "7 references: words",
        "variants of recall take their options from the model",
        "hippocampus/recall.py",
        "self.top_k, self.match_power = config.recall_top_k, config.match_power",
        "self.top_k, self.match_power = 0, 8.0",
        "test_recall_variants.py::test_options_without_parameters_differ_too",
    ),
    Mutation(
        "case 12",
        "a long run takes all the room there is",
        "hippocampus/episodes.py",
        "torch.where(repeated & leaves, _WORTH_REPEATED, 1.0)",
        "torch.where(repeated & leaves, 1.0, 1.0)",
        "test_continuation.py::test_a_long_run_leaves_room_for_what_was_read_before",
    ),
    Mutation(
        "case 12",
        "a long run silences what the base expected in it",
        "hippocampus/marginals.py",
        ".clamp_min(_LEAST_SHIFT)",
        "",
        "test_marginals.py::test_a_long_run_silences_no_other_token",
    ),
    Mutation(
        "case 12",
        "the work depends on how many episodes match",
        "hippocampus/continuation.py",
        "topk(min(PLACES, n_slots), dim=-1)",
        "topk(max(int((length > 0).sum(-1).max()), 1), dim=-1)",
        "test_continuation.py::test_a_run_of_few_tokens_costs_what_prose_costs",
    ),
    Mutation(
        "8 saving",
        "the adapters are not saved",
        "model/checkpoint.py",
        "if model.config.use_lora:\n        tensors",
        "if False:\n        tensors",
        "test_save_load.py::test_a_model_comes_back_bit_for_bit[lora]",
    ),
    Mutation(
        "8 saving",
        "a memory file forgets how full the store is",
        "model/memory_file.py",
        '"stored_bound": cache.memory.stored_bound',
        '"stored_bound": 0',
        "test_save_load.py::test_a_memory_comes_back_bit_for_bit[llama]",
    ),
    Mutation(
        "8 saving",
        "files are written in place",
        "model/checkpoint.py",
        "for name, t in tensors.items()}, temporary, metadata)",
        "for name, t in tensors.items()}, path, metadata)",
        "test_save_load.py::test_a_kill_while_writing_leaves_the_old_file",
    ),
    Mutation(
        "8 saving: drift",
        "keys are not carried into the new code",
        "model/memory_file.py",
        "if key_map is not None:",
        "if False:",
        "test_save_load.py::test_a_drifted_model_maps_the_memory_into_its_code[key projection]",
    ),
    Mutation(
        "9 bad input",
        "negative ids are let through",
        "model/inputs.py",
        "int(ids.min()) < 0 or",
        "False or",
        "test_bad_input.py::test_a_bad_call_is_refused_and_changes_nothing[a negative id]",
    ),
    Mutation(
        "9 bad input",
        "NaN reaches the memory",
        "model/modeling.py",
        "if not torch.isfinite(hidden).all():",
        "if False:",
        "test_bad_input.py::test_weights_that_break_later_never_reach_the_memory[nan]",
    ),
    Mutation(
        "9 bad input",
        "a row of padding alone is read",
        "model/inputs.py",
        "if n + done == 0]",
        "if n + done < 0]",
        "test_bad_input.py::test_rows_of_padding",
    ),
    Mutation(
        "gate",
        "the gate lowers the loss by looking away",
        "hippocampus/losses.py",
        "importance.detach()",
        "importance",
        "test_gate_and_losses.py::test_the_gate_cannot_lower_a_loss_by_looking_away",
    ),
    Mutation(
        "gate",
        "no gradient from the loss reaches the gate through a full store",
        "hippocampus/episodes.py",
        "if moved.priority.requires_grad and n_stored:",
        "if False:",
        "test_gate_and_losses.py::test_competition_is_relaxed_for_the_gradient_alone",
    ),
    Mutation(
        "5 purity",
        "what is read again is read into the state itself",
        "model/rereading.py",
        "copy = cache.copy()",
        "copy = cache",
        "test_ask.py::test_rereading_is_in_a_copy",
    ),
    Mutation(
        "2 rows",
        "padding of a query is a word of it",
        "model/cache.py",
        "zip(ids, real, strict=True) if counts)",
        "zip(ids, real, strict=True))",
        "test_ask.py::test_rows_and_threads_never_meet",
    ),
    Mutation(
        "2 rows",
        "a row that has ended goes on reading",
        "model/modeling.py",
        "if ended is not None and found",
        "if False and found",
        "test_generation_state.py::test_a_row_that_has_ended_reads_nothing_more",
    ),
]


def mutated(mutation: Mutation, source: Path) -> None:
    """Applies a mutation to a copy of src; exits with a message if its snippet is not there exactly once."""
    path = source / "hippoformer" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        sys.exit(
            f"{mutation.file} holds the snippet {mutation.old!r} {text.count(mutation.old)} times, expected once: "
            f"bring the mutation {mutation.what!r} in tests/mutations.py up to date"
        )
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def run(tests: list[str], source: Path) -> tuple[int, str]:
    """Exit status and output of pytest on the named tests, with the package taken from `source`."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    command += ["-o", f"pythonpath={source}", *(str(ROOT / "tests" / test) for test in tests)]
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    """Runs the mutations and prints the table."""
    parser = argparse.ArgumentParser(description="Break the package on purpose and see that tests fail.")
    parser.add_argument("--only", default="", help="only invariants that contain this")
    chosen = [mutation for mutation in MUTATIONS if parser.parse_args().only in mutation.invariant]
    problems = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, mutation in enumerate(chosen):  # all snippets are checked before anything runs
            source = Path(folder) / str(number)
            shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
            mutated(mutation, source)
        clean = Path(folder) / "clean"
        shutil.copytree(ROOT / "src", clean, ignore=shutil.ignore_patterns("__pycache__"))
        status, output = run(sorted({mutation.test for mutation in chosen}), clean)
        if status != 0:
            sys.exit(f"On the unchanged package the named tests do not all pass, so nothing would be proved:\n{output}")
        print(
            "| invariant | what was broken | where | test that has to fail | outcome |\n| --- | --- | --- | --- | --- |"
        )
        for number, mutation in enumerate(chosen):
            status, output = run([mutation.test], Path(folder) / str(number))
            outcome = {0: "**SURVIVED**", 1: "failed, as it should"}.get(status, f"**pytest could not run ({status})**")
            if status != 1:
                problems += 1
                print(output, file=sys.stderr)
            test = f"`{mutation.test}`"
            print(f"| {mutation.invariant} | {mutation.what} | `{mutation.file}` | {test} | {outcome} |", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
