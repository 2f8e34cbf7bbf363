"""The embedded world: a small but real Stable Diffusion pipeline that draws coloured shapes.

`world` draws pictures and writes captions, `scorer` looks at pixels, `pipeline/` holds the pretrained
diffusers folder (made by `jobs/pretrain_shapes.py`). Nothing outside this package treats the world specially:
the rest of the project sees an ordinary diffusers folder, a prompts file and a scorer.
"""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "pipeline"
TRAIN_PROMPTS = Path(__file__).parent / "prompts_train.jsonl"
HELD_OUT_PROMPTS = Path(__file__).parent / "prompts_held_out.jsonl"
