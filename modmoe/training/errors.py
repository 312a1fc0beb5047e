"""What ends a run with a message for its user; any other exception is a bug and keeps its traceback."""


class ConfigError(ValueError):
    """A mistake in a run's configuration, command line or data; the message is meant for the user as it is."""


class RunError(RuntimeError):
    """A run that cannot start or go on although its configuration is sound; the message says why and what to do."""


class SharedError(RunError):
    """What all ranks find alike, so that one of them says it for all."""


class DivergedError(SharedError):
    """Training whose loss, gradient or weights are not finite any more."""


def exit_code(error: BaseException) -> int:
    """Of a process that an exception ends: 2 for mistakes in the configuration, 130 for Ctrl-C, else 1."""
    if isinstance(error, ConfigError):
        return 2
    return 130 if isinstance(error, KeyboardInterrupt) else 1
