"""LoRA adapters of a running model: several at once, in one batch with requests of the base itself.

    PEFT folder --import--> checkpoint of A and B per module --segment--> views (CPU) or a device copy
        --bind--> a hook on each linear module it targets;  route(shares) before each forward pass: whose row is whose
        --hook--> output[rows] += (input[rows] A^T * scaling) B^T, for the rows of each adapter in the batch

An adapter never changes the model's weights, which other workers share and which are read-only. Modules that no bound
adapter targets have no hook, so without adapters a forward pass is the very same code as before. The rows of an adapter
are computed by themselves (and at least two at once, as everywhere on the CPU: see transformers_batch), so neighbours
don't change a request's numbers. Keys and values of an adapter's tokens are not those of the base: the batch keeps
their cached prefixes apart.

Life: the node sends `LoadAdapter` with a segment when a request names an adapter that this worker lacks; `bind` is
called between two steps. Quiescing drops all adapters, as it lets go of all segments: a snapshot holds none, and after
the wake the next request of an adapter loads it again, from the memory of the host service where that kept it.
Unloading comes after the last request of the adapter: the node sends nothing new, and waits for those that run.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from dormouse.checkpoint.adapters import A, B
from dormouse.errors import EngineError

Rows = slice | torch.Tensor


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one module: `scaling * x A^T B^T`."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """The addition for rows of inputs. A row that is alone is computed twice: the product of one row is another
        kernel's, with other rounding."""
        count = x.shape[0]
        if count == 1:
            x = x.expand(2, -1)
        return linear(linear(x, self.a).mul_(self.scaling), self.b)[:count]


@dataclass(frozen=True, eq=False)
class Adapter:
    """The factors of one adapter by the module they belong to. `serial` is this loading's alone: what was computed with
    an adapter must not be taken for what another computes that comes under the same name later."""

    factors: Mapping[torch.nn.Module, Factors]
    serial: int


class Adapters:
    """The adapters bound to one model. Everything happens on the thread that runs the model, but for `fit`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._serials = itertools.count(1)
        self._hooks: dict[torch.nn.Module, tuple[Any, set[Adapter]]] = {}
        self._routes: list[tuple[Adapter, Rows]] = []
        self._rows = 0

    def fit(self, tensors: Mapping[str, torch.Tensor], scalings: Mapping[str, float]) -> Adapter:
        """The adapter of tensors named `MODULE.lora_A` and `MODULE.lora_B`, which lie where the model does. Changes
        nothing. Raises EngineError that names the module when it does not fit the model."""
        factors: dict[torch.nn.Module, Factors] = {}
        for name, scaling in scalings.items():
            module = self._module(name)
            a, b = (tensors[f"{name}.{part}"] for part in (A, B))
            rank = a.shape[0]
            wanted = (rank, module.in_features), (module.out_features, rank)
            if (found := (tuple(a.shape), tuple(b.shape))) != wanted:
                raise EngineError(
                    f"the adapter does not fit module {name}: A {found[0]} and B {found[1]} where this model needs "
                    f"{wanted[0]} and {wanted[1]}",
                    remedy="Import it for the base model that it was trained on: dormouse import FOLDER --base NAME",
                )
            factors[module] = Factors(a, b, scaling)
        return Adapter(factors, next(self._serials))

    def bind(self, adapter: Adapter) -> None:
        """Let it take part from the next forward pass on."""
        for module in adapter.factors:
            if module not in self._hooks:
                self._hooks[module] = module.register_forward_hook(self._add), set()
            self._hooks[module][1].add(adapter)

    def unbind(self, adapter: Adapter) -> None:
        """Take it away, and the hooks that nobody needs any more. Nothing here refers to it then: a GPU's copy is freed
        with the caller's last reference. Idempotent."""
        self._routes = [route for route in self._routes if route[0] is not adapter]
        for module in adapter.factors:
            hook, users = self._hooks.get(module, (None, set()))
            users.discard(adapter)
            if hook is not None and not users:
                hook.remove()
                del self._hooks[module]

    def route(self, shares: Sequence[tuple[Adapter | None, int]]) -> None:
        """Say whose the rows of the coming forward passes are, in order: an adapter's or the base's, and how many.
        Rows beyond them are the base's."""
        spans: dict[Adapter, list[tuple[int, int]]] = {}
        at = 0
        for adapter, count in shares:
            if adapter is not None:
                own = spans.setdefault(adapter, [])
                if own and own[-1][1] == at:
                    own[-1] = own[-1][0], at + count
                else:
                    own.append((at, at + count))
            at += count
        self._rows = at
        self._routes = [(adapter, self._selection(own)) for adapter, own in spans.items()]

    def _selection(self, spans: list[tuple[int, int]]) -> Rows:
        if len(spans) == 1:
            return slice(*spans[0])
        rows = [row for begin, end in spans for row in range(begin, end)]
        return torch.tensor(rows, device=self._model.device)

    def _add(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """The hook: adds to the output in place, which is this call's own."""
        if not self._routes:
            return
        x, y = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
        if x.shape[0] < self._rows:
            raise EngineError(
                f"a module with an adapter was given {x.shape[0]} rows for {self._rows} tokens",
                remedy="Adapters of modules that see only some tokens (experts) are not supported",
            )
        for adapter, rows in self._routes:
            if (own := adapter.factors.get(module)) is None:
                continue
            if isinstance(rows, slice):
                y[rows].add_(own.delta(x[rows]))
            else:
                y.index_copy_(0, rows, y.index_select(0, rows).add_(own.delta(x.index_select(0, rows))))

    def _module(self, name: str) -> torch.nn.Linear:
        try:
            module = self._model.get_submodule(name)
        except AttributeError as error:
            raise EngineError(
                f"the adapter is for a module {name}, which {type(self._model).__name__} does not have",
                remedy="Import it for the base model that it was trained on: dormouse import FOLDER --base NAME",
            ) from error
        if not isinstance(module, torch.nn.Linear) or module is self._model.get_output_embeddings():
            raise EngineError(
                f"the adapter is for module {name}, which is no linear layer inside the model but "
                f"{type(module).__name__}",
                remedy="docs/models.md tells which adapters are supported",
            )
        return module
