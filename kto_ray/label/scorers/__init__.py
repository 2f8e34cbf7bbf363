"""The built-in scorers by name: an explicit table from the configuration's `label.scorer` to a class."""

SCORERS: dict[str, str] = {
    "shapes": "kto_ray.shapes.scorer:ShapesScorer",
}
