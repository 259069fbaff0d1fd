"""The merges of Rep-LeFFN's branches. Each has a module of its own; this one keeps their old address."""

from .merge_depthwise import merge_depthwise as merge_depthwise
from .merge_pointwise import merge_pointwise as merge_pointwise
