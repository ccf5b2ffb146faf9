"""Words and numbers as they stand on the page; every text from outside goes through ``esc`` or ``quoted``."""

from __future__ import annotations

import html
import unicodedata

_BIDI_CONTROLS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def esc(text: str) -> str:
    """HTML of a text, safe in content and in attributes; what cannot be seen or would act is made visible.

    Control characters (the start of ANSI sequences among them) become their Unicode pictures, bidirectional controls,
    which could reorder what is around them, their code points, and broken surrogates U+FFFD.
    """
    return html.escape("".join(_visible(char) for char in text), quote=True)


def quoted(text: str) -> str:
    """A prompt: escaped, and isolated so that its writing direction stays its own."""
    return f"<bdi>{esc(text)}</bdi>"


def _visible(char: str) -> str:
    code = ord(char)
    if char in "\n\t":
        return char
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    if char in _BIDI_CONTROLS or unicodedata.category(char) == "Cc":
        return f"\u27e8U+{code:04X}\u27e9"
    return char


def number(value: float, digits: int = 3) -> str:
    """A figure with ``digits`` significant digits, a true minus sign and no exponent where it can be helped."""
    if value == 0:
        return "0"
    size = abs(value)
    text = f"{value:.{digits}g}" if not 1e-4 <= size < 1e6 else f"{value:.{max(0, digits - 1 - _exponent(size))}f}"
    return text.replace("-", "\u2212")


def signed(value: float, digits: int = 3) -> str:
    """``number`` with its sign always shown."""
    return ("+" if value > 0 else "") + number(value, digits)


def fixed(value: float, decimals: int, *, sign: bool = False) -> str:
    """A figure with so many decimals, as figures in a column are, with a true minus sign."""
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    # Rounded to nothing is neither up nor down.
    return (text if float(text) else text.lstrip("+-")).replace("-", "\u2212")


def percent(rate: float, digits: int = 1) -> str:
    """A rate from 0 to 1 as per cent."""
    return f"{100 * rate:.{digits}f} %".replace("-", "\u2212")


def points(difference: float) -> str:
    """A difference of two rates in percentage points, signed."""
    return f"{100 * difference:+.1f}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``0.4 s``, ``42 s``, ``4 min 12 s``, ``1 h 03 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _exponent(size: float) -> int:
    return int(f"{size:e}".partition("e")[2])


def breakable(name: str) -> str:
    """A name of a reward or a setting: escaped, and free to go on in the next line after an underscore or a dot."""
    return esc(name).replace("_", "_<wbr>").replace(".", ".<wbr>")


def shortened(text: str, most: int) -> str:
    """At most ``most`` characters of a text, not escaped; an ellipsis stands for the rest."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}\u2026"
