"""How much memory a run will take at its peak, from what was counted and one measurement.

    load      process + weights + file
    work      process + weights + unpacked + 5/4 · (vectors + small) + trunk + large
    peak      the larger of the two

The file of weights is read through a map of its pages. They count while it is converted to another
precision, or quantized; where there is nothing to convert, the map itself becomes the weights.

``process`` is measured, not guessed: a plan imports what a run imports, and reads the same data.
To it come some 40 MB of machine code and buffers that only a fit touches.
``small`` and ``large`` are from the rehearsal, each the larger of training's and scoring's. They
are added up although their peaks fall at different times, because an allocator gives only large
blocks back to the system: once a step's activations have come and gone, their place stays with the
process while the next scoring asks for large blocks of logits. What lies between small blocks that
were freed is too small for others, hence the quarter on top; where batches are long it is
too little (docs/planning.md says why, and by how much).
Vectors are small blocks too, unless an adapter has more than eight million parameters.

On a GPU the weights, vectors and blocks are on the device, the process and the file are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from pfl_lm.layout import AdapterLayout
from pfl_lm.plan.rehearsal import LARGE, Rehearsal
from pfl_lm.plan.traffic import FLOAT, Traffic
from pfl_lm.recipe import Recipe

_TOUCHED = 40_000_000
"""Bytes of machine code and buffers that the first fit touches, beyond what importing did."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, and what they are for.

    Attributes:
        process: Python with everything imported and in use, the tokenizer and the data.
        weights: the frozen backbone in the precision it is kept in.
        file: its weights as they are stored, if they are converted while they are read.
        vectors: the adapter, the optimizer's moments, the method's vectors, a round's uploads,
            with what their fragments waste.
        trunk: what rows are below the first adapted layer, if that is remembered.
        blocks: of one training step and one scoring batch.
        on_host: whether the device is this machine's own memory.
        unpacked: the largest quantized matrix, in the precision it is multiplied in.
    """

    process: int
    weights: int
    file: int
    vectors: int
    trunk: int
    blocks: Rehearsal
    on_host: bool
    unpacked: int = 0

    @property
    def small(self) -> int:
        """Small blocks, with what their fragments waste."""
        most = max(self.blocks.train.small, self.blocks.score.small)
        return with_fragments(most)

    @property
    def large(self) -> int:
        """Large blocks: above all copies of the logits."""
        return max(self.blocks.train.large, self.blocks.score.large)

    @property
    def on_device(self) -> int:
        """The peak of what lies on the device, without the process around it."""
        beside = self.vectors + self.trunk + self.small + self.large
        return self.weights + self.unpacked + beside

    @property
    def loading(self) -> int:
        """The peak on this machine while the backbone is loaded."""
        return self.process + self.weights + self.file

    @property
    def working(self) -> int:
        """The peak on this machine while clients train and are scored."""
        return self.process + (self.on_device if self.on_host else 0)

    @property
    def host(self) -> int:
        """The peak on this machine."""
        return max(self.loading, self.working)


def process_bytes() -> int:
    """Return what this process holds now, and what it will once it fits."""
    held: int = psutil.Process().memory_info().rss
    return held + _TOUCHED


def with_fragments(n: int) -> int:
    """Return what small blocks of ``n`` bytes take, with the gaps between them."""
    return n * 5 // 4


def vector_bytes(recipe: Recipe, layout: AdapterLayout, traffic: Traffic, in_round: int) -> int:
    """Return the bytes of the vectors of a round whose last client trains.

    In vectors of ``layout.d`` numbers: the live adapter, its gradients and everybody's start;
    AdamW's two moments; some eight within a formula of the method; the models to choose from. And
    a client's state five times: as it was, as a copy to work on, as it will be, as tensors and as
    bytes to be written.
    """
    one = FLOAT * layout.d
    moments = 2 if recipe.training.optimizer == "adamw" else 0
    candidates = len(traffic.candidates) + 1
    state = 5 * sum(traffic.state.values())
    uploads = in_round * traffic.up
    n = one * (3 + moments + 8 + candidates) + traffic.server + state + uploads
    return n if one >= LARGE else with_fragments(n)
