"""The errors that users meet: each says what is wrong, where, and what to do.

All are picklable (they cross process boundaries) and refine the standard exception a caller would expect.
They are raised by every part of sparsight; invariants of our own code are plain `assert`s instead. Command lines print
what `user_error` finds, as `one_line`.
"""

import re


class SparsightError(Exception):
    """Anything a user can mend. Command lines print it as one line and exit with status 2."""


class ConfigError(SparsightError, ValueError):
    """A run configuration that cannot be used: unknown key, wrong type, contradicting values."""


class DataError(SparsightError, ValueError):
    """Input data that cannot be read: missing file, wrong JSON, broken row."""


class PictureError(DataError):
    """A picture refused by the safe decoder: broken, too large, or of a format not allowed."""


class VideoError(DataError):
    """A video refused by the frame source: not to be had, no video, broken, too large, or not allowed."""


class StorageError(SparsightError, OSError):
    """A local path or object-store key that cannot be read or written."""


class ArtifactError(SparsightError, ValueError):
    """A stage's output that is missing, unfinished, or made by an incompatible version."""


class AlignmentError(SparsightError, ValueError):
    """Teacher and student disagree on response tokens: training on such a row would be silently wrong."""


class CheckpointError(SparsightError, ValueError):
    """A checkpoint or model directory that does not fit the model it is loaded into."""


class ExportError(SparsightError, ValueError):
    """An exported model that does not reload to the same numbers."""


class StreamError(SparsightError, ValueError):
    """A stream that cannot take this frame or answer this question: closed, full, or out of order."""


class StreamFullError(StreamError):
    """A stream whose memory has no room for another frame: close it, or give it more."""


class LostBlockError(StreamError):
    """A frame's memory that is damaged or missing: the stream goes on without it, ask again."""


def user_error(error: BaseException) -> SparsightError | None:
    """The `SparsightError` behind an error, or None.

    Errors that crossed a process come wrapped, with the original as `cause` or `__cause__`; the wrapper may pass for
    the original's class, but its message is a remote traceback, so the innermost is looked for.
    """
    seen: list[BaseException] = []
    current: object = error
    while isinstance(current, BaseException) and current not in seen:
        wrapped = getattr(current, "cause", None)
        if isinstance(current, SparsightError) and wrapped is None:
            return current
        seen.append(current)
        current = wrapped or current.__cause__
    return None


def one_line(error: SparsightError) -> str:
    """The error's message without line breaks."""
    text = re.sub(r":\s*\n\s*", ": ", str(error).strip())
    return re.sub(r"\s*\n\s*", "; ", text)
