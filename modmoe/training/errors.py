"""What ends a run with a message for its user; any other exception is a bug and keeps its traceback."""


class ConfigError(ValueError):
    """A mistake in a run's configuration, command line or data; the message is meant for the user as it is."""


class RunError(RuntimeError):
    """A run that cannot start or go on although its configuration is sound; the message says why and what to do."""
