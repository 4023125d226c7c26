"""A tokenizer small enough for a test, with CLIP's own rules, and the ids of chunks typed from the definition."""

from __future__ import annotations

from transformers import CLIPTokenizer

B, E, T = 49406, 49407, 7  # begin, end, some text id

TAGS = [
    "1girl", "k-on!", "hatsune miku", "blue eyes", "@_@", ">_<", ":d", "...", "!?", "!!", "!", "re:zero", "(bad)", "'s",
    "girls' frontline", "fate/grand order", "東方", "アイドルマスター", "한국어", "\U0001f600", "❤️", "é", "e\u0301",
    "\u0301",
    "3d", "2010s", "|||", "x,y", "  ", "", "very aesthetic", "ÄÖÜ", "ς", "İ", "\u3000wide", "a\tb", "nier:automata",
]  # fmt: skip


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins of the 256 bytes, in CLIP's order ("!" is id 0)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(rest))]


def small_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    merges = [("!", ",</w>"), ("g", "i"), ("gi", "r"), ("gir", "l</w>"), ("k", "-"), (".", "."), ("..", ".</w>")]
    symbols = byte_alphabet()
    symbols += [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges]
    vocab = {symbol: i for i, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad)


def row(text: int, end: int, pad: int = 0) -> list[int]:
    return [B] + [T] * text + [E] * end + [0] * pad

TABLE = {  # content ids -> (encoder 1's chunks, encoder 2's chunks), typed from the definition
    0: ([row(0, 76)] * 3, [row(0, 1, 75)] * 3),
    1: ([row(1, 75), row(0, 76), row(0, 76)], [row(1, 1, 74), row(0, 1, 75), row(0, 1, 75)]),
    75: ([row(75, 1), row(0, 76), row(0, 76)], [row(75, 1), row(0, 1, 75), row(0, 1, 75)]),
    76: ([row(75, 1), row(1, 75), row(0, 76)], [row(75, 1), row(1, 1, 74), row(0, 1, 75)]),
    150: ([row(75, 1), row(75, 1), row(0, 76)], [row(75, 1), row(75, 1), row(0, 1, 75)]),
    225: ([row(75, 1)] * 3, [row(75, 1)] * 3),
    300: ([row(75, 1)] * 3, [row(75, 1)] * 3),
}
