"""What is printed when nobody reads on, as in ``pfl-lm validate recipe.yaml | head -1``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pfl_lm.cli.exits import UNREAD
from tests.tiny import tiny_recipe


def test_a_reader_that_has_gone_is_no_bug(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    for words in (["validate", str(recipe)], ["recipes", "list"]):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "pfl_lm", *words]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        assert (done.returncode, done.stderr) == (UNREAD, "")
