"""Tables and pictures of README.md and docs/, made from the stored results of bench/results.

To add a table, write a function that takes the documents of results and returns its lines, under `@block(NAME, RESULT)`
in one of the modules named here, and put `<!-- figures: NAME -->` and `<!-- end of figures -->` where it belongs. A
picture is named in pictures.py, and a new result in stored.py, with its command. Then `make figures`.
"""

from bench.figures import effect, examples, host, memory, predicted, step, train

__all__ = ["effect", "examples", "host", "memory", "predicted", "step", "train"]
