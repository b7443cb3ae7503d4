"""What the tests of caches share with those of the GPU's door."""

from driven import driver, torch  # noqa: F401
