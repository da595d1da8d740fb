"""Append to a window of dense rows; what leaves it is packed, in place and on the device."""
