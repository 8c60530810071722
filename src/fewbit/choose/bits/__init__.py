"""Bits: what `--bits` means, how a module's loss at a width is measured, and which module gets which width."""

from fewbit.choose.bits.widths import Bits, Mixed, parse_bits

__all__ = ["Bits", "Mixed", "parse_bits"]
