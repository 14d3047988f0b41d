"""The blocks that pages may have between `<!-- figures: NAME -->` and `<!-- end of figures -->`, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.figures import stored

#: Takes the documents of results. Returns a table's lines, or a text that stands within a sentence.
Make = Callable[..., Sequence[str] | str]
BLOCKS: dict[str, Block] = {}


@dataclass(frozen=True)
class Block:
    """A table, or a text within a sentence, made from stored results."""

    make: Make
    results: tuple[str, ...]

    def text(self) -> str:
        """Return what stands between the marks. Under a table it is told where its figures come from."""
        made = self.make(*map(stored.read, self.results))
        if isinstance(made, str):
            return made
        captions = [line for name in self.results for line in ("", stored.caption(name))]
        return "\n".join(["", "", *made, *captions, "", ""])


def block(name: str, *results: str) -> Callable[[Make], Make]:
    """Return a decorator that registers a function as a block, which is given the documents of these results."""

    def register(make: Make) -> Make:
        if name in BLOCKS:
            raise ValueError(f"there are two blocks {name!r}")
        BLOCKS[name] = Block(make, results)
        return make

    return register
