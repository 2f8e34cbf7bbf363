"""What the configuration says of verdicts that come from an application: `label.feedback`. `feedback/` goes by it.

How votes become verdicts and when a round is complete is said where it is said of people: `label.human`.
"""

from typing import Literal

from pydantic import model_validator

from kto_ray.config.people import DatabaseUrl
from kto_ray.identity import Fixed, Free, Noted
from kto_ray.section import Positive, Section


class Feedback(Section):
    """An application's votes as the labeler, with `label.labeler: feedback`. Votes that are sent to the run's JSON API
    are taken besides, or where neither `path` nor `database` is given, alone.

    `label.human` has the rest: `overlap` (votes that an image needs, and how they are combined), `min_labels`,
    `on_deadline`, `route`, `database`, and where the API listens.
    """

    folder: Fixed[str | None] = None
    """Folder or URI that images are published to, each under its id; None: `feedback` in the run's folder."""
    format: Fixed[Literal["png", "jpeg"]] = "png"
    """Of the published images; jpeg: of quality 95."""
    path: Noted[str | None] = None
    """Votes as files that come or grow, Parquet or JSON lines, a row a vote: a folder, or a pattern such as
    votes/*.parquet, local or as a URI; or ..."""
    database: Noted[DatabaseUrl | None] = None
    """... the SQLAlchemy URL of a database, with $NAME for passwords, and ..."""
    table: Noted[str | None] = None
    """... the table of it, or view, that has a row a vote; or ..."""
    query: Noted[str | None] = None
    """... a SELECT whose answer has: "SELECT id, image, thumb FROM thumbs WHERE app = 'kto'"."""
    id: Noted[str | None] = None
    """Column that tells votes apart; None, as for the others: found by its name (docs/feedback.md has the usual ones).
    Files need none: their rows are known by their place."""
    cursor: Noted[str | None] = None
    """Column of a database's table that never gets smaller from vote to vote, by which only new ones are read; None:
    that of `id`."""
    image: Noted[str | None] = None
    """Column of the image's id."""
    verdict: Noted[str | None] = None
    """Column of votes."""
    desirable: Noted[tuple[str | float | bool, ...]] = ()
    """Values of that column that mean yes, where they are not usual ones (see `data/verdicts.py`), ..."""
    undesirable: Noted[tuple[str | float | bool, ...]] = ()
    """... and those that mean no; any other one takes the person's earlier vote back then."""
    who: Noted[str | None] = None
    """Column of whoever voted, of whose votes on an image the last one counts; without one each vote is somebody
    else's."""
    when: Noted[str | None] = None
    """Column of the time of a vote, in seconds since 1970 or as ISO 8601; without one votes count in the order in which
    they are read."""
    poll_s: Free[Positive] = 10
    """Seconds between looks for new votes."""
    look_back_s: Free[Positive] = 60
    """Rows of a database that was read up to a place are looked through again for so long: transactions may end in
    another order than they began in."""

    @model_validator(mode="after")
    def _votes_come_from_one_place(self) -> "Feedback":
        if self.path and self.database:
            raise ValueError("give path, or database with table or query, or neither and send votes to the run's API")
        if bool(self.database) != bool(self.table or self.query) or (self.table and self.query):
            raise ValueError("database needs table or query, one of them, and these need database")
        if self.cursor and not self.database:
            raise ValueError("cursor is a column of a database's table; files are read from where they ended before")
        if bool(self.desirable) != bool(self.undesirable):
            raise ValueError("desirable and undesirable: give the values of both, or of neither")
        return self
