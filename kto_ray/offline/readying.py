"""From a run's configuration to the prepared set that it trains on, with all prompts encoded.

`offline/loop.py` asks for it before it trains, `kto_ray/loop.py` where images are mixed in (`data.mix`).
"""

from rich.console import Console

from kto_ray.config import RunConfig
from kto_ray.data.sources import source_of
from kto_ray.diffusion.families import family_of
from kto_ray.diffusion.geometry import image_size
from kto_ray.errors import UserError
from kto_ray.lease import held
from kto_ray.offline.encoding import encoding_of
from kto_ray.offline.preparing import Preparing, prepared_folder
from kto_ray.offline.texts import encode_texts
from kto_ray.preflight import Preflight
from kto_ray.prepared import OF_RUN, PreparedSet, keep_set, set_of
from kto_ray.train.streaming import lacking


def ready(config: RunConfig, preflight: Preflight, console: Console) -> PreparedSet:
    """The set of a run, whatever of it was there before; Ray is there.

    Raises:
        UserError: the source cannot be read, or has nothing that the objective learns from.
    """
    prepared = _prepare(config, preflight, console)
    if why := lacking(prepared, config.train):
        raise UserError(f"data: {why}")
    encode_texts(config, preflight.run, prepared.prompts(), console)
    return prepared


def _prepare(config: RunConfig, preflight: Preflight, console: Console) -> PreparedSet:
    """The set that the run trains on: the one that it began with, or a new one."""
    assert config.data is not None
    assert preflight.folder is not None
    run = preflight.run
    if run.exists(OF_RUN):
        return set_of(run)
    family, folder = family_of(preflight.folder, config.model), prepared_folder(config)
    geometry = family.geometry_of(preflight.folder)
    size = image_size(config.generate, geometry)
    encoding = encoding_of(config, size, geometry.multiple, preflight.components["vae"], family.__name__)
    with held(folder / encoding.key, config.cluster.lease_renew_s, config.cluster.lease_stale_s) as (_, fenced):
        texts = [prompt.text for prompt in preflight.held_out_prompts]
        preparing = Preparing(config, source_of(config.data), encoding, texts, fenced, console)
        prepared = preparing.prepare()
    keep_set(run, prepared)
    return prepared
