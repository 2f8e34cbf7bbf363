"""Secrets of a configuration: named where they stand, filled in where they are used, hidden wherever one is shown.

    postgresql+psycopg://kto:$KTO_PASSWORD@host/answers    kept and shown as it is; `fill` puts the variable's value in
    postgresql+psycopg://kto:s3cret@host/answers           kept and shown with *** (`hide`); given anew at every start

A configuration is written and shown through `hide` only: passwords and keys in URLs, whatever stands under `headers`,
and texts under a name like `token` or `api_key`, unless they name an environment variable. Scorers' own environments
import this module, too: it needs the standard library only.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from string import Template
from typing import Any

from kto_ray.errors import UserError

HIDDEN = "***"
REFERENCE = re.compile(r"(?<!\$)(?:\$\$)*\$(?:\{[A-Za-z_]\w*\}|[A-Za-z_]\w*)", re.ASCII)
WORDS = r"password|passwd|pwd|passphrase|secret|token|credentials?|authorization|cookie|api[_-]?key|access[_-]?key"
NAME = re.compile(rf"(?:^|[_.-])(?:{WORDS})s?(?:$|[_.-])(?!env$)", re.IGNORECASE)
IN_USERINFO = re.compile(r"(://[^\s/@:?#]*:)([^\s/@]*)(?=@)")
IN_QUERY = re.compile(rf"([?&](?:[^\s=&]*(?:{WORDS})[^\s=&]*|key|sig|signature)=)([^\s&#]*)", re.IGNORECASE)


def hide(value: Any, name: str = "") -> Any:
    """A value of a configuration without its secrets.

    Args:
        value: as JSON has it.
        name: under which it stands.
    """
    if isinstance(value, Mapping):
        return {key: hide(item, name if name == "headers" else str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if name == "headers" or NAME.search(name):
        return value if REFERENCE.search(value) else HIDDEN
    return IN_QUERY.sub(_hide_second, IN_USERINFO.sub(_hide_second, value))


def hide_in_database(url: str) -> str:
    """A database's URL, or what was meant to be one: there a password may have a slash in it."""
    userinfo = re.compile(r"(://[^/:@]*:)(.*)(?=@)" if "://" in url else r"^([^:]*:)(.*)(?=@)", re.DOTALL)
    return str(hide(userinfo.sub(_hide_second, url)))


def _hide_second(found: re.Match[str]) -> str:
    """The match, of its second group at most the name of a variable."""
    before, secret = found.groups()
    return f"{before}{secret if not secret or REFERENCE.fullmatch(secret) else HIDDEN}"


def fill(text: str, field: str) -> str:
    """A text with the environment variables that it names as $NAME or ${NAME}; $$ is a dollar sign.

    Raises:
        UserError: without the text, which may be secret.
    """
    try:
        return Template(text).substitute(os.environ)
    except KeyError as error:
        raise UserError(f"{field} names the environment variable {error}, which is not set here") from None
    except ValueError:
        raise UserError(
            f"{field} has a '$' before what is no name of an environment variable; write '$$' for a dollar sign"
        ) from None


def without_credentials(url: str) -> str:
    """Which database a URL means, whoever asks: to tell whether it is the same when a password was changed."""
    with contextlib.suppress(UserError):  # where the variable is not set, its name has to do
        url = fill(url, "")
    return IN_QUERY.sub(r"\1", re.sub(r"(?<=://)[^/:@]*(?::.*)?@", "", url))
