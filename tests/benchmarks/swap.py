"""What it costs to change clients: in memory, and through the disk.

    python -m tests.benchmarks.swap [--tiny] [--repeats N]

In memory: one client's numbers out of the resident adapter, another's in. Through the disk: a
client's whole state written as after a turn (fsynced, renamed, folder fsynced), and read back with
its SHA-256 checked, as before the next one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from pfl_lm.federation.store import Store
from pfl_lm.methods import METHODS, ClientInfo, Setup
from pfl_lm.model.adapter import Adapter
from pfl_lm.model.backbone import load_backbone
from tests.benchmarks.measure import alternate, arguments, show, table
from tests.benchmarks.world import recipe


def main() -> None:
    given = arguments(__doc__, repeats=50)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # a disk, where /tmp may be memory
        options = recipe(Path(folder), tiny=given.tiny).recipe
        adapter = Adapter(load_backbone(options.backbone, device), options.adapter, seed=0)
        start = adapter.read()
        other = torch.randn_like(start)
        setup = Setup(adapter.layout, 1, 0, options.training)
        method = METHODS[options.method.name](options.method, setup)
        state = method.init_client(ClientInfo("a", 1, adapter.layout), start)
        store = Store(Path(folder) / "run", {"a": "a"}, device)
        file = store.save_client("a", 0, state)

        def swap() -> None:
            adapter.read()
            adapter.write(other)

        times = alternate(
            {
                "swap in memory": swap,
                "state written and synced": lambda: store.save_client("a", 0, state),
                "state read and checked": lambda: store.load_client(file),
            },
            given.repeats,
        )
    megabytes = {
        "adapter": start.numel() * 4 / 1e6,
        "state": sum(each.numel() for each in state.vectors.values()) * 4 / 1e6,
    }
    show(
        f"changing clients: d = {len(start)}, adapter {megabytes['adapter']:.2f} MB, "
        f"{options.method.name}'s state {megabytes['state']:.2f} MB",
        table(times),
        {"megabytes": megabytes, "ms": {name: each.numbers for name, each in times.items()}},
    )


if __name__ == "__main__":
    main()
