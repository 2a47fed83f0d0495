"""What a person sees on stderr while a run works: progress bars, and lines above them."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0


class _Lines(tqdm):
    """Progress for a log file: whole lines instead of a bar that is drawn over itself."""

    monitor_interval = 0  # tqdm's monitor thread would print additional lines

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        self.fp.write(f"{self}\n")
        self.fp.flush()
        return True

    def close(self) -> None:
        if not self.disable and self.n != self.last_print_n:
            self.display()
        self.disable = True


def progress(items: Iterable | int, desc: str, unit: str, done: int = 0) -> tqdm:
    """A progress bar over `items`, or over a count that the caller advances with `.update()`.
    `done` of them were done before the run resumed, and are not part of the speed. Where stderr is
    not a terminal it prints lines instead, at most one every SECONDS_BETWEEN_LINES."""
    source = {"total": items} if isinstance(items, int) else {"iterable": items}
    if sys.stderr.isatty():
        return tqdm(**source, desc=desc, unit=unit, initial=done, dynamic_ncols=True)
    return _Lines(
        **source,
        desc=desc,
        unit=unit,
        initial=done,
        miniters=1,
        mininterval=SECONDS_BETWEEN_LINES,
        bar_format="{desc}: {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]",
    )


def say(line: str) -> None:
    """Prints a line on stderr, above the progress bar if there is one."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr, flush=True)
