"""The one error that is meant for the user's eyes rather than for a debugger."""


class UserError(Exception):
    """Input or surroundings are not as they must be; the message names field, value and what would be right.

    Jobs print it without a traceback and exit with status 2.
    """
