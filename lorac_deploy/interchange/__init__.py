"""Adapters of other libraries: what they change in a network, and the same as an adapter file of this project."""

from lorac_deploy.interchange.change import Change
from lorac_deploy.interchange.factorise import Fit, fitted
from lorac_deploy.interchange.reading import FORMATS, Source, read

__all__ = ["FORMATS", "Change", "Fit", "Source", "fitted", "read"]
