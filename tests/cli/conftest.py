"""The tiny run of the end-to-end tests, for the verbs that take a MODEL."""

from e2e.conftest import tiny, tiny_run  # noqa: F401
