"""What is left out or looks wrong in a source, as it is found: how often, and a few examples."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

EXAMPLES = 5
"""Of each kind."""

NO_PROMPT = "rows without a prompt are left out"
NOT_TEXT = "rows whose prompt is no text are left out"
NO_IMAGE = "rows without an image are left out"
MISSING = "image files are missing"
NOT_UNDERSTOOD = "verdicts are not understood, and count as none; name values with desirable and undesirable"
BOTH = "images are both desirable and undesirable under one prompt; each row stands for itself (kind: votes joins them)"
REPEATED = "rows repeat an image and prompt with the same verdict"
FILTERED = "rows are left out by where"


@dataclass
class Notes:
    """See the module."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    """What else is worth knowing."""
    signs: set[str] = field(default_factory=set)
    """Values of verdicts that cannot both mean no."""

    def add(self, what: str, number: int, examples: Iterable[str] = ()) -> None:
        if number:
            self.counts[what] += number
            kept = self.examples.setdefault(what, [])
            kept += [example[:200] for example in islice(examples, EXAMPLES - len(kept))]
