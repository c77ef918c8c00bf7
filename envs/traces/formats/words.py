"""Lengths of texts in tokens where there is no tokenizer: a rule of thumb, and said so by whoever uses it."""

TOKENS_PER_WORD = 4 / 3
BYTES_PER_TOKEN = 6
RULE = "4 tokens for 3 words, at least 1 for 6 bytes"


def count_tokens(text: str) -> int:
    """About as many tokens as a tokenizer would make of English; the bytes are for code and texts without spaces."""
    return round(max(len(text.split()) * TOKENS_PER_WORD, len(text.encode(errors="replace")) / BYTES_PER_TOKEN))
