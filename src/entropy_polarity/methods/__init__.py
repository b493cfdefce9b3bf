"""Every method under its name.

table     the rows: name, builder, source          settings      from a name and settings to a transform; chains
builders  plain GRPO and PAPO                       description   the table as data
"""

from entropy_polarity.methods.settings import (
    check_method,
    check_name,
    given_beside,
    joined,
    make_transform,
    name_of,
)
from entropy_polarity.methods.table import METHODS, Method

__all__ = [
    "METHODS",
    "Method",
    "check_method",
    "check_name",
    "given_beside",
    "joined",
    "make_transform",
    "name_of",
]
