"""Every method under its name.

table     the rows: name, builder, source          settings      from a name and settings to a transform; chains
builders  plain GRPO and PAPO                       description   the table as data
"""

from entropy_polarity.methods.settings import (
    chain_name,
    check_method,
    check_name,
    given_beside,
    make_transform,
    name_of,
)
from entropy_polarity.methods.table import METHODS, Method

__all__ = [
    "METHODS",
    "Method",
    "chain_name",
    "check_method",
    "check_name",
    "given_beside",
    "make_transform",
    "name_of",
]
