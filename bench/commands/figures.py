"""Write the tables and pictures of README.md and docs/ anew, from the results in bench/results.

A page has its tables between `<!-- figures: NAME -->` and `<!-- end of figures -->`. Nothing is measured: commands that
measure store their results there with `--out bench/results`. What is current already is left alone.

Exit code 0, or 1 if --check finds what is not current, or 2 where a result is missing, damaged or not complete.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.set_defaults(refuse=parser.error)
    parser.add_argument("--check", action="store_true", help="change nothing, and name what is not current")


def run(args: argparse.Namespace) -> int:
    """Write what is not current, or name it."""
    # They need scipy, and what the examples do. Other commands work on a machine that was set up for training alone.
    from bench.figures import pages, pictures, stored

    try:
        for name in stored.SOURCES:
            stored.read(name)
    except ValueError as error:
        args.refuse(str(error))
    found = 0
    for page in pages.pages():
        text = page.read_text()
        stale = pages.stale(text)
        for name in stale:
            print(f"{page.relative_to(stored.ROOT)}: {name}")
        found += len(stale)
        if stale and not args.check:
            page.write_text(pages.filled(text))
    for picture in pictures.PICTURES:
        if not picture.is_current():
            print(picture.path.relative_to(stored.ROOT))
            found += 1
            if not args.check:
                picture.save()
    print(f"{found} not current" if args.check else f"{found} written anew")
    return int(args.check and found > 0)
