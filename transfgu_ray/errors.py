"""Errors with a message for the user: one sentence on what is wrong, where, what is allowed and what to do.

TransfguError          exit code 2
+-- ConfigError        a setting is unknown, out of range, or differs from the run's
+-- DataError          photographs, labels or lists are missing or unusable
+-- WeightsError       encoder weights are missing or do not fit
+-- ArtifactError      a run folder or model cannot be read or written
    +-- StorageError   a storage did not answer for a minute
        +-- CredentialsError   it takes no request with these credentials
UnfinishedError        exit code 1: a part of the work is missing, for no fault of the user
+-- StalledError       no progress for too long
"""


class TransfguError(Exception):
    """A fault in the user's input; the message is shown without a traceback and the exit code is 2."""


class ConfigError(TransfguError):
    """A setting that is unknown, out of range, or different from the run's."""


class DataError(TransfguError):
    """Missing or unusable photographs, labels or lists."""


class WeightsError(TransfguError):
    """Encoder weights that are missing or do not fit the architecture."""


class ArtifactError(TransfguError):
    """A run folder or a model that cannot be read or written."""


class StorageError(ArtifactError):
    """A storage that did not answer for a minute, which says nothing of the files in it."""


class CredentialsError(StorageError):
    """A storage that takes no request with these credentials, e.g. since they expired; waiting does not change it."""


class UnfinishedError(Exception):
    """Work of which a part is missing, for no fault of the user; shown without a traceback. Exit code 1."""


class StalledError(UnfinishedError):
    """No progress for so long that something must be stuck; the message names it."""


def foreign_words(error: BaseException, most: int = 600) -> str:
    """Return what a library says of its error, in one line, and the class where it says nothing.

    Args:
        error: of a library.
        most: characters; of a longer message the middle is left out, since it often ends with the cause.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most // 2]} [...] {text[-most // 2 :]}"
