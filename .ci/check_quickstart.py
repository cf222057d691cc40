"""Hold the quickstart to its word: every client helped, in less than fifteen minutes."""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
index = json.loads((run / "adapters.json").read_text(encoding="utf-8"))
minutes = ((run / "adapters.json").stat().st_mtime - (run / "recipe.yaml").stat().st_mtime) / 60
print(f"quickstart: {len(index['clients'])} clients in {minutes:.1f} minutes")

assert len(index["clients"]) == 6, index["clients"].keys()
for client, result in index["clients"].items():
    test = result["scores"]["test"]
    assert test[result["candidate"]] < test["base"], (client, result)
    assert (run / "adapters" / result["slug"] / "adapter_model.safetensors").is_file(), client
assert minutes < 15, minutes
