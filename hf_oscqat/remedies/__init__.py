"""What is done against oscillation, one file each, on a prepared model.

`REMEDIES` is the one table a new remedy is entered in: the config accepts its key, the trainer runs it.
"""

from hf_oscqat.remedies.base import Remedy
from hf_oscqat.remedies.bin_regularization import BinRegularization
from hf_oscqat.remedies.dampening import Dampening
from hf_oscqat.remedies.freezing import Freezing

REMEDIES: dict[str, type[Remedy]] = {remedy.name: remedy for remedy in (Dampening, Freezing, BinRegularization)}
