"""Answers that a model writes to a client's rows, and how near they are to those in the rows.

    exact_match   answers that are the row's own, white space around them aside / rows
    rouge_l       mean over rows of F1 of the longest common subsequence of words

Written greedily, row by row, from what comes before the row's last answer. ROUGE-L (Lin, 2004) is
of words in lower case, a word being letters and digits of any script; with a longest common
subsequence of l words, precision is l / words written, recall l / words wanted, and F1 is 0 where
l is. Rows that are cut have a cut answer, and are compared with that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pfl_lm.layout import Vector

if TYPE_CHECKING:
    from pfl_lm.data.examples import Example
    from pfl_lm.model.adapter import Adapter
    from pfl_lm.recipe import EvaluationOptions

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Answers:
    """Which metrics of written answers are asked for, and what turns tokens into text."""

    tokenizer: Any
    options: EvaluationOptions

    def metrics(
        self, adapter: Adapter, vector: Vector, examples: Sequence[Example]
    ) -> dict[str, float]:
        """Let ``vector`` write an answer to each row; overwrites the resident adapter.

        Imports `evaluate`, which a run does for nothing else.
        """
        from pfl_lm.evaluate.hugging_face import METRICS

        adapter.write(vector)
        adapter.model.eval()
        written = [self._written(adapter, example) for example in examples]
        wanted = [self._text(_wanted(example)) for example in examples]
        return {
            name: METRICS[name](keep_in_memory=True).compute(
                predictions=written, references=wanted
            )[name]
            for name in self.options.metrics
        }

    @torch.no_grad()
    def _written(self, adapter: Adapter, example: Example) -> str:
        from transformers import GenerationConfig

        model, prompt = adapter.model, _prompt(example)
        own, ends = model.generation_config, {self.tokenizer.eos_token_id}
        named = own.eos_token_id
        ends |= {*named} if isinstance(named, list | tuple) else {named}
        ends |= {_wanted(example)[-1]} & {*self.tokenizer.all_special_ids}
        ids = torch.tensor([prompt], device=adapter.weights.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=self.options.max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=sorted(ends - {None}),
                pad_token_id=0
                if self.tokenizer.pad_token_id is None
                else self.tokenizer.pad_token_id,
                decoder_start_token_id=own.decoder_start_token_id,
                use_cache=True,
            ),
        )
        new = out[0] if example.target else out[0, len(prompt) :]
        return self._text(new.tolist())

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()


def _prompt(example: Example) -> tuple[int, ...]:
    """Return what comes before a row's last answer; all of what an encoder reads."""
    return example.input_ids if example.target else example.input_ids[: example.spans[-1][0]]


def _wanted(example: Example) -> tuple[int, ...]:
    """Return the tokens of a row's last answer, with the one that ends it."""
    if example.target:
        return example.target
    first, last = example.spans[-1]
    return example.input_ids[first:last]


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of answers that are the wanted ones, white space around them aside."""
    same = (one.strip() == other.strip() for one, other in zip(written, wanted, strict=True))
    return sum(same) / len(wanted)


def rouge_l(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the mean over rows of ROUGE-L's F1."""
    pairs = zip(written, wanted, strict=True)
    return math.fsum(_rouge_l(one, other) for one, other in pairs) / len(wanted)


def _rouge_l(written: str, wanted: str) -> float:
    one, other = _WORD.findall(written.lower()), _WORD.findall(wanted.lower())
    common = _longest_common(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    best = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for i, there in enumerate(other, 1):
            diagonal, best[i] = (
                best[i],
                diagonal + 1 if word == there else max(best[i], best[i - 1]),
            )
    return best[-1]
