"""What the tests of memory start in a process of its own: a plan, or the run it is of.

python -m tests.plan.peaks plan|run RECIPE KEY=VALUE...

The last line printed is a number of bytes: the peak that is planned, or the one that was reached.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pfl_lm.preflight import check_recipe


def planned(recipe: Path, overrides: list[str]) -> int:
    """Return the estimate that `pfl-lm plan` prints."""
    from pfl_lm.plan import make_plan

    checked = check_recipe(recipe, overrides)
    memory = make_plan(checked.loaded, checked.clients).memory
    assert memory is not None
    return memory.host


def reached(recipe: Path, overrides: list[str]) -> int:
    """Run the recipe as the command line does; return the most this process has held.

    Linux's own mark of this program. That of `getrusage` would begin at what the parent held.
    """
    from pfl_lm.cli.finetune import finetune

    finetune(recipe, overrides)
    status = Path("/proc/self/status").read_text()
    [mark] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(mark)


if __name__ == "__main__":
    what, recipe, *overrides = sys.argv[1:]
    print({"plan": planned, "run": reached}[what](Path(recipe), overrides))
