"""The run's one configuration tree: a YAML recipe, dotted overrides, and what both resolve to.

    load("shapes_demo", ["train.learning_rate=1e-4", "rounds=3"]) -> RunConfig

`run.py` is the tree, with the sections of the parts beside it; `reading.py` makes one, `explaining.py` says what is
wrong with it or what it implies, `resuming.py` guards a run folder against being continued with another one. Extra
keys are refused, with the nearest known key.
"""

from kto_ray.config.data import Data
from kto_ray.config.explaining import implied
from kto_ray.config.generate import Generate, Otherwise, shaping
from kto_ray.config.label import Filter, Labeling, ScorerPoolSettings, ScorerSettings
from kto_ray.config.machines import Cluster, Device, Dtype, Resources
from kto_ray.config.pages import Address, WatchPage
from kto_ray.config.people import Human
from kto_ray.config.prompts import Prompts, PromptSet
from kto_ray.config.reading import from_tree, load, override, public, recipe_names, to_yaml
from kto_ray.config.resuming import Change, require_same
from kto_ray.config.run import HELD_OUT_STAGES, BaseAdapter, Evaluate, Model, Replay, RunConfig, Tracking
from kto_ray.config.train import Adapter, SamplingPolicy, Train, held_dtype, steps_for

__all__ = [
    "HELD_OUT_STAGES",
    "Adapter",
    "Address",
    "BaseAdapter",
    "Change",
    "Cluster",
    "Data",
    "Device",
    "Dtype",
    "Evaluate",
    "Filter",
    "Generate",
    "Human",
    "Labeling",
    "Model",
    "Otherwise",
    "PromptSet",
    "Prompts",
    "Replay",
    "Resources",
    "RunConfig",
    "SamplingPolicy",
    "ScorerPoolSettings",
    "ScorerSettings",
    "Tracking",
    "Train",
    "WatchPage",
    "from_tree",
    "held_dtype",
    "implied",
    "load",
    "override",
    "public",
    "recipe_names",
    "require_same",
    "shaping",
    "steps_for",
    "to_yaml",
]
