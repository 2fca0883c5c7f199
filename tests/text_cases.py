"""Which texts could a tokeniser get wrong? Many scripts, emoji, control characters, all spaces, long words, special tokens."""

import random

SCRIPTS = {
    "Latin": (0x41, 0x17F), "Greek": (0x370, 0x3FF), "Cyrillic": (0x400, 0x4FF), "Hebrew": (0x5D0, 0x5EA),
    "Arabic": (0x600, 0x6FF), "Devanagari": (0x900, 0x97F), "Thai": (0xE01, 0xE5B), "Hangul": (0xAC00, 0xD7A3),
    "Jamo": (0x1100, 0x11FF), "Kana": (0x3041, 0x30FF), "CJK": (0x4E00, 0x9FFF), "CJK beyond 16 bits": (0x20000, 0x2A6D6),
    "half and full width": (0xFF01, 0xFFEE), "punctuation": (0x2010, 0x2057), "mathematics": (0x1D400, 0x1D7FF),
    "presentation forms": (0xFB00, 0xFDFF), "private use": (0xE000, 0xE0FF),
}  # fmt: skip
COMBINING = [chr(c) for c in (*range(0x300, 0x34F), 0x5B0, 0x64B, 0x93C, 0xE48, 0x20DD)]
SPACES = [
    *" \t\n\r\v\f\x1c\x85\xa0",
    *map(chr, (0x1680, 0x2000, 0x2009, 0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)),
]
CONTROLS = [
    *map(chr, (0, 1, 7, 8, 0x1B, 0x7F, 0x80, 0x9F, 0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x202E, 0x2060, 0xFEFF))
]
CONTROLS += [*map(chr, (0xFFFD, 0xFFFE, 0xFFFF, 0x10FFFF, 0xE0001))]
EMOJI = ["🙂", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👩🏿‍🚀", "🇩🇪", "1️⃣", "❤️", "🧑🏻‍❤️‍💋‍🧑🏾", "🏴󠁧󠁢󠁳󠁣󠁴󠁿"]
WORDS = [
    "In", "the", "beginning", "God", "created", ";", "let", "light", "3.14", "1,000", "don't", "``x''", "foo_bar",
    "http://a.b/c?d=e",
]  # fmt: skip
SPECIAL = [
    "<|endoftext|>", "</s>", "<pad>", "<unk>", "<s>", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>", "<extra_id_31>", "<extra_id_",
    "<|endoftext", "[cls]", "▁", "▁the", "Ġthe", "<0x0A>",
]  # fmt: skip
FIXED = [
    "", " ", "\n", "\0", "a\0b", "\t \n", "e\u0301", "\u0301", "ﬁ ½ ² Ⅷ ㎏ ﷺ", "İstanbul ẞ ŉ", "שָׁלוֹם", "नमस्ते", "ภาษาไทย", "각",
    "a" * 10_000, "日" * 10_000, " " * 1000, "\n" * 300, "👩‍👩‍👧‍👦" * 200, "e\u0301" * 500, "ab" * 5000 + " end",
    "<|endoftext|>" * 3, "</s></s>", "[SEP] [SEP]", "  leading", "trailing  ", "two  spaces", "12345678901234567890",
]  # fmt: skip


def texts(seed: int, count: int = 500) -> list[str]:
    """The fixed ones, then drawn ones; always the same for a seed."""
    draw = random.Random(seed)

    def letters() -> str:
        first, last = SCRIPTS[draw.choice(list(SCRIPTS))]
        word = ""
        for _ in range(draw.randrange(1, 9)):
            word += chr(draw.randint(first, last)) + (draw.choice(COMBINING) if draw.random() < 0.1 else "")
        return word

    def anything() -> str:
        code = draw.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    kinds = [(letters, 8), (lambda: draw.choice(WORDS), 8), (lambda: draw.choice(SPACES), 4), (lambda: " ", 6),
             (lambda: draw.choice(CONTROLS), 1), (lambda: draw.choice(EMOJI), 2), (lambda: draw.choice(SPECIAL), 1.5),
             (anything, 1), (lambda: draw.choice(COMBINING), 0.5)]  # fmt: skip
    makers, weights = zip(*kinds)
    drawn = [
        "".join(maker() for maker in draw.choices(makers, weights, k=draw.randrange(1, 30)))
        for _ in range(count - len(FIXED))
    ]
    return FIXED + drawn
