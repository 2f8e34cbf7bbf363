"""Whether people can be asked as `label.human` says; `preflight.py` asks here. Changes nothing in the database."""

from pathlib import Path

import sqlalchemy as sa

from kto_ray.config import Human
from kto_ray.errors import UserError
from kto_ray.people.address import database_owner, database_url
from kto_ray.people.clock import Clock
from kto_ray.people.gold import load_gold
from kto_ray.people.people import People, Person
from kto_ray.people.tables import labelers, open_database
from kto_ray.storage import Storage


def check(human: Human, run: Storage) -> None:
    """Raises UserError: a database or gold that cannot be used, or nobody who could label."""
    if human.gold.file:
        load_gold(human.gold.file)
    people, field = everybody(human, run), "label.human.labelers"
    if not human.labelers and not any(person.role == "labeler" and person.links for person in people):
        raise UserError(
            f"{field}: nobody can label: name somebody, for instance {field}=[ann], or add people with: "
            f"kto-ray labelers add NAME --run {run}"
        )


def everybody(human: Human, run: Storage) -> list[Person]:
    """Who is known to the database. Raises UserError: it cannot be used."""
    url = database_url(human, run)
    if url.startswith("sqlite:") and (file := sa.make_url(url).database) and not Path(file).exists():
        # Opening it would make the file; the folder of a run that begins is not there either.
        if human.database is not None and not Path(file).parent.is_dir():
            raise UserError(f"label.human.database: {url}: there is no folder {Path(file).parent}")
        return []
    engine = open_database(url, database_owner(human, run), make=False)
    try:
        has_people = sa.inspect(engine).has_table(labelers.name)
        return People(engine, human, Clock()).everybody() if has_people else []
    finally:
        engine.dispose()
