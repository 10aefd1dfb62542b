"""Python runs this at the start of every process of a campaign, which have this folder on their path."""

from tests.faults.hooks import install

install()
