"""The GPU's door without a GPU."""

from driven import driver  # noqa: F401
