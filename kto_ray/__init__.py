"""Online Diffusion-KTO on Ray: a text-to-image diffusion model learns from yes/no feedback.

Importing this package is cheap (neither torch nor ray is loaded). Start reading at `kto_ray/loop.py`.
"""

__version__ = "0.1.0"
