"""The exception tree: every mistake a user can make ends in one of these.

    CogVLMSFTError
    ├── RecipeError       a recipe's key, type, value, or the machine it asks for
    ├── DataError         a record, an annotation file, an image
    ├── CheckpointError   a folder of weights, its configuration or its tokenizer
    ├── TrainingError     a run that was ended from outside, such as by the loss of a process
    └── ModelInputError   tensors or messages that do not fit together (also a ValueError)

The command line prints the message and exits with status 2; any other exception is a defect of
ours and keeps its traceback. A message says what was found, what was expected, where, and the fix.
"""


class CogVLMSFTError(Exception):
    """Base of all errors that a user can mend."""


class RecipeError(CogVLMSFTError):
    """A recipe cannot be read, or asks for what cannot be done."""


class DataError(CogVLMSFTError):
    """A record, an annotation file or an image is not usable."""


class CheckpointError(CogVLMSFTError):
    """A checkpoint folder is missing, incomplete, or not a CogVLM."""


class TrainingError(CogVLMSFTError):
    """A run cannot go on, through no fault of its recipe or data."""


class ModelInputError(CogVLMSFTError, ValueError):
    """Inputs of the model or the processor contradict each other.

    It is a `ValueError` too because TRL recognises mismatched images by that type.
    """
