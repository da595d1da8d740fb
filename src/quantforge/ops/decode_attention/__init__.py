"""Attention of a few query rows over pages of packed keys and values and a dense remainder."""
