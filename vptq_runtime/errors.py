"""Every error that a user can cause.

A message is one line and names the file, the tensor or option, what was found and what was expected.
"""

import copy

MAX_MESSAGE = 1000  # characters
# Names come from files: they may hold line breaks, other control characters, and whole megabytes.
_CONTROLS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029), "?")


def printable(name: str) -> str:
    """A name that a file gives, fit for a message of one line on a terminal."""
    return name if name.isprintable() else repr(name)


class VPTQError(Exception):
    """Base of all errors raised by vptq_runtime and vptq_converter. What a file's names may do to a message's
    one line is undone here."""

    def __init__(self, message: str) -> None:
        text = message.translate(_CONTROLS)
        if len(text) > MAX_MESSAGE:  # the file stands first, what was expected last
            text = f"{text[: MAX_MESSAGE // 2]} ... {text[5 - MAX_MESSAGE // 2 :]}"
        super().__init__(text)


class FileError(VPTQError):
    """A model file or checkpoint is missing, damaged, or contradicts itself."""


class UnsupportedError(VPTQError):
    """The input is well formed but asks for something that is not supported (an architecture, a device)."""


class OptionError(VPTQError, ValueError):
    """An argument or option is out of range, or does not fit the model (a prompt longer than the context)."""


class DeviceError(VPTQError, RuntimeError):
    """The GPU or its driver has failed, or computes wrong numbers."""


class BusyError(VPTQError):
    """More requests wait than may.

    retry_after: seconds until one of those that wait is expected to get its turn; None where nobody knows.
    """

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class OutOfMemoryError(VPTQError, MemoryError):
    """The machine has not the memory that was asked for."""


def again(error: BaseException) -> BaseException:
    """The same error, to be raised once more: one object would gather the frames of all who raise it."""
    return copy.copy(error).with_traceback(error.__traceback__)
