"""Sleep: a role that has no turn leaves its card, and comes back with every bit where it was.

A `Sleeper` takes what its role holds on a device into main memory, puts nothing in its place, and gives the
allocator's cache back; waking puts it there again. Tensors stay the objects that they are, so that modules, optimizers
and DDP never notice; who uses one meanwhile gets an error about its shape. No process ends, and nothing is read from
disk.

`generate/replica.py`, `train/learner.py` and `score/actor.py` sleep by it where `cluster.placement` is colocated. The
last may live in another environment: this module needs torch alone, and only of processes that have it.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEPTH = 4
"""How far plug-ins are looked into for modules and tensors."""


class Sleeper:
    """Of one role in this process. Not for several threads at once.

    On a card, main memory is pinned, and goes back to torch's own cache of it on waking. On a CPU, what sleeps stays
    where it is, out of its role's reach.

    Args:
        device: what lies elsewhere stays there.
        held: gives what the role holds: modules and tensors, in lists and mappings.
    """

    def __init__(self, device: "torch.device", held: Callable[[], Iterable[Any]]) -> None:
        self.device, self._held = device, held
        self._away: list[tuple[Tensor, Tensor]] | None = None
        self._sharded: list[torch.nn.Module] = []
        self.seconds = 0.0
        """On the way to sleep and from it, in all."""

    @property
    def asleep(self) -> bool:
        return self._away is not None

    @property
    def sleeping_bytes(self) -> int:
        """How much is away from the device."""
        return sum(home.nbytes for _, home in self._away or ())

    def sleep(self) -> None:
        """Does nothing where it sleeps already."""
        if self.asleep:
            return
        import torch

        began = time.monotonic()
        with torch.no_grad():
            away = []
            for tensor in self._tensors():
                away.append((tensor, _at_home(tensor)))
            self._wait()  # copies to pinned memory may still be under way
            for tensor, _ in away:
                tensor.data = tensor.data.new_empty(0)
            self._away = away
        self._empty_cache()
        self.seconds += time.monotonic() - began

    def wake(self) -> None:
        """Does nothing where it is awake."""
        if self._away is None:
            return
        import torch

        began = time.monotonic()
        with torch.no_grad():
            for module in self._sharded:
                module.to(self.device)
            for tensor, home in self._away:
                tensor.data = home.to(self.device, non_blocking=True)
            self._wait()
            self._away = None
        self.seconds += time.monotonic() - began

    def _tensors(self) -> "list[Tensor]":
        """All that lie on the device, each once. Modules of shards go to main memory as wholes."""
        found: dict[int, Tensor] = {}
        self._sharded = []
        for tensor in _tensors_in(self._held(), self._sharded):
            if tensor.device.type == self.device.type and tensor.numel():
                found.setdefault(id(tensor), tensor)
        for module in self._sharded:
            module.cpu()
        return list(found.values())

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _empty_cache(self) -> None:
        import gc

        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _at_home(tensor: "Tensor") -> "Tensor":
    """What a tensor holds, in main memory: pinned if it came from a card."""
    import torch

    data = tensor.data
    if data.device.type == "cpu":
        return data
    return torch.empty_like(data, device="cpu", pin_memory=True).copy_(data, non_blocking=True)


def _tensors_in(thing: Any, sharded: "list[torch.nn.Module]") -> "Iterator[Tensor]":
    """Of modules, mappings and other collections, as deep as they go; modules with DTensors are added to `sharded`."""
    import torch

    if isinstance(thing, torch.nn.Module):
        tensors = [*thing.parameters(), *thing.buffers()]
        if any(hasattr(tensor, "to_local") for tensor in tensors):
            # What FSDP has of them besides would keep the memory; it lets go of it where a module moves.
            sharded.append(thing)
            return
        yield from tensors
    elif isinstance(thing, torch.Tensor):
        yield thing.to_local() if hasattr(thing, "to_local") else thing  # of a DTensor, what is on this rank
    elif isinstance(thing, Mapping):
        yield from _tensors_in(list(thing.values()), sharded)
    elif isinstance(thing, list | tuple | set):
        for part in thing:
            yield from _tensors_in(part, sharded)


def held_by(thing: Any, depth: int = DEPTH) -> list[Any]:
    """Modules and tensors in the attributes of an object that knows nothing of sleep, and of its parts."""
    import torch

    if isinstance(thing, torch.nn.Module | torch.Tensor):
        return [thing]
    if not depth or isinstance(thing, type | ModuleType | FunctionType | MethodType):
        return []
    if isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    return [held for part in parts for held in held_by(part, depth - 1)]


def on_card() -> "torch.device | None":
    """The card on which this process has worked; None: on none."""
    torch = sys.modules.get("torch")
    return torch.device("cuda") if torch is not None and torch.cuda.is_initialized() else None
