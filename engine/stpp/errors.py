"""The exception for errors that the user can fix."""


class UserError(ValueError):
    """An error in the user's input: a file, a flag or a recipe.

    The message is one line: the file or flag, the value found, and what to do. The command line prints it
    without a traceback and exits with code 2.
    """
