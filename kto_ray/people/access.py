"""Links and what proves them: a badge's id and its end, signed; `web/` reads them, `kto-ray labelers` prints them.

The secret lies in the run's database: whoever can read that needs no link. A signature and a date are checked by the
page itself; whether a badge was revoked, by the queue at every call.
"""

import secrets
import time
from urllib.parse import quote

import sqlalchemy as sa
from itsdangerous import BadData, URLSafeSerializer

from kto_ray.people.people import Badge, Refused
from kto_ray.people.tables import in_transaction, meta


def secret_of(engine: sa.Engine) -> str:
    """What this database's links are signed with; made at the first call."""

    def work(connection: sa.Connection) -> str:
        query = sa.select(meta.c.value).where(meta.c.key == "secret")
        found = connection.scalar(query)
        if found is None:
            found = secrets.token_hex(32)
            connection.execute(meta.insert().values(key="secret", value=found))
        return found

    return in_transaction(engine, work)


class Signer:
    """Signs badges, and reads them back."""

    def __init__(self, secret: str) -> None:
        self._tokens = URLSafeSerializer(secret, salt="badge")
        self._forms = URLSafeSerializer(secret, salt="form")

    def token(self, badge: Badge) -> str:
        return str(self._tokens.dumps([badge.id, int(badge.expires_at)]))

    def badge(self, token: str) -> Badge:
        """Raises Refused: forged, damaged or expired."""
        try:
            badge = Badge(*self._tokens.loads(token))
        except (BadData, TypeError) as error:
            raise Refused("badge", "this link is not known here") from error
        if badge.expires_at <= time.time():
            raise Refused("expired", "this link has expired; ask the operator for a new one")
        return badge

    def form_token(self, badge: Badge) -> str:
        """What a page of this badge's sends along to show that it was this page that called, not another site's."""
        return str(self._forms.dumps(badge.id))

    def is_form_of(self, badge: Badge, form_token: str) -> bool:
        try:
            return bool(self._forms.loads(form_token) == badge.id)
        except BadData:
            return False


def link(base_url: str, token: str) -> str:
    """Where somebody enters, as it can be pasted: without spaces or letters outside ASCII, which a run's name may have.

    Args:
        base_url: of the run's page, without a slash at its end.
    """
    return f"{quote(base_url, safe=':/%[]@')}/enter/{token}"
