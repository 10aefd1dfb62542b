"""What can go wrong in words. Every message is one sentence: what, where, what is allowed, what to do.

TransfguError          exit code 2
+-- ConfigError        a setting is unknown, out of range, or differs from the run's
+-- DataError          photographs, labels or lists are missing or unusable
+-- WeightsError       encoder weights are missing or do not fit
+-- ArtifactError      a run folder or model cannot be read or written
StalledError           exit code 1: nothing was done for too long
"""


class TransfguError(Exception):
    """The user's input is wrong; the message is shown without a traceback and the exit code is 2."""


class ConfigError(TransfguError):
    """A setting is unknown, out of range, or differs from the one the run was made with."""


class DataError(TransfguError):
    """Photographs, labels or lists are missing or unusable."""


class WeightsError(TransfguError):
    """Encoder weights are missing or do not fit the architecture."""


class ArtifactError(TransfguError):
    """A run folder or a model cannot be read or written."""


class StalledError(Exception):
    """Nothing was done for so long that something must be stuck; the message names what. Exit code 1."""
