"""Prompts that tokenizers disagree on, for tests of tokens."""

# ruff: noqa: RUF001  (ambiguous letters are what this file is about)

from __future__ import annotations

import random

CHOSEN = (
    "",
    " ",
    " \t\r\n\v\f\u2028\u2029\u00a0\u3000 ",
    "a photo of a cat",
    "A Photo of a CAT, wearing SUNGLASSES!!! 4k, 8K, trending on artstation",
    "fish &amp; chips, &lt;b&gt;bold&lt;/b&gt;, &quot;quoted&quot;, caf&eacute;, &#39;s, &#x1F600;",
    "&amp;amp;lt; twice, &amp;lt;end_of_text&amp;gt;, &ampamp; &unknown; &#0; &#xD800; &#128; &#x110000;",
    "<b>&amp; no unescaping by ftfy</b> e&#769;e&#x301; &nbsp;&nbsp; &zwnj;",
    "“curly” ‘quotes’ it’s don’t I’ll we’ve they’re I’m he’d",
    "it's don't I'll we've they're I'm he'd IT'S DON'T 'S 'ſ '’s ''s",
    "schÃ¶n, cafÃ©, â€œmojibakeâ€\x9d, Ð¿Ñ€Ð¸Ð²ÐµÑ‚, ã\x81\x82, ÃƒÂ¶",
    "ﬁne ﬂuﬀy ﬃ ﬄ ﬆ, ǆ Ǆ ĳ, ① ㎏ ﷽ ½ ² ℡",
    "ｆｕｌｌｗｉｄｔｈ　ＴＥＸＴ １２３ ﾊﾝｶｸ",
    "a <|endoftext|> b", "<|startoftext|>a<|endoftext|>", "< |endoftext| > <|ENDOFTEXT|>",
    "a <start_of_text> b", "a <end_of_text> b <end_of_text>", "<END_OF_TEXT><Start_Of_Text>",
    "<end_of_text", "<ſtart_of_text>",
    "x<end_of_text>y<start_of_text>z!", "'s<end_of_text>'s 1<end_of_text>2",
    "👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🇩🇪 ❤️ 1️⃣ ☺︎ 🫠🪿", "😀" * 90, "👩‍❤️‍💋‍👨" * 20,
    "مرحبا بالعالم", "שָׁלוֹם עוֹלָם", "abc \u202eevil\u202c def \u2066x\u2069 \u200f",
    "e\u0301 a\u0308\u0323 o\u0323\u0308 \u0301", "Z̷̢̛a̶l̴g̸o̵ " * 10, "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ ς",
    "İstanbul ISPARTA ı", "ẞ ß SS ǅ ᾳ ᾼ",
    "a\0b\x01c\x1bd\x7fe\x85f\x9fg", "\x1b[31mred\x1b[0m",
    "\ufeffbom\ufeff \ufffe \uffff \U0010ffff \ue000 \u200b\u200c\u200d\u2060",
    "\ud800", "a\udc80b\udfff", "\ud83d\ude00", "\udcff\udcfe",
    "0123456789 12.5 1,000,000 3½ ٣٤ ४५ 四 Ⅷ", "a_b __init__ snake_case camelCase",
    "漢字かな交じり文。中文，標點！한국어", "नमस्ते दुनिया क्ष", "ไทยไม่มีวรรค", "မြန်မာ ខ្មែរ",
    "http://example.com/?q=a&b=c#d", "C:\\path\\file.txt", "(masterpiece:1.2), [red|blue], {a}, <lora:x:0.8>",
    "... --- ,,, !!!??? ~~~ *** ===> <=> != @#$%^&*()", "'''''''", "``x`` ´y´ ‚z‘ „q“ «r» ‹s›",
    "word " * 10_000, "x" * 3_000, "red " * 75, "red " * 76, "red " * 74, "a1" * 60, "!" * 500, "é" * 300,
    "\N{ZERO WIDTH NON-JOINER}".join("separated"), "soft\u00adhyphen non\u2011breaking\u2013dash\u2014em",
    "\u1e9b\u0323 \u212b \u2126 K", "\U0001d4d7\U0001d4ee\U0001d4f5\U0001d4f5\U0001d4f8 \U00010400\U00010428",
)  # fmt: skip
_PIECES = (
    "a", "the", "red", "circle", "Star", "BLUE", " ", "  ", "\n", "\t", "\u00a0", ",", ".",
    "!", "'s", "’s", "'ll", "n't",
    "-", "_", "1", "42",
    "&amp;", "&amp;amp;", "&lt;", "&#39;", "&#x27;", "&eacute;", "&#769;", "&nbsp;", "&",
    ";", "<", ">", "|", "“", "”", "‘", "Ã¶", "â€™", "Ã©",
    "ﬁ", "ﬀ", "é", "e\u0301", "\u0301", "Σ", "ς", "İ", "ß", "<|endoftext|>",
    "<start_of_text>", "<end_of_text>", "😀", "\u200d", "\ufe0f", "🇩", "👩‍🚀",
    "שלום", "مرحبا", "漢字", "か", "\u3099", "한", "\u1112\u1161\u11ab", "\0", "\x07", "\x1c",
    "\x85", "\u2028", "\ud83d", "\ude00",
    "\udc80", "\ufffd", "ſ", "K",
)  # fmt: skip


def hostile_prompts(count: int = 1_000) -> list[str]:
    """The chosen ones, then chance mixtures of what they hold and of any Unicode; the same at every call."""
    chance = random.Random(20)
    found = list(CHOSEN)
    while len(found) < count:
        length = chance.choice((1, 2, 3, 5, 8, 13, 21, 40, 80))
        kind = len(found) % 4
        if kind < 2:
            pieces = [chance.choice(_PIECES) for _ in range(length)]
        elif kind == 2:
            pieces = [chr(chance.randrange(chance.choice((0x250, 0x3000, 0x110000)))) for _ in range(length)]
        else:
            pieces = [
                chance.choice((chance.choice(_PIECES), chr(chance.randrange(0x20, 0x2FFF)))) for _ in range(length)
            ]
        found.append(chance.choice(("", " ")).join(pieces))
    return found[:count]
