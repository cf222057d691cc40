"""The one place that knows PEFT: an adapter goes in, flat vectors come in and out.

    weights  (d,)  fp32   ── PEFT's lora_A / lora_B parameters are views into it, a head's too
    grads    (d,)  fp32   ── their ``.grad`` are views into it

So a client's swap is one copy, and a method sees one vector. One adapter is resident, named
``default``; client ids never become PEFT adapter names, because PEFT finds an adapter's tensors by
looking for its name inside their keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfl_lm.errors import ExportError, ModelError
from pfl_lm.layout import AdapterLayout, Factor, Vector
from pfl_lm.model.backbone import Backbone
from pfl_lm.model.checkpointed import CheckpointedLayers
from pfl_lm.model.compiled import CompiledLayers
from pfl_lm.model.forward import replace_forward
from pfl_lm.model.states import TrunkStates
from pfl_lm.model.targets import first_few, refuse_unknown_targets, targets_here
from pfl_lm.model.tasks import in_float32, start_head
from pfl_lm.model.trunk import layers_of, trunk_of

if TYPE_CHECKING:
    from pfl_lm.recipe import AdapterOptions

_NAME = "default"
_PREFIX = ("base_model", "model")
_COPY = ("modules_to_save", _NAME)
_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
}
_SAVED_ANYHOW = ("classifier", "score")
"""The heads that PEFT itself trains and saves with a classifier's adapter."""


class _Place(NamedTuple):
    """Where a parameter belongs; of a head, ``module`` is the parameter's own name."""

    module: str
    factor: Factor
    head: bool = False


class Adapter:
    """The LoRA adapter that lives in a backbone, as one flat vector.

    Attributes:
        model: the backbone's model, which now applies the adapter in every forward.
        forward: what to call for logits: the model, or its trunk where that is remembered.
        layout: which slice of the vector is which matrix.
        weights: ``(d,)`` fp32, the live numbers; writing here changes the model.
        grads: ``(d,)`` fp32, the live gradients of the last backward.
        is_half: whether the backbone below it is float16, so that gradients must be scaled.
    """

    def __init__(
        self,
        backbone: Backbone,
        options: AdapterOptions,
        *,
        seed: int,
        trunk: TrunkStates | None = None,
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Inject a fresh adapter: A random from ``seed``, B zero; and start a head, if it has one.

        ``trunk`` is where states of rows below the first adapted layer are remembered, if they are.
        With ``compile``, the layers above it are compiled; with ``gradient_checkpointing`` they
        are run once more in a backward pass, and keep little until then.

        Raises:
            ModelError: a target module or a layer does not exist, or layers cannot be compiled.
        """
        options = _named_as_here(backbone, options)
        self.is_half = backbone.dtype == torch.float16
        self.model = backbone.model
        self._heads = {name: self.model.get_submodule(name) for name in backbone.head}
        self._peft, self.config = _inject(backbone, options, seed)
        self._parameters = _parameters_by_place(self._peft)
        self.layout = AdapterLayout.of(
            (
                (place.module, place.factor, tuple(parameter.shape))
                for place, parameter in self._parameters.items()
                if not place.head
            ),
            head=(
                (place.module, tuple(parameter.shape))
                for place, parameter in self._parameters.items()
                if place.head
            ),
        )
        here = backbone.device
        self.weights: Vector = self.layout.join(
            {f"{at.module}.{at.factor}": each.to(here) for at, each in self._parameters.items()}
        )
        self.grads: Vector = torch.zeros_like(self.weights)
        for (_, view), parameter in zip(
            self.layout.views(self.weights), self.parameters(), strict=True
        ):
            parameter.data = view
        self.zero_grad()
        if backbone.is_spread:
            _go_to_inputs(self._peft)
        entries = self.layout.entries
        self._trunk = None
        if trunk is not None and backbone.task.name == "causal_lm":
            self._trunk = trunk_of(self.model, entries, trunk)
        self.forward = self.model if self._trunk is None else self._trunk
        self._checkpointed: CheckpointedLayers | None = None
        self._compiled: CompiledLayers | None = None
        try:
            if gradient_checkpointing:
                self._checkpointed = CheckpointedLayers(self._above())
            if compile:
                self._compiled = CompiledLayers(self.model, self._above())
        except ModelError:
            self.close()
            raise

    def _above(self) -> Sequence[nn.Module] | None:
        """Return the layers that no trunk stands for; None if the model has no one list."""
        _, layers = layers_of(self.model)
        first = 0 if self._trunk is None else self._trunk.depth
        return None if layers is None else list(layers)[first:]

    def close(self) -> None:
        """Take the adapter out: the backbone is as it was, ready for another one."""
        for part in (self._compiled, self._checkpointed, self._trunk):
            if part is not None:
                part.close()
        self._peft.unload()
        for name, module in self._heads.items():  # PEFT leaves its trained copy there
            setattr(self.model, name, module)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield PEFT's parameters in the order of the layout."""
        yield from self._parameters.values()

    def read(self) -> Vector:
        """Return a copy of the numbers in use."""
        return self.weights.clone()

    @torch.no_grad()
    def write(self, vector: Vector) -> None:
        """Put a client's numbers in: one copy of ``(d,)``."""
        self.weights.copy_(vector)

    def zero_grad(self) -> None:
        """Set the gradients to zero, and tie each parameter's ``.grad`` to its slice again."""
        self.grads.zero_()
        for (_, view), parameter in zip(
            self.layout.views(self.grads), self.parameters(), strict=True
        ):
            parameter.grad = view if parameter.requires_grad else None

    def drop_grad(self) -> None:
        """Set every ``.grad`` to None: an optimizer then takes no step at all."""
        for parameter in self.parameters():
            parameter.grad = None

    def train_only(self, factor: Factor | None) -> None:
        """Let only the A or only the B factors be trained, a head with B; None trains all."""
        for place, parameter in self._parameters.items():
            parameter.requires_grad_(factor in (None, place.factor))

    def tensors(self, vector: Vector, own: AdapterLayout | None = None) -> dict[str, Tensor]:
        """Return a vector as PEFT saves it: one contiguous CPU tensor a key, no adapter name.

        ``own`` is its layout, if it is of a smaller adapter than this one.
        """
        return {
            _saved_key(_Place(entry.module, entry.factor, entry.head)): (
                view.detach().cpu().contiguous().clone()
            )
            for entry, view in (own or self.layout).views(vector)
        }

    def vector(self, tensors: Mapping[str, Tensor], own: AdapterLayout | None = None) -> Vector:
        """Return the vector of which `tensors` has made these.

        Raises:
            ExportError: they are not of an adapter like this one, or of a smaller one as ``own``
                has it: other keys, shapes or types.
        """
        own = own or self.layout
        due = self.tensors(self.weights.new_zeros(own.d), own)
        kinds = {key: (tensor.shape, tensor.dtype) for key, tensor in due.items()}
        found = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        if found != kinds:
            odd = sorted({key for key, _ in found.items() ^ kinds.items()})
            raise ExportError(
                f"not an adapter as this run's recipe makes it; these differ: {first_few(odd)}"
            )
        return torch.cat([tensors[key].reshape(-1) for key in due]).to(self.weights.device)

    def config_json(
        self, base_model: str, revision: str | None, own: AdapterOptions | None = None
    ) -> dict[str, Any]:
        """Return the content of ``adapter_config.json``, with sets as sorted lists.

        ``own`` are the options of a smaller adapter than this one, if it is of such a one.
        """
        config = self.config.to_dict()
        if own is not None:
            adapted = [entry.module for entry in self.layout.entries if not entry.head]
            modules = sorted(targets_here(own.target_modules, adapted))
            config.update(r=own.r, lora_alpha=own.lora_alpha, target_modules=modules)
        config.update(base_model_name_or_path=base_model, revision=revision, inference_mode=True)
        return {key: _plain(value) for key, value in sorted(config.items())}

    def reload(self, folder: Path, own: AdapterLayout | None = None) -> Vector:
        """Read an exported folder back through PEFT, as a stranger would, and return its vector.

        ``own`` is the layout of what is in it, if that is smaller than this adapter. Leaves the
        reloaded numbers in the model, or the model as it was if the folder is refused.

        Raises:
            ExportError: PEFT does not find exactly this adapter's tensors in it.
        """
        from peft import load_peft_weights, set_peft_model_state_dict

        tensors = load_peft_weights(str(folder), device="cpu")
        own = own or self.layout
        expected = {
            _saved_key(_Place(each.module, each.factor, each.head)): each.shape
            for each in own.entries
        }
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        wrong = {key for key, _ in found.items() ^ expected.items()}
        if not wrong:
            if own != self.layout:
                vector = self.layout.filled(self.vector(tensors, own), own)
                tensors = self.tensors(vector)
            result = set_peft_model_state_dict(self._peft, tensors, adapter_name=_NAME)
            missing = [key for key in result.missing_keys if _place(key) is not None]
            wrong = {*result.unexpected_keys, *missing}
        if wrong:
            raise ExportError(
                f"{folder}: PEFT does not read it back; keys or shapes differ: {sorted(wrong)[:6]}"
            )
        return self.layout.taken(self.read(), own)


def _inject(backbone: Backbone, options: AdapterOptions, seed: int) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model

    if backbone.head:
        start_head(backbone.model, backbone.head, seed)
    config = LoraConfig(
        task_type=_TYPES[backbone.task.name],
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=sorted(options.target_modules),
        layers_to_transform=options.layers_to_transform,
        modules_to_save=[name for name in backbone.head if name not in _SAVED_ANYHOW] or None,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        torch.manual_seed(seed)
        peft_model = get_peft_model(backbone.model, config, adapter_name=_NAME)
    for name in backbone.head:
        in_float32(backbone.model.get_submodule(name).modules_to_save[_NAME])
    return peft_model, peft_model.peft_config[_NAME]


def _parameters_by_place(peft_model: nn.Module) -> dict[_Place, nn.Parameter]:
    """Return what is trained by its place, a head behind the rest."""
    found = {}
    for key, parameter in peft_model.named_parameters():
        place = _place(key)
        if place is not None:
            found[place] = parameter
    return dict(sorted(found.items(), key=lambda item: item[0].head))


def _go_to_inputs(peft_model: nn.Module) -> None:
    """Let each factor multiply where its input is, though its numbers stay in the one vector.

    A copy of it goes there in every forward, and its gradient comes back in the backward.
    """
    for name, module in peft_model.named_modules():
        if _place(f"{name}.weight") is not None:
            replace_forward(module, partial(_beside_input, module))


def _beside_input(factor: nn.Linear, forward: Callable[..., Any]) -> Callable[..., Any]:
    def multiply(inputs: Tensor) -> Tensor:
        return F.linear(inputs, factor.weight.to(inputs.device))

    return multiply


def _place(key: str) -> _Place | None:
    """Return the place of a live PEFT key, by its parts; None if it is not of an adapter."""
    parts = key.split(".")
    if len(parts) < 5 or tuple(parts[:2]) != _PREFIX:
        return None
    if _COPY in pairwise(parts):
        at = next(i for i, two in enumerate(pairwise(parts)) if two == _COPY)
        return _Place(".".join(parts[2:at] + parts[at + 2 :]), "B", head=True)
    if parts[-2:] != [_NAME, "weight"]:
        return None
    match parts[-3]:
        case "lora_A":
            return _Place(".".join(parts[2:-3]), "A")
        case "lora_B":
            return _Place(".".join(parts[2:-3]), "B")
    return None


def _saved_key(place: _Place) -> str:
    if place.head:
        return ".".join((*_PREFIX, place.module))
    return ".".join((*_PREFIX, place.module, f"lora_{place.factor}", "weight"))


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in sorted(value.items())}
    return getattr(value, "value", value)  # PEFT's enums become their text


def _named_as_here(backbone: Backbone, options: AdapterOptions) -> AdapterOptions:
    """Return the options with their targets as this backbone calls them.

    Raises:
        ModelError: a target module or a layer does not exist.
    """
    model: nn.Module = backbone.model
    linear = [
        name
        for name, module in model.named_modules()
        if adaptable(module) and name.split(".")[0] not in backbone.head
    ]
    n_layers = getattr(model.config, "num_hidden_layers", None)
    targets = targets_here(options.target_modules, linear)
    if targets != options.target_modules:
        options = options.model_copy(update={"target_modules": targets})
    refuse_unknown_targets(linear, n_layers, options)
    return options


def adaptable(module: nn.Module) -> bool:
    """Return whether a module multiplies by a matrix that an adapter can be put beside."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
