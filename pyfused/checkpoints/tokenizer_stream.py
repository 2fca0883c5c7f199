"""How is text printed while its ids come one by one, without half a character?"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from collections.abc import Set as AbstractSet


class StreamDecoder:
    """Turns ids into text as they come. Holds back the bytes of a character until it is complete. See `Tokenizer.stream`.

    The texts returned by `push` and, at the end, `finish` add up to exactly `Tokenizer.decode` of the ids.

    Args:
        content: (id, whether it begins the text) -> its bytes. Raises IndexError for an unknown id.
        skip: ids that are left out.
    """

    def __init__(self, content: Callable[[int, bool], bytes], skip: AbstractSet[int] = frozenset()) -> None:
        self._content, self._skip, self._first = content, skip, True
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """The text completed by this id; often empty within an emoji."""
        content = self._content(index, self._first)
        if index in self._skip:
            return ""
        self._first = False
        return self._decoder.decode(content)

    def finish(self) -> str:
        """The rest: U+FFFD if the ids ended inside a character, else "". The decoder can then be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._first = True
        return rest
