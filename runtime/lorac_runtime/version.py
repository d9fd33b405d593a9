"""The version of both distributions. It stands here and nowhere else: builds, commands and files read it."""

__version__ = "0.1.0"
