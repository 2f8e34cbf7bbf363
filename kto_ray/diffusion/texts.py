"""What prompts are to a denoiser, each encoded once in a run: kept in memory, and in the run's folder for all others.

`generate/replica.py` draws with it, `train/batches.py` trains with it: whoever meets a prompt first encodes it. So a
train worker, whose images were drawn by others, hardly ever loads a text encoder, and has none on its device.

A prompt is encoded alone: its rows are the same whatever it is met with, and whoever encodes it.
"""

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kto_ray.config import RunConfig
from kto_ray.diffusion.conditioning import Conditioning
from kto_ray.diffusion.family import Family
from kto_ray.storage import Storage

logger = logging.getLogger(__name__)

NOTHING = "nothing"
"""File of what guidance contrasts with; those of prompts are named after their digests."""
READERS = 16  # at a time: on remote storage an answer takes its time


class Texts:
    """Encoded prompts by text.

    Args:
        encoders: gives a family that has its text encoders. Asked for when a prompt is met that nobody has encoded, and
            not held on to.
        store: where they are kept for other processes; None: nowhere.
        room: about how many bytes this process may add to it.
        memory: about how many bytes it keeps in memory.
    """

    def __init__(
        self,
        encoders: Callable[[], Family],
        store: Storage | None = None,
        room: float = float("inf"),
        memory: float = 2**30,
    ) -> None:
        self._encoders, self._store, self._room, self._memory = encoders, store, room, memory
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()
        self.encoded = 0
        """How many texts this process has put through the encoders."""

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """One row a text, on the CPU, in the encoders' precision."""
        names = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
        rows = self._rows_of(list(names), lambda family, name: family.encode_prompts([names[name]]))
        name_of = {text: name for name, text in names.items()}
        return Conditioning.cat([rows[name_of[text]] for text in texts])

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Of these, each once, those that nobody has kept."""
        kept = set(self._store.names()) if self._store is not None else set[str]()
        names = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
        return [text for name, text in names.items() if f"{name}.safetensors" not in kept]

    def nothing(self) -> Conditioning:
        """See `Family.nothing`; one row, on the CPU."""
        return self._rows_of([NOTHING], lambda family, _: family.nothing())[NOTHING]

    def _rows_of(self, names: Sequence[str], encode: Callable[[Family, str], Conditioning]) -> dict[str, Conditioning]:
        rows = {name: self._rows[name] for name in names if name in self._rows}
        rows |= self._stored([name for name in names if name not in rows])
        if new := [name for name in names if name not in rows]:
            family = self._encoders()
            made = {name: encode(family, name).to(torch.device("cpu")) for name in new}
            self.encoded += len(made)
            self._keep(made)
            rows |= made
        self._remember(rows)
        return rows

    def _stored(self, names: Sequence[str]) -> dict[str, Conditioning]:
        """Of those that somebody has kept."""
        if self._store is None or not names:
            return {}
        store = self._store

        def read(name: str) -> Conditioning | None:
            try:
                return Conditioning(load(store.read(f"{name}.safetensors")))
            except FileNotFoundError:
                return None
            except SafetensorError as error:
                logger.warning("%s/%s.safetensors is damaged (%s); its prompt is encoded again", store, name, error)
                return None

        with ThreadPoolExecutor(min(READERS, len(names))) as pool:
            found = dict(zip(names, pool.map(read, names), strict=True))
        return {name: row for name, row in found.items() if row is not None}

    def _keep(self, rows: Mapping[str, Conditioning]) -> None:
        if self._store is None:
            return
        fitting = dict[str, bytes]()
        for name, row in rows.items():
            data = save({key: tensor.contiguous() for key, tensor in row.tensors.items()})
            if len(data) <= self._room:
                self._room -= len(data)
                fitting[name] = data
        store = self._store
        with ThreadPoolExecutor(max(1, min(READERS, len(fitting)))) as pool:
            list(pool.map(lambda name: store.write(f"{name}.safetensors", fitting[name]), fitting))

    def _remember(self, rows: Mapping[str, Conditioning]) -> None:
        """Those used last stay in memory."""
        for name, row in rows.items():
            self._rows[name] = row
            self._rows.move_to_end(name)
        held = sum(row.nbytes for row in self._rows.values())
        while held > self._memory and len(self._rows) > 1:
            _, dropped = self._rows.popitem(last=False)
            held -= dropped.nbytes


def texts_of(config: RunConfig, run: Storage, components: Mapping[str, str], encoders: Callable[[], Family]) -> Texts:
    """Those of a run, in the precision that it draws in.

    Args:
        components: digests of the base model's components. With other tokenizers or text encoders, texts are others.
        encoders: see `Texts`.
    """
    counting = {name: digest for name, digest in components.items() if name.startswith(("text", "token"))}
    made_by = json.dumps([counting, config.generate.dtype, config.model.family], sort_keys=True)
    folder = run / "texts" / hashlib.sha256(made_by.encode()).hexdigest()[:16]
    return Texts(encoders, folder, room=config.keep_texts * 10**9)
