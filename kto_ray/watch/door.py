"""The link that opens watch pages. Its badge is signed with a secret that lies in no file: who serves the pages has it.

Whoever has the link may look, until the serving process or job ends. It is asked for on loopback, too, where other
people of the same machine and pages of other sites in the same browser can call.
"""

import secrets
import time

from kto_ray.people.access import Signer, link
from kto_ray.people.people import Badge


def new_door(base_url: str, link_days: float) -> tuple[str, str]:
    """A link that works for so many days, and the secret that it is signed with.

    Args:
        base_url: of the pages, without a slash at its end.
    """
    secret = secrets.token_hex(32)
    badge = Badge(secrets.token_urlsafe(16), time.time() + link_days * 24 * 3600)
    return link(base_url, Signer(secret).token(badge)), secret
