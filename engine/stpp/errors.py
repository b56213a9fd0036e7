"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, a flag, a recipe.

    The message is one line. It names the file or the flag, says what was found, and what to do.
    The command line prints it without a traceback and exits with code 2.
    """
