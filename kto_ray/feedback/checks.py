"""Whether an application's votes can be had as `label.feedback` says; `preflight.py` asks here. Changes nothing."""

from kto_ray.config import Labeling
from kto_ray.config.feedback import Feedback
from kto_ray.feedback.file_votes import FileVotes
from kto_ray.feedback.publishing import publishing_folder
from kto_ray.feedback.sql_votes import SqlVotes
from kto_ray.feedback.understanding import VoteTable
from kto_ray.people.checks import everybody
from kto_ray.storage import Storage

ROOM = 2**28
"""Bytes that there must be for the first images."""


def table_of_votes(settings: Feedback) -> VoteTable | None:
    """Where votes are looked for; None: they are only sent."""
    if settings.database:
        return SqlVotes(settings)
    return FileVotes(settings) if settings.path else None


def check(label: Labeling, run: Storage) -> None:
    """Raises UserError: a folder that cannot be written, a table without the columns, or people's database."""
    everybody(label.human, run)
    publishing_folder(label.feedback.folder, run).require_room(ROOM)
    if table := table_of_votes(label.feedback):
        table.check()
