"""Hugging Face's Trainer, one for each client and round: on a resident model, and on a fresh one.

It is told to do the same work: the same rows in the same batches, the recipe's optimizer at a
constant rate, no weight decay, no clipping, no checkpoints, no reports. The Trainer divides the
loss by the supervised tokens of the whole step, as pfl-lm does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pfl_lm.bench.case import Case, Did
from pfl_lm.bench.clock import Stopwatch


@contextmanager
def trainer(case: Case, steps: Stopwatch) -> Iterator[Callable[[], Did]]:
    """Train the resident model by a Trainer that is made for this turn."""
    with case.adapter() as adapter, TemporaryDirectory(dir=case.disk) as folder:
        start = adapter.read()

        def turn() -> Did:
            adapter.write(start)
            adapter.train_only(None)
            _train(case, adapter.model, Path(folder), steps)
            return Did(adapter.read())

        yield turn


@contextmanager
def reload(case: Case, steps: Stopwatch) -> Iterator[Callable[[], Did]]:
    """Load the model, put a new adapter in, give it the client's numbers, train it as `trainer`.

    The rows are tokenized already, so no tokenizer is loaded.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    with case.adapter() as adapter:
        config, tensors = copy.deepcopy(adapter.config), adapter.tensors(adapter.read())
        read_back = adapter.vector
    options = {
        "revision": case.recipe.backbone.revision,
        "dtype": case.backbone.dtype,
        "local_files_only": True,  # the disk is measured, not the network
    }
    with TemporaryDirectory(dir=case.disk) as folder:

        def turn() -> Did:
            model = AutoModelForCausalLM.from_pretrained(
                case.place, use_safetensors=True, **options
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
                model = get_peft_model(model.to(case.device), copy.deepcopy(config))
            set_peft_model_state_dict(model, tensors)
            _train(case, model, Path(folder), steps)
            return Did(read_back(get_peft_model_state_dict(model)))

        yield turn


def _train(case: Case, model: Any, folder: Path, steps: Stopwatch) -> None:
    """Make a Trainer, and train."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):  # type: ignore[misc]
        """Takes the turn's batches as they come; a stock one would shuffle by its own seed."""

        def get_train_dataloader(self) -> Any:
            return [_inputs(batch) for batch in case.batches()]

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **more: Any) -> None:
            steps.start()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            steps.stop()

    training = case.recipe.training
    devices = [case.device] if case.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # a Trainer seeds everything
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=case.steps,
            per_device_train_batch_size=training.per_device_train_batch_size,
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=0.0,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=case.seed % 2**32,
            use_cpu=case.device.type == "cpu",
            **({"optim": "sgd"} if training.optimizer == "sgd" else {}),
        )
        made = InOrder(
            model=model, args=arguments, train_dataset=case.examples, callbacks=[Steps()]
        )
        made.remove_callback(PrinterCallback)  # it would print a summary of every turn
        made.train()
    model.eval()


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
