"""Other people's models on these kernels: :func:`accelerate`."""

from .core import accelerate as accelerate
from .report import Report as Report
from .report import Row as Row
