"""What lies where in a run folder, ``<runtime.output_dir>/<name>``."""

from __future__ import annotations

import re

LEDGER = "federation.sqlite"
LOCK = "federation.lock"
DIAGNOSTICS = "diagnostics.csv"
GIVEN = "recipe.yaml"
RESOLVED = "recipe.resolved.yaml"

SLUG = re.compile(r"[a-z0-9-]{1,80}", re.ASCII)

FOLDERS = ("clients", "clients/*", "uploads", "uploads/*", "server", "adapters", "adapters/*")
"""Where files are written besides the run folder itself and ``global``."""

STATES = re.compile(r"(clients/[a-z0-9-]{1,80}|server)/state-\d{1,9}\.safetensors", re.ASCII)
UPLOADS = re.compile(r"uploads/\d{1,9}/[a-z0-9-]{1,80}\.safetensors", re.ASCII)
UNFINISHED = re.compile(r"\..+\.\d+\.part", re.ASCII)

NOT_BEGUN = re.compile(
    rf"{re.escape(GIVEN)}|{re.escape(RESOLVED)}|{re.escape(LOCK)}"
    rf"|{re.escape(LEDGER)}(-wal|-shm|-journal)?|{UNFINISHED.pattern}",
    re.ASCII,
)
"""Files that a process leaves which was killed before its run had begun."""
