"""Data that needs no download."""

from involution.data.digits import Digits

__all__ = ["Digits"]
