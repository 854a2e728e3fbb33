"""Texts that tokenizers disagree about: scripts, spaces, numbers, code, control characters."""

import random

FIXED = [
    "",
    " ",
    "\n",
    "\t",
    "  leading and trailing  ",
    "a" * 100,
    "1234567890 1,234.56 0x1F 3.14e-10 ①②③ ½ ٣٤٥ २३४",
    "I'm you're he'll we've it'd they'S 'tis don’t",
    "def f(x):\n    return {x: [x**2 for x in range(10)]}\n\n\n# end\t\t",
    '<html lang="en">\r\n<p>&amp;</p>\r\n</html>',
    "Grüße, naïve façade, Ærøskøbing, ﬁne ﬂow, ｆｕｌｌｗｉｄｔｈ",
    "日本語のテキスト。中文文本，測試。한국어 문장입니다.",
    "Здравствуй, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "🙂👍🏽👩‍👩‍👧‍👦🇫🇷❤️‍🔥 ☃️",
    "e\u0301 n\u0303 \u200b zero\u200dwidth \ufeff bom \u00a0 nbsp \u3000 ideographic",
    "\x00\x01\x07\x1b[31mred\x7f\x85\u2028\u2029",
    "<s> </s> <unk> <pad> [INST] <<SYS>> <|im_start|>user <|im_end|> <|endoftext|>",
    "<|begin_of_text|><|start_header_id|> <0x0A> ▁▁ Ġ Ċ <tool> \ufffd ﷺ क्",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α∧¬β → 𝔸𝒞, \U0010ffff",
    "a\n\nb\n \nc\r\n\r\nd \n  e\n\n\n\n",
    "https://example.org/path?q=a%20b&c=d#frag user@example.org C:\\dir\\file.txt",
]
ALPHABETS = [
    "abc ABC",
    "0123456789 .,",
    " \n\t\r",
    "{}[]()<>=+-*/\\|&^%$#@!~`'\";:,.? _",
    "日本語中文한국어",
    "éèêëüñçåøœß’“”—…",
    "🙂🎉👍🏽🇫🇷\u200d\ufe0f",
    "\x00\x02\x0b\x1f\x7f\u0085\u200b\ufeff",
    "<|im_end|> <s> </s> [INST] ",
    "Ġ▁Ċ",
]


def odd_texts(count=320, seed=0):
    """So many texts, the same for every caller: the fixed ones, then mixtures of alphabets."""
    draw = random.Random(seed)
    texts = list(FIXED)
    while len(texts) < count:
        letters = "".join(draw.sample(ALPHABETS, draw.randint(1, 4)))
        texts.append("".join(draw.choices(letters, k=draw.randint(1, 60))))
    return texts[:count]
