"""Pictures of stored results, which say of themselves what they were drawn from.

The bytes of a picture differ from release to release of matplotlib and of its fonts, so that comparing them would tell
nothing. A picture's PNG therefore holds a digest of the results and of the source of what drew them: it is current as
long as these have not changed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from bench.reporting import documents

#: Draws the documents of one or several runs.
Draw = Callable[..., Figure]
#: The entry of the PNG's metadata.
DIGEST = "Drawn from"


def digest(draw: Draw, *drawn: Any) -> str:
    """Return what a current picture of these documents holds; it changes with the module of `draw`, too."""
    source = Path(inspect.getfile(draw)).read_text()
    return sha256(json.dumps([source, *drawn], sort_keys=True).encode()).hexdigest()


def save(picture: Path, draw: Draw, *results: Path) -> None:
    """Draw stored results, as PNG."""
    drawn = [documents.read(path) for path in results]
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw(*drawn).savefig(picture, metadata={DIGEST: digest(draw, *drawn)})


def is_current(picture: Path, draw: Draw, *results: Path) -> bool:
    """Whether the picture is there, and of these results as they are now."""
    try:
        with Image.open(picture) as opened:
            opened.load()
    except (OSError, SyntaxError):  # missing, or cut off, which PIL tells in both ways
        return False
    return bool(opened.info.get(DIGEST) == digest(draw, *map(documents.read, results)))
