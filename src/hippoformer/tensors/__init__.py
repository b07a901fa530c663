"""Layer 1: pure functions on tensors. No parameters, no state, no knowledge of language models.

Shape letters used in the whole package: R rows (sequences), N tokens of one step, C window slots, E episode slots,
M stored episodes (`buffer_size`), H heads, D hidden size, K key width, U value width, V vocabulary.
"""
